"""Paths of a network without a classifier: those of a linear one fitted on its features.

The probe is a ridge regression of the labels on the pooled features (`core.probes`), kept in the
run folder: what resumes, edits or explores the run reads it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from npprune.core.probes import Ridge
from npprune.errors import DataError, plural, setting
from npprune.models.probe import read_probe
from npprune.models.view import classifiers
from npprune.pipeline.common.inputs import Images, Network, with_classifier
from npprune.pipeline.common.work import Work


def probed(network: Network, images: Images, kept: Path, work: Work) -> Network:
    """The network with a classifier: the run's own where there is one, else fitted on the images.

    Raises:
        DataError: images without labels, or of one class.
    """
    if kept.is_file():
        return with_classifier(network, *read_probe(kept))
    features, labels, done = [], [], 0
    with torch.no_grad():
        for batch in images.batches():
            features.append(network.model(batch.images.to(work.where)).float().cpu())
            labels.append(batch.labels)
            done += len(batch)
            work.progress(done, images.source.length, message="features to fit a probe on")
    y = torch.cat(labels) if labels else torch.zeros(0)
    if len(y.unique()) < 2 or int(y.min()) < 0:
        raise DataError(
            "paths are of neurons that raise a class's probability: of a network without a "
            f"classifier they need images with labels, and `{images.source.spec}` has none of two "
            "classes",
            hint=f"give a folder with one folder a class: {setting('data.train', 'folder:PATH')}",
        )
    fit = Ridge(torch.cat(features), y)
    found = fit.left_out(fit.best).argmax(1) == torch.searchsorted(fit.classes, y)
    work.say(
        f"classifier: a ridge probe on the features of {plural(len(y), 'image')}, right on "
        f"{100 * float(found.double().mean()):.1f} % of them when left out"
    )
    return with_classifier(network, *(part.float() for part in fit.layer()))


def probe_arrays(network: Network) -> dict[str, np.ndarray]:
    """The weight and the bias of a probe, for a file."""
    layer = classifiers(network.model)[0]
    return {
        "weight": layer.weight.detach().cpu().numpy(),
        "bias": layer.bias.detach().cpu().numpy(),
    }


def probe_sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """Over both."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
