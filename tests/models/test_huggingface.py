"""Folders of `transformers`: logits, labels and preprocessing as there; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from npprune.data.transforms import make_transform
from npprune.errors import ModelError
from npprune.models.load import build, load
from npprune.records import CheckpointConfig
from tests.models.test_load import config_of

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
TEXT |= {"intermediate_size": 48, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
TWO = {"vision_config": SIZES, "text_config": TEXT}
DINO = {**SIZES, "mlp_ratio": 2}
SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
SWIN |= {"image_size": 32, "window_size": 4, "mlp_ratio": 2.0}

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {  # class without its ending, configuration
    "ViT": ("ViT", {**SIZES, "layer_norm_eps": 0.01, "hidden_act": "gelu_new"}),
    "ViT, no biases": ("ViT", {**SIZES, "qkv_bias": False, "image_size": [16, 40]}),
    "ViT-MSN": ("ViTMSN", SIZES),
    "I-JEPA": ("IJepa", SIZES),
    "DeiT": ("DeiT", SIZES),
    "DeiT with teacher": ("DeiT", SIZES),
    "DINOv2": ("Dinov2", DINO),
    "DINOv2, gated": ("Dinov2", {**DINO, "use_swiglu_ffn": True}),
    "DINOv2 with registers": ("Dinov2WithRegisters", DINO),
    "BEiT": ("Beit", {**SIZES, "use_relative_position_bias": True}),
    "BEiT, shared": (
        "Beit",
        {
            **SIZES,
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": False,
            "layer_scale_init_value": 0.0,
        },
    ),
    "Data2Vec": ("Data2VecVision", {**SIZES, "use_relative_position_bias": True}),
    "CLIP": ("CLIP", TWO),
    "SigLIP": ("Siglip", TWO),
    "Swin": ("Swin", SWIN),
    "Swin v2": ("Swinv2", {**SWIN, "pretrained_window_sizes": [6, 3]}),
}


def saved(case: str, folder: Path, **changes: Any) -> nn.Module:
    kind, given = NETWORKS[case]
    config = getattr(transformers, f"{kind}Config")(**given, num_labels=5, **changes)
    ending = "WithTeacher" if case.endswith("teacher") else ""
    model = getattr(transformers, f"{kind}ForImageClassification{ending}")(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.25 * torch.randn(p.shape, generator=generator) + 0.05)
    model.save_pretrained(folder)
    return model  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("vit")
    return folder, saved("ViT", folder)


@pytest.fixture
def copied(vit: tuple[Path, nn.Module], tmp_path: Path) -> Path:
    shutil.copytree(vit[0], tmp_path / "copy")
    return tmp_path / "copy"


def changed(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def images(height: int = 32, width: int = 32) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected, found = theirs(pixel_values=x).logits, ours(x)
    assert expected.std(0).max() > 1e-3  # the images differ
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", NETWORKS)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path)
    loaded = load(str(tmp_path))
    size = loaded.info.preprocessing.input_size[1:]
    same(loaded.model, theirs, images(*size))
    state = loaded.model.state_dict()
    rebuilt = build(config_of(loaded.model, **described(loaded)), state)
    torch.testing.assert_close(rebuilt(images(*size)), loaded.model(images(*size)))


def described(loaded: Any) -> dict[str, Any]:
    """The fields of a checkpoint's `config.json`, through JSON as in the file."""
    source = loaded.info.source
    source.model_args = json.loads(json.dumps(source.model_args))
    return {
        "source": source,
        "widths": loaded.info.widths,
        "heads": loaded.info.heads,
        "num_classes": loaded.info.num_classes,
        "preprocessing": loaded.info.preprocessing,
    }


def test_a_folder_is_given_in_five_ways(vit: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, theirs = vit
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")  # another file, of older kind
    shutil.copy(folder / "config.json", tmp_path)
    for name, checkpoint in (
        (str(folder), None),
        (f"local-dir:{folder}", None),
        ("auto", folder),
        ("auto", folder / "model.safetensors"),
        (str(tmp_path), None),
    ):
        loaded = load(name, checkpoint=checkpoint)
        same(loaded.model, theirs, images())
    with pytest.raises(ModelError, match="is not the network vit_tiny_patch16_224: `cls_token`"):
        load("vit_tiny_patch16_224", checkpoint=folder)
    with pytest.raises(ModelError, match="has weights of its own"):
        load(str(folder), checkpoint=folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"`num_heads` is 6, and .* has 3"):
        load(str(folder), num_heads=6)


def test_weights_in_several_files(copied: Path, vit: tuple[Path, nn.Module]) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({n: tensors[n] for n in own}, copied / file)
    index = {n: file for file, own in parts.items() for n in own}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same(load(str(copied)).model, vit[1], images())
    (copied / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../vit/model.safetensors"}})
    )
    with pytest.raises(ModelError, match="is no index of weights files in its folder"):
        load(str(copied))


@pytest.mark.parametrize("case", ["ViT", "DINOv2", "DINOv2 with registers", "SigLIP"])
def test_positions_are_resampled_as_transformers_does(case: str, tmp_path: Path) -> None:
    theirs = saved(case, tmp_path)
    loaded = load(str(tmp_path), img_size=48)
    x = images(48, 48)
    extra = {} if "DINO" in case else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = theirs(pixel_values=x, **extra).logits
    torch.testing.assert_close(loaded.model(x), expected, rtol=1e-5, atol=1e-5)
    assert any("resampled from 4x4 to 6x6" in note for note in loaded.notes)


# ------------------------------------------------------------------ labels, preprocessing

PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "both sides": ("ViT", {"size": {"height": 32, "width": 32}}),
    "both sides, then a crop": (
        "DeiT",
        {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}},
    ),
    "shorter side, then a crop": (
        "CLIP",
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}},
    ),
    "not normalised": ("Siglip", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "pixels from -1 to 1": (
        "ViT",
        {
            "size": {"height": 32, "width": 32},
            "rescale_factor": 1 / 127.5,
            "image_mean": [1.0, 1.1, 0.9],
        },
    ),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_pixels_are_those_of_the_folders_preprocessor(case: str, copied: Path) -> None:
    kind, given = PROCESSORS[case]
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**given)
    processor.save_pretrained(copied)
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(image)
    expected = torch.tensor(np.array(processor(image)["pixel_values"][0]))
    found = make_transform(load(str(copied)).info.preprocessing)(image)
    step = 1.01 / 255 / 0.22  # one of 255 values, normalised
    assert (found - expected).abs().max() < 2 * step
    assert (found - expected).abs().mean() < 0.1 * step


