"""What a hidden unit costs in milliseconds: one block's MLP, timed at several widths.

A table for budgets in measured latency. The layers are built directly, as ONNX graphs or modules,
so nothing has to be pruned or exported to know what a width would cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npprune.errors import UsageError
from npprune.export.bench import interleave, quantile
from npprune.export.runtimes import RUNTIMES, Runtime, Served
from npprune.files import scratch

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from torch import nn


WARMUP = 3  # runs of each width before any is timed


@dataclass(frozen=True)
class WidthLatency:
    """Milliseconds of one MLP [b x t, d] at each width, medians of interleaved runs."""

    widths: list[int]
    ms: list[float]
    iqr_ms: list[float]
    tokens: int
    embed_dim: int
    batch: int
    threads: int
    provider: str

    def at(self, width: int) -> float:
        """Milliseconds at any width, linear between the measured ones and beyond them; never
        below the time of the smallest."""
        pairs = list(zip(self.widths, self.ms, strict=True))
        if len(pairs) == 1:
            return pairs[0][1]
        upper = next((i for i, (w, _) in enumerate(pairs) if w >= width), len(pairs) - 1)
        (w0, t0), (w1, t1) = pairs[max(upper, 1) - 1], pairs[max(upper, 1)]
        return max(t0 + (t1 - t0) * (width - w0) / (w1 - w0), min(self.ms))


def measure_width_latency(
    embed_dim: int,
    widths: Sequence[int],
    *,
    tokens: int,
    batch: int = 1,
    threads: int | None = None,
    provider: str = "cpu",
    runs: int | None = None,
    min_seconds: float = 1.0,
    runtime: Runtime = RUNTIMES["onnxruntime"],
) -> WidthLatency:
    """Time fc1 -> GELU -> fc2 on [batch, tokens, embed_dim] for each hidden width.

    `runs` rounds, each running every width once; None: at least 10, until `min_seconds` times the
    number of widths have gone by. Weights are noise: the time does not depend on them.
    """
    sizes = sorted(set(widths))
    if not sizes or sizes[0] < 1:
        raise UsageError(f"`widths` must be positive, got {list(widths)}")
    if min(embed_dim, tokens, batch) < 1:
        raise UsageError("`embed_dim`, `tokens` and `batch` must be at least 1")
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, tokens, embed_dim), dtype=np.float32)
    with scratch() as folder:
        opened = []
        for h in sizes:
            if runtime.takes_files:
                path = folder / f"mlp_{h}.onnx"
                path.write_bytes(_mlp(embed_dim, h, rng).SerializeToString())
                served = Served(file=lambda _, path=path: path)  # type: ignore[misc]
            else:
                served = Served(_module(embed_dim, h))
            # Idle threads of the other widths' sessions must not hold the cores.
            opened.append(runtime.open(served, x, place=provider, threads=threads, timed=False))
        calls = [o.bind(x) for o in opened]
        times = interleave(calls, WARMUP, runs, min_seconds * len(sizes))
    return WidthLatency(
        widths=sizes,
        ms=[quantile(t, 0.5) for t in times],
        iqr_ms=[quantile(t, 0.75) - quantile(t, 0.25) for t in times],
        tokens=tokens,
        embed_dim=embed_dim,
        batch=batch,
        threads=opened[0].threads,
        provider=opened[0].provider,
    )


def _module(d: int, h: int) -> nn.Module:
    """fc1 -> GELU -> fc2 for PyTorch. The generator of random numbers is left as it was."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))


def _mlp(d: int, h: int, rng: np.random.Generator) -> onnx.ModelProto:
    """fc1 -> GELU -> fc2 on x [b, t, d], in the operators that an exported block has."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    sizes = {"w1": (d, h), "b1": (h,), "w2": (h, d), "b2": (d,)}
    weights = [
        numpy_helper.from_array(0.02 * rng.standard_normal(s, dtype=np.float32), name)
        for name, s in sizes.items()
    ]
    shape: list[str | int | None] = ["batch", "tokens", d]
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["m1"]),
            helper.make_node("Add", ["m1", "b1"], ["a1"]),
            helper.make_node("Gelu", ["a1"], ["g"]),
            helper.make_node("MatMul", ["g", "w2"], ["m2"]),
            helper.make_node("Add", ["m2", "b2"], ["y"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
