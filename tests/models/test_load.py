"""Loading by name and from files: layouts, sizes, preprocessing, and what is refused."""

from __future__ import annotations

import argparse
import json
import pickle
import socket
import warnings
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from npprune.errors import ModelError
from npprune.models import hub
from npprune.models import load as loading
from npprune.models.foreign import jax_to_timm
from npprune.models.load import build, create, load, load_model, model_info, weights_sha256
from npprune.records import CheckpointConfig, ModelSource

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
TINY |= {"num_heads": 3, "num_classes": 5}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Non-trivial values everywhere: no zero biases, no unit scales."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2 + 0.05)
    return model


def tiny(name: str = "vit_base_patch16_224", **args: Any) -> nn.Module:
    return randomised(create(name, {**TINY, **args}))


def images(side: int = 32, n: int = 2) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def jax_archive(model: nn.Module) -> dict[str, np.ndarray]:
    """The inverse of `jax_to_timm`, written from the layout's description."""
    s = {k: v.numpy() for k, v in model.state_dict().items()}
    d, heads = model.embed_dim, model.blocks[0].attn.num_heads  # type: ignore[union-attr,index]
    out = {
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "head/kernel": s["head.weight"].T,
        "head/bias": s["head.bias"],
    }
    for i in range(len(model.blocks)):  # type: ignore[arg-type]
        b, at = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attn = at + "MultiHeadDotProductAttention_1/"
        for n, part in enumerate(("query", "key", "value")):
            rows = slice(n * d, (n + 1) * d)
            out[f"{attn}{part}/kernel"] = s[b + "attn.qkv.weight"][rows].T.reshape(d, heads, -1)
            out[f"{attn}{part}/bias"] = s[b + "attn.qkv.bias"][rows].reshape(heads, -1)
        out[attn + "out/kernel"] = s[b + "attn.proj.weight"].T.reshape(heads, -1, d)
        out[attn + "out/bias"] = s[b + "attn.proj.bias"]
        for n, name in ((0, "LayerNorm_0"), (1, "LayerNorm_2")):
            out[f"{at}{name}/scale"] = s[f"{b}norm{n + 1}.weight"]
            out[f"{at}{name}/bias"] = s[f"{b}norm{n + 1}.bias"]
        for n in (0, 1):
            out[f"{at}MlpBlock_3/Dense_{n}/kernel"] = s[f"{b}mlp.fc{n + 1}.weight"].T
            out[f"{at}MlpBlock_3/Dense_{n}/bias"] = s[f"{b}mlp.fc{n + 1}.bias"]
    return out


# ------------------------------------------------------------------ auto


def test_auto_reads_a_jax_archive(tmp_path: Path) -> None:
    model = tiny()
    np.savez(tmp_path / "w.npz", **jax_archive(model))
    loaded = load("auto", checkpoint=tmp_path / "w.npz")
    torch.testing.assert_close(loaded.model(images()), model(images()))
    info = loaded.info
    assert (info.widths, info.heads, info.embed_dim) == ([96, 96], [3, 3], 24)
    assert (info.num_classes, info.scope) == (5, "cls")
    assert info.preprocessing.input_size == (3, 32, 32)
    assert info.preprocessing.mean == (0.5, 0.5, 0.5)
    assert any("preprocessing" in note for note in loaded.notes)


def test_jax_archive_agrees_with_timms_own_reader(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **jax_archive(tiny()))
    other = create("vit_base_patch16_224", TINY)
    other.load_pretrained(str(tmp_path / "w.npz"))  # type: ignore[operator]
    ours = load_model("auto", checkpoint=tmp_path / "w.npz")
    assert weights_sha256(ours) == weights_sha256(other)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"global_pool": "avg", "fc_norm": True},
        {"init_values": 0.1},
        {"reg_tokens": 4, "no_embed_class": True},
        {"reg_tokens": 4},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"class_token": False, "global_pool": "avg", "fc_norm": False},
        {"class_token": False, "global_pool": "map", "mlp_ratio": 2.5},
        {"mlp_ratio": 11 / 3},
    ],
    ids=str,
)
def test_auto_finds_the_architecture_of_a_state_dict(tmp_path: Path, args: dict[str, Any]) -> None:
    model = tiny(**args)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    torch.testing.assert_close(loaded.model(images()), model(images()))
    assert loaded.info.source.sha256 == weights_sha256(model)
    again = create(loaded.info.source.architecture, loaded.info.source.model_args)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images()), model(images()))


