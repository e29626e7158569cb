"""Folders for `transformers`: its own classes load them, and give the network's logits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from npprune.data.transforms import make_transform
from npprune.errors import ExportError
from npprune.export.hugging import load_transformers, to_transformers
from npprune.models.info import model_info
from npprune.models.load import load
from npprune.models.surgery import apply_plan
from npprune.models.tokens import apply_tokens
from npprune.models.view import make_view
from npprune.records import ClassInfo, ModelInfo, ModelSource, Plan, Preprocessing
from tests.models.test_load import images, tiny

transformers = pytest.importorskip("transformers")

CLASSES = [ClassInfo(i, name) for i, name in enumerate("abcde")]


def pruned(**args: Any) -> nn.Module:
    """Blocks of 40 and 61 units, 2 and 3 heads, 5 query dimensions."""
    model = tiny(**args)
    widths = list(make_view(model).widths)
    keep = [list(range(40)), list(range(61))]
    plan = Plan(keep=keep, widths=widths, heads=[[0, 2], [0, 1, 2]], query_dims=[5, 8])
    return apply_plan(model, plan)


def merging(**args: Any) -> nn.Module:
    """The same, of which 5 and 2 tokens merge."""
    return apply_tokens(pruned(**args), [5, 2])


def own_units() -> nn.Module:
    """Tokens merge, the class token has units of its own, the last block computes it alone."""
    model = tiny()
    keep, own = [list(range(40)), list(range(61))], [list(range(20, 60)), []]
    plan = Plan(
        keep, list(make_view(model).widths), cls_keep=own, merged=[5, 0], last_for_read=True
    )
    return apply_plan(model, plan)


NETWORKS: dict[str, tuple[Any, str]] = {
    "evenly wide": (lambda: tiny(mlp_ratio=2.5), "ViTForImageClassification"),
    "other activation": (lambda: tiny(act_layer="quick_gelu"), "ViTForImageClassification"),
    "uneven": (pruned, "NpPruneViTForImageClassification"),
    "registers, scales": (
        lambda: pruned(reg_tokens=4, no_embed_class=True, init_values=0.1, qkv_bias=False),
        "NpPruneViTForImageClassification",
    ),
    "mean of the patches": (
        lambda: pruned(global_pool="avg", fc_norm=True, pre_norm=True),
        "NpPruneViTForImageClassification",
    ),
    "no class token": (
        lambda: pruned(global_pool="avg", class_token=False),
        "NpPruneViTForImageClassification",
    ),
    "distilled": (
        lambda: tiny("deit_base_distilled_patch16_224"),
        "NpPruneViTForImageClassification",
    ),
    "DINOv2's head": (
        lambda: tiny(head_reads="class+patches", norm_eps=1e-3),
        "NpPruneViTForImageClassification",
    ),
    "merging": (merging, "NpPruneViTForImageClassification"),
    "merging, mean of all": (
        lambda: merging(global_pool="avg", reg_tokens=2, no_embed_class=True),
        "NpPruneViTForImageClassification",
    ),
    "own units, last block for what is read": (own_units, "NpPruneViTForImageClassification"),
    "gated": (
        lambda: tiny("vit_giant_patch14_dinov2", mlp_ratio=2),
        "NpPruneViTForImageClassification",
    ),
}


def described(model: nn.Module) -> ModelInfo:
    return model_info(model, ModelSource("vit_base_patch16_224"))


@pytest.mark.parametrize("case", NETWORKS)
def test_transformers_loads_the_folder(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [n for n in sys.modules if n.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)  # the cache of another test
    make, kind = NETWORKS[case]
    model = make()
    folder = tmp_path / f"written_{len(case)}"
    folder.mkdir()
    own = to_transformers(model, described(model), CLASSES, folder, "A test.")
    loaded = transformers.AutoModelForImageClassification.from_pretrained(
        folder, trust_remote_code=own, local_files_only=True
    ).eval()
    assert type(loaded).__name__ == kind
    assert own == (kind != "ViTForImageClassification")
    assert loaded.config.id2label == dict(enumerate("abcde"))
    with torch.no_grad():
        found, expected = loaded(pixel_values=images()).logits, model(images())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # the gate's own way
        torch.testing.assert_close(load_transformers(folder, own)(images()), found)
    if not own:
        again = load(str(folder)).model
        torch.testing.assert_close(again(images()), expected, rtol=1e-5, atol=1e-5)
    card = (folder / "README.md").read_text()
    assert ("trust_remote_code=True" in card) == own
    assert f"{sum(p.numel() for p in model.parameters()):,}" in card


@pytest.mark.parametrize("mode", [("squash", 1.0), ("squash", 0.8), ("center", 0.8)])
def test_the_processor_prepares_the_same_pixels(mode: tuple[str, float], tmp_path: Path) -> None:
    model = tiny()
    info = described(model)
    info.preprocessing = Preprocessing(
        (3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), "bilinear", mode[1], mode[0]
    )
    to_transformers(model, info, CLASSES, tmp_path)
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    processor = getattr(transformers, f"{said.pop('image_processor_type')}Pil")(**said)
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = torch.tensor(np.array(processor(image)["pixel_values"][0]))
    assert (found - make_transform(info.preprocessing)(image)).abs().mean() < 0.1 / 255 / 0.2
    assert load(str(tmp_path)).info.preprocessing.crop_mode == mode[0]


def test_what_transformers_cannot_be_told_of(tmp_path: Path) -> None:
    for model, said in (
        (tiny(global_pool="map", class_token=False), "pool by attention"),
        (tiny(qk_norm=True), "norms within attention"),
        (tiny("beit_base_patch16_224"), "timm's class Beit"),
    ):
        with pytest.raises(ExportError, match=said):
            to_transformers(model, described(model), CLASSES, tmp_path)
    model = tiny()
    info = described(model)
    info.preprocessing = Preprocessing(crop_mode="border")
    with pytest.raises(ExportError, match="no preprocessing of border"):
        to_transformers(model, info, CLASSES, tmp_path)
