"""`npprune paths import|export`: the paper's files into a run folder and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from npprune.cli import app
from npprune.errors import ModelError, StoreError, UsageError
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.path_files import export_released, import_released
from npprune.pipeline.prune.stage import prune
from npprune.recipe import DataSection, ModelSection, PruneSection
from npprune.records import Manifest, from_json
from npprune.store.paper_files import ReleasedImage, read_released, released_name, write_released
from npprune.store.runs import RunFolder
from tests.helpers.discovering import COUNTS, FEW, World, make_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def network(world: World) -> ModelSection:
    return ModelSection(name="auto", checkpoint=str(world.root / "w.safetensors"), num_heads=3)


def test_export_writes_a_file_for_each_class(world: World) -> None:
    world.discover(topk=1)
    files = export_released(world.root / "run", world.root / "out")
    assert [path.name for path in files] == [released_name(label) for label in range(7)]
    table = world.table()
    for label, path in enumerate(files):
        (line,) = path.read_text().splitlines()  # a class, as a batch
        rows, of_class = json.loads(line), table.where(label)
        assert len(rows) == COUNTS[label]
        assert [row["ja"][0] for row in rows] == of_class.neurons[:, :, 0].tolist()
        assert [row["ja_score"][0][0] for row in rows] == of_class.scores.tolist()
        assert all(set(row) == {"ja", "ja_score"} for row in rows)
    export_released(world.root / "run", world.root / "out", layout="image")
    assert len(files[0].read_text().splitlines()) == COUNTS[0]


def test_export_with_a_baseline_and_back(world: World) -> None:
    world.discover(data=FEW)
    world.discover("base", FEW, method="activation")
    out = world.root / "out"
    export_released(world.root / "run", out, baseline=world.root / "base")
    first = read_released(out / released_name(0))[0]
    assert first.baseline == world.table("base").neurons[0].tolist()
    assert first.baseline_score == world.table("base").scores[0]
    for baseline, name in ((False, "run"), (True, "base")):
        import_released(out, network(world), world.root / f"again_{name}", baseline=baseline)
        again, before = world.table(f"again_{name}"), world.table(name)
        assert (again.neurons == before.neurons).all()
        assert (again.scores == before.scores).all()
        assert (again.labels == before.labels).all()
    back = world.root / "back"
    export_released(world.root / "again_run", back, baseline=world.root / "again_base")
    for path in out.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes()


def test_influence_pattern_there_and_back(world: World) -> None:
    world.discover(data=FEW, method="influence-pattern", topk=1)
    export_released(world.root / "run", world.root / "out")
    lines = (world.root / "out" / released_name(0)).read_text().splitlines()
    assert len(lines) == 1
    assert set(json.loads(lines[0])) == {"path"}
    result = import_released(world.root / "out", network(world), world.root / "again")
    assert result.discovery is not None
    assert (result.discovery.method, result.discovery.mean_score) == ("influence-pattern", None)
    assert (world.table("again").neurons == world.table().neurons).all()
    with pytest.raises(UsageError, match="Influence Pattern's have none"):
        export_released(world.root / "again", world.root / "o", baseline=world.root / "run")


def test_what_export_refuses(world: World) -> None:
    run, out = world.root / "run", world.root / "out"
    with pytest.raises(StoreError, match="is not a run folder"):
        export_released(run, out)
    world.discover()
    with pytest.raises(UsageError, match=r"must be a run of method activation, got .* neuron-path"):
        export_released(run, out, baseline=run)
    world.discover("few", method="activation", data={"images_per_class": 1})
    with pytest.raises(UsageError, match="must be of the same images"):
        export_released(run, out, baseline=world.root / "few")
    out.mkdir()
    (out / released_name(9)).write_text("")
    with pytest.raises(StoreError, match=r"other results, such as `imgnet_all-9\.rlt\.jsonl`"):
        export_released(run, out)
    assert len(list(out.iterdir())) == 1


def write(folder: Path, label: int, *images: ReleasedImage) -> Path:
    folder.mkdir(exist_ok=True)
    write_released(folder / released_name(label), images)
    return folder


PATH = ReleasedImage([[1], [2], [47]], 0.5)
REFUSED = {
    "edits": (
        {0: [ReleasedImage([[1], [2], [3]], edit=(0.1, 0.2, 0.3))]},
        "what editing neurons did to the predictions, not scores of paths",
    ),
    "mixture": (
        {0: [PATH], 1: [ReleasedImage([[1], [2], [3]], influence_pattern=True)]},
        "mix neuron paths and Influence Pattern",
    ),
    "nothing": ({0: []}, "hold no images"),
    "blocks": ({0: [ReleasedImage([[1], [2]], 0.5)]}, "have 2 blocks, and .* has 3"),
    "width": ({1: [ReleasedImage([[1], [48], [3]], 0.5)]}, "neuron 48 of block 1, and .* has 48"),
    "label": ({7: [PATH]}, "results of class 7, and .* has 7 outputs"),
    "K": ({0: [PATH], 1: [ReleasedImage([[1, 2]] * 3, 0.5)]}, r"per block: \[1, 2\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_import_refuses(world: World, what: str) -> None:
    files, message = REFUSED[what]
    for label, images in files.items():
        write(world.root / "files", label, *images)
    with pytest.raises((StoreError, ModelError), match=message):
        import_released(world.root / "files", network(world), world.root / "run")
    assert not (world.root / "run").exists()


def test_import_without_a_baseline_in_the_files(world: World) -> None:
    files = write(world.root / "files", 0, PATH)
    with pytest.raises(StoreError, match="hold no baseline"):
        import_released(files, network(world), world.root / "run", baseline=True)


def test_other_files_do_not_go_into_the_same_run(world: World) -> None:
    files, run = write(world.root / "files", 0, PATH), world.root / "run"
    first = import_released(files, network(world), run, work=Work(command="npprune paths import"))
    assert first.commands == ["npprune paths import"]
    assert import_released(files, network(world), run) == first
    write(files, 0, PATH, PATH)
    with pytest.raises(StoreError, match="belongs to a run of other settings: `files`"):
        import_released(files, network(world), run)


def test_the_command_line(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    files, run = write(world.root / "files", 5, PATH), world.root / "paper"
    model = ["vit_tiny_patch16_224", "--img-size", "32", "--num-classes", "7", "--num-heads", "3"]
    deep = write(world.root / "deep", 5, ReleasedImage([[767]] * 12, 0.5))
    assert app.run_app(["paths", "import", str(files), *model, "--out", str(run)]) == 2
    assert "have 3 blocks, and vit_tiny_patch16_224 has 12" in capsys.readouterr().err
    assert app.run_app(["paths", "import", str(deep), *model, "--out", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["kind"] == "result"
    assert result["model"]["source"]["sha256"] == "unknown"
    assert result["model"]["widths"] == [768] * 12
    assert result["discovery"]["data"]["label_rule"] == "file names"
    manifest = from_json(Manifest, RunFolder(run).manifest_path.read_text())
    assert manifest.settings["origin"] == "the paper's released program"
    assert list(manifest.inputs) == [released_name(5)]
    assert app.run_app(["report", str(run)]) == 0
    assert "released program" in (run / "report.md").read_text()
    capsys.readouterr()
    out = world.root / "out"
    assert app.run_app(["paths", "export", str(run), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [released_name(5)]
    assert read_released(out / released_name(5)) == read_released(deep / released_name(5))
    assert app.run_app(["paths", "export", str(run), "--out", str(out), "--layout", "row"]) == 2
    assert "`--layout` must be one of `batch`, `image`, got `row`" in capsys.readouterr().err
    assert app.run_app(["paths", "import", "--help"]) == 0
    assert "npprune paths import" in capsys.readouterr().out


@pytest.mark.parametrize("named", [False, True])
def test_only_a_run_of_known_weights_is_pruned(world: World, named: bool) -> None:
    files, run = write(world.root / "files", 5, PATH), world.root / "paper"
    if not named:
        files = write(world.root / "deep", 5, ReleasedImage([[1]] * 12, 0.5))
    model = network(world) if named else ModelSection(name="vit_tiny_patch16_224", num_classes=7)
    import_released(files, model, run)
    data = DataSection(calibration=f"folder:{world.images}")
    settings, out = PruneSection(keep=0.5, criterion="variance"), world.root / "ckpt"
    if named:
        variant = prune(run, data, settings, out, work=Work(device="cpu"))
        assert variant.prune.protected == [1, 1, 1]
    else:
        with pytest.raises(StoreError, match="nothing says of which weights its paths are"):
            prune(run, data, settings, out, work=Work(device="cpu"))
    assert out.exists() is named


GOLDEN = {"vit/neuron_path": 10, "vit/topk5": 0, "vit/influence_pattern": 0, "mae/neuron_path": 2}


@pytest.mark.golden
@pytest.mark.parametrize("folder", GOLDEN)
def test_the_golden_files_there_and_back(tmp_path: Path, shared_golden: Path, folder: str) -> None:
    kind = folder.split("/")[0]
    weights = {"vit": "vit/weights.npz", "mae": "mae/weights.pth"}[kind]
    model = ModelSection(name="auto", checkpoint=str(shared_golden / weights), num_heads=3)
    files = shared_golden / folder
    result = import_released(files, model, tmp_path / "run")
    assert result.discovery is not None
    assert result.discovery.images == 20
    baseline = None
    if "neuron_path" in folder or "topk5" in folder:
        baseline = tmp_path / "base"
        import_released(files, model, baseline, baseline=True)
    written = export_released(tmp_path / "run", tmp_path / "out", baseline=baseline)
    assert [path.name for path in written] == [released_name(0), released_name(1)]
    for path in written:
        assert read_released(path) == read_released(files / path.name)
        same_lines = GOLDEN[folder] in (0, 10)  # mae: two images a line
        ours, theirs = (p.read_text().splitlines() for p in (path, files / path.name))
        assert (list(map(json.loads, ours)) == list(map(json.loads, theirs))) is same_lines


@pytest.mark.golden
@pytest.mark.parametrize("folder", ["edit_path_probability", "edit_activation_class"])
def test_golden_files_of_edits_are_refused(
    tmp_path: Path, shared_golden: Path, folder: str
) -> None:
    model = ModelSection(name="auto", checkpoint=str(shared_golden / "vit" / "weights.npz"))
    with pytest.raises(StoreError, match="not scores of paths"):
        import_released(shared_golden / "vit" / folder, model, tmp_path / "run")