def test_auto_reads_deit_layouts(tmp_path: Path) -> None:
    deit3 = tiny(init_values=0.1, no_embed_class=True)
    names = {
        k: k.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        for k in deit3.state_dict()
    }
    torch.save({"model": {names[k]: v for k, v in deit3.state_dict().items()}}, tmp_path / "3.pth")
    ours = load_model("auto", checkpoint=tmp_path / "3.pth", num_heads=3)
    torch.testing.assert_close(ours(images()), deit3(images()))
    distilled = tiny("deit_base_distilled_patch16_224")
    torch.save({"model": distilled.state_dict()}, tmp_path / "d.pth")
    loaded = load("auto", checkpoint=tmp_path / "d.pth", num_heads=3)
    torch.testing.assert_close(loaded.model(images()), distilled(images()))
    assert loaded.info.preprocessing.mean == (0.485, 0.456, 0.406)


def test_auto_needs_the_heads_unless_the_width_is_usual(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelError, match="heads is not in the file, and the width 24") as err:
        load("auto", checkpoint=tmp_path / "w.pth")
    assert "`num_heads=N`" in str(err.value.hint)
    with pytest.raises(ModelError, match="must divide the width 24, got 7"):
        load("auto", checkpoint=tmp_path / "w.pth", num_heads=7)
    torch.save(tiny(embed_dim=192, depth=1).state_dict(), tmp_path / "ti.pth")
    loaded = load("auto", checkpoint=tmp_path / "ti.pth")
    assert loaded.info.heads == [3]
    assert any("took 3" in note for note in loaded.notes)


def test_auto_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none was given"):
        load("auto")
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "r.pth")
    with pytest.raises(ModelError, match=r"lacks `patch_embed.proj.weight`.*conv1.weight"):
        load("auto", checkpoint=tmp_path / "r.pth")
    state = tiny().state_dict()
    torch.save({k: v for k, v in state.items() if "blocks.0.norm1" not in k}, tmp_path / "n.pth")
    with pytest.raises(ModelError, match=r"2 missing: `blocks.0.norm1.weight`"):
        load("auto", checkpoint=tmp_path / "n.pth", num_heads=3)
    torch.save({**state, "blocks.3.norm1.weight": torch.ones(24)}, tmp_path / "g.pth")
    with pytest.raises(ModelError, match="has block 3 and lacks block 2"):
        load("auto", checkpoint=tmp_path / "g.pth", num_heads=3)


@pytest.mark.parametrize(
    ("key", "message"),
    [("conv_root/kernel", "hybrid with a ResNet"), ("pre_logits/kernel", "representation layer")],
)
def test_jax_variants_are_refused_by_name(key: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        jax_to_timm({key: torch.zeros(1)})


def test_other_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(ModelError, match=r"lacks `embedding/kernel`.*arrays: a"):
        load("auto", checkpoint=tmp_path / "x.npz")
    archive = jax_archive(tiny())
    del archive["Transformer/encoderblock_1/MlpBlock_3/Dense_0/bias"]
    np.savez(tmp_path / "y.npz", **archive)
    with pytest.raises(ModelError, match="lacks 'Transformer/encoderblock_1/MlpBlock_3/Dense_0"):
        load("auto", checkpoint=tmp_path / "y.npz")


def test_positions_are_resampled_for_another_image_size(tmp_path: Path) -> None:
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3, img_size=48)
    assert loaded.info.preprocessing.input_size == (3, 48, 48)
    assert loaded.model.pos_embed.shape == (1, 37, 24)  # type: ignore[union-attr]
    assert loaded.model(images(48)).shape == (2, 5)
    cls = model.pos_embed[:, :1]  # type: ignore[index]
    torch.testing.assert_close(loaded.model.pos_embed[:, :1], cls)  # type: ignore[index]
    wide = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3, img_size=(32, 64))
    assert wide.info.preprocessing.input_size == (3, 32, 64)
    with pytest.raises(ModelError, match="positive numbers of pixels, got 0"):
        load("auto", checkpoint=tmp_path / "w.pth", num_heads=3, img_size=0)


