"""The contract of the view, over timm's families at tiny sizes with random weights."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from npprune.core.attribution.tangent import value_and_tangent
from npprune.errors import ModelError
from npprune.models.load import create
from npprune.models.view import make_view

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
TINY |= {"num_heads": 3, "num_classes": 5}

# family: timm name, changes to TINY, scope, prefix tokens
FAMILIES: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "vit": ("vit_base_patch16_224", {}, "cls", 1),
    "vit, odd size": ("vit_base_patch16_224", {"img_size": 37}, "cls", 1),
    "vit, oblong": ("vit_base_patch16_224", {"img_size": (24, 40)}, "cls", 1),
    "vit, average": ("vit_base_patch16_224", {"global_pool": "avg"}, "patch", 1),
    "vit, registers": (
        "vit_base_patch16_224",
        {"reg_tokens": 4, "no_embed_class": True},
        "cls",
        5,
    ),
    "vit, QK norm": ("vit_base_patch16_224", {"qk_norm": True}, "cls", 1),
    "vit, post norm": ("vit_base_patch16_rpn_224", {}, "patch", 0),
    "deit": ("deit_base_patch16_224", {}, "cls", 1),
    "deit distilled": ("deit_base_distilled_patch16_224", {}, "all", 2),
    "deit3, LayerScale": ("deit3_base_patch16_224", {}, "cls", 1),
    "dinov2, registers": ("vit_small_patch14_reg4_dinov2", {}, "cls", 5),
    "dinov2, packed SwiGLU": ("vit_giant_patch14_dinov2", {"mlp_ratio": 4}, "cls", 1),
    "dinov3": ("vit_small_patch16_dinov3", {}, "patch", 5),
    "dinov3, SwiGLU": ("vit_small_plus_patch16_dinov3", {}, "patch", 5),
    "clip, pre-norm": ("vit_base_patch16_clip_224", {}, "cls", 1),
    "siglip, attention pool": ("vit_base_patch16_siglip_224", {}, "patch", 0),
    "perception encoder": ("vit_pe_core_base_patch16_224", {}, "all", 1),
    "registers, no class token": ("vit_wee_patch16_reg1_gap_256", {}, "patch", 1),
    "differential attention": ("vit_dlittle_patch16_reg1_gap_256", {}, "patch", 1),
    "aimv2": ("aimv2_large_patch14_224", {}, "patch", 0),
    "beit": ("beit_base_patch16_224", {}, "patch", 1),
    "beitv2": ("beitv2_base_patch16_224", {}, "patch", 1),
    "beit3, MLP norm": ("beit3_base_patch16_224", {}, "patch", 1),
    "eva": ("eva_giant_patch14_224", {}, "patch", 1),
    "eva02, rotary": ("eva02_tiny_patch14_224", {}, "patch", 1),
    "eva02, MLP norm": ("eva02_base_patch14_448", {}, "patch", 1),
    "rotary, mixed": ("vit_small_patch16_rope_mixed_224", {"embed_dim": 48}, "cls", 1),
    "relative positions": ("vit_relpos_base_patch16_224", {}, "patch", 0),
    "shared relative positions": ("vit_srelpos_small_patch16_224", {}, "patch", 0),
    "relative positions, class token": ("vit_relpos_base_patch16_clsgap_224", {}, "patch", 1),
    "hybrid stem": (
        "vit_small_resnet26d_224",
        {"img_size": 64, "patch_size": 1},
        "cls",
        1,
    ),
}

REFUSED = {
    "convnext_atto": "ConvNeXt has no `blocks`",
    "resnet10t": "ResNet has no `blocks`",
    "pit_ti_224": "PoolingVisionTransformer has no `blocks`",
    "mvitv2_tiny": "MultiScaleVit has no `blocks`",
    "cait_xxs24_224": "Cait has class-attention blocks",
    "xcit_nano_12_p16_224": "Xcit has class-attention blocks",
    "convit_tiny": "ConVit has a class token that joins between the blocks",
    "samvit_base_patch16": "VisionTransformerSAM has a convolutional neck",
    "hiera_tiny_224": "Hiera has pooling between the blocks",
    "mixer_s32_224": r"block 0 \(MixerBlock\) has no `attn` next to its `mlp.fc2`",
    "vit_small_patch16_18x2_224": r"block 0 \(ParallelThingsBlock\) has no `attn`",
    "vit_base_patch16_xp_224": r"block 0 \(ParallelScalingBlock\) has no `attn`",
    "crossvit_9_240": r"block 0 \(MultiScaleBlock\) has no `attn`",
}


def family(name: str) -> tuple[nn.Module, Tensor]:
    """A tiny float64 model of the family with non-trivial weights, and two images."""
    timm_name, changes, _, _ = FAMILIES[name]
    args = {**TINY, **changes}
    model = create(timm_name, args).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "backbone" in key:  # a deep stem with such weights would overflow
                continue
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise * 0.2 + 0.05)
    side = args["img_size"]
    shape = (side, side) if isinstance(side, int) else side
    return model, torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", FAMILIES)
def test_contract(name: str) -> None:
    model, images = family(name)
    view = make_view(model)
    assert view.scope == FAMILIES[name][2]
    assert view.num_prefix_tokens == FAMILIES[name][3]
    assert view.widths == tuple(view.fc2(l).in_features for l in range(2))
    with torch.no_grad():
        logits = model(images)
        assert logits.std() > 1e-3
        x = view.embed(images)
        for l in range(len(view.widths)):
            y, attention = view.block_and_attention(l, x)
            torch.testing.assert_close(view.attention_output(l, x), attention, rtol=0, atol=1e-12)
            torch.testing.assert_close(view.tail(l, x, attention), y, rtol=0, atol=1e-12)
            some = slice(2, 5)
            torch.testing.assert_close(
                view.tail(l, x[:, some], attention[:, some]), y[:, some], rtol=0, atol=1e-12
            )
            _check_edit(view, l, x, y)
            _check_given(view, l, x, y)
            _check_tangent(view, l, x)
            if view.scope == "cls":
                _check_cls_only(view, l, x, y)
            x = view.block(l, x)
            torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
        torch.testing.assert_close(view.head(x), logits, rtol=0, atol=1e-12)
        # Nothing stays behind on the model.
        torch.testing.assert_close(model(images), logits, rtol=0, atol=0)


def _check_edit(view: Any, l: int, x: Tensor, y: Tensor) -> None:
    """The edit sees fc2's input, [b, t, h], and its result is what fc2 gets."""
    seen: list[Tensor] = []

    def keep(h: Tensor) -> Tensor:
        seen.append(h)
        return h

    torch.testing.assert_close(view.block(l, x, edit=keep), y, rtol=0, atol=1e-12)
    assert seen[0].shape == (*x.shape[:2], view.widths[l])

    def only(h: Tensor) -> Tensor:
        h = h.clone()
        h[:, 1] = 0
        return h

    edited = view.block(l, x, edit=only)
    changed = (edited - y).abs().amax((0, 2)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [1]


def _check_given(view: Any, l: int, x: Tensor, y: Tensor) -> None:
    """Giving the MLP's own output changes nothing."""
    hidden: list[Tensor] = []
    view.block(l, x, edit=lambda h: hidden.append(h) or h)
    for tokens in (slice(0, 1), slice(1, None), slice(None)):
        output = view.fc2(l)(hidden[0][:, tokens])
        torch.testing.assert_close(view.block(l, x, given=(tokens, output)), y, rtol=0, atol=1e-12)


def _check_cls_only(view: Any, l: int, x: Tensor, y: Tensor) -> None:
    """The class token is what it is when all tokens are computed, with every kernel."""
    attn = view.blocks[l].attn
    was = attn.fused_attn
    for fused in (True, False):
        attn.fused_attn = fused
        only = view.block(l, x, cls_only=True)
        assert only.shape == y.shape
        torch.testing.assert_close(only[:, 0], y[:, 0], rtol=0, atol=1e-12)
    attn.fused_attn = was


def _check_tangent(view: Any, l: int, x: Tensor) -> None:
    """Forward mode through the block agrees with torch's own and with a central difference."""
    dx = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(l))
    with sdpa_kernel(SDPBackend.MATH):
        y, dy = jvp(lambda v: view.block(l, v), (x,), (dx,))
        step = 1e-6
        difference = (view.block(l, x + step * dx) - view.block(l, x - step * dx)) / (2 * step)
    torch.testing.assert_close(dy, difference, rtol=1e-5, atol=1e-5)
    (ours,), (dours,) = value_and_tangent(lambda v: (view.block(l, v),), x, dx)
    torch.testing.assert_close(ours, y, rtol=0, atol=1e-12)
    torch.testing.assert_close(dours, dy, rtol=1e-9, atol=1e-9)


