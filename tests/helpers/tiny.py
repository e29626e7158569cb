"""Small deterministic transformers with weights that are not near zero."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn


def tiny_vit(seed: int = 0, **options: Any) -> nn.Module:
    """A timm ViT of 3 blocks, width 24, 16-pixel images in 4-pixel patches, 7 classes, float64."""
    args: dict[str, Any] = {
        "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3,
        "num_classes": 7, "mlp_ratio": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # timm draws from the global state
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", **{**args, **options})
    return _stirred(model, seed)


def tiny_swin(
    seed: int = 0, name: str = "swin_tiny_patch4_window7_224", **options: Any
) -> nn.Module:
    """A timm Swin, v1 or v2, of 2 and 2 blocks, width 16 and 32, 32-pixel images in 4-pixel
    patches and windows of 4 (of 2 in the second stage's shifted block), 7 classes, float64."""
    args: dict[str, Any] = {
        "img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4,
        "num_classes": 7, "mlp_ratio": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **{**args, **options})
    return _stirred(model, seed)


def _stirred(model: nn.Module, seed: int) -> nn.Module:
    """In evaluation mode and float64, with weights that are not near zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.3 if p.dim() > 1 else 0.2
            p.add_(scale * torch.randn(p.shape, generator=g))
    return model.double().eval()


def tiny_batch(
    n: int = 4, classes: int = 7, size: int = 16, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Images [n, 3, size, size] in float64 and labels of several classes."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=g, dtype=torch.float64)
    return images, torch.randint(0, classes, (n,), generator=g)
