"""Weights files of other libraries: the logits are theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from npprune.errors import ModelError
from npprune.models.load import create, load
from tests.models.test_load import TINY, images, randomised, tiny


def test_torchvision(tmp_path: Path) -> None:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48,
        num_classes=5,
    )  # fmt: skip
    randomised(model).eval()
    old = {  # names of torchvision before 0.13
        re.sub(r"mlp\.([03])\.", lambda m: f"mlp.linear_{1 + (m[1] == '3')}.", k): v
        for k, v in model.state_dict().items()
    }
    for content in (model.state_dict(), {"model": old, "epoch": 3}):
        torch.save(content, tmp_path / "w.pth")
        loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
        torch.testing.assert_close(loaded.model(images()), model(images()), rtol=1e-5, atol=1e-5)
        assert "read as torchvision's vision transformer, under timm's names" in loaded.notes
        pre = loaded.info.preprocessing
        assert (pre.mean[0], pre.interpolation, pre.crop_pct) == (0.485, "bilinear", 0.875)


def mmpretrain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to MMPreTrain's, from its `VisionTransformer` and `VisionTransformerClsHead`."""
    out = {}
    for name, tensor in state.items():
        new = re.sub(r"^blocks\.(\d+)\.norm([12])\.", r"layers.\1.ln\2.", name)
        new = re.sub(r"^blocks\.(\d+)\.mlp\.fc1\.", r"layers.\1.ffn.layers.0.0.", new)
        new = re.sub(r"^blocks\.(\d+)\.mlp\.fc2\.", r"layers.\1.ffn.layers.1.", new)
        new = re.sub(r"^blocks\.", "layers.", new)
        new = new.replace("patch_embed.proj.", "patch_embed.projection.")
        new = re.sub(r"^norm\.", "ln1.", new)
        new = new.replace("head.", "head.layers.head.") if "head" in new else f"backbone.{new}"
        out[new] = tensor
    return out


def test_mmpretrain(tmp_path: Path) -> None:
    model = tiny()
    state = mmpretrain(model.state_dict())
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    torch.testing.assert_close(loaded.model(images()), model(images()))
    assert any("MMPreTrain" in note for note in loaded.notes)
    torch.save({"state_dict": state | {"neck.fc.weight": torch.ones(3, 3)}}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=r"`neck\.fc\.weight`"):
        load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)


@pytest.mark.parametrize("shared", [False, True])
def test_beit(shared: bool, tmp_path: Path) -> None:
    args = {"use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    args |= {"use_abs_pos_emb": shared}
    model = randomised(create("beit_base_patch16_224", {**TINY, **args}))
    state = model.state_dict()
    for l in range(2):  # a buffer of the original's
        state[f"blocks.{l}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.long)
    torch.save({"model": state}, tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth")
    torch.testing.assert_close(loaded.model(images()), model(images()))
    assert loaded.info.heads == [3, 3]
    with pytest.raises(ModelError, match="are of 3 heads"):
        load("auto", checkpoint=tmp_path / "w.pth", num_heads=2)
    with pytest.raises(ModelError, match="52 relative positions, and 48x48 pixels need 124"):
        load("auto", checkpoint=tmp_path / "w.pth", img_size=48)


@pytest.mark.slow
def test_a_hybrid_is_built_from_its_file_alone(tmp_path: Path) -> None:
    model = create("vit_small_resnet26d_224", {"num_classes": 5})
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load("vit_small_resnet26d_224", checkpoint=tmp_path / "w.pth")
    x = images(224, 1)
    torch.testing.assert_close(loaded.model(x), model(x))
    assert loaded.info.num_classes == 5
