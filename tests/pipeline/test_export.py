"""Export of checkpoints and networks: formats, precisions, images, gates, and what is recorded."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch

from npprune.errors import (
    DataError,
    DeviceError,
    ExportError,
    GateError,
    ModelError,
    StoreError,
    UsageError,
)
from npprune.export import checked
from npprune.export.parity import GATES, Gate
from npprune.export.predict import Classifier
from npprune.export.session import open_session
from npprune.models.info import model_info
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.inputs import Images
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.export import images as export_images
from npprune.pipeline.export import timings
from npprune.pipeline.export.bench import BenchSettings, analysis, bench_checkpoint, bench_files
from npprune.pipeline.export.stage import default_target, export_checkpoint, export_model
from npprune.recipe import DataSection, ExportSection, ModelSection
from npprune.records import (
    Benchmark,
    BenchmarkRow,
    Environment,
    ExportRecord,
    Latency,
    ModelSource,
    Result,
    Variant,
    from_json,
    to_json,
)
from npprune.report import render_html, render_markdown
from npprune.store.checkpoints import read_config
from npprune.store.runs import RunFolder
from tests.helpers import report_example
from tests.helpers.deploying import network, plan_of, write_dense, write_images, write_pruned

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_base_patch16_224", {}),
    "average pool": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "distilled": ("deit_base_distilled_patch16_224", {}),
    "LayerScale": ("deit3_base_patch16_224", {}),
    "SwiGLU": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}),
    "attention pool": ("vit_base_patch16_siglip_224", {}),
    "rotary": ("vit_small_patch16_dinov3", {}),
    "beit": ("beit_base_patch16_224", {}),
    "eva02": ("eva02_tiny_patch14_224", {}),
}
HEADS = ("vit", "average pool", "distilled", "LayerScale")
CPU = {"provider": "cpu"}


def section(**more: Any) -> ExportSection:
    return ExportSection(**{"latency": False, **more})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense network, one with uneven widths, one with a cut head, and images."""
    root = tmp_path_factory.mktemp("deploy")
    source = write_images(root / "images")
    dense = write_dense(root / "dense")
    write_pruned(root / "uneven", root / "dense", dense, plan_of(dense), source)
    cut = plan_of(dense, classes=[1, 4])
    write_pruned(root / "cut", root / "dense", dense, cut, source)
    return root


@pytest.fixture
def events() -> list[Event]:
    return []


def images_of(world: Path) -> DataSection:
    return DataSection(val=f"folder:{world / 'images'}")


# ---------------------------------------------------------------- every kind of network


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "vit")) for name in FAMILIES],
)
def test_families_with_heads_and_classes_removed(name: str, world: Path, tmp_path: Path) -> None:
    architecture, more = FAMILIES[name]
    dense = write_dense(tmp_path / "dense", architecture, **more)
    heads = [[0, 2], [1]] if name in HEADS else None
    plan = plan_of(dense, heads=heads, classes=[5, 0, 2])
    pruned = write_pruned(tmp_path / "small", tmp_path / "dense", dense, plan)
    record = export_checkpoint(tmp_path / "small", images_of(world), section(), **CPU)
    assert record.passed
    assert [row.batch for row in record.parity] == [1, 3, 17]
    assert max(row.max_relative_error for row in record.parity) < 1e-5
    classifier = Classifier(tmp_path / "small" / "model.onnx", provider="cpu")
    assert [c.name for c in classifier.classes] == ["c5", "c0", "c2"]
    x = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = pruned(x).numpy()
    assert expected.shape == (5, 3)
    np.testing.assert_allclose(classifier.session.run(x.numpy()), expected, rtol=0, atol=1e-4)


