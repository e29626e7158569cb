"""The exported graph: open batch, readable names, nothing of the machine, the gate."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from npprune import __version__
from npprune.errors import DeviceError, ExportError, GateError, UsageError
from npprune.export import parity as parity_module
from npprune.export.bench import (
    bench_pair,
    noise_warning,
    onnx_runner,
    peak_memory,
    quantile,
    torch_runner,
)
from npprune.export.checked import Comparison, export_checked
from npprune.export.onnx import Int8Needs, OnnxForm, Producer, export_onnx, pixel_input, to_pixels
from npprune.export.parity import Gate, check_parity, require
from npprune.export.session import open_session
from npprune.export.session import reason as reason_of
from npprune.records import ClassInfo, ExportRecord, Latency, Preprocessing, from_json, to_json

SIZE = 32
PREPROCESSING = Preprocessing((3, SIZE, SIZE), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bicubic", 0.9)
CLASSES = [ClassInfo(i, f"kind {i}", f"n0000000{i}") for i in range(7)]


def tiny(name: str = "vit_tiny_patch16_224", *, widths: tuple[int, ...] = (), **more) -> nn.Module:
    """A small network with non-trivial weights; `widths` replaces the hidden layers."""
    torch.manual_seed(0)
    settings = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = timm.create_model(name, num_classes=7, **(settings | more)).eval()
    for block, width in zip(model.blocks, widths, strict=False):
        block.mlp.fc1 = nn.Linear(48, width)
        block.mlp.fc2 = nn.Linear(width, 48)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Images [20, 3, H, W] as they come out of the transform: whole pixel values, normalised."""
    pixels = torch.randint(0, 256, (20, SIZE, SIZE, 3), generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


@pytest.fixture(scope="module")
def uneven() -> nn.Module:
    """Three blocks of different hidden widths, one of them odd."""
    return tiny(widths=(48, 17, 96))


@pytest.fixture(scope="module")
def exported(uneven: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    producer = Producer("vit_tiny_patch16_224", plan_sha256="p" * 64, weights_sha256="w" * 64)
    export_onnx(uneven, PREPROCESSING, CLASSES, path, producer=producer)
    return path


def test_it_agrees_at_every_batch_size(uneven, exported, images):
    parity = check_parity(uneven, exported, images, batch_sizes=(1, 3, 17))
    assert parity.passed, parity.failures
    assert [(r.batch, r.images) for r in parity.rows] == [(1, 20), (3, 20), (17, 20)]
    assert all(0 < r.max_relative_error < 1e-5 for r in parity.rows)
    assert all(r.top1_agreement == 1 for r in parity.rows)
    assert parity.provider == "CPUExecutionProvider"


def test_the_bytes_hold_nothing_of_this_machine(exported):
    data = exported.read_bytes()
    strangers = ["site-packages", "stack_trace", ".py", str(Path(__file__).resolve().parents[2])]
    strangers += [sys.prefix, str(Path.home()), "pkg.torch", "aten.", "class_hierarchy"]
    assert [s for s in strangers if s.encode() in data] == []


def test_names_are_those_of_the_modules(exported, uneven):
    graph = onnx.load(exported).graph
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    assert "blocks.1.mlp.fc1/MatMul" in names
    assert "blocks.2.attn/Softmax" in names
    values = [v for n in graph.node for v in n.output] + [t.name for t in graph.initializer]
    assert [v for v in values if v.startswith(("val_", "node_", "scalar_tensor"))] == []
    weights = {t.name: tuple(t.dims) for t in graph.initializer}
    assert weights["blocks.1.mlp.fc1.weight_t"] == (48, 17)
    assert weights["blocks.1.mlp.fc2.bias"] == (48,)
    assert [v.name for v in graph.input] == ["images"]
    assert [v.name for v in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.name == "vit_tiny_patch16_224"


def test_metadata_round_trip(exported):
    said = open_session(exported, "cpu").metadata
    assert [ClassInfo(**c) for c in json.loads(said["labels"])] == CLASSES
    read = json.loads(said["preprocessing"])
    assert tuple(read["mean"]) == PREPROCESSING.mean
    assert tuple(read["input_size"]) == PREPROCESSING.input_size
    assert read["interpolation"] == "bicubic"
    assert said["npprune_version"] == __version__
    assert said["architecture"] == "vit_tiny_patch16_224"
    assert said["plan_sha256"] == "p" * 64
    assert onnx.load(exported).producer_name == "npprune"


def test_export_says_nothing_and_leaves_the_model_as_it_was(capfd, tmp_path):
    model = tiny(depth=1, embed_dim=24).train()  # of its own: no other test has traced it
    before = {k: v.clone() for k, v in model.state_dict().items()}
    export_onnx(model, PREPROCESSING, CLASSES, tmp_path / "m.onnx")
    open_session(tmp_path / "m.onnx", "auto")
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "qk_norm": True, "init_values": 0.1}),
        pytest.param("eva02_tiny_patch14_224", {}, marks=pytest.mark.slow),
        pytest.param("deit_tiny_distilled_patch16_224", {}, marks=pytest.mark.slow),
        pytest.param("beit_base_patch16_224", {}, marks=pytest.mark.slow),
    ],
)
def test_families(name, more, images, tmp_path):
    record = export_checked(
        tiny(name, depth=1, **more), PREPROCESSING, CLASSES, tmp_path / "m.onnx", Comparison(images)
    )
    assert record.passed