def test_a_file_of_another_grid_is_never_read_as_a_square(tmp_path: Path) -> None:
    def saved(grid: tuple[int, int], **args: Any) -> tuple[Path, nn.Module]:
        model = tiny(img_size=(grid[0] * 8, grid[1] * 8), depth=1, **args)
        path = tmp_path / f"{grid}{sorted(args)}.pth"
        torch.save(model.state_dict(), path)
        return path, model

    for grid in ((4, 6), (3, 5), (2, 4), (7, 9)):  # k - 1 x k + 1 and the class token make k x k
        path, model = saved(grid)
        size = (grid[0] * 8, grid[1] * 8)
        with pytest.raises(ModelError, match="the image size is not in the file") as err:
            load("auto", checkpoint=path, num_heads=3)
        assert f"`img_size={size[0]}x{size[1]}`" in str(err.value.hint)
        loaded = load("auto", checkpoint=path, num_heads=3, img_size=size)
        assert loaded.info.preprocessing.input_size == (3, *size)
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(loaded.model(x), model(x))
    path, model = saved((4, 4), no_embed_class=True)
    with pytest.raises(ModelError, match=r"3x5 or 5x3\) and 1 of other.*4x4\) and none") as err:
        load("auto", checkpoint=path, num_heads=3)
    assert "`img_size=32`" in str(err.value.hint)
    again = load("auto", checkpoint=path, num_heads=3, img_size=32).model
    torch.testing.assert_close(again(images()), model(images()))
    path, model = saved((2, 8))  # 16 patches: taken as a square, which is said
    assert "16 patches: read as 4x4" in load("auto", checkpoint=path, num_heads=3).notes[0]
    loaded = load("auto", checkpoint=path, num_heads=3, img_size=(16, 64))
    x = torch.randn(1, 3, 16, 64)
    torch.testing.assert_close(loaded.model(x), model(x))


def test_auto_names_what_it_has_no_place_for(tmp_path: Path) -> None:
    state = tiny().state_dict()
    layers: dict[str, str] = {
        "pre_logits.fc.weight": "representation layer .*`pre_logits.fc.weight`",
        "aux_head.weight": r"1 tensors that a plain .* lacks: `aux_head.weight` \[5, 24\]",
        "head_dist.weight": "lacks: `head_dist.weight`",
        "blocks.0.attn.qkv.lora_A.weight": "lacks: `blocks.0.attn.qkv.lora_A.weight`",
    }
    for name, message in layers.items():
        torch.save({**state, name: torch.ones(5, 24)}, tmp_path / "w.pth")
        with pytest.raises(ModelError, match=message):
            load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    archive = jax_archive(tiny())
    np.savez(tmp_path / "w.npz", **archive, **{"extra/kernel": np.ones(3)})
    with pytest.raises(ModelError, match="1 arrays that a plain ViT lacks: `extra/kernel`"):
        load("auto", checkpoint=tmp_path / "w.npz")
    torch.save({**state, "mask_token": torch.ones(1, 24)}, tmp_path / "m.pth")
    notes = load("auto", checkpoint=tmp_path / "m.pth", num_heads=3).notes
    assert "not used: `mask_token`, for which the network has no place" in notes


# ------------------------------------------------------------------ as trainers write them


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


