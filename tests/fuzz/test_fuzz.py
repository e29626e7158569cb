"""Whatever a file holds: read, or refused by one error; no traceback, no hang, bounded memory.

Each format begins with a right file, which hypothesis then damages: bytes flipped, cut, repeated,
and, in what is JSON, values exchanged for odd ones. A few examples by default;
`NPPRUNE_FUZZ_SEED=1 pytest -m slow tests/fuzz` tries thousands, others for each seed.
"""

from __future__ import annotations

import copy
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from npprune.data.hierarchy import read_hierarchy
from npprune.data.labels import find_labels
from npprune.errors import NpPruneError
from npprune.export.loops import repeated
from npprune.export.predict import Classifier
from npprune.images.decoding import FORMATS, decode
from npprune.models.folders import open_folder, translate
from npprune.models.load import build
from npprune.models.weights import read_weights
from npprune.models.where import find_folder
from npprune.recipe.loading import load_recipe, shipped_recipes
from npprune.records import CheckpointConfig, Result, to_json
from npprune.report import render_html, render_markdown
from npprune.store import atomic
from npprune.store.paper_files import read_released
from npprune.store.runs import read_plan
from npprune.untrusted import out_of_memory
from tests.export.test_hostile import LABELS, PREPROCESSING, three
from tests.export.test_hostile import write as write_onnx
from tests.helpers import report_example
from tests.helpers.deploying import plan_of, write_dense

pytest.importorskip("hypothesis", reason="needs the [dev] extra")
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SEED = int(os.environ.get("NPPRUNE_FUZZ_SEED", "0"))
FEW, MANY = 6, int(os.environ.get("NPPRUNE_FUZZ_EXAMPLES", "1000"))
SECONDS, BYTES = 20.0, 2**30  # of one example, on a busy machine; of all examples of a format

Read = Callable[[Path], Any]
ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**40, -0.0, 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "\0", "\ud800", "../..", "/dev/zero", "a" * 10_000, [], {}, [[]], [None], [-1], {"": None},
    [0] * 1000,
]  # fmt: skip


