"""The explorer and the report in a real browser, opened from disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from npprune.report import comparing, render_html
from npprune.report.html import as_html
from tests.helpers import report_example as example
from tests.helpers.exploring import HOSTILE, build, explored
from tests.report.test_comparing import DENSE, A, B, a_run, a_study
from tests.report.test_report import rich

WIDTHS = (360, 768, 1920)
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


@pytest.fixture(scope="module")
def checker() -> str:
    """axe-core, a checker of accessibility, as a script."""
    package = "axe_playwright_python"
    pytest.importorskip(package, reason="needs axe-playwright-python (the dev extra)")
    return (resources.files(package) / "axe.min.js").read_text(encoding="utf-8")


def barriers(page: Any, checker: str) -> list[str]:
    """What keeps somebody from reading the page as it is now, in light and in dark."""
    found = []
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.evaluate(checker)
    for scheme, rules in (("light", None), ("dark", ["color-contrast"])):
        page.emulate_media(color_scheme=scheme)
        options = {"preload": False, "resultTypes": ["violations"]}
        said = page.evaluate("o => axe.run(o)", options | ({"runOnly": rules} if rules else {}))
        found += [f"{scheme}, {v['id']}: {v['nodes'][0]['html']}" for v in said["violations"]]
    return found


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


@pytest.mark.parametrize(
    "page", ["site/index.html", pytest.param("one.html", marks=pytest.mark.slow)]
)
def test_every_page_draws_itself_at_three_widths(world: Path, opened: Any, page: str) -> None:
    opened.goto(f"file://{world / page}")
    opened.wait_for_selector("h1")
    j = opened.evaluate("npprune.run.neurons[1][0]")
    for route in ROUTES:
        opened.goto(f"file://{world / page}{route.format(j=j)}")
        opened.wait_for_selector("h1")
        assert opened.text_content("h1") != "Nothing here", route
        for width in WIDTHS:
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


def test_what_was_removed_is_said_at_once_and_headings_stand_over_their_columns(
    world: Path, opened: Any
) -> None:
    opened.goto(f"file://{world / 'site/index.html'}")
    opened.wait_for_selector(".short")
    said = opened.locator(".short dt").all_text_contents()
    assert said == ["Looked at", "Removed", "What it cost", "To doubt"]
    assert "128 of 256 neurons (50" in opened.locator(".short dd").nth(1).text_content()
    columns = "row => [...row.cells].reduce((n, cell) => n + cell.colSpan, 0)"
    table = opened.locator("table:has(.barcell)")
    first = table.locator("tbody tr").first
    assert table.locator("thead tr").evaluate(columns) == first.evaluate(columns)


def test_images_without_pictures_are_listed_behind_those_with(
    world: Path, opened: Any, tmp_path: Path
) -> None:
    build(world / "run", tmp_path / "few", images_per_class=1, ablate=0)
    opened.goto(f"file://{tmp_path / 'few/index.html'}#/class/0")
    opened.wait_for_selector(".gallery li")
    assert opened.locator(".gallery li").count() == 1
    assert opened.locator(".ids a").count() == 4
    opened.click("text=4 more images without a picture")
    opened.click(".ids a >> nth=0")
    opened.wait_for_selector("h1.file")


@pytest.mark.parametrize("route", ["#/class/0", "#/neuron/1/{j}", "#/image/6"])
def test_the_explorer_can_be_read_by_everyone(
    world: Path, opened: Any, checker: str, route: str
) -> None:
    opened.goto(f"file://{world / 'one.html'}")
    opened.wait_for_selector("h1")
    j = opened.evaluate("npprune.run.neurons[1][0]")
    opened.goto(f"file://{world / 'one.html'}{route.format(j=j)}")
    opened.wait_for_selector("h1")
    assert barriers(opened, checker) == []


@pytest.mark.parametrize(
    "what", ["report", "comparison", pytest.param("everything", marks=pytest.mark.slow)]
)
def test_the_report_can_be_read_by_everyone_at_every_width(
    tmp_path: Path, opened: Any, checker: str, what: str
) -> None:
    runs = [a_run("one", A, DENSE), a_run("two", B, DENSE), a_study()]
    for run in runs[:2]:
        run.variants[0].evaluation = example.seen(run.variants[0].evaluation)
    pages = {
        "report": lambda: render_html(replace(runs[0], discovery=None)),
        "comparison": lambda: as_html(comparing.build(runs)),
        "everything": lambda: render_html(rich()),
    }
    page = pages[what]()
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    opened.goto(f"file://{tmp_path / 'page.html'}")
    assert barriers(opened, checker) == []  # with all tables open
    for width in WIDTHS:
        opened.set_viewport_size({"width": width, "height": 800})
        assert opened.evaluate("document.scrollingElement.scrollWidth") <= width
    opened.emulate_media(media="print")
    assert opened.locator("table").first.is_visible()
    assert not opened.locator("nav").is_visible()


def test_a_page_with_a_barrier_is_found(opened: Any, checker: str) -> None:
    dark = "@media (prefers-color-scheme: dark) { h1 { color: #eee; background: #fff } }"
    page = "<main><h1>A heading</h1><img src=data:,></main>"
    opened.set_content(f"<html lang=en><title>x</title><style>{dark}</style>{page}")
    kinds = [line.split(":")[0] for line in barriers(opened, checker)]
    assert kinds == ["light, image-alt", "dark, color-contrast"]
