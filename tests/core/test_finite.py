"""Where a network gives no numbers, the error says where they end."""

from __future__ import annotations

import pytest
import torch

from npprune.core.attribution.methods import find_paths
from npprune.core.attribution.quadrature import Integral
from npprune.core.compression.statistics import collect_statistics
from npprune.errors import DataError, ModelError, NpPruneError
from npprune.models.view import make_view
from tests.helpers.tiny import tiny_batch, tiny_vit

NAN = float("nan")


def broken(where: str) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    model, (images, labels) = tiny_vit(), tiny_batch(3)
    with torch.no_grad():
        if where == "image":
            images[2, 0, 3, 3] = NAN
        elif where == "weights":
            model.blocks[1].mlp.fc2.weight[0, 0] = NAN  # type: ignore[index,union-attr]
        else:
            model = model.float()
            images = images.float()
            model.blocks[1].mlp.fc2.weight.mul_(1e38)  # type: ignore[index,union-attr]
    return model, images, labels


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("image", DataError, r"image 2 .*must hold finite values, got NaN or infinity in 1 of 768"),
        ("weights", ModelError, r"got NaN or infinity in `blocks.1.mlp.fc2.weight`"),
        ("block", ModelError, r"no finite numbers after block 1 for image 0.*overflows in float32"),
    ],
)
def test_the_place_is_named(where: str, kind: type[NpPruneError], message: str) -> None:
    model, images, labels = broken(where)
    view = make_view(model)
    for method in ("neuron-path", "activation"):
        with pytest.raises(kind, match=message):
            find_paths(view, images, labels, method=method, integral=Integral.of("cls", points=2))  # type: ignore[arg-type]
    with pytest.raises(kind, match=message):
        collect_statistics(view, [images], needs=["moments"])


def test_calibration_images_are_counted_over_the_batches() -> None:
    images, _ = tiny_batch(3)
    bad = images.clone()
    bad[1] = NAN
    with pytest.raises(DataError, match="image 4 must hold finite values"):
        collect_statistics(make_view(tiny_vit()), [images, bad], needs=["moments"])


def test_one_output_has_no_paths() -> None:
    images, _ = tiny_batch(2)
    view = make_view(tiny_vit(num_classes=1))
    for scope in ("cls", "patch"):
        with pytest.raises(ModelError, match="at least two outputs, got one"):
            find_paths(view, images, torch.zeros(2, dtype=torch.long), integral=Integral.of(scope))  # type: ignore[arg-type]
