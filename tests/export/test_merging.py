"""Networks that merge tokens, exported: the same network in every format and precision."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from npprune.export.archive import to_torch_archive
from npprune.export.checked import Comparison, export_checked
from npprune.export.graph import tidy
from npprune.export.onnx import Int8Needs, OnnxForm, export_onnx
from npprune.export.parity import top1_score
from npprune.models.tokens import apply_tokens
from tests.export.test_onnx import CLASSES, PREPROCESSING, images, tiny

__all__ = ["images"]


@pytest.fixture(scope="module")
def merging() -> nn.Module:
    """Merges 3 of 16 patches; the last block computes the class token alone."""
    return apply_tokens(tiny(depth=2), [3, 0], last=True)


def test_onnx_agrees_at_every_batch_size(merging, images, tmp_path: Path) -> None:
    record = export_checked(
        merging, PREPROCESSING, CLASSES, tmp_path / "m.onnx", Comparison(images)
    )
    assert [row.batch for row in record.parity] == [1, 3, 17]
    assert all(row.max_relative_error < 1e-5 for row in record.parity)
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert not [kind for kind in kinds if "Scatter" in kind or kind in ("NonZero", "Loop", "If")]
    assert kinds["TopK"] == 2


@pytest.mark.slow
def test_onnx_of_an_average_pooled_network(images, tmp_path: Path) -> None:
    model = apply_tokens(tiny(global_pool="avg", depth=2), [3, 2])
    record = export_checked(model, PREPROCESSING, CLASSES, tmp_path / "m.onnx", Comparison(images))
    assert all(row.max_relative_error < 1e-5 for row in record.parity)


def test_half_precision(merging, images, tmp_path: Path) -> None:
    record = export_checked(
        merging, PREPROCESSING, CLASSES, tmp_path / "m.onnx", Comparison(images),
        OnnxForm(precision="fp16"),
    )  # fmt: skip
    assert record.passed


def test_eight_bits(merging, images, tmp_path: Path) -> None:
    labels = merging(images).argmax(1)
    made = export_onnx(
        merging, PREPROCESSING, CLASSES, tmp_path / "m.onnx", OnnxForm(precision="int8"),
        int8=Int8Needs(images, top1_score(images, labels, PREPROCESSING)),
    )  # fmt: skip
    assert len(made) > 1
    assert max(c.score for c in made) > 0.5


@pytest.mark.slow
def test_torch_archive(merging, images, tmp_path: Path) -> None:
    record = to_torch_archive(merging, PREPROCESSING, CLASSES, images, tmp_path / "m.pt2")
    assert all(row.max_relative_error < 1e-5 for row in record.parity)


def test_constants_of_one_value_and_other_shapes_stay_apart() -> None:
    values = {"a": [1, 2], "b": [[1], [2]], "c": [[1], [2]]}
    tensors = [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in values.items()]
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["d"]), helper.make_node("Add", ["c", "d"], ["y"])],
        "g", [], [helper.make_tensor_value_info("y", TensorProto.INT64, [2, 2])], tensors,
    )  # fmt: skip
    proto = helper.make_model(graph)
    tidy(proto, set())
    shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
    assert shapes == {"const.int64.1_2": [2], "const.int64.1_2_": [2, 1]}
    first, second = proto.graph.node
    assert list(first.input) == ["const.int64.1_2", "const.int64.1_2_"]
    assert second.input[0] == "const.int64.1_2_"
