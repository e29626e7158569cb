"""README and documentation: links resolve, and commands and recipes are those of the program."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

import npprune
from npprune.cli.app import app
from npprune.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _reference()


@cache
def pages() -> dict[Path, str]:
    """Every page, the generated ones as well."""
    generated = {DOCS / name: text for name, text in reference.pages().items()}
    return {path: path.read_text(encoding="utf-8") for path in WRITTEN} | generated


def anchors(text: str) -> set[str]:
    """What the headings of a page are linked by."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def broken(path: Path, text: str) -> list[str]:
    """The page's relative links that lead nowhere."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if "://" in link:
            continue
        if target not in pages():
            if not target.exists() or anchor:
                found.append(link)
        elif anchor and anchor not in anchors(pages()[target]):
            found.append(link)
    return found


def test_every_relative_link_resolves() -> None:
    assert len(pages()) > 20
    assert {p.name: b for p, text in pages().items() if (b := broken(p, text))} == {}


def test_a_broken_link_would_be_found() -> None:
    text = "[a](nowhere.md) [b](concepts.md#nowhere) [c](concepts.md#path) [d](reference/cli.md)"
    assert broken(DOCS / "index.md", text) == ["nowhere.md", "concepts.md#nowhere"]


def shell_lines() -> list[tuple[str, list[str]]]:
    """Every `npprune ...` line in the pages' code: the page's name, and the words after it."""
    found = []
    for path in WRITTEN:
        for language, code in BLOCK.findall(path.read_text(encoding="utf-8")):
            if language not in ("", "sh"):
                continue
            for line in code.replace("\\\n", " ").splitlines():
                shown = re.match(r"(?:(?:torchrun|srun|pip) .*(?:-m|&&) )?npprune (.*)", line)
                if shown:
                    found.append((path.name, shlex.split(shown[1].rstrip(" ."), comments=True)))
    return found


def test_every_command_line_shown_is_understood_by_the_program() -> None:
    commands = reference.commands()
    lines = shell_lines()
    assert len(lines) > 50
    for page, words in lines:
        name = " ".join(words[:2]) if words[0] == "paths" else words[0]
        args = words[name.count(" ") + 1 :]
        try:
            commands[name].make_context(name, args)
        except Exception as error:
            pytest.fail(f"{page}: npprune {shlex.join(words)}: {error}")


def test_the_guides_name_every_command_of_the_program() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in WRITTEN)
    commands = reference.commands()
    assert set(typer.main.get_command(app).commands) == {n.split()[0] for n in commands}  # type: ignore[attr-defined]
    assert [name for name in commands if f"npprune {name}" not in text] == []


def test_the_command_line_reference_has_every_option() -> None:
    sections = dict(
        re.findall(r"^## npprune ([\w ]+)\n(.*?)(?=^## |\Z)", reference.command_line(), re.M | re.S)
    )
    for name, command in reference.commands().items():
        for parameter in command.params:
            for flag in parameter.opts if parameter.param_type_name == "option" else ():
                assert f"`{flag}`" in sections[name], (name, flag)


def test_the_recipes_reference_has_every_key_with_a_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.+) \|$", reference.recipes(), re.M)
    assert all(meaning.strip() for *_, meaning in rows)
    keys = {key for key, *_ in rows}
    for field in Recipe.model_fields.values():
        section = reference._section_class(field.annotation)
        assert section is None or set(section.model_fields) <= keys
    assert "| `topk` | integer, at least 1 | `1` | " in reference.recipes()


def test_the_python_reference_has_every_name_and_where_its_settings_are() -> None:
    text = reference.python()
    names = [name for name in npprune.__all__ if not name.startswith("__")]
    assert [name for name in names if f"heading: npprune.{name}\n" not in text] == []
    assert text.count("[data](recipes.md#data)") == 6
    assert "npprune.criteria.register" in text
    assert "| `top1_change` | `Mean` | paired, pruned minus dense, in [-1, 1] |" in text
    for kind in reference.RESULTS:
        _, _, table = text.partition(f"### {kind.__name__}\n")
        shown = re.findall(r"^\| `(\w+)` \|", table.partition("\n#")[0], re.MULTILINE)
        assert shown == [field.name for field in dataclasses.fields(kind)]


def test_recipes_shown_are_recipes() -> None:
    shown = [
        yaml.safe_load(code)
        for path in WRITTEN
        for language, code in BLOCK.findall(path.read_text(encoding="utf-8"))
        if language == "yaml"
    ]
    assert len(shown) >= 2
    for part in shown:
        Recipe.model_validate({"name": "x", "model": {"name": "x"}} | part)


@pytest.fixture
def world_of_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Python pages name, as small as a test needs: a network, `imagenet/`."""
    import numpy as np
    import timm
    from PIL import Image

    from tests.helpers.tiny import tiny_vit

    model = tiny_vit().float()
    model.pretrained_cfg["input_size"] = (3, 16, 16)  # type: ignore[index,operator]

    monkeypatch.chdir(tmp_path)
    own = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **k: model if k == {"pretrained": True} else own(name, **k),
    )
    monkeypatch.setattr("torch.utils.data.DataLoader.__init__", _alone())
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for name in "abcdefg":
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def _alone() -> object:
    """DataLoader's constructor, without processes of its own: they cost seconds each."""
    from torch.utils.data import DataLoader

    own = DataLoader.__init__

    def init(self: object, *args: object, num_workers: int = 0, **options: object) -> None:
        own(self, *args, num_workers=0, **options)  # type: ignore[arg-type]

    return init


@pytest.mark.slow
@pytest.mark.usefixtures("world_of_the_pages")
def test_the_python_pages_run_as_printed(tmp_path: Path) -> None:
    """Every line, in order: the second page goes on from the first."""
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = [
        (path, code)
        for path in (DOCS / "how-to" / "python.md", DOCS / "how-to" / "finetune.md")
        for language, code in BLOCK.findall(path.read_text(encoding="utf-8"))
        if language == "python"
    ]
    assert len(blocks) >= 10
    for path, code in blocks:
        exec(compile(code, str(path), "exec"), names)
    assert {p.name for p in (tmp_path / "ckpt").iterdir()} >= {"half", "tuned", "vit_tiny_half"}
    assert (tmp_path / "half.onnx").is_file()


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {p.relative_to(DOCS).as_posix() for p in pages() if DOCS in p.parents}


def test_the_readme_is_short_and_keeps_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert "\npip install . && npprune demo\n" in text
    assert '\npip install -e ".[dev]" && pytest\n' in text


def test_the_hooks_before_a_commit_are_checks_of_ci() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(repo["hooks"]) == 4
    assert [hook["entry"] for hook in repo["hooks"] if hook["entry"] not in ci] == []


def test_the_services_are_targets_of_the_dockerfile() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert [service["build"]["target"] for service in services.values()] == targets
