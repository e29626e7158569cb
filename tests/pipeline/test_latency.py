"""A latency as the budget: the price list, what is chosen within it, and what is said after."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from npprune.budget import Budget
from npprune.core.compression.selection import Ranking, select, smooth, widths_for
from npprune.errors import GateError, UsageError
from npprune.export.widths import WidthLatency
from npprune.models.info import model_info, state
from npprune.models.load import create
from npprune.pipeline.common.work import Work
from npprune.pipeline.demo.training import ARCHITECTURE, MODEL_ARGS, PREPROCESSING
from npprune.pipeline.prune import latency as timing
from npprune.pipeline.prune.latency import (
    LatencySearch,
    LatencyTable,
    build_table,
    correct,
    outcome,
)
from npprune.pipeline.prune.stage import prune
from npprune.recipe import DataSection, ModelSection, PruneSection, check
from npprune.records import CheckpointConfig, ClassInfo, Latency, ModelSource
from npprune.store.checkpoints import read_config, write_checkpoint

FIXED, LEVEL = 3.0, 1.25  # of the network below: what no width changes, and how much slower an
# MLP is inside the network than alone
WIDTHS = [64, 64, 48]
ALONE = WidthLatency([16, 32, 64], [0.5, 0.9, 2.3], [0.0] * 3, 17, 32, 1, 2, "cpu")


def pair(dense: float, pruned: float, spread: float = 0.0) -> Latency:
    low, high = pruned / dense * (1 - spread), pruned / dense * (1 + spread)
    return Latency("onnxruntime", "cpu", 1, 2, 10, dense, pruned, spread * dense, spread * pruned,
                   pruned / dense, low, high)  # fmt: skip


def ms(amount: float) -> Budget:
    return Budget("latency", amount)


def ranking(scores: list[torch.Tensor]) -> Ranking:
    return Ranking(scores, round_to=8, min_keep=8)


def true_ms(widths: Sequence[int]) -> float:
    return FIXED + LEVEL * sum(ALONE.at(w) for w in widths)


def a_table(error: float = 1.0) -> LatencyTable:
    """The price list of that network; `error`: on the first whole network timed."""
    allowed = [widths_for(h, 8, 8) for h in WIDTHS]
    return build_table(
        ALONE, allowed, WIDTHS, lambda narrow: pair(true_ms(WIDTHS), error * true_ms(narrow))
    )


def test_the_level_of_the_prices_is_that_of_whole_networks() -> None:
    table = a_table()
    assert table.dense_ms == pytest.approx(true_ms(WIDTHS))
    assert table.level == pytest.approx(LEVEL)
    assert table.fixed_ms == pytest.approx(FIXED, rel=1e-3)
    for widths in ([16, 16, 16], [64, 8, 40], WIDTHS):
        assert table.fixed_ms + table.hidden_ms(widths) == pytest.approx(true_ms(widths), rel=1e-3)
    assert table.warnings == []


def test_a_share_up_to_one_and_milliseconds_above() -> None:
    table = a_table()
    dense = table.dense_ms
    assert table.budget(ms(0.7)) == pytest.approx(0.7 * dense - table.fixed_ms)
    assert table.budget(ms(0.7 * dense)) == pytest.approx(table.budget(ms(0.7)))
    assert table.budget(ms(10 * dense)) == table.budget(ms(1.0)) == table.hidden_ms(WIDTHS)


def test_a_target_below_what_remains_is_refused() -> None:
    with pytest.raises(GateError, match="every block at its least width") as caught:
        a_table().budget(ms(0.1))
    assert "`min_keep`" in str(caught.value.hint)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [0.55, 0.7, 0.9])
def test_measured_selection_within_a_latency_is_the_best_there_is(seed: int, target: float) -> None:
    table = a_table()
    g = torch.Generator().manual_seed(seed)
    scores = [torch.rand(h, generator=g) for h in WIDTHS]
    harm = [
        {w: float(torch.rand(1, generator=g)) * 3 ** (-w / 16) for w in (16, 24, 32, 40)} | {h: 0.0}
        for h in WIDTHS
    ]
    found = select(
        ranking(scores), table.budget(ms(target)), method="measured", prices=table.prices,
        harm=harm,
    )  # fmt: skip
    choices = [list(row) for row in table.prices]
    filled = [smooth(row, ws) for row, ws in zip(harm, choices, strict=True)]
    within = [
        widths for widths in itertools.product(*choices)
        if table.hidden_ms(widths) <= table.budget(ms(target)) * (1 + 1e-12)
    ]  # fmt: skip
    best = min(sum(f[w] for f, w in zip(filled, widths, strict=True)) for widths in within)
    assert found.harm == pytest.approx(best, rel=1e-12)
    assert table.fixed_ms + table.hidden_ms(found.widths) <= target * table.dense_ms * (1 + 1e-9)


@pytest.mark.parametrize("target", [0.55, 0.7, 0.9, 1.0])
def test_uniform_selection_takes_the_largest_share_within_the_latency(target: float) -> None:
    table = a_table()
    budget = table.budget(ms(target))
    scores = [torch.rand(h) for h in WIDTHS]
    found = select(ranking(scores), budget, method="uniform", prices=table.prices).widths
    assert table.hidden_ms(found) <= budget * (1 + 1e-9)
    share = max(w / h for w, h in zip(found, WIDTHS, strict=True))
    wider = [min(h, -(-(share * h + 1e-6) // 8) * 8) for h in WIDTHS]
    if found != WIDTHS:
        assert table.hidden_ms([int(w) for w in wider]) > budget or share == 1


@pytest.mark.parametrize("error", [0.8, 1.2])
def test_a_wrong_level_is_corrected_at_the_widths_chosen(error: float) -> None:
    table = a_table(error)
    assert abs(table.level / LEVEL - 1) > 0.1
    scores = [torch.rand(h) for h in WIDTHS]

    def widths_at(budget: float) -> list[int]:
        return select(ranking(scores), budget, prices=table.prices).widths

    timed = []

    def whole(widths: Sequence[int]) -> Latency:
        timed.append(list(widths))
        return pair(true_ms(WIDTHS), true_ms(widths))

    correct(table, ms(0.75), widths_at, whole)
    assert table.level == pytest.approx(LEVEL)
    assert len(timed) == 2
    assert true_ms(widths_at(table.budget(ms(0.75)))) <= 0.75 * true_ms(WIDTHS) * (1 + 1e-3)
    correct(table, ms(0.75), widths_at, whole)  # nothing is left to correct
    assert len(timed) == 3


def test_noise_in_the_table_never_makes_a_wider_block_cheaper() -> None:
    noisy = WidthLatency([16, 32, 64], [0.9, 0.5, 2.0], [0.0] * 3, 17, 32, 1, 2, "cpu")
    table = build_table(noisy, [[16, 32, 48, 64]], [64], lambda narrow: pair(4.0, 3.0))
    assert sorted(table.prices[0].values()) == list(table.prices[0].values())


def test_a_machine_on_which_narrower_is_not_faster_is_said_to_be_one() -> None:
    table = build_table(ALONE, [[16, 32, 64]], [64], lambda narrow: pair(4.0, 4.2))
    assert table.level == 1.0
    assert "narrower blocks are not faster" in table.warnings[0]


def test_within_five_percent_nothing_is_said() -> None:
    table = a_table()
    widths = [32, 24, 24]
    target = (table.fixed_ms + table.hidden_ms(widths)) / table.dense_ms
    record, warnings = outcome(table, ms(target), widths, pair(10.0, 10.0 * target * 1.03))
    assert warnings == []
    assert record["achieved_share"] == pytest.approx(target * 1.03)
    assert record["measured"]["dense_ms"] == 10.0


def test_what_is_missed_by_more_is_explained() -> None:
    table = a_table()
    widths = [32, 24, 24]
    near = (table.fixed_ms + table.hidden_ms(widths)) / table.dense_ms
    _, (said,) = outcome(table, ms(near * 1.2), widths, pair(10.0, 10.0 * near))
    assert "the widths allowed come no nearer than -16.7%" in said
    _, (said,) = outcome(table, ms(near), widths, pair(10.0, 11.5 * near))
    assert "(+15.0%)" in said
    assert "do not add up" in said
    _, (said,) = outcome(table, ms(near), widths, pair(10.0, 11.5 * near, spread=0.5))
    assert "busy or noisy" in said


def test_not_faster_than_dense_comes_first() -> None:
    _, warnings = outcome(a_table(), ms(0.6), [32, 24, 24], pair(10.0, 10.5))
    assert warnings[0].startswith("the pruned network is not faster than the dense one")


@pytest.mark.slow
def test_a_real_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {**MODEL_ARGS, "depth": 1, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 16}
    model = create(ARCHITECTURE, args)
    info = model_info(model, ModelSource(ARCHITECTURE, args))
    dense = tmp_path / "dense"
    write_checkpoint(
        dense,
        CheckpointConfig(
            source=info.source, widths=info.widths, heads=info.heads, num_classes=10,
            preprocessing=PREPROCESSING, classes=[ClassInfo(i, str(i)) for i in range(10)],
            weights_sha256="",
        ),
        state(model),
    )  # fmt: skip
    monkeypatch.setattr(timing, "WIDTH_SECONDS", 0.02)
    monkeypatch.setattr(timing, "PAIR_SECONDS", 0.2)
    settings = PruneSection(
        target_latency=0.7, latency_batch=32, latency_threads=1, criterion="magnitude",
        selection="uniform", compensation="none", calibration_images=20, round_to=64,
    )  # fmt: skip
    data = DataSection(calibration="digits:calibration")
    variant = prune(ModelSection(name=str(dense)), data, settings, tmp_path / "half")
    record = read_config(tmp_path / "half").prune.details["latency"]
    assert record["asked_share"] == 0.7
    assert record["measured"]["batch"] == 32
    assert sum(variant.prune.widths) < sum(variant.prune.dense_widths)
    assert set(map(int, record["alone_ms"])) >= {64, 512}


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_any_runtime_is_the_clock(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create(ARCHITECTURE, {**MODEL_ARGS, "depth": 1, "embed_dim": 32, "num_heads": 2})
    monkeypatch.setattr(timing, "PAIR_SECONDS", 0.0)
    model.train()
    with timing.DenseTimer(model, PREPROCESSING, batch=2, threads=1, runtime=runtime) as timer:
        found = timer.against(model)
    assert (found.runtime, found.batch, found.threads) == (runtime, 2, 1)
    assert model.training  # it was a copy that ran


def searched(target: float, ratio: Callable[[float], float]) -> tuple[LatencySearch, list[float]]:
    """A search on a machine where a share of the MACs takes so much of the dense latency; the
    networks that it timed."""
    seen: list[float] = []

    class Timer:
        def against(self, share: float) -> Latency:
            seen.append(share)
            return pair(8.0, 8.0 * ratio(share))

    found = LatencySearch.__new__(LatencySearch)
    found.target, found.work, found.tried = ms(target), Work(), []
    found.timer = Timer()  # type: ignore[assignment]
    return found, seen


@pytest.mark.parametrize("target", [0.6, 0.3, 0.9, 0.6 * 8.0])
@pytest.mark.parametrize("curve", [1.0, 1.5, 0.8])
def test_macs_are_found_that_take_the_time(target: float, curve: float) -> None:
    def ratio(share: float) -> float:
        return 0.2 + 0.8 * share**curve

    search, seen = searched(target, ratio)
    share = search.macs(1.0, 0.05, lambda macs: macs)  # type: ignore[arg-type,return-value]
    asked = target if target <= 1 else target / 8.0
    assert ratio(share) <= 1.02 * asked
    assert ratio(share) == pytest.approx(asked, rel=0.05)
    assert len(seen) <= 6
    assert all(0.05 <= s <= 1 for s in seen)


def test_a_latency_that_no_network_takes_ends_the_search_at_once() -> None:
    search, seen = searched(0.6, lambda share: 0.8 + 0.2 * share)
    with pytest.raises(
        GateError, match=r"60\.0% of .* below the 82\.0% .* takes \(dense"
    ) as caught:
        search.macs(1.0, 0.1, lambda macs: macs)  # type: ignore[arg-type,return-value]
    assert seen == [0.6, 0.1]
    assert "min_keep" in str(caught.value.hint)
    search, seen = searched(0.6, lambda share: 1.5 - 0.3 * share)  # merging costs, and saves less
    with pytest.raises(GateError, match=r"147\.0% .* and the 132\.0% with 60\.0% of") as caught:
        search.macs(1.0, 0.1, lambda macs: macs)  # type: ignore[arg-type,return-value]
    assert "latency_batch" in str(caught.value.hint)
    search, seen = searched(0.3, lambda share: 0.8 + 0.2 * share)
    with pytest.raises(GateError, match="smallest network allowed"):
        search.macs(1.0, 0.4, lambda macs: macs)  # type: ignore[arg-type,return-value]
    assert seen == [0.4]  # the least is the first


def test_one_budget() -> None:
    with pytest.raises(UsageError, match="`keep` and `target_latency`"):
        check(PruneSection(keep=0.5, target_latency=0.5))