def test_a_dense_network_goes_the_same_way(world: Path, tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    from safetensors.torch import save_file

    model = network()
    save_file(model.state_dict(), weights)
    name = ModelSection(
        name="auto", checkpoint=str(weights), num_heads=3,
    )  # fmt: skip
    record = export_model(name, images_of(world), section(), out=tmp_path / "dense.onnx", **CPU)
    assert record.passed
    assert record.latency == []
    assert record.dense_bytes is None
    known = open_session(tmp_path / "dense.onnx", "cpu").metadata
    assert int(known["macs"]) > 1000
    assert int(known["params"]) == sum(p.numel() for p in model.parameters())
    assert [c["name"] for c in json.loads(known["labels"])] == [f"c{i}" for i in range(6)]
    assert from_json(ExportRecord, (tmp_path / "dense.export.json").read_text()) == record


def test_an_unpruned_checkpoint_has_nothing_to_be_timed_beside(world: Path, tmp_path: Path) -> None:
    record = export_checkpoint(
        world / "dense", images_of(world), ExportSection(), out=tmp_path / "d.onnx", **CPU
    )
    assert record.passed
    assert record.latency == []


def test_it_is_timed_beside_the_dense_network(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    from npprune.pipeline.export import stage as export

    monkeypatch.setattr(export, "noise_warning", lambda latency: f"noisy at {latency.batch}")
    settings = ExportSection(batch=4, with_preprocessing=True, precision="fp16")
    record = export_checkpoint(
        world / "uneven", images_of(world), settings, out=tmp_path / "m.onnx",
        work=Work(emit=events.append), **CPU,
    )  # fmt: skip
    (row,) = record.latency
    assert (row.batch, row.threads, row.precision) == (4, torch.get_num_threads(), "fp16")
    assert record.dense_bytes is not None
    assert record.bytes < record.dense_bytes
    warnings = [e.message for e in events if e.level == "warning"]
    assert "noisy at 4" in warnings
    assert record.details["notes"] == ["noisy at 4"]
    assert [r.batch for r in record.parity] == [4]
    assert open_session(tmp_path / "m.onnx", "cpu").input_name == "pixels"


# ---------------------------------------------------------------- the other formats


def test_a_torch_archive(world: Path) -> None:
    record = export_checkpoint(world / "uneven", images_of(world), section(format="torch"))
    path = world / "uneven" / "model.pt2"
    assert record.format == "torch"
    assert record.bytes == path.stat().st_size
    assert (world / "uneven" / "model.export.json").is_file()
    loaded = torch.export.load(path).module()  # in a process without npprune: tests/export
    assert loaded(torch.zeros(2, 3, 32, 32)).shape == (2, 6)


def test_timm_reads_its_own_format(world: Path, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    pruned = write_pruned(tmp_path / "even", tmp_path / "dense", dense, plan_of(dense, (40, 40)))
    record = export_checkpoint(tmp_path / "even", images_of(world), section(format="timm"))
    folder = tmp_path / "even_timm"
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "export.json"}
    assert record.parity[0].max_relative_error == 0
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), pruned(x))
    assert tuple(loaded.pretrained_cfg["mean"]) == (0.4, 0.5, 0.6)


