"""Checkpoints of strangers: no code, no network, no memory without bound, no other run changed."""

from __future__ import annotations

import json
import pickle
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from npprune.errors import ModelError, NpPruneError, StoreError
from npprune.models import hub
from npprune.models.create import check_fits, checked_args
from npprune.models.load import build
from npprune.models.weights import read_weights
from npprune.pipeline.common.results import run_of
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.stage import dense_section
from npprune.records import CheckpointConfig, Environment, Result, Variant
from npprune.store.checkpoints import read_checkpoint, read_config
from npprune.store.runs import RunFolder
from tests.helpers.deploying import plan_of, write_dense, write_pruned


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense and a pruned checkpoint."""
    world = tmp_path_factory.mktemp("hostile")
    model = write_dense(world / "dense")
    write_pruned(world / "pruned", world / "dense", model, plan_of(model), run="../run")
    return world


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> CheckpointConfig:
    """`config.json` after a stranger's edit, read as every command reads it."""
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))
    return read_config(folder)


@pytest.fixture
def pruned(world: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(world / "pruned", tmp_path / "pruned"))


@pytest.mark.parametrize(("name", "value"), [
    ("checkpoint_path", "/tmp/x.pth"),
    ("pretrained", True),
    ("pretrained_cfg", {"url": "http://localhost/x.pth"}),
    ("pretrained_cfg_overlay", {"url": "http://localhost/x.pth"}),
    ("pretrained_strict", False),
    ("cache_dir", "/tmp"),
    ("features_only", True),
    ("scriptable", True),
    ("embed_layer", "os.system"),
    ("block_fn", "x"),
    ("norm_layer", "os.system"),
    ("act_layer", {"a": 1}),
    ("img_size", 10**9),
    ("img_size", [32, 10**9]),
    ("img_size", [32] * 1000),
    ("img_size", "32"),
    ("patch_size", float("nan")),
    ("depth", 10**6),
    ("depth", True),
    ("embed_dim", -1),
    ("embed_dim", 2.5),
    ("num_heads", 10**30),
    ("mlp_ratio", float("inf")),
    ("num_classes", 10**12),
    ("class_token", "yes"),
    ("__class__", "x"),
])  # fmt: skip
def test_an_argument_that_does_more_than_describe_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"the network is described by `{name}`"):
        checked_args({name: value}, "config.json")