STATE = tiny().state_dict()
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}  # another state of the network
SMALL = randomised(create("vit_base_patch16_224", {**TINY, "depth": 1}), 3).state_dict()
HEADLESS = {name: tensor for name, tensor in STATE.items() if not name.startswith("head")}
LOSS = {"criterion.weight": torch.ones(5)}
BESIDE = {
    "args": argparse.Namespace(out=Path("runs"), lr=np.float32(1e-3)),
    "best": np.float64(0.5),
    "history": np.zeros(3),
    "dir": PureWindowsPath("C:/runs"),
    "torch": torch.__version__,
}
FOUND: dict[str, tuple[Any, str]] = {  # contents, what a note says
    **{
        f"prefix {p}": ({"state_dict": prefixed(p, STATE)}, "")
        for p in ("net.", "vit.", "encoder.", "backbone.", "_orig_mod.module.", "model.net.")
    },
    **{
        f"key {key}": ({key: STATE, "epoch": 3, **BESIDE}, "")
        for key in ("model_state_dict", "model", "net", "weights", "params", "student", "module")
    },
    "averaged by PyTorch": (
        {"n_averaged": torch.tensor(5), **prefixed("module.", STATE)},
        "left out, being no part of the network: `n_averaged`",
    ),
    "a loss under the trainer": ({"state_dict": prefixed("model.", STATE) | LOSS}, "criterion"),
    "a loss beside bare names": ({"state_dict": STATE | LOSS}, "`criterion.weight`"),
    "a measure": ({"model_state_dict": STATE, "best_acc": torch.tensor(0.5)}, "`best_acc`"),
    "an optimizer": (
        {
            "model": STATE,
            "optimizer": {"state": {0: {"step": torch.ones(1), "exp": torch.ones(2)}}},
        },
        "`optimizer` (2 tensors)",
    ),
    "compiled blocks": (
        {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in STATE.items()},
        "",
    ),
    "averages last": (
        {"model": OTHER, "ema": prefixed("module.", STATE)},
        "took `module.` of `ema`",
    ),
    "averages in one dictionary": (
        {"state_dict": prefixed("model.", OTHER) | prefixed("ema_model.", STATE)},
        "not `model.` of `state_dict`; to take `model.` of `state_dict`, save it alone",
    ),
    "a teacher": ({"student": OTHER, "teacher": STATE}, "not `student`"),
    "the most complete": ({"ema": HEADLESS, "model": STATE}, "took `model`"),
}


@pytest.mark.parametrize("case", FOUND)
def test_the_network_inside_is_found(case: str, tmp_path: Path) -> None:
    content, said = FOUND[case]
    torch.save(content, tmp_path / "w.pth")
    loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, STATE[name]), name
    assert said in "\n".join(loaded.notes)


def test_the_network_not_taken_can_be_saved_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (
        {"student": OTHER, "teacher": STATE, **BESIDE},
        {"state_dict": prefixed("model.", OTHER) | prefixed("ema_model.", STATE)},
        {"state_dict": OTHER | prefixed("teacher.", STATE)},
    ):
        torch.save(content, "w.pth")
        notes = load("auto", checkpoint="w.pth", num_heads=3).notes
        note = next(n for n in notes if "save it alone" in n)
        exec(note.split("`")[-2].replace("FILE", "'w.pth'"))
        model = load("auto", checkpoint="alone.pth", num_heads=3).model
        assert all(torch.equal(v, OTHER[k]) for k, v in model.state_dict().items())


def test_of_different_networks_the_named_one_is_taken(tmp_path: Path, vit_tiny_file: Path) -> None:
    from safetensors.torch import load_file

    content = {"teacher": SMALL, "student": load_file(vit_tiny_file)}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ModelError, match="2 different networks: `teacher`, `student`"):
        load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    loaded = load("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth")
    assert "took `student` (it fits the named architecture), not `teacher`" in loaded.notes[0]


NAMED = {  # contents of other kinds, what is said, and the next step
    "torchvision": (
        {"conv_proj.weight": 1, "encoder.layers.encoder_layer_0.ln_1.weight": 1},
        "torchvision's vision transformer",
        "convert it first",
    ),
    "hugging face": (
        {"vit.embeddings.patch_embeddings.projection.weight": 1},
        "Hugging Face's vision transformer",
        "give the folder with its config.json",
    ),
    "adapters": ({"base_model.model.blocks.0.attn.qkv.lora_A.weight": 1}, "LoRA", "merge them"),
    "a resnet": ({"layer1.0.conv1.weight": 1}, "convolutional network", "plain vision transf"),
}


@pytest.mark.parametrize("case", NAMED)
def test_hints_name_the_layout_and_lead_in_no_circle(case: str, tmp_path: Path) -> None:
    names, what, step = NAMED[case]
    torch.save({k: torch.ones(2, 2) for k in names}, tmp_path / "w.pth")
    with pytest.raises(ModelError, match=what) as err:
        load("auto", checkpoint=tmp_path / "w.pth")
    assert step in str(err.value.hint)
    with pytest.raises(ModelError) as err:
        load("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth")
    assert what in str(err.value.hint)
    assert "auto" not in str(err.value.hint)