def test_a_fixed_batch_is_the_only_one_that_runs(images, tmp_path):
    model = tiny(depth=1)
    record = export_checked(
        model, PREPROCESSING, CLASSES, tmp_path / "m.onnx", Comparison(images), OnnxForm(batch=4)
    )
    assert [r.batch for r in record.parity] == [4]
    session = open_session(tmp_path / "m.onnx", "cpu")
    assert session.fixed_batch == 4
    with pytest.raises(ExportError, match=r"m\.onnx cannot run on a batch of shape \(3, 3, 32, 32"):
        session.run(images[:3].numpy())


def test_pixels_in_gives_the_logits_of_images_in(images, tmp_path):
    model, plain, path = tiny(depth=1), tmp_path / "plain.onnx", tmp_path / "pixels.onnx"
    export_onnx(model, PREPROCESSING, CLASSES, plain)
    record = export_checked(
        model, PREPROCESSING, CLASSES, path, Comparison(images), OnnxForm(with_preprocessing=True)
    )
    assert record.details["with_preprocessing"] is True
    pixels = to_pixels(images, PREPROCESSING)
    assert pixels.dtype == torch.uint8
    with torch.no_grad():
        assert torch.equal(pixel_input(model, PREPROCESSING)(pixels), model(images))
    session = open_session(path, "cpu")
    assert session.input_name == "pixels"
    assert session.input_shape == ["batch", SIZE, SIZE, 3]
    logits = session.run(pixels.numpy())
    assert np.abs(logits - open_session(plain, "cpu").run(images.numpy())).max() < 1e-5
    assert "blocks.0.mlp.fc1/MatMul" in [n.name for n in onnx.load(path).graph.node]


def test_large_weights_go_beside_the_graph(images, tmp_path):
    path = tmp_path / "m.onnx"
    record = export_checked(
        tiny(depth=1),
        PREPROCESSING,
        CLASSES,
        path,
        Comparison(images),
        OnnxForm(external_above=1000),
    )
    data = tmp_path / "m.onnx.data"
    assert record.bytes == path.stat().st_size + data.stat().st_size
    assert data.stat().st_size > path.stat().st_size / 2
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (path, data):
        file.rename(moved / file.name)
    assert open_session(moved / "m.onnx", "cpu").run(images.numpy()).shape == (20, 7)


def test_classes_must_match_the_head(tmp_path):
    with pytest.raises(ExportError, match="the network has 7, got 6"):
        export_onnx(tiny(depth=1), PREPROCESSING, CLASSES[:6], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_cannot_be_traced(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x.mean((2, 3)) if x.sum() > 0 else x.sum((2, 3))

    with pytest.raises(ExportError, match="cannot be traced for ONNX"):
        export_onnx(Odd(), PREPROCESSING, [], tmp_path / "m.onnx")


# ---------------------------------------------------------------- the gate


def tamper(path: Path) -> None:
    """Change one weight of an exported file."""
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == "head.bias")
    value = onnx.numpy_helper.to_array(tensor).copy()
    value[0] += 50
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, "head.bias"))
    onnx.save(proto, path)


