"""The price list of hidden units."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from npprune.errors import UsageError
from npprune.export.widths import WidthLatency, _mlp, measure_width_latency


def test_wider_costs_more():
    table = measure_width_latency(64, [2048, 16, 2048], tokens=65, batch=2, threads=1, runs=12)
    assert table.widths == [16, 2048]
    assert 0 < table.ms[0] < table.ms[1]
    assert (table.tokens, table.embed_dim, table.batch, table.threads) == (65, 64, 2, 1)
    assert table.provider == "CPUExecutionProvider"


def test_the_timed_graph_is_an_mlp():
    proto = _mlp(6, 9, np.random.default_rng(1))
    weights = {t.name: np.frombuffer(t.raw_data, np.float32) for t in proto.graph.initializer}
    w1, w2 = weights["w1"].reshape(6, 9), weights["w2"].reshape(9, 6)
    x = np.random.default_rng(2).standard_normal((2, 4, 6), dtype=np.float32)
    from scipy.special import erf

    hidden = x @ w1 + weights["b1"]
    expected = (hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))) @ w2 + weights["b2"]
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert np.abs(session.run(None, {"x": x})[0] - expected).max() < 1e-6


def test_between_and_beyond_the_measured_widths():
    table = WidthLatency([100, 200, 400], [1.0, 2.0, 3.0], [0.0] * 3, 1, 1, 1, 1, "cpu")
    assert table.at(100) == 1.0
    assert table.at(150) == 1.5
    assert table.at(300) == 2.5
    assert table.at(600) == 4.0
    assert table.at(50) == 1.0


@pytest.mark.parametrize("widths", [[], [0, 16]])
def test_widths_must_be_positive(widths):
    with pytest.raises(UsageError, match="`widths` must be positive"):
        measure_width_latency(8, widths, tokens=4)