@pytest.mark.parametrize(("name", "value"), [
    ("img_size", 16384), ("embed_dim", 16384), ("num_classes", 2**20),
])  # fmt: skip
def test_sizes_that_its_tensors_do_not_have_take_no_memory(
    pruned: Path, name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors = read_checkpoint(pruned)
    if name == "num_classes":
        config = replace(config, num_classes=value)
    else:
        config.source.model_args |= {name: value, "num_heads": 1}

    def allocated(*args: object, **options: object) -> None:
        pytest.fail("memory was asked for")

    monkeypatch.setattr("npprune.models.load.fit_to", allocated)
    with pytest.raises(ModelError, match=r"config\.json"):
        build(config, tensors)


def test_a_network_larger_than_memory_is_told_from_shapes() -> None:
    args = {"img_size": 64, "embed_dim": 16384, "depth": 256, "num_heads": 4, "mlp_ratio": 64.0}
    with pytest.raises(ModelError, match=r"x: the network described .* does not fit into memory"):
        check_fits("vit_base_patch16_224", args, "x")


@pytest.mark.parametrize("name", ["evil/network", "hf-hub:evil/network", "hf_hub:evil/network@x"])
def test_a_hub_name_in_a_file_is_not_downloaded(
    pruned: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(pruned))

    def edit(data: dict[str, Any]) -> None:
        data["details"]["dense"] = {"name": name}

    config = changed(pruned, edit)
    with pytest.raises(ModelError, match=r"evil/network.* on the hub, which is not on this"):
        dense_section(config, pruned, None)
    with pytest.raises(NpPruneError, match="timm has no model named"):
        build(replace(config, source=replace(config.source, architecture=name)), {})


def edits(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(data: dict[str, Any]) -> None:
        *path, last = key.split(".")
        for part in path:
            data = data.setdefault(part, {})
        data[last] = value

    return edit


@pytest.mark.parametrize(("key", "value", "message"), [
    ("details.dense", [], "`details.dense`: input should be a valid dictionary"),
    ("details.dense.name", 3, "`details.dense.name`"),
    ("details.dense.checkpoint_relative", "a\0b", "`details.dense.checkpoint_relative`"),
    ("details.data", "x", "`details.data`"),
    ("details.data.calibration", {}, "`details.data.calibration`"),
    ("details.outputs", "abc", "`details.outputs`"),
    ("details.outputs", [0], "must name 6 outputs, got 1"),
    ("details.classes", [-1], "`details.classes.0`"),
    ("details.trained", 3, "`details.trained`"),
    ("run", "a\0b", "`run`"),
    ("prune.details", {"axes": [{"axis": 1}]}, "`details.axes.0.axis`"),
    ("prune.details", {"attention": {"heads": "x"}}, "`details.attention.heads`"),
])  # fmt: skip
def test_free_form_parts_are_of_their_types(
    pruned: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(StoreError, match=message):
        changed(pruned, edits(key, value))


def test_paths_that_are_no_utf8_are_paths(pruned: Path) -> None:
    config = changed(pruned, edits("details.dense", {"name": "w\udce9", "checkpoint": None}))
    assert config.details["dense"]["name"] == "w\udce9"


def test_settings_of_other_kinds_are_refused(pruned: Path) -> None:
    config = changed(pruned, edits("details.dense", {"name": "x", "img_size": "wide"}))
    with pytest.raises(StoreError, match="`img_size` in the details"):
        dense_section(config, pruned, None)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind": NaN}', '{"a":' * 100_000, "\ufeff"])
def test_a_description_that_is_no_json_is_one_error(pruned: Path, text: str) -> None:
    (pruned / "config.json").write_text(text)
    with pytest.raises(StoreError, match=r"not valid JSON: .*config\.json"):
        read_config(pruned)


def test_another_run_is_not_changed(world: Path, tmp_path: Path) -> None:
    """A checkpoint that names a run is believed where the run names the checkpoint, too."""
    config = read_config(world / "pruned")
    assert config.prune is not None
    from npprune.models.info import model_info

    info = model_info(build(*read_checkpoint(world / "dense")), config.source)
    said: list[str] = []
    work = Work("cpu", emit=lambda event: said.append(event.message))

    def known(variants: list[Variant]) -> bool:
        RunFolder(world / "run").path.mkdir(exist_ok=True)
        result = Result("run", "t", Environment(), info, [], None, variants)
        RunFolder(world / "run").write_result(result)
        return run_of(world / "pruned", config, work) is not None

    other = replace(config.prune, plan_sha256="other")
    assert known([Variant("pruned", "../pruned", info, other)])
    assert not said
    assert not known([])
    assert not known([Variant("mine", "../mine", info, other)])
    assert not known([Variant("pruned", "../dense", info, config.prune)])
    assert len(said) == 3
    assert "whose result does not list it: what is found is shown, not recorded" in said[0]
    # moved or renamed since
    assert known([Variant("pruned", "../gone", info, config.prune)])
    assert known([Variant("before", "../gone", info, config.prune)])


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return pytest.fail, ("code of the file was run",)


def npz(path: Path, header: bytes, body: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def test_weights_that_are_no_weights(tmp_path: Path) -> None:
    shape = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }\n"
    npz(tmp_path / "shape.npz", shape)
    npz(tmp_path / "pickle.npz", b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n")
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    torch.save({"a": Payload()}, tmp_path / "code.pth")
    (tmp_path / "code.npz").write_bytes(pickle.dumps({"a": Payload()}))
    torch.save({"a": torch.zeros(1).expand(10**10)}, tmp_path / "expanded.pth")
    bomb: Any = ()
    for _ in range(3):
        bomb = (bomb,) * 3
    torch.save({bomb: 1}, tmp_path / "keys.pth")
    shared: dict[str, Any] = {}
    for _ in range(7):
        shared = {str(i): shared for i in range(8)}
    torch.save(shared, tmp_path / "shared.pth")
    for name, message in (
        ("shape", "says 399999999996 bytes of values, and holds 0"),
        ("pickle", "cannot be read as a NumPy file"),
        ("one", "no archive of arrays"),
        ("code", "cannot be read as a NumPy file"),
    ):
        with pytest.raises(ModelError, match=message):
            read_weights(tmp_path / f"{name}.npz")
    for name, message in (
        ("code", "holds pickled code"),
        ("expanded", "it would unpack to 38,147 MiB"),
        ("keys", "must hold named tensors, got a dictionary with tuple"),
        ("shared", "holds more than 100,000 dictionaries"),
    ):
        with pytest.raises(ModelError, match=message):
            read_weights(tmp_path / f"{name}.pth")


def test_parts_of_weights_stay_in_their_folder(tmp_path: Path) -> None:
    from npprune.models.folders import weights_files

    index = tmp_path / "model.safetensors.index.json"
    for names in (["../x"], ["/etc/passwd"], [3], [], ["a/b"], {"a": 1}):
        listed = dict(enumerate(names)) if isinstance(names, list) else 3
        index.write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(ModelError, match="is no index of weights files in its folder"):
            weights_files(index)
    assert hub.FILES
