"""Networks without a classifier: what their features are, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npprune.core.objective import Features
from npprune.errors import ModelError
from npprune.models.load import create, load
from npprune.models.view import make_view, outputs_of
from tests.helpers.tiny import tiny_batch, tiny_vit

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
TEXT |= {"intermediate_size": 48, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
TWO = {"vision_config": SIZES, "text_config": TEXT}
DINO = {**SIZES, "mlp_ratio": 2}
BACKBONES = {  # class -> configuration's, sizes
    "ViTModel": ("ViT", SIZES),
    "ViTMAEModel": ("ViTMAE", {**SIZES, "mask_ratio": 0.0}),
    "DeiTModel": ("DeiT", SIZES),
    "Dinov2Model": ("Dinov2", DINO),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", DINO),
    "BeitModel": ("Beit", {**SIZES, "use_relative_position_bias": True}),
    "CLIPVisionModel": ("CLIPVision", SIZES),
    "SiglipVisionModel": ("SiglipVision", SIZES),
    "SiglipModel": ("Siglip", TWO),
    "CLIPModel": ("CLIP", TWO),
    "IJepaModel": ("IJepa", SIZES),
}


@pytest.mark.parametrize("kind", list(BACKBONES))
def test_features_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    name, sizes = BACKBONES[kind]
    model = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(**sizes)).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.25 * torch.randn(p.shape, generator=g) + 0.05)
        model.save_pretrained(tmp_path)
        images = torch.randn(2, 3, 32, 32, generator=g)
        tower = getattr(model, "vision_model", model)
        ordered = {"noise": torch.arange(16.0).expand(2, -1)} if "MAE" in kind else {}
        out = tower(images, **ordered)
        last = out.last_hidden_state
        if kind.startswith("CLIP"):  # which norms its class token alone
            last = getattr(tower, "vision_model", tower).post_layernorm(last)
        loaded = load(str(tmp_path))
        found = outputs_of(loaded.model, images)
    assert loaded.info.num_classes == 0
    pooled = last.mean(1) if kind == "IJepaModel" else last[:, 0]
    if "Siglip" in kind or kind == "BeitModel":
        pooled = out.pooler_output
    expected = torch.cat([pooled[:, None], last[:, -16:]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert any("no classifier" in note for note in loaded.notes)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_the_head_gives_what_timm_gives(pool: str) -> None:
    model, (images, _) = tiny_vit(num_classes=0, global_pool=pool, reg_tokens=2), tiny_batch()
    view = make_view(model)
    x: Any = view.embed(images)
    for l in range(3):
        x = view.block(l, x)
    found = view.head(x)
    torch.testing.assert_close(found[:, 0], model(images))
    torch.testing.assert_close(found[:, 1:], model.forward_features(images)[:, 3:])  # type: ignore[operator]
    torch.testing.assert_close(outputs_of(model, images), found)
    assert view.tokens_read is None
    assert view.classifiers() == []


def test_the_cotangent_is_a_root_of_the_curvature() -> None:
    f = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def change(step: Tensor) -> Tensor:
        return Features().divergence(f, f + step)[0]

    hessian = torch.autograd.functional.hessian(change, torch.zeros_like(f)).reshape(12, 12)
    g = torch.Generator().manual_seed(1)
    draws = torch.stack([Features().cotangent(f, g).flatten() for _ in range(4000)])
    found = draws.T @ draws / len(draws)
    torch.testing.assert_close(found.diagonal(), hessian.diagonal())
    torch.testing.assert_close(found, hessian, rtol=0, atol=0.06 * float(hessian.max()))


def test_timm_weights_without_a_classifier_load_by_name(tmp_path: Path) -> None:
    model = create("vit_small_patch14_dinov2", {"img_size": 28, "num_classes": 0})
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    file = tmp_path / "w.safetensors"
    loaded = load("vit_small_patch14_dinov2.lvd142m", checkpoint=file, img_size=28)
    assert loaded.info.num_classes == 0
    assert loaded.info.preprocessing.input_size == (3, 28, 28)
    assert loaded.notes[-1].startswith("no classifier: what counts are its features")


def test_a_file_with_a_head_is_a_backbone_on_request(tmp_path: Path) -> None:
    model = tiny_vit().float()
    args = {"img_size": 16, "num_heads": 3}
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    loaded = load("auto", checkpoint=tmp_path / "w.safetensors", num_classes=0, **args)  # type: ignore[arg-type]
    images = tiny_batch()[0].float()
    tokens: Any = model.forward_features(images)  # type: ignore[operator]
    expected = model.forward_head(tokens, pre_logits=True)  # type: ignore[operator]
    torch.testing.assert_close(loaded.model(images), expected)
    assert loaded.info.num_classes == 0
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(tensors, tmp_path / "b.safetensors")
    assert load("auto", checkpoint=tmp_path / "b.safetensors", **args).info.num_classes == 0  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"`num_classes` is 5, and the weights .* no classifier"):
        load("auto", checkpoint=tmp_path / "b.safetensors", num_classes=5, **args)  # type: ignore[arg-type]