def test_the_families_are_of_every_kind_that_the_view_supports() -> None:
    """timm's files, and what the classifier reads, with how many tokens before the patches."""
    files = {
        model_entrypoint(name).__module__.removeprefix("timm.models.")
        for name, *_ in FAMILIES.values()
    }
    vits = {"vision_transformer", "vision_transformer_relpos", "vision_transformer_hybrid"}
    assert files == {*vits, "deit", "beit", "eva"}
    kinds = {(scope, prefix) for *_, scope, prefix in FAMILIES.values()}
    assert kinds >= {
        ("cls", 1),
        ("cls", 5),
        ("patch", 0),
        ("patch", 1),
        ("patch", 5),
        ("all", 1),
        ("all", 2),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_by_name(name: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[name]):
        make_view(create(name, {}))


def test_what_is_done_around_the_blocks_is_noticed() -> None:
    model, images = family("vit")
    features = model.forward_features  # type: ignore[union-attr]
    model.forward_features = lambda x: features(x) * 2  # type: ignore[assignment,operator]
    with pytest.raises(ModelError, match="more after its blocks than a final norm"):
        make_view(model).embed(images)
    model, images = family("vit")
    model.blocks = nn.ModuleList(model.blocks)  # type: ignore[arg-type]

    def between(x: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(x))  # type: ignore[operator]
        for block in model.blocks:  # type: ignore[union-attr]
            x = block(x) + 1
        return model.norm(x)  # type: ignore[operator]

    model.forward_features = between  # type: ignore[assignment]
    with pytest.raises(ModelError, match="more between its blocks"):
        make_view(model).embed(images)


def test_scopes_that_a_model_lacks() -> None:
    for name in ("siglip, attention pool", "registers, no class token"):
        view = make_view(family(name)[0])
        with pytest.raises(ModelError, match="needs a class token") as err:
            view.tokens("cls")
        assert "patch" in str(err.value.hint)
    view = make_view(family("vit, registers")[0])
    assert view.tokens("cls") == slice(0, 1)
    assert view.tokens("patch") == slice(5, None)
    with pytest.raises(ModelError, match="built without pooling"):
        make_view(create("vit_base_patch16_224", {**TINY, "global_pool": ""}))


def test_the_hint_for_other_modules_is_true() -> None:
    class Other(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

    plain = family("vit")[0]
    layers = nn.ModuleDict({"encoder_layer_0": nn.Linear(2, 2)})
    for module, hint in (
        (nn.DataParallel(plain), "the network is inside it: give its `.module`"),
        (Other(net=plain, criterion=nn.Linear(2, 2)), "give its `.net`"),
        (Other(conv_proj=nn.Linear(2, 2), encoder=Other(layers=layers)), "torchvision's vision"),
        (Other(layers=nn.Sequential(Other(blocks=nn.Sequential(plain.blocks)))), "hierarchical"),
        (nn.Linear(2, 2), "timm's plain vision transformers are supported"),
    ):
        with pytest.raises(ModelError, match="has no `blocks`") as err:
            make_view(module)
        assert hint in str(err.value.hint)


def test_a_block_needs_the_embedding_first() -> None:
    model, images = family("vit")
    with pytest.raises(RuntimeError, match="call `embed` first"):
        make_view(model).block(0, images)


def test_bfloat16_keeps_the_stream_and_lets_a_callers_autocast_be() -> None:
    model, images = family("vit")
    model, images = model.float(), images.float()
    seen: list[torch.dtype] = []

    def edit(h: Tensor) -> Tensor:
        seen.append(h.dtype)
        return h

    exact, rough = make_view(model), make_view(model, precision="bf16")
    with torch.no_grad():
        x, y = (view.block(0, view.embed(images), edit=edit) for view in (exact, rough))
        with torch.autocast("cpu", torch.bfloat16):
            exact.block(0, x, edit=edit)
        a, b = exact.head(x), rough.head(y)
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert x.dtype == y.dtype == b.dtype == torch.float32
    assert not torch.equal(x, y)
    torch.testing.assert_close(y, x, rtol=0.05, atol=0.05)
    torch.testing.assert_close(b, a, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_give_the_same_gradient() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests
    model, images = family("vit")
    plain, compiled = make_view(model), make_view(model, compiled=True)
    gradients = []
    for view in (plain, compiled):
        x = view.embed(images).detach().requires_grad_()
        y = x
        for l in range(len(view.widths)):
            y = view.block(l, y)
        gradients.append(torch.autograd.grad(view.head(y).square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # all blocks share it
