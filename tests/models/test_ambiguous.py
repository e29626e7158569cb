"""Never wrong without a word: what a file of weights does not say is refused, asked for or said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npprune.errors import ModelError
from npprune.models.load import create, load
from tests.models.test_load import images, randomised, tiny

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
SMALL |= {"num_heads": 3, "num_classes": 5}
EVA = {"num_heads": 3}


def network(name: str, **args: Any) -> nn.Module:
    return randomised(create(name, {**SMALL, **args}))


def clip(**args: Any) -> nn.Module:
    return network("vit_base_patch16_clip_quickgelu_224", **args)


def without_bias(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.head.bias.zero_()  # type: ignore[union-attr,operator]
    return model


REFUSED: dict[str, tuple[Any, str, str]] = {  # network, what is said, the next step
    "norms after attention and MLP": (
        lambda: network("vit_base_patch16_rpn_224"),
        r"whose norms follow attention and MLP \(rpn\)",
        "`vit_base_patch16_rpn_224`",
    ),
    "a perception encoder": (
        lambda: network("vit_pe_core_base_patch16_224", use_rot_pos_emb=True),
        "rotary positions are not in the file|exist with GELU",
        "",
    ),
    "CLIP, quick-GELU or not": (clip, "GELU and with quick-GELU", "`activation=quick-gelu`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_auto_refuses_what_other_networks_look_like(case: str, tmp_path: Path) -> None:
    make, said, step = REFUSED[case]
    torch.save(make().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match=said) as err:
        load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    assert step in str(err.value.hint)


RIGHT: dict[str, tuple[Any, dict[str, Any], str]] = {  # network, what is given, what is said
    "quick-GELU": (clip, {"activation": "quick-gelu"}, "no rotary positions"),
    "CLIP with GELU": (
        lambda: network("vit_base_patch16_clip_224"),
        {"activation": "gelu"},
        "no rotary positions",
    ),
    "another activation": (lambda: tiny(act_layer="relu"), {"activation": "relu"}, ""),
    "average pooling without a norm of its own": (
        lambda: tiny(global_pool="avg", fc_norm=False),
        {"pooling": "avg"},
        "GELU (activation)",
    ),
    "nothing is given": (tiny, {}, "the classifier reads the class token (pooling), GELU"),
    "six heads": (
        lambda: tiny(embed_dim=192, num_heads=6),
        {"num_heads": 6},
        "before attention and MLP",
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_auto_is_right_with_what_was_asked_for(case: str, tmp_path: Path) -> None:
    make, given, said = RIGHT[case]
    model = make()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth", **{"num_heads": 3, **given})
    torch.testing.assert_close(loaded.model(images()), model(images()))
    assert said in "\n".join(loaded.notes)
    if given and "num_heads" not in given:  # the test can fail
        plain = {"activation": "gelu" if given != {"activation": "gelu"} else "relu"}
        other = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3, **plain)
        assert not torch.allclose(other.model(images()), model(images()))


def test_what_is_assumed_is_said(tmp_path: Path) -> None:
    model = tiny(embed_dim=192, num_heads=6, depth=1)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    notes = load("auto", checkpoint=tmp_path / "w.pth").notes
    assert any("took 3, usual at width 192 (num_heads)" in note for note in notes)
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    notes = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3, img_size=48).notes
    assert "position embeddings resampled for 48x48 pixels, as was asked for" in notes
    rotary = network("vit_small_patch16_rope_ape_224")  # the same tensors as DeiT III
    torch.save(rotary.state_dict(), tmp_path / "w.pth")
    notes = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3, img_size=32).notes
    assert any("no rotary positions as in DeiT III" in note for note in notes)
    other = randomised(create("vit_tiny_patch16_224", {"img_size": 96, "num_classes": 5}))
    torch.save(other.state_dict(), tmp_path / "w.pth")
    for size in (None, 224):
        notes = load("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth", img_size=size).notes
        assert "resampled from 6x6 to 14x14 patches" in "".join(notes)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_inputs_than_rgb(channels: int, tmp_path: Path) -> None:
    model = tiny(in_chans=channels, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    x = torch.randn(2, channels, 32, 32)
    torch.testing.assert_close(loaded.model(x), model(x))
    pre = loaded.info.preprocessing
    assert (pre.input_size, pre.mean) == ((channels, 32, 32), (0.5,) * channels)


def test_a_projection_is_no_classifier(tmp_path: Path) -> None:
    state: dict[str, Tensor] = without_bias(clip()).state_dict()
    for name, tensors in (
        ("auto", state),
        ("vit_base_patch16_clip_224", state),
        ("auto", {**tiny().state_dict(), "visual.proj": torch.ones(24, 5)}),
        ("vit_base_patch16_clip_224", {"visual.proj": torch.ones(768, 512)}),
        ("vit_base_patch16_clip_224", {"visual.head.proj.weight": torch.ones(512, 768)}),
    ):
        torch.save(tensors, tmp_path / "w.pth")
        given = {"activation": "gelu", "num_heads": 3} if name == "auto" else {}
        with pytest.raises(ModelError, match="is a projection onto embeddings"):
            load(name, checkpoint=tmp_path / "w.pth", **given)  # type: ignore[arg-type]
    for name in ("vit_base_patch16_clip_224.openai", "vit_pe_core_base_patch16_224"):
        with pytest.raises(ModelError, match="is a projection onto embeddings"):
            load(name)