def test_dinov2_takes_the_size_of_its_preprocessor(tmp_path: Path) -> None:
    theirs = saved("DINOv2", tmp_path)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48}
    ).save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.info.preprocessing.input_size == (3, 48, 48)
    same(loaded.model, theirs, images(48, 48))
    assert "resampled from 4x4 to 6x6" in "".join(loaded.notes)


def test_labels(copied: Path) -> None:
    assert load(str(copied)).classes == []  # LABEL_0 is no name
    changed(copied, id2label={str(i): f"{'abcde'[i]}\x1b[1m" for i in range(5)})
    assert [c.name for c in load(str(copied)).classes] == [f"{c} [1m" for c in "abcde"]
    changed(copied, id2label={"0": "a"})
    assert load(str(copied)).classes == []


# ------------------------------------------------------------------ refused


def test_other_networks_are_refused_by_name(tmp_path: Path) -> None:
    for kind, config, why in (
        ("DINOv3ViTModel", transformers.DINOv3ViTConfig(**SIZES), "rotary positions"),
    ):
        getattr(transformers, kind)(config).save_pretrained(tmp_path / kind)
        with pytest.raises(ModelError, match=f"^{kind} is .*{why}"):
            load(str(tmp_path / kind))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_attention_heads": 5}, "5 heads over queries"),
        ({"num_attention_heads": -1}, "`num_attention_heads` .* a number above 0, got -1"),
        ({"image_size": 40}, "makes 5x5 patches, and the weights have 17 positions"),
        ({"image_size": "x"}, "`image_size` .* must be pixels, got 'x'"),
        ({"hidden_act": "os.system"}, "'os.system', is no activation"),
        ({"problem_type": "multi_label_classification"}, "is for multi_label_classification"),
        ({"hidden_size": 10**9}, "says `hidden_size` 1000000000, and the weights have 24"),
        ({"num_hidden_layers": 4}, "says `num_hidden_layers` 4, and the weights have 2"),
        ({"layer_norm_eps": None, "architectures": None}, "which class of `transformers`"),
        ({"architectures": ["os.system"]}, "^os.system is not among the networks"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(
    change: dict[str, Any], match: str, copied: Path
) -> None:
    changed(copied, **change)
    with pytest.raises(ModelError, match=match):
        load(str(copied))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"image_size": "x"}, "`image_size` .* must be pixels, got 'x'"),
        ({"image_size": [32, 48]}, "at 32x48 pixels"),
        ({"depths": [10**9, 1]}, "`depths`"),
        ({"depths": [1, 1]}, "not fit"),
        ({"window_size": "os.system"}, "`window_size`"),
        ({"use_absolute_embeddings": True}, "with `use_absolute_embeddings` True"),
        ({"layer_norm_eps": 0.1}, "with `layer_norm_eps` 0.1"),
    ],
    ids=str,
)
def test_a_swin_that_does_not_fit(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    saved("Swin", tmp_path)
    changed(tmp_path, **change)
    with pytest.raises(ModelError, match=match):
        load(str(tmp_path))


def test_tensors_that_do_not_fit(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    for extra, gone, match in (
        ({"vit.adapter.weight": torch.ones(2)}, "", r"does not know: `vit.adapter.weight` \[2\]"),
        ({}, "vit.encoder.layer.1.attention.attention.key.bias", "lack 'blocks.1.k.bias'"),
        ({}, "vit.layernorm.weight", "1 missing: `norm.weight`"),
        ({}, "classifier.weight", "have no classifier"),
    ):
        left = {k: v for k, v in tensors.items() if k != gone and not k.startswith(gone or "\0")}
        if gone == "classifier.weight":
            left.pop("classifier.bias")
        save_file(left | extra, copied / "model.safetensors")
        with pytest.raises(ModelError, match=match):
            load(str(copied))


def test_arguments_of_a_checkpoint_are_checked(vit: tuple[Path, nn.Module]) -> None:
    loaded = load(str(vit[0]))
    for args, match in (
        ({"pretrained": True}, "`pretrained` = 'True', which is not taken from a file"),
        ({"checkpoint_path": "/x.pth"}, "`checkpoint_path`"),
        ({"embed_dim": 10**9}, "`embed_dim`"),
        ({"act_layer": "os.system"}, "`act_layer`"),
        ({"norm_layer": ["a"]}, "`norm_layer`"),
        ({"img_size": [2, 2, 2]}, "`img_size`"),
        ({"depth": True}, "`depth`"),
    ):
        config: CheckpointConfig = config_of(loaded.model, **described(loaded))
        config.source = replace(config.source, model_args={**config.source.model_args, **args})
        with pytest.raises(ModelError, match=match):
            build(config, loaded.model.state_dict())