def test_a_tampered_file_fails_the_gate(uneven, exported, images, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(exported.read_bytes())
    tamper(path)
    parity = check_parity(uneven, path, images)
    assert not parity.passed
    with pytest.raises(GateError, match=r"relative logit error .*at batch 1, at most 1e-04") as err:
        require(parity, "bad.onnx")
    assert err.value.exit_code == 1
    assert "of 20 images at batch 17" in err.value.message


def test_a_failed_gate_leaves_nothing(images, tmp_path, monkeypatch):
    from npprune.export import checked

    def spoiled(*args, **kwargs):
        result = export_onnx(*args, **kwargs)
        tamper(args[3])
        return result

    monkeypatch.setattr(checked, "export_onnx", spoiled)
    path = tmp_path / "m.onnx"
    with pytest.raises(GateError):
        export_checked(tiny(depth=1), PREPROCESSING, CLASSES, path, Comparison(images))
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"an earlier file")
    with pytest.raises(GateError):
        export_checked(tiny(depth=1), PREPROCESSING, CLASSES, path, Comparison(images))
    assert path.read_bytes() == b"an earlier file"


def test_not_a_number_never_agrees(exported, images):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 7), float("nan"))

    assert not check_parity(Broken(), exported, images, batch_sizes=(4,)).passed


def test_the_record_is_json(images, tmp_path):
    labels = torch.zeros(len(images), dtype=torch.int64)
    record = export_checked(
        tiny(depth=1), PREPROCESSING, CLASSES, tmp_path / "m.onnx", Comparison(images, labels)
    )
    assert from_json(ExportRecord, to_json(record)) == record
    assert record.bytes == (tmp_path / "m.onnx").stat().st_size
    assert record.details["torch_top1"] == record.details["onnx_top1"]


def test_accuracy_gate(uneven, exported, images, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(exported.read_bytes())
    tamper(path)
    with torch.no_grad():
        labels = uneven(images).argmax(1)
    gate = Gate(tolerance=None, min_agreement=0.0, max_drop=1.0)
    parity = check_parity(uneven, path, images, gate=gate, labels=labels)
    assert parity.torch_top1 == 1.0
    assert len(parity.failures) == 1
    assert "at most 1 are allowed" in parity.failures[0]
    assert parity_module.GATES["fp32"] == Gate(1e-4, 1.0, None)


# ---------------------------------------------------------------- sessions


def test_an_explicit_provider_is_never_replaced(exported):
    session = open_session(exported, "cpu", threads=1)
    assert (session.asked, session.provider, session.threads) == ("cpu", "CPUExecutionProvider", 1)
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there, so the provider may well start")
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(DeviceError, match=f"`provider` {provider} ") as err:
            open_session(exported, provider)
        assert "onnxruntime-gpu[cuda,cudnn]" in err.value.hint


def test_auto_says_what_and_why(exported):
    session = open_session(exported, "auto")
    assert session.provider in ("CPUExecutionProvider", "CUDAExecutionProvider")
    assert len(session.reason) > 10


@pytest.mark.parametrize(
    ("provider", "threads", "message"),
    [
        ("gpu", None, "`provider` must be one of `auto`, `cpu`"),
        ("cpu", 0, "`threads` must be at least"),
    ],
)
def test_wrong_session_settings(exported, provider, threads, message):
    with pytest.raises(UsageError, match=message):
        open_session(exported, provider, threads)


def test_broken_and_missing_files(tmp_path):
    with pytest.raises(ExportError, match="no ONNX file at"):
        open_session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("not a graph")
    for provider in ("cpu", "auto"):
        with pytest.raises(ExportError, match=r"text\.onnx cannot be opened"):
            open_session(tmp_path / "text.onnx", provider)


SOURCE = "/onnxruntime_src/onnxruntime/core/graph/model"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Load model from a b.onnx failed:" + SOURCE + ".cc:256 "
            "onnxruntime::Model::Model(onnx::ModelProto&&, const std::list<int(*)(int)>*, bool) "
            "Unsupported model IR version: 99, max (supported): 11\n",
            "Unsupported model IR version: 99, max (supported): 11",
        ),
        (
            f"{SOURCE}.h:9 void onnxruntime::Check(int) const [with T = a::b] Opset 60 is new",
            "Opset 60 is new",
        ),
        (f"{SOURCE}.cc:1 onnxruntime::Model::Model It (still) fails", "It (still) fails"),
        ("Running Reshape: shape.cc:4 Check [ONNXRuntimeError] : 1 : FAIL : b.h:7 f a::g (x)",
         "Running Reshape: a::g (x)"),
        ("Got: 5\n Expected: 2", "Got: 5 Expected: 2"),
        ("", "RuntimeError"),
        (f"{SOURCE}.cc:1 alone", "alone"),
        ("long " * 500, ("long " * 500).strip()),
    ],
)  # fmt: skip
def test_the_runtimes_own_reason_is_told_in_full(said, reason):
    assert reason_of(RuntimeError(said)) == reason