def test_timm_is_taught_uneven_widths(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "t"
    record = export_checkpoint(world / "uneven", images_of(world), section(format="timm"), out=out)
    assert record.parity[0].max_relative_error < 1e-5
    names = {"npprune_timm.py", "npprune_tokens.py", "model.safetensors", "config.json"}
    assert {p.name for p in out.iterdir()} == names | {"export.json"}


@pytest.mark.parametrize(
    ("settings", "provider", "flag"),
    [
        ({"format": "torch", "precision": "int8"}, "auto", "precision=int8"),
        ({"format": "timm", "with_preprocessing": True}, "auto", "with_preprocessing"),
        ({"format": "torch"}, "cuda", "--provider cuda"),
        ({"format": "timm", "batch": 3}, "auto", "batch=3"),
    ],
)
def test_what_a_format_does_not_have(settings: dict, provider: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"`{flag}` does not go with `(--)?format"):
        export_checkpoint(Path("x"), DataSection(), section(**settings), provider=provider)


# ---------------------------------------------------------------- eight bits


@pytest.fixture
def random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes of random networks are near ties: their agreement is not what is tested."""
    gate = Gate(tolerance=None, min_agreement=0.0, max_drop=1.0)
    monkeypatch.setitem(GATES, "int8", gate)


@pytest.mark.usefixtures("random_weights")
def test_int8_is_calibrated_and_judged_on_different_images(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[Event]
) -> None:
    read: list[str] = []
    given: dict[str, torch.Tensor] = {}
    whole, before = Images.batches, checked.export_onnx

    def watch(self: Images, *args: Any, **more: Any) -> Iterator[Any]:
        for batch in whole(self, *args, **more):
            read.extend(batch.ids)
            yield batch

    def note(*args: Any, **more: Any) -> Any:
        given["calibration"] = more["int8"].calibration
        return before(*args, **more)

    monkeypatch.setattr(Images, "batches", watch)
    monkeypatch.setattr(checked, "export_onnx", note)
    record = export_checkpoint(
        world / "uneven", images_of(world), section(precision="int8", max_drop=100),
        out=tmp_path / "i8.onnx", work=Work(emit=events.append), **CPU,
    )  # fmt: skip
    assert len(read) == len(set(read)) == 72
    assert record.details["images"]["calibration"] == len(given["calibration"]) == 15
    assert record.details["images"]["compared"] == 57
    assert {row.images for row in record.parity} == {57}
    candidates = record.details["candidates"]
    names = [c["name"] for c in candidates]
    assert names == ["int8-static", "int8-static-mixed", "int8-dynamic"]
    (chosen,) = [c for c in candidates if c["chosen"]]
    assert chosen["score"] == max(c["score"] for c in candidates)
    said = [e.message for e in events]
    assert any(m.startswith("int8-dynamic: top-1") for m in said)
    assert any("is judged by 57 images only: one of them is 1.8 points" in m for m in said)
    assert open_session(tmp_path / "i8.onnx", "cpu").metadata["precision"] == chosen["name"]


def test_int8_that_loses_too_much_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npprune.export import precision

    def spoil(path: Path, needs: Any) -> list[Any]:
        import onnx
        from onnx import numpy_helper

        proto = onnx.load(path)
        for tensor in proto.graph.initializer:
            if tensor.name in ("head.weight", "head.weight_t", "head.bias"):
                array = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(-array, tensor.name))
        onnx.save(proto, path)
        return []

    monkeypatch.setattr(precision, "to_int8", spoil)
    # labels that the network itself gives: it is right on all of them
    data = _labelled_by_itself(world, tmp_path / "own")
    target = tmp_path / "out" / "i8.onnx"
    with pytest.raises(GateError, match=r"top-1 falls by 100\.00 points, from 100\.00 % to") as e:
        export_checkpoint(
            world / "uneven", data, section(precision="int8", max_drop=2.5), out=target, **CPU
        )
    assert e.value.exit_code == 1
    assert "at most 2.5 are allowed" in e.value.message
    assert "`max_drop=POINTS`" in (e.value.hint or "")
    assert list(target.parent.iterdir()) == []


def _labelled_by_itself(world: Path, folder: Path) -> DataSection:
    """The images in folders named after what the network takes them for."""
    target = folder.parent / "first.onnx"
    export_checkpoint(world / "uneven", images_of(world), section(), out=target, **CPU)
    from PIL import Image

    classifier = Classifier(target, provider="cpu")
    for path in sorted((world / "images").rglob("*.png")):
        with Image.open(path) as image:
            index = classifier.classify([image.convert("RGB")], topk=1)[0][0].index
        place = folder / str(index)
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{path.parent.name}_{path.name}")
    names = {str(i): i for i in range(6)}
    (folder.parent / "map.json").write_text(json.dumps(names))
    return DataSection(val=f"folder:{folder}", class_map=str(folder.parent / "map.json"))


@pytest.mark.slow
@pytest.mark.usefixtures("random_weights")
def test_int8_with_a_fixed_batch_and_a_cut_head(world: Path, tmp_path: Path) -> None:
    settings = section(precision="int8", batch=8, with_preprocessing=True, max_drop=100)
    record = export_checkpoint(
        world / "cut", images_of(world), settings, out=tmp_path / "i8.onnx", **CPU
    )
    assert [(row.batch, row.images) for row in record.parity] == [(8, 19)]  # of 24
    assert len(record.details["candidates"]) == 3


# ---------------------------------------------------------------- images


def test_parity_images_are_spread_over_the_source(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_images, "PARITY_IMAGES", 12)
    labels: list[int] = []
    whole = Images.batches

    def watch(self: Images, *args: Any, **more: Any) -> Iterator[Any]:
        for batch in whole(self, *args, **more):
            labels.extend(batch.labels.tolist())
            yield batch

    monkeypatch.setattr(Images, "batches", watch)
    export_checkpoint(world / "uneven", images_of(world), section(), out=tmp_path / "m.onnx", **CPU)
    assert sorted(labels) == [c for c in range(6) for _ in range(2)]


def test_a_cut_head_is_compared_on_its_own_classes(world: Path, tmp_path: Path) -> None:
    record = export_checkpoint(
        world / "cut", images_of(world), section(), out=tmp_path / "m.onnx", **CPU
    )
    assert {row.images for row in record.parity} == {24}
    other = tmp_path / "other"
    shutil.copytree(world / "images" / "c0", other / "0")
    (tmp_path / "map.json").write_text('{"0": 0}')
    data = DataSection(val=f"folder:{other}", class_map=str(tmp_path / "map.json"))
    with pytest.raises(DataError, match="is one of the 2 that the network's head was cut to"):
        export_checkpoint(world / "cut", data, section(), out=tmp_path / "n.onnx", **CPU)
    assert not (tmp_path / "n.onnx").exists()


@pytest.mark.usefixtures("random_weights")
def test_broken_images_are_left_out_and_said(
    world: Path, tmp_path: Path, events: list[Event]
) -> None:
    shutil.copytree(world / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images").rglob("*.png"))[::3]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    data = DataSection(val=f"folder:{tmp_path / 'images'}")
    settings = section(precision="int8", max_drop=100)
    record = export_checkpoint(
        world / "uneven",
        data,
        settings,
        out=tmp_path / "m.onnx",
        work=Work(emit=events.append),
        **CPU,
    )
    found = record.details["images"]
    assert len(found["skipped"]) == len(broken) == 24
    assert found["calibration"] + found["compared"] == 48
    assert sum("it cannot be read" in e.message for e in events) == 24
    with pytest.raises(DataError, match=r"\.png"):
        export_checkpoint(
            world / "uneven", data.model_copy(update={"on_bad_image": "error"}), settings,
            out=tmp_path / "n.onnx", **CPU,
        )  # fmt: skip
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"no image of .* could be read"):
        export_checkpoint(world / "uneven", data, settings, out=tmp_path / "n.onnx", **CPU)
    assert not (tmp_path / "n.onnx").exists()


def test_a_remembered_source_that_is_gone(world: Path, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    gone = f"folder:{tmp_path / 'gone'}"
    write_pruned(tmp_path / "a", tmp_path / "dense", dense, plan_of(dense), gone)
    with pytest.raises(DataError, match=r"was calibrated on `folder:.*gone`, which cannot") as err:
        export_checkpoint(tmp_path / "a", DataSection(), section())
    assert err.value.hint == "give images with `val=SOURCE`"
    write_pruned(tmp_path / "b", tmp_path / "dense", dense, plan_of(dense))
    with pytest.raises(UsageError, match="`val` is needed: the images to export on"):
        export_checkpoint(tmp_path / "b", DataSection(), section())


def test_remembered_images_are_used(world: Path, tmp_path: Path) -> None:
    record = export_checkpoint(
        world / "uneven", DataSection(), section(), out=tmp_path / "m.onnx", **CPU
    )
    assert record.details["images"]["source"] == f"folder:{world / 'images'}"


# ---------------------------------------------------------------- places


def test_a_moved_folder_is_exported_without_timing(
    world: Path, tmp_path: Path, events: list[Event]
) -> None:
    dense = write_dense(tmp_path / "dense")
    plan = plan_of(dense, classes=[1, 4])
    write_pruned(tmp_path / "here", tmp_path / "dense", dense, plan)
    (tmp_path / "there").mkdir()
    (tmp_path / "here").rename(tmp_path / "there" / "moved")
    shutil.rmtree(tmp_path / "dense")
    moved = tmp_path / "there" / "moved"
    record = export_checkpoint(
        moved, images_of(world), ExportSection(), work=Work(emit=events.append), **CPU
    )
    assert record.passed
    assert record.latency == []
    warnings = [e.message for e in events if e.level == "warning"]
    (said,) = [w for w in warnings if w.startswith("not timed against the dense network: ")]
    assert "`--dense FILE`" in said
    with pytest.raises(ModelError):
        export_checkpoint(
            moved, images_of(world), ExportSection(), dense_checkpoint="no.pth", **CPU
        )


def test_an_exported_file_runs_where_it_is_moved_to(world: Path, tmp_path: Path) -> None:
    export_checkpoint(
        world / "uneven", images_of(world), section(), out=tmp_path / "a" / "m.onnx", **CPU
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "m.onnx").rename(tmp_path / "b" / "other.onnx")
    assert len(Classifier(tmp_path / "b" / "other.onnx", provider="cpu").classes) == 6


@pytest.mark.parametrize(
    ("format", "out", "said"),
    [
        ("onnx", "m.pt2", r"must end in \.onnx for `format=onnx`, got `.*m\.pt2`"),
        ("torch", "m.onnx", r"must end in \.pt2 for `format=torch`"),
        ("onnx", "folder.onnx", "must be a file, got the folder"),
        ("timm", "file", "must be a folder, got the file"),
    ],
)
def test_wrong_targets(format: str, out: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=said):
        export_checkpoint(Path("x"), DataSection(), section(format=format), out=tmp_path / out)


def test_a_place_that_cannot_be_written(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*file"):
        export_checkpoint(
            world / "uneven", images_of(world), section(), out=tmp_path / "file" / "m.onnx", **CPU
        )


def test_default_targets() -> None:
    assert default_target(Path("ckpt/a"), "onnx") == Path("ckpt/a/model.onnx")
    assert default_target(Path("ckpt/a"), "torch") == Path("ckpt/a/model.pt2")
    assert default_target(Path("ckpt/a"), "timm") == Path("ckpt/a_timm")


# ---------------------------------------------------------------- side by side


def test_two_files_side_by_side(world: Path, tmp_path: Path, events: list[Event]) -> None:
    paths = [tmp_path / "dense.onnx", tmp_path / "small.onnx"]
    for folder, path in zip(("dense", "uneven"), paths, strict=True):
        export_checkpoint(world / folder, images_of(world), section(), out=path, **CPU)
    settings = BenchSettings(batches=[3], threads=[1, 2], seconds=0.01, provider="cpu")
    found = bench_files(*paths, settings, out=tmp_path / "bench", work=Work(emit=events.append))
    assert [(r.latency.threads, r.latency.batch) for r in found.rows] == [(1, 3), (2, 3)]
    assert found.macs_ratio is not None
    assert 0 < found.macs_ratio < 1
    for row in found.rows:
        t = row.latency
        assert t.runs >= 10
        assert row.dense_images_per_second == pytest.approx(1e3 * t.batch / t.dense_ms)
        assert row.dense_memory is not None
    again = from_json(Benchmark, (tmp_path / "bench" / "bench.json").read_text())
    assert again == found
    picture = ElementTree.parse(tmp_path / "bench" / "bench.svg").getroot()  # a file of its own
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in ElementTree.tostring(picture, encoding="unicode")
    assert [e.done for e in events if e.level == "progress"] == [1, 2]


def test_files_of_different_images_are_not_compared(world: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path, pixels in zip(paths, (False, True), strict=True):
        settings = section(with_preprocessing=pixels, batch=4)
        export_checkpoint(world / "uneven", images_of(world), settings, out=path, **CPU)
    with pytest.raises(UsageError, match="must take the same images"):
        bench_files(*paths, BenchSettings(provider="cpu"))
    with pytest.raises(UsageError, match="`--runtime torch` needs a checkpoint"):
        bench_files(*paths, BenchSettings(runtimes=["torch"]))
    with pytest.raises(UsageError, match="go with a checkpoint"):
        bench_files(*paths, BenchSettings(precisions=["int8"]))
    with pytest.raises(ExportError, match="no ONNX file at"):
        bench_files(tmp_path / "no.onnx", paths[0], BenchSettings(provider="cpu"))


def test_a_checkpoint_beside_its_dense_network(
    world: Path, tmp_path: Path, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timings, "noise_warning", lambda t: "busy" if t.batch == 2 else None)
    settings = BenchSettings(batches=[2], threads=[1], seconds=0.01, provider="cpu", memory=False)
    found = bench_checkpoint(world / "uneven", settings, work=Work(emit=events.append))
    assert [r.latency.runtime for r in found.rows] == ["onnxruntime", "torch"]
    assert found.macs_ratio is not None
    assert 0 < found.macs_ratio < 1
    assert {r.warning for r in found.rows} == {"busy"}
    assert sum(e.level == "warning" and "busy" in e.message for e in events) == 2
    with pytest.raises(UsageError, match="is not pruned"):
        bench_checkpoint(world / "dense", settings)


def test_all_that_is_here_in_one_table(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(timings.RUNTIMES, "torch-compile")  # it compiles for long
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(timings, "bench_twice", lambda a, b, _: (
        Latency(a.runtime, a.provider, a.batch, a.threads, 10, 3.0, 2.0, 0, 0, 0.66, 0.6, 0.7,
                a.precision), 0.04 if a.runtime == "torch" else 0.06,
    ))  # fmt: skip
    settings = BenchSettings(
        ["all"], batches=[1, 4], threads=[1], memory=False, precisions=["all"],
        data=f"folder:{world / 'images'}",
    )  # fmt: skip
    found = bench_checkpoint(world / "uneven", settings)
    here = {(r.latency.runtime, r.latency.precision) for r in found.rows}
    assert here >= {("onnxruntime", p) for p in ("", "fp16", "int8")}
    assert here >= {("torch", p) for p in ("", "fp16", "bf16")}
    assert "pip install openvino" in found.absent["OpenVINO, cpu"]
    assert found.images == settings.data
    assert len(found.int8) == 2
    for row in found.rows:
        assert row.pruned_agreement is not None
        assert row.dense_start_ms is not None
        assert row.dense_start_ms > 0
        if row.latency.precision == "" and row.latency.provider.lower().startswith("cpu"):
            assert row.pruned_agreement.max_relative_error < 1e-4
        if row.latency.precision == "int8":
            assert row.pruned_agreement.max_relative_error > 1e-4
        assert row.marks == (
            "launch-bound" if row.latency.runtime == "torch" else "noisy, launch-bound"
        )  # 3 ms at either batch
    assert from_json(Benchmark, to_json(found)) == found
    assert "OpenVINO is not installed" in analysis(found).text


def test_what_was_asked_for_by_name_has_to_be_here(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DeviceError, match="OpenVINO is not installed"):
        bench_checkpoint(world / "uneven", BenchSettings(["openvino"], memory=False))
    settings = BenchSettings(["torch"], precisions=["int8"], data=f"folder:{world / 'images'}")
    with pytest.raises(UsageError, match="PyTorch has fp32, bf16, fp16"):
        bench_checkpoint(world / "uneven", settings)


@pytest.mark.slow
def test_a_run_holds_every_export_and_the_benchmark(world: Path, tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    small = tmp_path / "small"
    write_pruned(small, tmp_path / "dense", dense, plan_of(dense), run="../run")
    run = RunFolder(tmp_path / "run")
    info = model_info(dense, ModelSource("vit_tiny_patch16_224"))
    summary = read_config(small).prune
    assert summary is not None
    listed = Variant("small", "../small", info, summary)
    run.write_result(Result("run", "2026-01-01", Environment(), info, [], None, [listed]))
    half, archive = section(precision="fp16"), section(format="torch")
    for name, settings in (
        ("fp16.onnx", half),
        ("fp32.onnx", section()),
        ("fp16.onnx", half),  # again: the same file, not one more
        ("model.pt2", archive),
    ):
        export_checkpoint(
            small, images_of(world), settings, out=small / name, work=Work(command=f"export {name}")
        )
    bed = BenchSettings(batches=[1], threads=[1], seconds=0.01, provider="cpu", memory=False)
    bench_checkpoint(small, bed, work=Work(command="bench small"))
    result = run.read_result()
    (variant,) = result.variants
    assert variant.export is not None
    assert variant.export.file == "model.pt2"
    assert [x.file for x in variant.more_exports] == ["fp16.onnx", "fp32.onnx"]
    assert list(result.analyses) == ["benchmark-small"]
    assert result.commands == [
        "export fp32.onnx", "export fp16.onnx", "export model.pt2", "bench small",
    ]  # fmt: skip
    html, markdown = (page.read_text() for page in render_report(run.path))
    for page in (html, markdown):
        page = page.replace("\\_", "_")  # Markdown
        assert "Speed of small compared with vit_tiny_patch16_224" in page
        assert "fp16.onnx (fp16, opset 20" in page
        assert "in ONNX Runtime (CPU; asked for: auto) against PyTorch" in page
        assert "model.pt2 (torch archive" in page
        assert "torch archive, fp32" in page


def test_the_report_shows_how_int8_was_chosen() -> None:
    result = report_example.result()
    export = result.variants[0].export
    assert export is not None
    export.precision, export.tolerance = "int8", -1.0
    export.details = {
        "torch_top1": 0.75, "onnx_top1": 0.74, "max_drop": 1.0,
        "candidates": [
            {"name": "int8-static", "bytes": 100, "score": 0.70, "chosen": False},
            {"name": "int8-dynamic", "bytes": 120, "score": 0.74, "chosen": True},
        ],
    }  # fmt: skip
    page = render_markdown(result)
    assert "top-1 74.0 %, PyTorch 75.0 %, at most 1.0 points lower allowed: passed." in page
    assert "int8-dynamic | 120 B | 74.0 % | yes" in page
    assert "tolerance −1" not in page


def test_the_benchmark_is_in_the_report() -> None:
    rows = [
        BenchmarkRow(
            Latency(runtime, "cpu", 16, 2, 50, 10.0, 6.0, 0.2, 0.1, 0.6, 0.58, 0.63),
            1600.0, 2666.7, 40_000_000, 30_000_000, warning,
        )
        for runtime, warning in (("onnxruntime", None), ("torch", "busy machine"))
    ]  # fmt: skip
    found = Benchmark("vit", "half", "2026-01-01", Environment(), rows, macs_ratio=0.5)
    shown = analysis(found)
    assert "busy machine" in shown.text
    assert shown.figure is not None
    assert [s.name for s in shown.figure.series] == ["ONNX Runtime, cpu", "PyTorch, cpu"]
    assert shown.figure.x_names == ["16, 2"]
    assert shown.figure.reference == {"dense": 1.0, "MACs": 0.5}
    assert shown.rows[0][5:8] == ["0.60", "0.58–0.63", "83 %"]
    result = report_example.result()
    result.analyses["benchmark-half"] = shown
    page = render_html(from_json(Result, to_json(result)))
    assert "Speed of half compared with vit" in page
