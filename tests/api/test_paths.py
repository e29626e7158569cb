"""The Python API at the edges of its arguments: it works, or one of our errors says why not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import npprune
from npprune.errors import DataError, ModelError, NpPruneError, UsageError
from tests.helpers.tiny import tiny_batch, tiny_vit

IMAGES, LABELS = tiny_batch(2)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_vit().train()


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> torch.Tensor:
    return npprune.discover_paths(model, IMAGES, LABELS, points=2).neurons


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES.numpy(), LABELS.tolist()),
        (IMAGES.tolist(), LABELS.numpy().astype(np.uint8)),
        (list(IMAGES), tuple(LABELS)),
        (IMAGES.clone().requires_grad_(), LABELS.int()),
        (np.flip(np.flip(IMAGES.numpy(), 0), 0), LABELS),
    ],
)
def test_array_likes_are_taken(
    model: nn.Module, expected: torch.Tensor, images: Any, labels: Any
) -> None:
    found = npprune.discover_paths(model, images, labels, points=2)
    assert torch.equal(found.neurons, expected)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_gradients_that_are_switched_off(
    model: nn.Module, expected: torch.Tensor, mode: Any
) -> None:
    with mode():
        frozen = copy.deepcopy(model).requires_grad_(False)
        for network in (model, frozen):
            found = npprune.discover_paths(network, IMAGES + 0, LABELS + 0, points=2)
            assert torch.equal(found.neurons, expected)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (UsageError, {"labels": LABELS * 0 + 7}, r"must lie in 0\.\.6, .* got 7"),
        (UsageError, {"labels": [-1, 0]}, r"must lie in 0\.\.6, .* got -1"),
        (UsageError, {"labels": LABELS.double()}, "must be whole numbers, got float64"),
        (UsageError, {"labels": [True, False]}, "must be whole numbers, got bool"),
        (UsageError, {"labels": 1}, r"must be \[2\], one for each image, got \[\]"),
        (UsageError, {"labels": ["cat", "dog"]}, "`labels` must be a tensor or an array"),
        (UsageError, {"labels": None}, "`labels` must be"),
        (UsageError, {"images": IMAGES[0]}, "must be .images, channels, height, width"),
        (UsageError, {"images": IMAGES[:0], "labels": []}, "at least one"),
        (UsageError, {"images": IMAGES.byte()}, "must be floating-point numbers, got uint8"),
        (UsageError, {"images": "cat.png"}, "`images` must be"),
        (UsageError, {"images": [IMAGES[0], IMAGES[1, :, 1:]]}, "must be a tensor or an array"),
        (UsageError, {"images": torch.randn(2, 3, 32, 32)}, r"\[3, 32, 32\] do not fit"),
        (UsageError, {"images": IMAGES[:, :1]}, r"\[1, 16, 16\] do not fit the network"),
        (DataError, {"images": torch.cat([IMAGES[:1], IMAGES[1:] / 0])}, "image 1 holds NaN"),
        (UsageError, {"topk": 0}, "`topk` must be a whole number at least 1, got 0"),
        (UsageError, {"topk": -1}, "got -1"),
        (UsageError, {"topk": 1.5}, "`topk` must be a whole number"),
        (UsageError, {"topk": True}, "`topk` must be a whole number"),
        (UsageError, {"topk": 49}, r"`topk` must be in 1\.\.48"),
        (UsageError, {"points": 0}, r"`points` must be a whole number in 1\.\.256"),
        (UsageError, {"seed": "a"}, "`seed` must be a whole number"),
        (UsageError, {"method": "activations"}, "`method` must be one of"),
        (UsageError, {"scope": "class"}, "`scope` must be one of"),
        (UsageError, {"quadrature": ["gauss-radau"]}, "`quadrature` must be one of"),
        (UsageError, {"accumulation": None}, "`accumulation` must be one of"),
        (UsageError, {"model": "vit"}, "`model` must be a network, got str"),
        (ModelError, {"model": nn.Linear(2, 2)}, "Linear"),
        (ModelError, {"model": tiny_vit(num_classes=0)}, "VisionTransformer has no classifier"),
        (ModelError, {"model": tiny_vit(num_classes=1), "labels": [0, 0]}, "got one"),
        (ModelError, {"model": tiny_vit().to("meta")}, "meta device"),
    ],
)
def test_wrong_arguments_are_our_errors(
    model: nn.Module, kind: type[NpPruneError], change: dict[str, Any], message: str
) -> None:
    arguments = {"model": model, "images": IMAGES, "labels": LABELS, **change}
    with pytest.raises(kind, match=message):
        npprune.discover_paths(**arguments)


def test_a_near_word_is_suggested(model: nn.Module) -> None:
    with pytest.raises(UsageError) as caught:
        npprune.discover_paths(model, IMAGES, LABELS, method="activations")  # type: ignore[arg-type]
    assert caught.value.hint == "did you mean `activation`?"


def test_half_precision_works_until_it_overflows() -> None:
    half = tiny_vit().half()
    found = npprune.discover_paths(half, IMAGES, LABELS, points=2)
    assert torch.isfinite(found.scores).all()
    with torch.no_grad():
        half.blocks[0].mlp.fc2.weight.mul_(60000)  # type: ignore[index,union-attr]
    with pytest.raises(ModelError, match="finite"):
        npprune.discover_paths(half, IMAGES, LABELS)


def test_plans_are_checked(model: nn.Module) -> None:
    keep = [torch.tensor([0, 3]), np.array([1]), [2]]
    plan = npprune.Plan(keep=keep, widths=(48, 48, 48))  # type: ignore[arg-type]
    assert plan.keep == [[0, 3], [1], [2]]
    with torch.inference_mode():
        smaller = npprune.apply_plan(model, plan)
    assert smaller.training
    assert not any(p.is_inference() for p in smaller.parameters())
    with pytest.raises(UsageError, match=r"`plan` must be an npprune.Plan, got dict"):
        npprune.apply_plan(model, {"keep": keep})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="`model` must be a network, got NoneType"):
        npprune.apply_plan(None, plan)  # type: ignore[arg-type]
    with pytest.raises(NpPruneError, match=r"`keep\[0\]` must be a list of whole numbers"):
        npprune.Plan(keep=[[0.5]], widths=[48])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "wrong", [{"num_classes": -1}, {"num_heads": 2.5}, {"img_size": "big"}, {"img_size": (0, 16)}]
)
def test_numbers_of_load_model(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(wrong))}` must be a whole number at least"):
        npprune.load_model("vit_tiny_patch16_224", **wrong)