def test_hints_say_what_is_wrong_with_the_file(exported, uneven, tmp_path):
    def hint(name: str, change=None) -> tuple[str, str]:
        path = tmp_path / name
        if change is not None:
            proto = onnx.load(exported)
            change(proto)
            path.write_bytes(proto.SerializeToString())
        with pytest.raises(ExportError) as caught:
            open_session(path, "cpu")
        return caught.value.message, str(caught.value.hint)

    message, said = hint("ir.onnx", lambda proto: setattr(proto, "ir_version", 99))
    assert re.search(
        r"opened: Unsupported model IR version: 99, max supported IR .*: \d+$", message
    )
    assert f"newer ONNX Runtime (this is {onnxruntime.__version__})" in said
    message, said = hint("opset.onnx", lambda p: setattr(p.opset_import[0], "version", 99))
    assert "Opset 99 is under development" in message
    assert "lower `opset`" in said
    _, said = hint("operator.onnx", lambda proto: setattr(proto.graph.node[0], "op_type", "Foo"))
    assert "newer ONNX Runtime" in said
    (tmp_path / "cut.onnx").write_bytes(exported.read_bytes()[:2000])
    assert hint("cut.onnx")[1] == "the file is damaged, or no ONNX file"
    export_onnx(uneven, PREPROCESSING, CLASSES, tmp_path / "two.onnx", OnnxForm(external_above=0))
    (tmp_path / "two.onnx.data").write_bytes(b"1")
    assert "whole and under its own name" in hint("two.onnx")[1]
    (tmp_path / "two.onnx.data").unlink()
    message, said = hint("two.onnx")
    assert "two.onnx.data" in message
    assert "must lie next to it" in said


def test_the_ir_version_is_of_the_operator_sets_time(exported, images, tmp_path):
    assert onnx.load(exported).ir_version == 9  # of opset 20
    path = tmp_path / "model.onnx"
    export_onnx(
        tiny(depth=1), PREPROCESSING, CLASSES, path, OnnxForm(opset=17, precision="int8"),
        int8=Int8Needs(images[:4], lambda session: 1.0),
    )  # fmt: skip
    proto = onnx.load(path)
    assert {o.domain: o.version for o in proto.opset_import}[""] == 17
    assert proto.ir_version == 8
    assert open_session(path, "cpu").run(images[:2].numpy()).shape[0] == 2


# ---------------------------------------------------------------- timing


@pytest.mark.slow
def test_the_smaller_network_is_faster(images, tmp_path):
    paths = []
    for name, width in (("dense", 6000), ("pruned", 48)):
        paths.append(tmp_path / f"{name}.onnx")
        model = tiny(depth=1, widths=(width,))
        export_onnx(model, PREPROCESSING, CLASSES, paths[-1])
    dense, pruned = (onnx_runner(p, 4, threads=1) for p in paths)
    latency = bench_pair(dense, pruned, warmup=2, runs=15)
    assert latency.runs == 15
    assert latency.pruned_ms < latency.dense_ms
    assert latency.ratio < 0.8
    assert latency.ratio_low <= latency.ratio <= latency.ratio_high
    assert (latency.runtime, latency.batch, latency.threads) == ("onnxruntime", 4, 1)


def test_memory_of_a_process_of_its_own(exported, tmp_path):
    small, large = (peak_memory(exported, b, threads=1) for b in (1, 512))
    assert 0 < small < large
    assert large - small > 512 * 3 * SIZE * SIZE * 4  # the input alone
    with pytest.raises(ExportError, match=r"memory of .*none\.onnx cannot be measured"):
        peak_memory(tmp_path / "none.onnx", 1)


def test_torch_is_timed_the_same_way(images):
    model = tiny(depth=1)
    runner = torch_runner(model, 2, images=images, threads=1)
    latency = bench_pair(runner, runner, warmup=1, min_seconds=0.0)
    assert latency.runs == 10
    assert latency.runtime == "torch"
    assert latency.provider == "cpu"
    assert latency.dense_ms > 0


def test_quantiles_and_noise():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([1.0], 0.25) == 1.0
    calm = Latency("torch", "cpu", 1, 1, 10, 10.0, 5.0, 0.5, 0.2, 0.5, 0.49, 0.51)
    assert noise_warning(calm) is None
    calm.pruned_iqr_ms = 2.0
    assert "40 %" in (noise_warning(calm) or "")
    calm.pruned_iqr_ms, calm.ratio_high = 0.2, 1.2
    assert "cannot be told apart" in (noise_warning(calm) or "")