def test_a_name_leads_to_auto_only_where_auto_reads_the_file(tmp_path: Path) -> None:
    def hint(tensors: dict[str, Tensor]) -> str:
        torch.save(tensors, tmp_path / "w.pth")
        with pytest.raises(ModelError) as err:
            load("vit_tiny_patch16_224", checkpoint=tmp_path / "w.pth")
        return str(err.value.hint)

    assert "`auto`" in hint(STATE)
    assert "`img_size=24x40`" in hint(tiny(img_size=(24, 40)).state_dict())
    assert "`auto`" not in hint({**STATE, "blocks.0.attn.rel.weight": torch.ones(2, 2)})
    assert "`auto`" not in hint({k: v for k, v in STATE.items() if "qkv" not in k})


def test_a_classifier_apart_from_the_network_is_not_lost(tmp_path: Path) -> None:
    def refused(content: Any, match: str) -> str:
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ModelError, match=match) as err:
            load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
        return str(err.value.hint)

    net = prefixed("net.", STATE)
    assert "`head.weight`" in refused({**net, "top.weight": torch.ones(9, 5)}, "layer `top.weight`")
    apart = {"backbone": HEADLESS, "classifier": {"weight": torch.ones(9, 24)}}
    refused(apart, r"layer `classifier.weight` \[9, 24\]")
    first = {"head.1.weight": STATE["head.weight"], "head.1.bias": STATE["head.bias"]}
    sequence = HEADLESS | first | {"head.0.weight": torch.ones(24, 24)}
    assert "as `head.weight` and `head.bias`" in refused(sequence, "is a sequence of layers")
    torch.save(HEADLESS | first, tmp_path / "w.pth")  # after dropout
    loaded = load("auto", checkpoint=tmp_path / "w.pth", num_heads=3)
    assert torch.equal(loaded.model.state_dict()["head.weight"], STATE["head.weight"])
    assert any("`head.1.weight` is taken for the classifier" in note for note in loaded.notes)


# ------------------------------------------------------------------ by name


@pytest.fixture(scope="module")
def vit_tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = randomised(create("vit_tiny_patch16_224", {"num_classes": 7}))
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_a_timm_name_with_a_file(vit_tiny_file: Path) -> None:
    loaded = load("vit_tiny_patch16_224.augreg_in21k_ft_in1k", checkpoint=vit_tiny_file)
    assert not loaded.model.training
    info = loaded.info
    assert info.source.model_args == {"num_classes": 7}
    assert (info.num_classes, info.heads, info.widths[0]) == (7, [3] * 12, 768)
    assert info.params == sum(p.numel() for p in loaded.model.parameters())
    # 12 blocks of 197 tokens, patches, head
    block = 197 * (4 * 192**2 + 2 * 192 * 768) + 2 * 197**2 * 192
    assert info.macs == 12 * block + 196 * 768 * 192 + 192 * 7
    assert info.preprocessing.crop_pct == 0.9
    assert "state_dict" not in loaded.model.pretrained_cfg  # type: ignore[operator]


