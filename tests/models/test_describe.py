"""Networks that were changed by hand: described by what builds them again, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

from npprune.errors import ModelError
from npprune.models.create import create
from npprune.models.describe import builds, describe, is_described, unwrapped, with_tensors
from npprune.models.info import weights_sha256
from npprune.models.surgery import apply_plan
from npprune.records import ModelSource, Plan

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2}
TINY |= {"num_heads": 3, "num_classes": 5}


def tiny(name: str = "vit_tiny_patch16_224", **more: Any) -> Any:
    model = create(name, TINY | more)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.float()


def _head(model: Any) -> None:
    model.head = nn.Linear(24, 3)


def _channels(model: Any) -> None:
    model.patch_embed.proj = nn.Conv2d(1, 24, 8, 8)


def _size(model: Any) -> None:
    model.set_input_size(img_size=(24, 32))


def _activation(model: Any) -> None:
    for block in model.blocks:
        block.mlp.act = nn.ReLU()


def _epsilon(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_head, {"num_classes": 3}),
        (_channels, {"in_chans": 1}),
        (_size, {"img_size": [24, 32]}),
        (_activation, {"act_layer": "relu"}),
        (_epsilon, {"norm_eps": 1e-5}),
    ],
)
def test_what_was_changed_is_said(change: Callable[[Any], None], expected: dict[str, Any]) -> None:
    model = tiny()
    change(model)
    source = describe(model)
    assert source.architecture == "vit_tiny_patch16_224"
    assert expected.items() <= source.model_args.items()
    assert source.sha256 == weights_sha256(model)
    assert builds(source, model)
    assert change is _head or not builds(describe(tiny()), model)  # outputs follow the weights


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"init_values": 0.1, "qk_norm": True}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
    ],
)
def test_kinds_of_networks(name: str, args: dict[str, Any]) -> None:
    assert is_described(describe(tiny(name, **args)))


def test_a_network_built_from_its_class_and_one_that_was_pruned() -> None:
    plain = VisionTransformer(16, 8, num_classes=5, embed_dim=24, depth=2, num_heads=2)
    assert describe(plain).architecture == "vit_base_patch16_224"
    assert is_described(describe(plain))
    keep = [list(range(20)), list(range(9, 60))]
    pruned = apply_plan(tiny(), Plan(keep=keep, widths=[96, 96], heads=[[0, 2], [1]]))
    assert is_described(describe(pruned))


def test_what_timm_cannot_build_is_known_by_its_parts() -> None:
    model = tiny()
    model.blocks[0].mlp.act = nn.Mish()
    source = describe(model)
    assert not is_described(source)
    assert not builds(source, model)
    other = copy.deepcopy(model)
    other.blocks[1].mlp.act = nn.Mish()
    assert describe(other).model_args != source.model_args
    hooked = tiny()
    hooked.head.register_forward_hook(lambda module, args, out: out * 2)  # seen by what it computes
    assert not builds(ModelSource("vit_tiny_patch16_224", TINY), hooked)
    assert builds(ModelSource("vit_tiny_patch16_224", TINY), tiny())


def test_wrappers_are_taken_off() -> None:
    model = tiny()
    ema = ModelEmaV3(model)
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(model)) is model  # type: ignore[arg-type]
    assert unwrapped(ema) is ema.module


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ModelError, match="not those of the network"):
        with_tensors(tiny(), tiny(depth=1).state_dict())
