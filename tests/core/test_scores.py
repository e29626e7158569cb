"""Every criterion against its formula, and what combinations promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npprune.core.compression.scores import Context, score
from npprune.core.compression.statistics import Statistics, collect_statistics
from npprune.criteria import CRITERIA, Criterion
from npprune.errors import UsageError
from tests.core.test_statistics import data, in_batches, seeded, tiny_view

NAMES = [
    "random", "magnitude", "activation", "variance", "variance-weight", "wanda", "taylor",
    "fisher", "path-votes", "path-attribution", "obs", "curvature-obs",
]  # fmt: skip


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    return collect_statistics(tiny_view(), in_batches(data()[0], 5), generator=seeded())


def context(statistics: Statistics, **over: Any) -> Context:
    view = tiny_view()
    g = torch.Generator().manual_seed(0)
    fields: dict[str, Any] = {
        "second": [view.fc2(l) for l in range(3)],
        "first": [view.first(l) for l in range(3)],
        "sums": statistics,
        "path_votes": [torch.randint(5, (24,), generator=g) for _ in range(3)],
        "path_scores": [torch.rand(24, generator=g) for _ in range(3)],
        "generator": torch.Generator().manual_seed(4),
    }
    return Context(**(fields | over))


def test_scores_match_their_formulas(statistics: Statistics) -> None:
    ctx, l = context(statistics), 1
    m, w = statistics.moments(l), ctx.second[l].weight
    v = m.covariance.diagonal()
    assert ctx.first is not None
    expected: dict[str, Tensor] = {
        "magnitude": w.norm(dim=0) * ctx.first[l][0].weight.norm(dim=1),
        "activation": m.mean_absolute,
        "variance": v,
        "variance-weight": (w**2).sum(0) * v,
        "wanda": (w.abs() * (v + m.mean**2).sqrt()).sum(0),
        "taylor": statistics.taylor(l),
        "fisher": statistics.fisher(l),
        "path-votes": ctx.votes(l).double(),  # type: ignore[index]
        "path-attribution": ctx.attribution(l).double(),  # type: ignore[index]
    }
    for name, values in expected.items():
        torch.testing.assert_close(score(name, ctx)[l], values)


@pytest.mark.parametrize(
    ("given", "said"),
    [(None, "got NoneType"), (torch.zeros(3), r"got a tensor of \[3\]"),
     (torch.full((24,), torch.nan), "got NaN"), ([1.0] * 24, "got list")],
)  # fmt: skip
def test_what_is_no_score_for_each_unit_is_refused(
    given: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA, "x", Criterion("x", lambda context, l: given, (), "a test"))
    with pytest.raises(UsageError, match=r"`x` must give a score for each of the 24 .*" + said):
        score("x", context(None))  # type: ignore[arg-type]


def test_a_tensor_of_a_criterions_own_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.arange(24).double()
    monkeypatch.setitem(CRITERIA, "x", Criterion("x", lambda context, l: own, (), "a test"))
    (found,) = score("x", context(None, protected=[[0, 1]] * 3), [1])  # type: ignore[arg-type]
    assert found[:2].min() > found[2:].max()
    assert torch.equal(own, torch.arange(24).double())


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_all_it_reads(name: str) -> None:
    needs = CRITERIA[name].needs
    stats = None
    if needs:
        stats = collect_statistics(
            tiny_view(), in_batches(data()[0], 5), needs=needs, generator=seeded()
        )
    scores = score(name, context(stats))  # type: ignore[arg-type]
    assert [s.shape for s in scores] == [(24,)] * 3
    assert all(s.dtype == torch.float64 and bool(torch.isfinite(s).all()) for s in scores)


@pytest.mark.parametrize("name", NAMES)
def test_protected_neurons_stand_above_all_others(name: str, statistics: Statistics) -> None:
    plain = score(name, context(statistics))
    weakest = [s.argsort()[:4].tolist() for s in plain]
    guarded = score(name, context(statistics, protected=weakest))
    for s, fixed in zip(guarded, weakest, strict=True):
        assert set(s.topk(4).indices.tolist()) == set(fixed)


def test_a_prior_moves_neurons_up(statistics: Statistics) -> None:
    votes = [torch.zeros(24) for _ in range(3)]
    votes[0][5] = 1
    prior = [1 + 1e6 * v.double() for v in votes]
    for name in ("variance", "curvature-obs"):
        assert int(score(name, context(statistics, prior=prior))[0].argmax()) == 5


def test_gated_first_layers_have_two_rows_a_neuron() -> None:
    first, second = nn.Linear(4, 12), nn.Linear(6, 4)
    got = score("magnitude", Context([second], first=[[first]]))[0]
    gate, value = nn.Linear(4, 6), nn.Linear(4, 6)
    with torch.no_grad():
        gate.weight.copy_(first.weight[:6])
        value.weight.copy_(first.weight[6:])
    apart = score("magnitude", Context([second], first=[[gate, value]]))[0]
    torch.testing.assert_close(apart, got)
    rows = (first.weight[:6].norm(dim=1) ** 2 + first.weight[6:].norm(dim=1) ** 2).sqrt()
    torch.testing.assert_close(got, (rows * second.weight.norm(dim=0)).double())


def test_refusals(statistics: Statistics) -> None:
    with pytest.raises(UsageError, match="got `vote`"):
        score("vote", context(statistics))
    with pytest.raises(UsageError, match="none were given"):
        score("variance", context(None))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="needs a run with paths"):
        score("path-votes", context(statistics, path_votes=None))
    with pytest.raises(UsageError, match="needs a generator"):
        score("random", context(statistics, generator=None))
    with pytest.raises(UsageError, match="before the hidden units"):
        score("magnitude", context(statistics, first=None))