def test_wrapped_and_prefixed_checkpoints(vit_tiny_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = load_file(vit_tiny_file)
    sha = load("vit_tiny_patch16_224", checkpoint=vit_tiny_file).info.source.sha256
    prefixed = {f"module.{k}": v for k, v in plain.items()}
    other = {k: v + 1 for k, v in plain.items()}
    for i, content in enumerate(
        (
            {"model": plain, "args": argparse.Namespace(lr=0.1)},
            {"model": other, "model_ema": prefixed},
        )
    ):
        torch.save(content, tmp_path / f"{i}.pth")
        loaded = load("vit_tiny_patch16_224", checkpoint=tmp_path / f"{i}.pth")
        assert loaded.info.source.sha256 == sha
    assert loaded.notes[0] == "averaged weights: the file's `module.` of `model_ema`"
    assert "took `module.` of `model_ema` (the most complete, then averaged" in loaded.notes[1]


def test_a_checkpoint_of_another_model_names_the_tensors(vit_tiny_file: Path) -> None:
    with pytest.raises(
        ModelError, match=r"151 of other shapes: `cls_token` is \[1, 1, 192\] in the file and "
    ):
        load("vit_small_patch16_224", checkpoint=vit_tiny_file)
    with pytest.raises(ModelError, match=r"`patch_embed.proj.weight` is \[192, 3, 16, 16\]"):
        load("vit_small_patch32_224", checkpoint=vit_tiny_file)
    with pytest.raises(ModelError, match=r"`num_classes` is 10, and the classifier .* 7 outputs"):
        load("vit_tiny_patch16_224", checkpoint=vit_tiny_file, num_classes=10)


def test_a_jax_file_with_other_heads_than_the_name(tmp_path: Path) -> None:
    model = tiny(patch_size=16, img_size=224, embed_dim=192, depth=12, num_heads=3)
    np.savez(tmp_path / "w.npz", **jax_archive(model))
    ours = load_model("vit_tiny_patch16_224", checkpoint=tmp_path / "w.npz")
    torch.testing.assert_close(ours(images(224)), model(images(224)))
    with pytest.raises(ModelError, match="has 3 attention heads, and vit_tiny_patch16_224 has 6"):
        load("vit_tiny_patch16_224", checkpoint=tmp_path / "w.npz", num_heads=6)


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ModelError, match="no model named 'vit_tinny_patch16_224'") as err:
        load("vit_tinny_patch16_224")
    assert "vit_tiny_patch16_224" in str(err.value.hint)
    with pytest.raises(ModelError, match="no weights tagged 'nope'") as err:
        load("vit_tiny_patch16_224.nope")
    assert "augreg" in str(err.value.hint)
    with pytest.raises(ModelError, match=r"cannot build .*num_heads=5"):
        create("vit_tiny_patch16_224", {"num_heads": 5})


def test_without_a_network_the_error_says_which_file_to_fetch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cfg = {"hf_hub_id": "timm/no-such-model-here"}
    with pytest.raises(ModelError, match="hub cannot be reached") as err:
        hub.fetch("vit_x", cfg)
    assert "`model.safetensors` of https://huggingface.co/timm/no-such-model-here" in str(
        err.value.hint
    )
    assert "`checkpoint=FILE`" in str(err.value.hint)
    with pytest.raises(ModelError, match="publishes no weights"):
        hub.fetch("vit_x", {})


def test_a_named_network_resamples_from_the_right_grid(tmp_path: Path) -> None:
    name, args = "vit_tiny_patch16_224", {"num_classes": 5}

    def saved(size: Any) -> tuple[Path, nn.Module]:
        model = randomised(create(name, {**args, "img_size": size}))
        torch.save(model.state_dict(), tmp_path / "w.pth")
        return tmp_path / "w.pth", model

    path, model = saved((112, 448))  # as many patches as 224 x 224
    loaded = load(name, checkpoint=path, img_size=(112, 448))
    assert torch.equal(loaded.model.pos_embed, model.pos_embed)  # type: ignore[arg-type]
    assert "196 patches: read as 7x28, as the image size says" in loaded.notes
    path, model = saved((96, 160))
    with pytest.raises(
        ModelError, match=r"`pos_embed` is \[1, 61, 192\].*60 patches are no sq"
    ) as e:
        load(name, checkpoint=path)
    assert "`img_size=HxW`" in str(e.value.hint)
    loaded = load(name, checkpoint=path, img_size=[96, 160])
    assert torch.equal(loaded.model.pos_embed, model.pos_embed)  # type: ignore[arg-type]
    path, model = saved(96)
    assert "image size 96x96 keeps them" in load(name, checkpoint=path).notes[0]