@dataclass
class Format:
    """Right content, and what reads it."""

    name: str  # of the file
    content: bytes
    read: Read


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with a few changes anywhere."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("flip", "cut", "remove", "insert", "repeat", "number")))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif kind == "repeat":
            data[at:at] = data[at : at + 30] * draw(st.integers(1, 50))
        else:
            data[at : at + 4] = draw(st.sampled_from((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff")))
    return bytes(data)


@st.composite
def edited(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON document in which a few values are odd ones."""
    document: Any = json.loads(content)
    for _ in range(draw(st.integers(1, 2))):
        holder, key = None, None
        value = document
        while isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
            holder = value
            key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else
                                       range(len(value))))  # fmt: skip
            value = holder[key]
        if holder is not None:
            odd = copy.deepcopy(draw(st.sampled_from(ODD)))  # it may be edited next
            holder[key] = draw(st.sampled_from((odd, [odd], {"a": odd}, [value, value])))
    return json.dumps(document).encode()


def refused(read: Callable[..., Any], *args: Any) -> None:
    """Read it, or meet the one kind of error that has a message, a hint and exit code 2."""
    try:
        read(*args)
    except NpPruneError as err:
        if not err.message or err.exit_code != 2:
            raise
    except Exception as err:
        if not out_of_memory(err):
            raise


def examine(form: Format, folder: Path, examples: int) -> None:
    """Damage, read and look."""
    path = folder / form.name
    path.write_bytes(form.content)
    form.read(path)  # it is right as it is
    before = psutil.Process().memory_info().rss
    is_json = form.name.endswith(".json")
    strategy = damaged(form.content)
    if is_json:
        strategy = st.one_of(edited(form.content), edited(form.content), strategy)

    @seed(SEED)
    @settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def check(content: bytes) -> None:
        path.write_bytes(content)
        started = time.perf_counter()
        refused(form.read, path)
        assert time.perf_counter() - started < SECONDS
        assert [p.name for p in folder.iterdir() if p.name not in around] == [form.name]

    around = {p.name for p in folder.iterdir()} - {form.name}
    check()
    assert psutil.Process().memory_info().rss - before < BYTES


# ---------------------------------------------------------------- formats


def report(path: Path) -> None:
    result = atomic.read_json(Result, path)
    render_html(result)
    render_markdown(result)


def rebuilt(path: Path) -> None:
    _, tensors = DENSE
    build(atomic.read_json(CheckpointConfig, path), tensors)


def foreign(path: Path) -> None:
    _, described = find_folder(str(path.parent), None)
    assert described is not None
    folder = open_folder(described.path)
    if folder.kind == "timm":
        _ = folder.architecture, folder.model_args, folder.classes(6)
    else:
        translate(folder, None)


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def labels(path: Path) -> None:
    find_labels(["a", "b"], num_classes=3, class_map=path)


TENSORS = {"pos_embed": torch.ones(1, 2, 3), "blocks.0.norm1.weight": torch.ones(3)}
DENSE: tuple[Any, dict[str, torch.Tensor]] = (None, {})


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Format]:
    """Every format by name."""
    global DENSE
    from safetensors.torch import save

    from npprune.store.checkpoints import read_checkpoint

    place = tmp_path_factory.mktemp("right")
    model = write_dense(place / "dense")
    DENSE = read_checkpoint(place / "dense")
    files = {"pth": io.BytesIO(), "npz": io.BytesIO()}
    torch.save({"model": TENSORS, "epoch": 3}, files["pth"])
    np.savez(files["npz"], **{k.replace(".", "/"): v.numpy() for k, v in TENSORS.items()})
    recipe = next(iter(shipped_recipes().values())).read_bytes()
    timm_config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 6, "global_pool": "token",
        "model_args": {"img_size": 32, "embed_dim": 24}, "label_names": list("abcdef"),
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 32, 32]},
    }  # fmt: skip
    found = [
        Format("recipe.yaml", recipe, load_recipe),
        Format("map.json", b'{"a": 0, "b": 2}', labels),
        Format("map.txt", b"a\nb\n", labels),
        Format("hierarchy.json", b'{"a": ["r"], "b": "r"}', read_hierarchy),
        Format("hierarchy.tsv", b"a\tr\nb\tr\n", read_hierarchy),
        Format("plan.json", to_json(plan_of(model)).encode(), read_plan),
        Format("checkpoint.json", (place / "dense" / "config.json").read_bytes(), rebuilt),
        Format("result.json", to_json(report_example.result()).encode(), report),
        Format("w.safetensors", save(TENSORS), read_weights),
        Format("w.pth", files["pth"].getvalue(), read_weights),
        Format("w.npz", files["npz"].getvalue(), read_weights),
        Format("config.json", json.dumps(timm_config).encode(), foreign),
        Format("m.onnx", write_onnx(place / "m.onnx", three()).read_bytes(), looked_at),
    ]
    found += [Format(f"x.{k.lower()}", picture(k), lambda p: decode(p, "x")) for k in FORMATS]
    return {form.name: form for form in found}


def looked_at(path: Path) -> None:
    try:
        repeated(path)
    except ValueError as err:
        raise NpPruneError(str(err)) from err


NAMES = [
    "recipe.yaml", "map.json", "map.txt", "hierarchy.json", "hierarchy.tsv", "plan.json",
    "checkpoint.json", "result.json", "w.safetensors", "w.pth", "w.npz", "config.json", "m.onnx",
    *(f"x.{k.lower()}" for k in FORMATS),
]  # fmt: skip


def prepared(folder: Path, form: Format) -> Path:
    if form.name == "config.json":
        (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_few_damages(name: str, formats: dict[str, Format], tmp_path: Path) -> None:
    examine(formats[name], prepared(tmp_path, formats[name]), FEW)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES)
def test_many_damages(name: str, formats: dict[str, Format], tmp_path: Path) -> None:
    examine(formats[name], prepared(tmp_path, formats[name]), MANY)


# ---------------------------------------------------------------- text that is no file


KEYS = st.sampled_from(
    ("name", "prune.keep", "prune.axes", "model", "data.mean", "discover.topk", "export", "x.y")
)
VALUES = st.one_of(
    st.text(max_size=30), st.sampled_from([json.dumps(v) for v in ODD if v != "\ud800"]),
    st.sampled_from(["[" * 700, "{" * 50, "&a [*a]", "!!python/object:os.system x", "<<: 1"]),
)  # fmt: skip


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(st.builds("{}={}".format, KEYS, VALUES) | st.text(max_size=30))
def test_overrides(text: str) -> None:
    refused(load_recipe, next(iter(shipped_recipes().values())), [text])


def classified(path: Path) -> None:
    Classifier(path, provider="cpu").classify([Image.new("RGB", (9, 9))])


METADATA = st.sampled_from([json.loads(LABELS), json.loads(PREPROCESSING), *ODD])


@settings(max_examples=10, deadline=None, database=None, derandomize=True)
@given(METADATA, METADATA)
def test_onnx_metadata(first: Any, second: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        known = {"labels": json.dumps(first), "preprocessing": json.dumps(second)}
        path = write_onnx(Path(folder) / "x.onnx", three(), metadata=known)
        refused(classified, path)


def test_paths_of_the_paper(tmp_path: Path) -> None:
    from npprune.store.paper_files import ReleasedImage, write_released

    images = [ReleasedImage([[1, 2], [0, 3]], 0.5), ReleasedImage([[1, 2], [0, 3]], 0.25)]
    write_released(tmp_path / "x.jsonl", images)
    content = (tmp_path / "x.jsonl").read_bytes()
    examine(Format("x.jsonl", content, read_released), tmp_path, FEW)
