"""ONNX files of strangers: no loop, no output or metadata that is taken for granted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from PIL import Image

from npprune.errors import ExportError
from npprune.export.loops import repeated
from npprune.export.predict import Classifier
from npprune.export.session import open_session

LABELS = json.dumps([{"index": i, "name": f"c{i}"} for i in range(3)])
PREPROCESSING = json.dumps({"input_size": [3, 8, 8]})
INPUT = h.make_tensor_value_info("images", T.FLOAT, ["b", 3, 8, 8])


def write(
    path: Path,
    nodes: list[Any],
    *,
    given: Any = INPUT,
    outputs: Any = None,
    metadata: dict[str, str] | None = None,
    functions: list[Any] | None = None,
) -> Path:
    out = outputs or [h.make_tensor_value_info("logits", T.FLOAT, None)]
    graph = h.make_graph(nodes, "g", [given], out)
    sets = [h.make_opsetid("", 17), h.make_opsetid("own", 1)]
    model = h.make_model(graph, opset_imports=sets, functions=functions or [])
    model.ir_version = 8
    known = {"labels": LABELS, "preprocessing": PREPROCESSING}
    h.set_model_props(model, known if metadata is None else metadata)
    onnx.save(model, str(path))
    return path


def three(op: str = "Identity") -> list[Any]:
    """Three numbers for each image, their means over pixels."""
    return [
        h.make_node("ReduceMean", ["images"], ["m"], axes=[2, 3], keepdims=0),
        h.make_node(op, ["m"], ["logits"]),
    ]


def endless() -> Any:
    """A loop whose condition stays true."""
    body = h.make_graph(
        [h.make_node("Identity", ["c"], ["d"]), h.make_node("Identity", ["x"], ["y"])], "body",
        [h.make_tensor_value_info(n, t, s)
         for n, t, s in (("i", T.INT64, []), ("c", T.BOOL, []), ("x", T.FLOAT, None))],
        [h.make_tensor_value_info("d", T.BOOL, []), h.make_tensor_value_info("y", T.FLOAT, None)],
    )  # fmt: skip
    return h.make_node("Loop", ["", "t", "images"], ["looped"], body=body)


def always() -> Any:
    return h.make_node("Constant", [], ["t"], value=h.make_tensor("t", T.BOOL, [], [True]))


def branch(nodes: list[Any], out: str) -> Any:
    return h.make_graph(nodes, out, [], [h.make_tensor_value_info(out, T.FLOAT, None)])


def test_a_loop_is_not_run_wherever_it_is(tmp_path: Path) -> None:
    loop = [always(), endless(), *three()]
    inner = [endless(), h.make_node("Identity", ["looped"], ["a"])]
    other = [h.make_node("Identity", ["images"], ["b"])]
    choice = h.make_node(
        "If", ["t"], ["z"], then_branch=branch(inner, "a"), else_branch=branch(other, "b")
    )
    own = h.make_function(
        "own", "F", ["images"], ["looped"], [always(), endless()], [h.make_opsetid("", 17)]
    )
    call = h.make_node("F", ["images"], ["z"], domain="own")
    for name, path in (
        ("Loop", write(tmp_path / "loop.onnx", loop)),
        ("Loop", write(tmp_path / "if.onnx", [always(), choice, *three()])),
        ("Loop", write(tmp_path / "function.onnx", [call, *three()], functions=[own])),
    ):
        assert repeated(path) == name
        with pytest.raises(ExportError, match="holds the operator Loop, which repeats"):
            open_session(path, "cpu")
    plain = h.make_node(
        "If", ["t"], ["z"], then_branch=branch(other, "b"), else_branch=branch(other, "b")
    )
    assert repeated(write(tmp_path / "plain.onnx", [always(), plain, *three()])) is None
    Classifier(tmp_path / "plain.onnx", provider="cpu")


@pytest.mark.parametrize(
    "data", [b"", b"\x00", b"\xff" * 100, b"\x3a\xff\xff\xff\x7f", b"ORTM" * 9]
)
def test_bytes_that_are_no_graph(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(ExportError, match="cannot be opened"):
        open_session(tmp_path / "x.onnx", "cpu")


@pytest.mark.parametrize(("key", "value"), [
    ("labels", "[" * 100_000), ("labels", "3"), ("labels", '[{"index": 0}]'), ("labels", "NaN"),
    ("labels", '{"a": 1}'), ("preprocessing", "[]"), ("preprocessing", '{"crop_pct": 1e-9}'),
    ("preprocessing", '{"input_size": [3, 100000, 100000]}'), ("preprocessing", '{"std": [0]}'),
    ("preprocessing", '{"interpolation": "x"}'), ("preprocessing", '{"crop_mode": "x"}'),
    ("preprocessing", '{"input_size": [3, 16, 16]}'), ("preprocessing", '{"mean": [NaN]}'),
    ("preprocessing", '{"input_size": [1, 8, 8]}'),
])  # fmt: skip
def test_metadata_is_checked(key: str, value: str, tmp_path: Path) -> None:
    known = {"labels": LABELS, "preprocessing": PREPROCESSING, key: value}
    path = write(tmp_path / "x.onnx", three(), metadata=known)
    with pytest.raises(ExportError, match=r"metadata"):
        Classifier(path, provider="cpu")


def shape(*sizes: Any, kind: int = T.FLOAT) -> Any:
    return h.make_tensor_value_info("images", kind, list(sizes))


@pytest.mark.parametrize(("nodes", "options", "message"), [
    ([h.make_node("Identity", ["images"], ["logits"])], {}, "a number for each of its 3 classes"),
    ([h.make_node("ReduceMean", ["images"], ["logits"], axes=[0, 2, 3])], {}, "for 1 images"),
    ([*three()[:1], h.make_node("Cast", ["m"], ["logits"], to=T.INT64)],
     {"outputs": [h.make_tensor_value_info("logits", T.INT64, None)]}, "got int64"),
    ([*three()[:1], h.make_node("SequenceConstruct", ["m"], ["logits"])],
     {"outputs": [h.make_tensor_sequence_value_info("logits", T.FLOAT, None)]}, "a number for"),
    (three("Log"), {}, "gives NaN or infinity"),
    ([h.make_node("Flatten", ["images"], ["logits"])], {"given": shape("b", 3, 8)}, "takes inputs"),
    (three(), {"given": shape(0, 3, 8, 8)}, "takes inputs of shape"),
    (three(), {"given": shape("b", 3, 8, 16)}, "takes inputs of shape"),
    (three(), {"given": shape("b", 3, 8, 8, kind=T.DOUBLE),
               "outputs": [h.make_tensor_value_info("logits", T.DOUBLE, None)]}, "cannot run"),
])  # fmt: skip
def test_outputs_are_what_the_labels_say(
    nodes: list[Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "x.onnx", nodes, **options)
    black = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ExportError, match=message):
        Classifier(path, provider="cpu").classify([black])
