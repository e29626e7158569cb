"""Path neurons in a smaller network: as many as cost nothing, all that fit, or none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from npprune.core.compression.selection import Selection
from npprune.core.metrics import divergence
from npprune.errors import UsageError
from npprune.models.info import model_sizes
from npprune.models.view import make_view
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.measuring import (
    Measured,
    Paths,
    PlanSettings,
    Subject,
    measure,
    prepared,
)
from npprune.pipeline.prune.path_neurons import SHARES, held, with_path_neurons
from npprune.pipeline.prune.planning import amount, choose
from npprune.recipe import PruneSection, check
from tests.helpers.tiny import tiny_batch, tiny_vit


def measured_of(votes: list[Tensor], **more: object) -> tuple[Measured, PlanSettings, Selection]:
    """A tiny network with paths through the neurons that have votes."""
    model = tiny_vit(embed_dim=32, num_heads=2, depth=2)
    images, _ = tiny_batch(40)
    union = [v.nonzero()[:, 0].tolist() for v in votes]
    asked = PlanSettings.of(PruneSection(**{"keep": 0.5, **more}))  # type: ignore[arg-type]
    subject = Subject(
        make_view(model), [images[:30]], lambda: model_sizes(model), [images[30:]],
        Paths(union, votes, votes),
    )  # fmt: skip
    measured = prepared(measure(subject, asked, Work()), asked, Work())
    return measured, asked, choose(measured, asked, amount(measured, asked) or 0).selection


def many() -> list[Tensor]:
    """Votes for most of the neurons, at random."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.rand(64, generator=g).double() * (torch.rand(64, generator=g) > 0.2) for _ in "ab"
    ]


def test_auto_takes_the_largest_share_that_is_not_worse() -> None:
    measured, asked, before = measured_of(many())
    after, record = with_path_neurons(measured, asked, before)
    assert [row["share"] for row in record["tried"]] == list(SHARES)
    for row in record["tried"]:
        assert row["taken"] == (row["change"] <= row["standard_error"])
    taken = [row for row in record["tried"] if row["taken"]]
    assert record["taken"] == taken[-1]["share"]
    assert record["votes"] == pytest.approx(taken[-1]["votes"])
    assert after.widths == before.widths
    assert with_path_neurons(measured, asked, before) == (after, record)
    votes = [row["votes"] for row in record["tried"]]
    assert votes == sorted(votes)
    assert votes[-1] > votes[0]


def test_paths_that_are_the_criterions_own_choice_are_all_kept() -> None:
    measured, asked, before = measured_of(many())
    best = [torch.zeros(64).double() for _ in "ab"]
    for l, kept in enumerate(before.keep):
        best[l][kept[:5]] = 1.0
    paths = Paths([sorted(kept[:5]) for kept in before.keep], best, best)
    measured = replace(measured, subject=replace(measured.subject, paths=paths))
    after, record = with_path_neurons(measured, asked, before)
    assert after.keep == before.keep
    assert (record["taken"], record["votes"], record["neurons"]) == (1.0, 1.0, 10)


def test_off_and_protect() -> None:
    votes = many()
    measured, asked, before = measured_of(votes, paths="off")
    assert with_path_neurons(measured, asked, before) == (before, {})
    measured, asked, protected = measured_of(votes, paths="protect")
    assert with_path_neurons(measured, asked, protected)[0] == protected
    paths = measured.subject.paths
    assert paths is not None
    assert held(paths, protected.keep)["votes"] > held(paths, before.keep)["votes"]
    assert PlanSettings.of(PruneSection(protect_paths=False)).paths == "off"
    assert PlanSettings.of(PruneSection(protect_paths=True)).paths == "protect"
    with pytest.raises(UsageError, match="contradict"):
        check(PruneSection(keep=0.5, protect_paths=False, paths="prior"))


def test_prior_raises_scores_by_votes() -> None:
    measured, asked, before = measured_of(many(), paths="prior")
    after, record = with_path_neurons(measured, asked, before)
    assert record["tried"][0]["change"] == 0
    assert record["tried"][-1]["votes"] > record["tried"][0]["votes"]
    assert after.widths == before.widths


def test_the_measure_is_the_divergence_of_the_refitted_network() -> None:
    from npprune.core.compression.harm import predict
    from npprune.pipeline.prune.path_neurons import _refitted

    measured, asked, before = measured_of(many())
    _, record = with_path_neurons(measured, asked, before)
    view, images = measured.subject.view, measured.subject.held_out
    smaller = predict(view, images, _refitted(measured, before))
    expected = float(divergence(predict(view, images), smaller).mean())
    assert record["tried"][0]["nats"] == pytest.approx(expected, rel=1e-6)
