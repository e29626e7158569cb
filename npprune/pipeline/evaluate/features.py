"""Features of a dense and a pruned network without a classifier, on the same images."""

from __future__ import annotations

import torch
from torch import Tensor

from npprune.core import metrics, probes
from npprune.errors import DataError
from npprune.models.view import outputs_of
from npprune.pipeline.common.inputs import Images, Network
from npprune.pipeline.common.work import Work
from npprune.records import FeatureEvaluation, Probe

PROBES = {"k-NN": probes.nearest_neighbours, "ridge probe": probes.ridge}


@torch.no_grad()
def measured_features(
    dense: Network, pruned: Network, images: Images, work: Work
) -> tuple[FeatureEvaluation, Tensor, Tensor]:
    """What is found; labels [n]; and a few of the images, for timing.

    Raises:
        DataError: there is no image that can be read.
    """
    distances: list[Tensor] = []
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: list[Tensor] = []
    sample: Tensor | None = None
    done = 0
    for batch in images.batches():
        x = batch.images.to(work.where)
        before, after = (outputs_of(n.model, x).float().cpu() for n in (dense, pruned))
        distances.append(metrics.feature_distances(before, after))
        for kept, features in zip(pooled, (before, after), strict=True):
            kept.append(features[:, 0].clone())
        labels.append(batch.labels)
        sample = batch.images if sample is None else sample
        done += len(batch)
        work.progress(done, images.source.length)
    if sample is None:
        raise DataError(f"no image of `{images.source.spec}` could be read")
    before, after = (torch.cat(parts) for parts in pooled)
    found = FeatureEvaluation(
        data=images.info(),
        preprocessing=images.preprocessing,
        device="",
        agreement=metrics.feature_agreement(torch.cat(distances)),
        probes=_probes(before, after, torch.cat(labels)),
    )
    return found, torch.cat(labels), sample


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
