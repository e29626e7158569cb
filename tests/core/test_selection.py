"""Selection against brute force, and what its budgets, floors and warnings promise."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from npprune.core.compression import selection, solver
from npprune.core.compression.solver import Item
from npprune.errors import GateError, UsageError


def brute_force(
    harm: list[dict[int, float]], price: list[dict[int, float]], budget: float
) -> float:
    best = math.inf
    for pick in itertools.product(*[sorted(row) for row in harm]):
        if sum(p[w] for p, w in zip(price, pick, strict=True)) <= budget:
            best = min(best, sum(h[w] for h, w in zip(harm, pick, strict=True)))
    return best


def solve_tables(harm: Any, prices: Any, budget: float) -> list[Any]:
    return solver.solve([Item(h, p) for h, p in zip(harm, prices, strict=True)], budget)


def chosen(scores: list[Tensor], budget: float, **more: Any) -> selection.Selection:
    names = ("protected", "votes", "round_to", "min_keep")
    ranking = selection.Ranking(scores, **{k: more.pop(k) for k in names if k in more})
    return selection.select(ranking, budget, **more)


@pytest.mark.parametrize("seed", range(8))
def test_solve_is_exact_for_any_price(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    harm, price = [], []
    for _ in range(5):
        widths = sorted(torch.randperm(20, generator=g)[:5].tolist())
        values = torch.rand(5, generator=g).tolist()  # not monotone on purpose
        harm.append(dict(zip(widths, values, strict=True)))
        # latencies: no common unit, not even monotone
        price.append(dict(zip(widths, (torch.rand(5, generator=g) + 0.1).tolist(), strict=True)))
    budget = 2.0
    taken = solve_tables(harm, price, budget)
    assert sum(p[w] for p, w in zip(price, taken, strict=True)) <= budget
    got = sum(h[w] for h, w in zip(harm, taken, strict=True))
    assert got == pytest.approx(brute_force(harm, price, budget), abs=1e-12)


def test_solve_with_rounded_prices_stays_within_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "STATES", 10)
    g = torch.Generator().manual_seed(3)
    harm = [dict(enumerate(torch.rand(4, generator=g).sort(descending=True).values.tolist()))] * 6
    price = [
        dict(enumerate((torch.rand(4, generator=g).cumsum(0) + 0.1).tolist())) for _ in range(6)
    ]
    taken = solve_tables(harm, price, 5.0)
    assert sum(p[w] for p, w in zip(price, taken, strict=True)) <= 5.0
    got = sum(h[w] for h, w in zip(harm, taken, strict=True))
    assert got == pytest.approx(brute_force(harm, price, 5.0), abs=1e-3)


def test_solve_refuses_an_impossible_budget() -> None:
    with pytest.raises(GateError, match="the smallest widths allowed cost 32, and the budget is 8"):
        solve_tables([{16: 1.0, 32: 0.0}] * 2, [{16: 16.0, 32: 32.0}] * 2, 8)


def test_uniform_keeps_the_best_in_every_block() -> None:
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(64, generator=g), torch.randn(96, generator=g)]
    got = chosen(scores, 80, round_to=16, min_keep=16)
    assert got.widths == [32, 48]
    assert got.achieved == 80
    assert got.total == 160
    assert got.warnings == []
    for kept, score in zip(got.keep, scores, strict=True):
        assert kept == sorted(kept)
        assert min(score[kept]) >= max(score[[i for i in range(len(score)) if i not in kept]])


def test_widths_round_up_never_above_the_width_and_say_so() -> None:
    got = chosen([torch.arange(40.0)], 33, round_to=16)
    assert got.widths == [40]
    assert "+21.2%" in got.warnings[0]
    assert selection.widths_for(40, 16, 17) == [32, 40]
    assert selection.widths_for(8, 16, 16) == [8]
    assert selection.round_up(0.7 * 160, 16, 160) == 112


def test_global_minimises_the_removed_score_exactly() -> None:
    g = torch.Generator().manual_seed(1)
    scores = [torch.rand(12, generator=g), 3 * torch.rand(12, generator=g)]
    got = chosen(scores, 12, method="global", round_to=1, min_keep=1)
    pooled = torch.cat(scores).topk(12).indices.tolist()
    assert got.keep == [
        sorted(i for i in pooled if i < 12),
        sorted(i - 12 for i in pooled if i >= 12),
    ]
    dear = chosen(scores, 24, method="global", round_to=1, min_keep=1, prices=[1, 4])
    assert dear.achieved <= 24
    assert dear.widths[1] < got.widths[1]


def test_measured_follows_the_table_and_interpolates() -> None:
    scores = [torch.arange(64.0)] * 3
    harm = [{16: 1.0, 64: 0.01}, {16: 0.02, 64: 0.01}, {16: 1.0, 64: 0.01}]
    got = chosen(scores, 96, method="measured", harm=harm, round_to=16)
    assert got.widths in ([32, 16, 48], [48, 16, 32])
    rows = [selection.interpolate(r, [16, 32, 48, 64]) for r in harm]
    price = [{w: float(w) for w in r} for r in rows]
    assert got.harm == pytest.approx(brute_force(rows, price, 96))
    middle = selection.interpolate({16: 1.0, 64: 0.01}, [40])[40]
    assert middle == pytest.approx(0.1)
    noisy = selection.interpolate({16: 1.0, 32: 0.1, 48: 0.2, 64: 0.0}, [16, 32, 40, 56, 64, 80])
    assert noisy == pytest.approx({16: 1.0, 32: 0.2, 40: 0.2, 56: 0.1, 64: 0.0, 80: 0.0})
    below = selection.interpolate({32: 0.1, 48: 0.01, 64: 0.0}, [16, 24, 32])
    assert below == pytest.approx({16: 1.0, 24: 10**-0.5, 32: 0.1})
    assert selection.interpolate({32: 0.5}, [16, 32, 64]) == {16: 0.5, 32: 0.5, 64: 0.5}


def test_smoothing_takes_noise_out_and_keeps_a_true_parabola() -> None:
    true = {w: math.exp(-1 - w / 20 - (w / 40) ** 2) for w in range(16, 96, 8)}
    got = selection.smooth({w: true[w] for w in (16, 32, 48, 64, 80)}, list(true))
    assert got == pytest.approx(true)
    g = torch.Generator().manual_seed(0)
    noisy = {w: h * math.exp(float(torch.randn(1, generator=g)) * 0.3) for w, h in true.items()}
    smoothed = selection.smooth({**noisy, 96: 0.0}, [*true, 96])
    values = [smoothed[w] for w in sorted(smoothed)]
    assert values == sorted(values, reverse=True)
    assert smoothed[96] == 0.0
    toward = selection.smooth({**{w: true[w] for w in (16, 32, 48, 64)}, 80: 0.0}, [64, 72, 80])
    assert toward == pytest.approx({64: true[64], 72: true[64] / 2, 80: 0.0})

    def wrong(row: dict[int, float]) -> float:
        return sum(math.log(row[w] / true[w]) ** 2 for w in true)

    assert wrong(smoothed) < wrong(noisy) / 2
    few = {16: 1.0, 32: 0.1, 64: 0.0}
    assert selection.smooth(few, [24]) == selection.interpolate(few, [24])


def test_protected_neurons_stay_or_are_trimmed_by_votes_with_a_warning() -> None:
    scores = [torch.arange(64.0), torch.arange(64.0)]
    protected = [[0, 1, 2], []]
    got = chosen(scores, 64, protected=protected)
    assert got.keep[0] == [0, 1, 2, *range(35, 64)]
    votes = [torch.arange(64.0, 0, -1), torch.zeros(64)]
    many = chosen(scores, 32, protected=[list(range(40)), []], votes=votes)
    assert many.keep[0] == list(range(16))
    assert many.warnings == [
        "block 0: 40 protected neurons exceed its width of 16; the 24 with the fewest votes go"
    ]
    spared = chosen(scores, 64, method="global", protected=[list(range(40)), []], votes=votes)
    assert spared.widths == [48, 16]  # the budget can hold them, so the block gets the room
    assert set(range(40)) <= set(spared.keep[0])


def test_ties_are_broken_by_index() -> None:
    assert chosen([torch.zeros(32)], 16).keep == [list(range(16))]


def test_refusals() -> None:
    scores = [torch.arange(32.0)]
    with pytest.raises(UsageError, match="got `best`"):
        chosen(scores, 16, method="best")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="harm table"):
        chosen(scores, 16, method="measured")
    with pytest.raises(UsageError, match=r"in \(0, 32\], got 33"):
        chosen(scores, 33)
    with pytest.raises(UsageError, match="NaN"):
        chosen([torch.full((32,), math.nan)], 16)
    with pytest.raises(UsageError, match=r"block 0 must lie in 0\.\.31"):
        chosen(scores, 16, protected=[[32]])
    with pytest.raises(UsageError, match="lack width 16"):
        chosen(scores, 16, prices=[{32: 1.0}])
    with pytest.raises(GateError, match="cost 16, and the budget is 8"):
        chosen(scores, 8, method="global")


def test_harm_that_tells_nothing_apart_leaves_the_budget_spent_evenly() -> None:
    scores = [torch.arange(64.0)] * 3
    flat = [{16: 0.0, 32: 0.0, 64: 0.0}] * 3
    found = chosen(scores, 96, method="measured", harm=flat)
    assert found.widths == [32, 32, 32]
    half = [flat[0], {16: 1.0, 32: 0.5, 64: 0.0}, flat[2]]
    found = chosen(scores, 128, method="measured", harm=half)
    assert found.widths == [32, 64, 32]
    options = [{1: 0.0, 2: 0.0}], [{1: 10.0, 2: 20.0}]
    others = [[Item(h, p) for h, p in zip(*options, strict=True)]]
    found = chosen(scores, 116, method="measured", harm=flat, others=others)
    assert (found.widths, found.others) == ([32, 32, 32], [[2]])
