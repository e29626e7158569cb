"""Features of a dense and a pruned network without a classifier, on the same images."""

from __future__ import annotations

from torch import Tensor

from npprune.core import metrics, probes
from npprune.data.loading import Batch
from npprune.models.view import outputs_of
from npprune.pipeline.common.inputs import Images, Network
from npprune.pipeline.common.work import Work
from npprune.pipeline.evaluate.seen import Seen, see_all
from npprune.records import FeatureEvaluation, Probe

PROBES = {"k-NN": probes.nearest_neighbours, "ridge probe": probes.ridge}


def see_features(dense: Network, pruned: Network, images: Images, work: Work) -> Seen:
    """Of all images: pooled vectors [b, d] of both, and how far apart their features are."""

    def look(batch: Batch) -> tuple[Tensor, ...]:
        x = batch.images.to(work.where)
        before, after = (outputs_of(n.model, x).float().cpu() for n in (dense, pruned))
        distances = metrics.feature_distances(before, after)
        return before[:, 0].clone(), after[:, 0].clone(), distances

    return see_all(Seen(), look, images, work)


def compared_features(
    found: tuple[Tensor, ...], labels: Tensor, images: Images
) -> FeatureEvaluation:
    """Of what `see_features` saw, over all images; labels [n], -1 where there is none."""
    dense, pruned, distances = found
    return FeatureEvaluation(
        data=images.info(),
        preprocessing=images.preprocessing,
        device="",
        agreement=metrics.feature_agreement(distances),
        probes=_probes(dense, pruned, labels),
    )


def _probes(dense: Tensor, pruned: Tensor, labels: Tensor) -> list[Probe]:
    """What simple classifiers make of the features; nothing without labels of two classes."""
    known = labels >= 0
    if len(labels[known].unique()) < 2:
        return []
    y = labels[known]
    found = []
    for name, classify in PROBES.items():
        right = [classify(x[known], y) == y for x in (dense, pruned)]
        rates = [metrics.wilson(int(r.sum()), len(y)) for r in right]
        change = metrics.mean_interval(right[1].double() - right[0].double())
        found.append(Probe(name, rates[0], rates[1], change))
    return found
