"""How many path neurons are kept: as many as cost nothing that could be measured.

The paths of many classes together name more neurons than a small network has room for, and votes
alone would decide which stay. So the criterion chooses first. Then path neurons, the most voted for
first, take a growing share of each block's kept width (or votes raise the criterion's scores by a
growing weight). Every share is refitted by least squares and its predictions on images that nothing
is fitted on compared with those of share 0; the largest that is not worse by more than one standard
error of the paired difference is taken. Where the class token has hidden units of its own, the
paths' are among these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from npprune.core.compression.harm import Replacement, least_squares, predict
from npprune.core.compression.selection import Selection, keep_sets
from npprune.core.metrics import mean_interval
from npprune.pipeline.prune.measuring import HARM_IMAGES, Measured, Paths, PlanSettings

SHARES = (0.0, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Of a block's kept width, for the paths' neurons."""
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Of the votes: a score times (1 + weight x votes, as a share of the block's most)."""


def with_path_neurons(
    measured: Measured, settings: PlanSettings, selection: Selection
) -> tuple[Selection, dict[str, Any]]:
    """The selection with as many path neurons as cost nothing, at the same widths; and the record.

    The record: per share or weight, nats from the dense network, the paired difference to 0 and its
    standard error; which was taken; and what it keeps of the paths' neurons and of their votes.
    """
    paths = measured.subject.paths
    if paths is None or settings.paths == "off":
        return selection, {}
    tried: list[dict[str, float]] = []
    if settings.paths in ("auto", "prior") and not settings.by_paths(paths):
        selection, tried = _largest(measured, settings, selection, paths)
    record = {"use": settings.paths, "tried": tried, **held(paths, selection.either)}
    if tried:
        record["taken"] = next(row["share"] for row in reversed(tried) if row["taken"])
    return selection, record


def held(paths: Paths, keep: Sequence[Sequence[int]]) -> dict[str, float]:
    """The paths' neurons that stay, how many there are, and the share of the votes that stay."""
    stay = staying(paths, keep)
    votes = sum(float(v[sorted(s)].sum()) for v, s in zip(paths.votes, stay, strict=True))
    whole = sum(float(v[u].sum()) for v, u in zip(paths.votes, paths.union, strict=True))
    return {
        "neurons": sum(map(len, stay)),
        "of": sum(map(len, paths.union)),
        "votes": votes / whole if whole else 1.0,
    }


def staying(paths: Paths, keep: Sequence[Sequence[int]]) -> list[set[int]]:
    """The paths' neurons that stay in each block."""
    return [set(kept) & set(union) for kept, union in zip(keep, paths.union, strict=True)]


def _largest(
    measured: Measured, settings: PlanSettings, selection: Selection, paths: Paths
) -> tuple[Selection, list[dict[str, float]]]:
    """The selection by the largest share that costs nothing, and all that were tried."""
    subject, tried = measured.subject, []
    images = subject.placed(subject.held_out) or subject.few(HARM_IMAGES)
    dense = predict(subject.view, images)
    taken_last, base = selection, None
    for share in WEIGHTS if settings.paths == "prior" else SHARES:
        found = _by(measured, settings, selection, paths, share)
        changed = predict(subject.view, images, _refitted(measured, found))
        nats = subject.view.objective.divergence(dense, changed)
        base = nats if base is None else base
        change = mean_interval(nats - base)
        taken = change.value <= change.standard_error
        if taken:
            taken_last = found
        tried.append(
            {
                "share": share,
                "nats": float(nats.mean()),
                "change": change.value,
                "standard_error": change.standard_error,
                "taken": taken,
                **held(paths, found.either),
            }
        )
    return taken_last, tried


def _by(
    measured: Measured, settings: PlanSettings, selection: Selection, paths: Paths, share: float
) -> Selection:
    """The selection at the same widths, with path neurons by a share or a weight: among the class
    token's own units where it has some, else among those that all tokens share."""
    if share == 0:
        return selection
    scores, keep = list(measured.hidden.ranking.scores), selection.keep
    own = selection.own or [[] for _ in keep]
    if measured.own is not None:
        theirs = measured.own.own.ranking.scores
        scores = [t if o else s for s, t, o in zip(scores, theirs, own, strict=True)]
    widths = [len(o) or len(k) for k, o in zip(keep, own, strict=True)]
    if settings.paths == "prior":
        scores = [_raised(s, v, share) for s, v in zip(scores, paths.votes, strict=True)]
        first: list[list[int]] = [[] for _ in keep]
    else:
        first = [
            _most_voted(union, votes, int(share * width))
            for union, votes, width in zip(paths.union, paths.votes, widths, strict=True)
        ]
    sets = keep_sets(scores, widths, first, paths.votes)[0]
    return replace(
        selection,
        keep=[k if o else s for k, o, s in zip(keep, own, sets, strict=True)],
        own=selection.own and [s if o else [] for o, s in zip(own, sets, strict=True)],
    )


def _raised(scores: Tensor, votes: Tensor, weight: float) -> Tensor:
    """Scores, from 0 up, times what the votes add."""
    low = scores.double().cpu() - scores.min().double().cpu()
    return low * (1 + weight * votes / votes.max().clamp_min(1e-12))


def _most_voted(union: Sequence[int], votes: Tensor, count: int) -> list[int]:
    ranked = sorted(union, key=lambda j: (-float(votes[j]), j))
    return sorted(ranked[:count])


def _refitted(measured: Measured, selection: Selection) -> dict[int, Replacement]:
    """Second layers of the kept units, by least squares, each block by itself."""
    view, out = measured.subject.view, {}
    for l, kept in enumerate(selection.keep):
        if selection.own is not None and selection.own[l] and measured.own is not None:
            out[l] = measured.own.least_squares(l, kept, selection.own[l])
        elif len(kept) < view.widths[l]:
            out[l] = least_squares(view.fc2(l), measured.hidden.moments(l), kept)
    return out
