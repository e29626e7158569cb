"""The explorer in a real browser, opened from disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.exploring import HOSTILE, build, explored

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ROUTES = (
    "", "#/classes", "#/class/0", "#/neurons", "#/neuron/1/{j}", "#/image/6", "#/flips",
    "#/compare", "#/compare/0/neuron-path/0/activation",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = explored(tmp_path_factory.mktemp("browser"))
    build(root / "run", root / "one.html", plan=root / "half", single=True)
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"needs a browser, one of {', '.join(BROWSERS)}")
    with driver.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """A page; in the end nothing was complained of, and nothing asked of anywhere else."""
    page = browser.new_page(viewport={"width": 360, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: said.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: asked.append(request.url))
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("page", ["site/index.html", "one.html"])
def test_every_page_draws_itself_at_three_widths(world: Path, opened: Any, page: str) -> None:
    opened.goto(f"file://{world / page}")
    opened.wait_for_selector("h1")
    j = opened.evaluate("npprune.run.neurons[1][0]")
    for route in ROUTES:
        opened.goto(f"file://{world / page}{route.format(j=j)}")
        opened.wait_for_selector("h1")
        assert opened.text_content("h1") != "Nothing here", route
        for width in (360, 1024, 1920):
            opened.set_viewport_size({"width": width, "height": 800})
            assert opened.evaluate("document.scrollingElement.scrollWidth") <= width, route
        for image in opened.query_selector_all("main img"):
            image.scroll_into_view_if_needed()
            image.evaluate("image => image.decode()")
        links = opened.eval_on_selector_all(
            "a[href]", "all => all.map(a => a.getAttribute('href'))"
        )
        assert all(link.startswith("#") for link in links)


def test_links_search_and_keys(world: Path, opened: Any) -> None:
    opened.goto(f"file://{world / 'site/index.html'}")
    opened.wait_for_selector(".graph .node")
    opened.keyboard.press("/")
    opened.keyboard.type("ALERT")
    assert opened.text_content("#found li") == f"{HOSTILE} class 0"
    opened.keyboard.press("Enter")
    opened.wait_for_function("document.title.includes('<script>')")
    assert opened.url.endswith("#/class/0")
    assert opened.text_content("h1") == HOSTILE
    node = opened.locator(".graph .node").first
    said = node.get_attribute("aria-label")
    node.focus()
    opened.keyboard.press("Enter")
    opened.wait_for_function("location.hash.startsWith('#/neuron/0/')")
    opened.wait_for_selector("h1:has-text('neuron')")
    name = opened.text_content("h1").split(" kept")[0].split(" removed")[0].strip()
    assert said.startswith(name + ":")
    opened.goto(f"file://{world / 'site/index.html'}#/neuron/0/100000")
    opened.wait_for_selector("h1:has-text('Nothing here')")
