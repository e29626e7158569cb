"""Pruning where the images or the outputs say little: a network and a warning, or a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from npprune.core.compression.scores import score
from npprune.errors import ModelError, UsageError
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune import measuring
from npprune.pipeline.prune.stage import prune
from npprune.recipe import DataSection, ModelSection, PruneSection
from npprune.records import Variant
from tests.helpers.tiny import tiny_vit

Prune = Callable[..., Variant]


@pytest.fixture
def run(tmp_path: Path) -> Prune:
    """Prune a tiny network of some outputs on images of some classes."""

    def pruned(
        outputs: int,
        images: list[np.ndarray],
        classes: int = 1,
        data: Any = None,
        edit: Callable[[Any], object] | None = None,
        **settings: Any,
    ) -> Variant:
        model = tiny_vit(num_classes=outputs).float()
        if edit is not None:
            with torch.no_grad():
                edit(model)
        tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file(tensors, tmp_path / "w.safetensors")
        for c in range(classes):
            folder = tmp_path / "images" / f"class_{c}"
            folder.mkdir(parents=True, exist_ok=True)
            for i, pixels in enumerate(images):
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return prune(
            ModelSection(name="auto", checkpoint=str(tmp_path / "w.safetensors"), num_heads=3),
            DataSection(calibration=f"folder:{tmp_path / 'images'}", **(data or {})),
            PruneSection(**{"keep": 0.5, "round_to": 4, "min_keep": 4, **settings}),
            tmp_path / "out",
            work=Work(device="cpu"),
        )

    return pruned


def black(n: int) -> list[np.ndarray]:
    return [np.zeros((16, 16, 3), np.uint8)] * n


def noise(n: int) -> list[np.ndarray]:
    g = np.random.default_rng(0)
    return [g.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(n)]


@pytest.mark.parametrize("settings", [
    {}, {"compensation": "least-squares"}, {"shrinkage": 1e-9},
    {"keep": None, "target_macs": 0.7, "axes": ["mlp", "heads", "qk"]},
])  # fmt: skip
@pytest.mark.parametrize(("images", "classes", "warning"), [
    (black(3), 7, "calibration images are all the same"), (noise(1), 1, "too few calibration"),
    (noise(4), 1, ""),
])  # fmt: skip
def test_few_images_and_equal_ones_give_a_network(
    run: Prune, images: list[np.ndarray], classes: int, warning: str, settings: dict[str, Any]
) -> None:
    variant = run(7, images, classes, **settings)
    assert warning in " ".join(variant.prune.warnings)
    if not settings.get("axes"):
        assert sum(variant.prune.widths) == 72
    assert all(np.isfinite(c) for c in variant.prune.details["condition_number"])


def test_with_one_output_what_was_asked_for_stays(run: Prune) -> None:
    variant = run(1, noise(12))
    assert variant.prune.widths == [24, 24, 24]
    assert variant.prune.criterion == "obs"
    said = " ".join(variant.prune.warnings)
    assert "one output: its predictions never change" in said
    assert "criterion `curvature-obs` reads the gradient of the predictions, which is 0" in said


def test_a_head_cut_to_one_class_is_one_output(run: Prune) -> None:
    variant = run(7, noise(3), 7, data={"classes": [2]})
    assert variant.prune.widths == [24, 24, 24]
    assert variant.model.num_classes == 1
    assert "one output" in variant.prune.warnings[0]
    kept = run(7, noise(3), 7, data={"classes": [2]}, keep_head=True)
    assert (kept.model.num_classes, kept.prune.criterion) == (7, "curvature-obs")


@pytest.mark.parametrize("settings", [
    {"keep": None, "max_drop": 1.0}, {"keep": None, "target_macs": 0.7, "axes": ["mlp", "qk"]},
])  # fmt: skip
def test_what_one_output_cannot_measure_is_refused(run: Prune, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="those of one output never"):
        run(1, noise(12), **settings)


def dead_units(model: Any) -> None:
    for block in model.blocks:
        block.mlp.fc1.weight[::2] = 0
        block.mlp.fc1.bias[::2] = -100


def constant_block(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight.zero_()
    model.blocks[1].mlp.fc1.bias.fill_(1.0)


def dead_block(model: Any) -> None:
    model.blocks[1].mlp.fc1.weight.zero_()
    model.blocks[1].mlp.fc1.bias.fill_(-100.0)
    model.blocks[1].mlp.fc2.weight.zero_()


def copies(model: Any) -> None:
    for block in model.blocks:
        block.mlp.fc1.weight[:] = block.mlp.fc1.weight[:1]
        block.mlp.fc1.bias[:] = block.mlp.fc1.bias[:1]


def dead_attention(model: Any) -> None:
    model.blocks[0].attn.qkv.weight.zero_()
    model.blocks[0].attn.proj.weight.zero_()


def nearly_zero(model: Any) -> None:
    for p in model.parameters():
        p.mul_(1e-30)


def half(model: Any) -> None:
    model.half()


ALL_AXES = {"keep": None, "target_macs": 0.7, "axes": ["mlp", "heads", "qk"]}


@pytest.mark.parametrize("settings", [{}, ALL_AXES], ids=["units", "axes"])
@pytest.mark.parametrize(
    "edit", [dead_units, constant_block, dead_block, copies, dead_attention, nearly_zero, half]
)
def test_degenerate_networks_give_a_network(
    run: Prune, edit: Callable[[Any], object], settings: dict[str, Any]
) -> None:
    variant = run(7, noise(3), 2, edit=edit, **settings)
    assert all(np.isfinite(v) for v in variant.prune.predicted.values())
    assert variant.model.macs < _dense_macs()
    assert all(np.isfinite(c) for c in variant.prune.details["condition_number"])


def _dense_macs() -> int:
    from npprune.models.info import count_macs

    return count_macs(tiny_vit().float(), (3, 16, 16))


@pytest.mark.parametrize(("edit", "message"), [
    (lambda m: m.blocks[1].mlp.fc1.weight.mul_(1e30), "no finite numbers after block"),
    (lambda m: m.blocks[1].mlp.fc2.weight.mul_(3e38), "overflows in float32"),
    (lambda m: m.head.weight.fill_(float("nan")), r"`head\.weight` holds values that are not"),
    (lambda m: m.norm.bias.fill_(float("inf")), r"`norm\.bias` holds values that are not finite"),
])  # fmt: skip
def test_a_network_without_finite_numbers_is_explained(
    run: Prune, edit: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        run(7, noise(3), 2, edit=edit)


def test_a_drop_that_is_never_reached_ends_at_the_smallest_network(run: Prune) -> None:
    found = run(7, black(3), 7, keep=None, max_drop=1.0, axes=["mlp"])
    assert found.prune.widths == [4, 4, 4]


def test_magnitude_sees_both_layers(run: Prune, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def kept(*args: Any) -> list[torch.Tensor]:
        seen.extend(score(*args))
        return seen

    monkeypatch.setattr(measuring, "score", kept)
    run(7, noise(12), criterion="magnitude", selection="uniform")
    for scores, block in zip(seen, tiny_vit().float().blocks, strict=True):  # type: ignore[arg-type]
        first, second = block.mlp.fc1.weight.double(), block.mlp.fc2.weight.double()
        torch.testing.assert_close(scores, first.norm(dim=1) * second.norm(dim=0))