def test_names_that_timm_has_changed(monkeypatch: pytest.MonkeyPatch, vit_tiny_file: Path) -> None:
    asked: list[str] = []

    def fetched(name: str, cfg: dict[str, Any]) -> Path:
        asked.append(name)
        return vit_tiny_file

    monkeypatch.setattr(loading, "fetch", fetched)
    with pytest.warns(UserWarning, match="timm has renamed"):
        load_model("vit_tiny_patch16_224_in21k")
    loaded = load("vit_tiny_patch16_224_in21k", checkpoint=vit_tiny_file)
    new = "vit_tiny_patch16_224.augreg_in21k"
    assert asked == [new]
    assert loaded.info.source.architecture == new
    assert loaded.notes[0] == f"timm has renamed vit_tiny_patch16_224_in21k: it is {new} now"
    for name in (f"hf-hub:timm/{new}", f"timm/{new}"):
        assert load(name).info.source.architecture == new
    assert asked == [new] * 3


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is fetched is read as the folder that it is; without a network it is said how."""
    asked: list[str] = []

    def fetched(repo: str) -> Path:
        asked.append(repo)
        return tmp_path

    monkeypatch.setattr("npprune.models.where.fetch_folder", fetched)
    model = tiny()
    timm_folder(tmp_path, model)
    for name, repo in (
        ("someone/my-vit", "someone/my-vit"),
        ("hf-hub:someone/my-vit@v1", "someone/my-vit@v1"),
    ):
        loaded = load(name)
        assert asked[-1] == repo
        assert loaded.info.source.checkpoint == name
        torch.testing.assert_close(loaded.model(images()), model(images()))
    with pytest.raises(ModelError, match="has weights of its own"):
        load("someone/my-vit", checkpoint=tmp_path / "w.pth")
    with pytest.raises(ModelError, match="there is no folder"):
        load("./someone/my-vit")


def test_without_a_network_a_name_says_what_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ModelError, match="the hub cannot be reached") as err:
        load("google/no-such-network-here")
    for said in ("`config.json`", "`model.safetensors`", "`checkpoint=FOLDER`"):
        assert said in str(err.value.hint)
    with pytest.raises(ModelError, match="is no name of the hub"):
        load("hf-hub:..")


def timm_folder(folder: Path, model: nn.Module, **changes: Any) -> None:
    """A folder as timm writes for the hub."""
    args = {k: v for k, v in TINY.items() if k != "num_classes"}
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": 5,
        "model_args": args,
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3],
            "std": [0.4, 0.5, 0.6],
            "crop_pct": 0.8,
            "interpolation": "bilinear",
        },
        "label_names": ["ant", "bee", "cat", "dog", "eel"],
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    save_file(model.state_dict(), folder / "model.safetensors")


def test_a_folder_of_timm_says_all(tmp_path: Path) -> None:
    model = tiny()
    timm_folder(tmp_path, model)
    for name, checkpoint in (
        (str(tmp_path), None),
        (f"local-dir:{tmp_path}", None),
        ("auto", tmp_path),
        ("vit_base_patch16_224", tmp_path / "model.safetensors"),
    ):
        loaded = load(name, checkpoint=checkpoint)
        torch.testing.assert_close(loaded.model(images()), model(images()))
        pre = loaded.info.preprocessing
        assert (pre.mean, pre.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (pre.input_size, pre.crop_pct, pre.interpolation) == ((3, 32, 32), 0.8, "bilinear")
        assert [c.name for c in loaded.classes] == ["ant", "bee", "cat", "dog", "eel"]
    with pytest.raises(ModelError, match="architecture vit_base_patch16_224, and MODEL is"):
        load("vit_tiny_patch16_224", checkpoint=tmp_path)
    for args, match in (
        ({"checkpoint_path": "/etc/passwd"}, "`checkpoint_path` = '/etc/passwd'"),
        ({"embed_layer": "os.system"}, "`embed_layer`"),
        ({"depth": 10**6}, "`depth`"),
    ):
        timm_folder(tmp_path, model, model_args=args)
        with pytest.raises(ModelError, match=match):
            load(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="none of its weights"):
        load(str(tmp_path))


# ------------------------------------------------------------------ broken files


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


def test_broken_files(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            load("vit_tiny_patch16_224", checkpoint=path)

    refused(tmp_path / "none.pth", "does not exist")
    refused(tmp_path, "must be a file, got the folder")
    (tmp_path / "empty.pth").touch()
    refused(tmp_path / "empty.pth", "is empty")
    for suffix, kind in (("pth", "PyTorch"), ("safetensors", "safetensors"), ("npz", "NumPy")):
        (tmp_path / f"text.{suffix}").write_text("<html>not found</html>")
        refused(tmp_path / f"text.{suffix}", f"cannot be read as a {kind} file")
    torch.save({"a": torch.zeros(1000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:900])
    refused(tmp_path / "cut.pth", "cannot be read as a PyTorch file")
    save_file({"a": torch.zeros(1000)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:900])
    refused(tmp_path / "cut.safetensors", "cannot be read as a safetensors file")
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    refused(tmp_path / "evil.pth", r"holds pickled code \(.*exec\), which is not run")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"a": Evil()}))
    refused(tmp_path / "evil.pkl", "evil.pkl")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", "must hold named tensors, got list")
    torch.save({"epoch": 3}, tmp_path / "no.pth")
    refused(tmp_path / "no.pth", "got a dictionary with 'epoch'")
    torch.save({"a": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pth")
    refused(tmp_path / "nan.pth", "`a` holds values that are not finite")
    np.savez(tmp_path / "obj.npz", a=np.array([{}], dtype=object))
    refused(tmp_path / "obj.npz", "cannot be read as a NumPy file")


def test_programs_are_not_run(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a format that PyTorch gives up
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "s.pt")
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "m.pth")
    for file, match, step in (
        ("s.pt", "is a TorchScript archive", "torch.jit.load(FILE).state_dict()"),
        ("m.pth", r"pickled code \(torch.nn.modules.linear.Linear\)", "whole pickled network"),
    ):
        with pytest.raises(ModelError, match=match) as err:
            load("auto", checkpoint=tmp_path / file)
        assert step in str(err.value.hint)


# ------------------------------------------------------------------ hash, build


def test_the_hash_sees_every_value_and_nothing_else() -> None:
    model = tiny()
    sha = weights_sha256(model)
    assert sha == weights_sha256(randomised(create("vit_base_patch16_224", TINY)))
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-6  # type: ignore[index,union-attr]
    assert weights_sha256(model) != sha


def test_creating_a_model_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    create("vit_base_patch16_224", TINY)
    assert torch.rand(1) == expected


def config_of(model: nn.Module, **changes: Any) -> CheckpointConfig:
    info = model_info(model, ModelSource("vit_base_patch16_224", dict(TINY)))
    fields: dict[str, Any] = {
        "source": info.source,
        "widths": info.widths,
        "heads": info.heads,
        "num_classes": info.num_classes,
        "preprocessing": info.preprocessing,
        "classes": [],
        "weights_sha256": info.source.sha256,
    }
    return CheckpointConfig(**{**fields, **changes})


def test_build_is_strict() -> None:
    model = tiny()
    state = model.state_dict()
    rebuilt = build(config_of(model), state)
    assert not rebuilt.training
    torch.testing.assert_close(rebuilt(images()), model(images()), rtol=0, atol=0)
    with pytest.raises(ModelError, match=r"1 missing: `norm.bias`"):
        build(config_of(model), {k: v for k, v in state.items() if k != "norm.bias"})
    with pytest.raises(ModelError, match=r"1 unexpected: `extra`"):
        build(config_of(model), {**state, "extra": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"config.json says hidden widths \[96, 64\]"):
        build(config_of(model, widths=[96, 64]), state)
    with pytest.raises(ModelError, match=r"`head.weight` is \[5, 24\] in the file and \[4, 24\]"):
        build(config_of(model, num_classes=4), state)
    with pytest.raises(ModelError, match="2 heads of 8 need a qkv of 48 rows, got 72"):
        build(config_of(model, heads=[3, 2]), state)


# ------------------------------------------------------------------ the paper's layouts


@pytest.mark.golden
def test_golden_weights_load(shared_golden: Path) -> None:
    vit = load("auto", checkpoint=shared_golden / "vit/weights.npz").info
    mae = load("auto", checkpoint=shared_golden / "mae/weights.pth", num_heads=3).info
    for info, scope in ((vit, "cls"), (mae, "patch")):
        assert (info.widths, info.heads) == ([384] * 6, [3] * 6)
        assert (info.embed_dim, info.num_classes, info.scope) == (96, 1000, scope)
        assert info.preprocessing.input_size == (3, 96, 96)
