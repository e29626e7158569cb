"""The explorer of a small network: numbers against direct ones, files against their rules."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from npprune.cli import app
from npprune.core.attribution.editing import edited_logits, members, path_factors
from npprune.core.attribution.votes import class_top
from npprune.core.metrics import true_probability
from npprune.models.view import make_view
from npprune.pipeline.common.inputs import open_images, open_network
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.finished import divide, open_finished
from npprune.pipeline.explore.stage import _in_turn
from tests.helpers.exploring import HOSTILE, IMAGES, build, explored


def pieces(folder: Path) -> dict[str, Any]:
    """The data of a folder, by name."""
    found = {}
    for path in (folder / "data").iterdir():
        match = re.fullmatch(r'npprune\.take\("([\w-]+)",(.*)\);\n', path.read_text(), re.DOTALL)
        assert match, path
        assert match[1] == path.stem
        found[match[1]] = json.loads(match[2])
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return explored(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="module")
def site(world: Path) -> dict[str, Any]:
    return pieces(world / "site")


@pytest.fixture(scope="module")
def loaded(world: Path):
    """View, images and table of the run, in its order."""
    found = open_finished(world / "run")
    network = open_network(found.recipe.model, Work("cpu"))
    source = open_images(
        found.recipe.data.train, found.recipe.data, network.info, Work("cpu"),
        asked="data.train", on_bad="error",
    )  # fmt: skip
    return make_view(network.model), torch.cat([b.images for b in source.batches()]), found.table


def test_it_holds_the_runs_paths_and_the_plan(world: Path, site: dict[str, Any], loaded) -> None:
    _, _, table = loaded
    assert site["run"]["methods"] == ["neuron-path", "activation"]
    assert np.array_equal(site["paths"]["neuron-path"], table.neurons.reshape(len(table), -1))
    assert [image["id"] for image in site["images"]] == table.ids.tolist()
    plan = json.loads((world / "half" / "plan.json").read_text())
    assert site["run"]["plan"]["keep"] == plan["keep"]
    assert site["run"]["plan"]["name"] == "half"
    assert site["run"]["notes"] == []


def test_a_class_is_measured_with_the_paths_of_the_other_half(site: dict[str, Any], loaded) -> None:
    view, x, table = loaded
    labels = torch.from_numpy(table.labels)
    take, hold, _ = divide(table)
    for edit in ("remove", "keep"):
        after = []
        for row in np.flatnonzero(table.labels == 0):
            voters = hold if row in take else take
            path = class_top(table.neurons[voters], table.labels[voters], 0, 2)
            factors = path_factors(members(path, view.widths), edit)
            logits = edited_logits(view, x[row : row + 1], factors, scope="cls")
            after.append(true_probability(logits, labels[row : row + 1]))
        mean, low, high = site["effects"]["0"]["neuron-path"][edit]["p"]
        assert mean == pytest.approx(float(torch.cat(after).mean()), rel=1e-3)
        assert low <= mean <= high
    assert site["effects"]["0"]["n"] == IMAGES[HOSTILE]
    assert "1" not in site["effects"], "one image leaves none to measure on"


def test_exemplars_are_the_images_of_the_largest_activations(site: dict[str, Any], loaded) -> None:
    view, x, _ = loaded
    hidden: list[torch.Tensor] = []
    stream = view.embed(x)
    with torch.no_grad():
        for l in range(2):
            stream = view.block(l, stream, edit=lambda h: hidden.append(h) or h)
    for l in range(2):
        assert site["run"]["neurons"][l] == [int(j) for j in site[f"neurons-{l}"]]
        for j, about in site[f"neurons-{l}"].items():
            at_class = hidden[l][:, 0, int(j)]
            order = at_class.argsort(descending=True)[:9].tolist()
            assert about["rows"] == order
            assert about["values"] == pytest.approx(at_class[order].tolist(), rel=1e-3, abs=1e-6)
            fires = hidden[l][order, 1:, int(j)]
            strongest = int(fires.flatten().argmax())
            assert (fires.max() <= 0) or "".join(about["lit"])[strongest] == "f"
            assert [[c != "0" for c in text] for text in about["lit"]] == (fires > 0).tolist()


def test_single_neurons_and_predictions(site: dict[str, Any], loaded) -> None:
    view, x, table = loaded
    row = 6
    image, label = site["images"][row], int(table.labels[row])
    with torch.no_grad():
        p = view.model(x[row : row + 1]).softmax(1)[0]
    assert image["p"] == pytest.approx(float(p[label]), rel=1e-3)
    assert [c for c, _ in image["dense"]] == p.argsort(descending=True)[:5].tolist()
    factors = [torch.ones(1, h) for h in view.widths]
    factors[1][0, table.neurons[row, 1, 1]] = 0
    q = edited_logits(view, x[row : row + 1], factors, scope="cls").softmax(1)[0, label]
    assert image["ablated"][1][1] == pytest.approx(float(q), rel=1e-3)


def test_the_same_run_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    build(world / "run", tmp_path / "again", plan=world / "half")
    build(world / "run", tmp_path / "again", plan=world / "half")  # replaces its own
    first, second = (
        {p.relative_to(root): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        for root in (world / "site", tmp_path / "again")
    )
    assert first == second
    assert Path("thumbs/000000.webp") in first


def test_names_from_outside_never_become_markup(world: Path, tmp_path: Path) -> None:
    build(world / "run", tmp_path / "one.html", single=True, neurons=1)
    page = (tmp_path / "one.html").read_text()
    assert "\\u003cscript>alert(1)\\u003c!--" in page
    assert "<script>alert" not in page
    assert page.count("<script") == page.count("</script>")
    assert "data:image/webp;base64," in page
    assert not re.search(r'<script[^>]* src|<link|https?:(?!//www\.w3\.org/2000/svg")', page)
    for path in (world / "site" / "data").iterdir():
        assert "<" not in path.read_text()
    for script in (Path(app.__file__).parents[1] / "report" / "explorer").glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write", script.read_text()
        )


def test_without_its_images_it_says_so_and_shows_the_rest(world: Path, tmp_path: Path) -> None:
    hidden = (world / "images").rename(world / "elsewhere")
    try:
        found = build(world / "run", tmp_path / "site")
    finally:
        hidden.rename(world / "images")
    assert found.images == 0
    assert "not where the run found them" in found.notes[0]
    data = pieces(tmp_path / "site")
    assert data["run"]["notes"] == found.notes
    assert len(data["paths"]["neuron-path"]) == sum(IMAGES.values())
    assert data["effects"] == {}
    assert "dense" not in data["images"][0]


def test_some_images_missing_and_some_left_out(world: Path, tmp_path: Path) -> None:
    gone = world / "images" / "cat" / "0.png"
    gone.rename(world / "away.png")
    try:
        found = build(world / "run", tmp_path / "site", images_per_class=2)
    finally:
        (world / "away.png").rename(gone)
    assert found.images == 2 + 1 + 2
    assert "1 of 10 images are not in" in found.notes[0]


def test_what_it_refuses(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(world / "run")

    def refused(*args: str) -> str:
        assert app.run_app(["explore", *args]) == 2
        return capsys.readouterr().err

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "not an explorer that npprune wrote" in refused(run, "--out", str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert "must not overwrite an input" in refused(run, "--out", run)
    assert "RUN must be a run folder" in refused(str(tmp_path / "nowhere"))
    assert "`--neurons` must be at least 1" in refused(run, "--neurons", "0")
    other = shutil.copytree(world / "half", tmp_path / "other")
    plan = json.loads((other / "plan.json").read_text())
    (other / "plan.json").write_text(
        json.dumps({**plan, "source_sha256": "0" * 64, "checksum": None})
    )
    assert "is of weights 000000000000..." in refused(run, "--plan", str(other))


def test_the_command_says_where_it_lies(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "site"
    args = ["explore", str(world / "run"), "--out", str(out), "--neurons", "2", "--ablate", "0"]
    assert app.run_app([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["page"]) == ("explorer", str(out / "index.html"))
    assert found["bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert (found["images"], found["classes"], found["neurons"]) == (10, 3, 4)


def test_images_whose_neurons_are_removed_lie_evenly_among_the_classes() -> None:
    def chosen(labels: list[int], count: int) -> set[int]:
        rows = np.arange(len(labels))
        table = SimpleNamespace(labels=np.array(labels))
        return _in_turn(table, rows.tolist(), count)  # type: ignore[arg-type]

    assert chosen([0, 1, 2, 3, 4, 5, 6, 7, 8], 3) == {0, 4, 8}
    assert chosen([0, 0, 0, 1, 2, 2], 5) == {0, 1, 3, 4, 5}
    assert chosen([0, 1], 9) == {0, 1}
    assert chosen([0, 1], 0) == set()
