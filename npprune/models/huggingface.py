"""Networks of Hugging Face's `transformers`, from their `config.json` and tensors, as timm's.

Every tensor gets a place by name, or is named in a note; sizes are the tensors' own, and the
configuration says only what tensors cannot: heads, activation, the norms' epsilon, the image size.
What differs from timm's usual networks: DeiT without a teacher reads the class token alone beside
an unread distillation token; DINOv2's classifier reads the class token and the mean patch token
side by side; CLIP's classifier pools before the last norm, SigLIP's and I-JEPA's after it.
Without a classifier, a network is read for its features: pooled as `transformers` pools it
(`pooler_output`, else the class token or the mean patch token), patch tokens after the last norm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from npprune.errors import ModelError, setting
from npprune.models.foreign import Size, about_features, by
from npprune.models.huggingface_swin import NAMES as SWIN
from npprune.models.huggingface_swin import from_swin
from npprune.models.translations import renamed

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""What `transformers` calls an activation, and what timm does."""

_FAMILIES = r"(?:vit|deit|dinov2|dinov2_with_registers|beit|data2vec_vision|ijepa|vision_model)\."
_LAYER = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.(.+)")
_IN_LAYER = (  # names of today's and of older versions, in one block
    (r"(?:layernorm_before|layer_norm1|norm1)\.", "norm1."),
    (r"(?:layernorm_after|layer_norm2|norm2)\.", "norm2."),
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(?:query|q_proj)\.", "q."),
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(?:key|k_proj)\.", "k."),
    (r"(?:attention\.attention\.|attention\.|self_attn\.)(?:value|v_proj)\.", "v."),
    (r"(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", "attn.proj."),
    (r"(?:intermediate\.dense|mlp\.fc1|mlp\.weights_in)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2|mlp\.weights_out)\.", "mlp.fc2."),
    (r"(?:layer_scale1\.lambda1|lambda_1)$", "ls1.gamma"),
    (r"(?:layer_scale2\.lambda1|lambda_2)$", "ls2.gamma"),
    (
        r"attention\.(?:attention\.)?relative_position_bias\.relative_position_bias_table$",
        "attn.relative_position_bias_table",
    ),
)
_OUTSIDE = (
    (r"embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"(?:layernorm|post_layernorm)\.", "norm."),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"pooler\.layernorm\.", "fc_norm."),
    (
        r"(?:encoder\.relative_position_bias|shared_position_bias)\.relative_position_bias_table$",
        "rel_pos_bias.relative_position_bias_table",
    ),
    (r"(?:classifier|cls_classifier)\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
)
_POOLING = (
    (r"head\.probe$", "attn_pool.latent"),
    (r"head\.attention\.in_proj_", "attn_pool.in_proj_"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
)
"""SigLIP's, which its features are pooled by, and its classifier is not."""
_UNREAD = re.compile(  # plays no part in the classifier's output
    r"embeddings\.(?:mask_token|position_ids)$|pooler\.dense\.|head\."
    r"|text_model\.|text_projection|visual_projection|logit_(?:scale|bias)|decoder\."
    r"|.*relative_position_index$"
)

_WHY_NOT = {
    "npprune_vit": "a network that npprune wrote; give the checkpoint folder that it was made from",
    "dinov3_vit": "a network with rotary positions, which are not read from such a folder",
}


@dataclass
class Translated:
    """A foreign network as timm's: `create(name, args)` takes the tensors, all and strictly."""

    name: str
    args: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def from_transformers(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    img_size: Size | None = None,
    shown: Size | None = None,
    *,
    headless: bool = False,
) -> Translated:
    """A network of `transformers`: for image classification, or a backbone.

    Args:
        config: what its `config.json` says.
        tensors: its state dict.
        img_size: height and width that were asked for; positions are resampled as `transformers`
            does it.
        shown: height and width that its preprocessor makes; DINOv2 takes images of any size.
        headless: its classifier is left out.

    Raises:
        ModelError: an architecture that is not supported (by name, with the reason), or
            configuration and tensors that do not agree.
    """
    kind = _kind(config)
    build = _BUILDERS.get(kind)
    if build is None and kind not in SWIN:
        raise _unsupported(kind, str(config.get("model_type")))
    if config.get("problem_type") in ("multi_label_classification", "regression"):
        raise ModelError(
            f"the folder's network is for {config['problem_type']}, and npprune reads outputs as "
            "one choice among classes (softmax)",
            hint="use a network that chooses one class",
        )
    if kind in SWIN:
        return Translated(*from_swin(kind, config, tensors, img_size))
    vision = config.get("vision_config")
    inner = dict(vision) if isinstance(vision, Mapping) else dict(config)
    backbone = headless or not kind.removesuffix("WithTeacher").endswith("ForImageClassification")
    pooling = _POOLING if backbone and kind.startswith("Siglip") else ()
    renamed, unread = _renamed(tensors, (*pooling, *_OUTSIDE))
    if not backbone and not any(name.startswith("head.") for name in renamed):
        raise ModelError(
            f"the weights of {kind} have no classifier",
            hint="they are cut short, or a backbone's: save it from the network itself",
        )
    if backbone:
        for name in [n for n in renamed if n.startswith(("head.", "head_dist."))]:
            del renamed[name]
    assert build is not None
    made = build(_Source(kind, inner, renamed, img_size, shown))
    _join(made)
    made.notes += about_features(made.args["num_classes"])
    if unread:
        names = ", ".join(f"`{name}`" for name in unread[:4])
        more = f" and {len(unread) - 4} more" if len(unread) > 4 else ""
        made.notes.append(f"left out, as {kind} does not read it: {names}{more}")
    return made


def _kind(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    raise ModelError(
        "the folder's config.json does not say which class of `transformers` its network is "
        "(`architectures`)",
        hint="save it with `save_pretrained` from the network itself",
    )


def _unsupported(kind: str, family: str) -> ModelError:
    return ModelError(
        f"{kind} is {_WHY_NOT.get(family, 'not among the networks that npprune reads')}",
        hint=f"of `transformers` are read: {', '.join((*_BUILDERS, *SWIN))}",
    )


def _renamed(
    tensors: Mapping[str, Tensor], outside: tuple[tuple[str, str], ...]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under timm's names, queries, keys and values still apart; and the unread ones.

    outside: names beside the blocks. ModelError where a name is not known.
    """
    out: dict[str, Tensor] = {}
    unread: list[str] = []
    unknown: list[str] = []
    for name, tensor in tensors.items():
        bare = re.sub(f"^{_FAMILIES}", "", name)
        inside = _LAYER.fullmatch(bare)
        table, rest = (_IN_LAYER, inside[2]) if inside else (outside, bare)
        new = renamed(rest, table)
        if new is None:
            (unread if _UNREAD.match(bare) else unknown).append(name)
        else:
            out[f"blocks.{inside[1]}.{new}" if inside else new] = tensor
    if unknown:
        raise ModelError(
            f"the folder has {len(unknown)} tensors that npprune does not know: "
            + ", ".join(f"`{k}` {list(tensors[k].shape)}" for k in unknown[:3]),
            hint="leaving layers out would give other outputs",
        )
    return out, unread


def _join(made: Translated) -> None:
    """One layer for queries, keys and values, as timm has it, in place."""
    t = made.tensors
    separate = made.name.startswith("beit")  # whose keys have no bias
    for l in range(made.args["depth"]):
        at = f"blocks.{l}."
        try:
            t[f"{at}attn.qkv.weight"] = torch.cat([t.pop(f"{at}{p}.weight") for p in "qkv"])
            if separate:
                t[f"{at}attn.q_bias"], t[f"{at}attn.v_bias"] = (
                    t.pop(f"{at}{p}.bias") for p in "qv"
                )
            elif made.args["qkv_bias"]:
                t[f"{at}attn.qkv.bias"] = torch.cat([t.pop(f"{at}{p}.bias") for p in "qkv"])
        except KeyError as err:
            raise ModelError(f"the folder's weights lack {err}", hint="they are cut short") from err


@dataclass
class _Source:
    """What a builder reads: the configuration of the image tower, and tensors in timm's names."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    img_size: Size | None
    shown: Size | None
    notes: list[str] = field(default_factory=list)

    def get(self, *names: str) -> Tensor:
        for name in names:
            if name in self.tensors:
                return self.tensors[name]
        raise ModelError(
            f"the weights of {self.kind} lack `{names[0]}`", hint="the file is cut short"
        )

    @property
    def classifies(self) -> bool:
        return "head.weight" in self.tensors

    def attention_pool(self) -> None:
        """SigLIP's queries, keys and values of its pooling as timm has them, in place."""
        for part in ("weight", "bias"):
            joined = self.get(f"attn_pool.in_proj_{part}")
            width = len(joined) // 3
            self.tensors[f"attn_pool.q.{part}"] = joined[:width]
            self.tensors[f"attn_pool.kv.{part}"] = joined[width:]
            del self.tensors[f"attn_pool.in_proj_{part}"]

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the configuration, above 0."""
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise ModelError(
                f"`{key}` in the folder's config.json must be a number above 0, got {value!r}"
            )
        return value

    def size(self, key: str) -> Size:
        value = self.config.get(key, 224)
        pair = value if isinstance(value, list | tuple) else (value, value)
        sides = [v for v in pair if isinstance(v, int) and 0 < v <= 16384]
        if len(pair) != 2 or len(sides) != 2:
            raise ModelError(f"`{key}` in the folder's config.json must be pixels, got {value!r}")
        return sides[0], sides[1]

    def activation(self, key: str = "hidden_act", default: str = "gelu") -> str:
        value = self.config.get(key, default)
        if value not in ACTIVATIONS:
            raise ModelError(
                f"`{key}` of the folder's config.json, {value!r}, is no activation that is known",
                hint=f"known are {', '.join(ACTIVATIONS)}",
            )
        return ACTIVATIONS[value]

    def common(self, eps: float = 1e-12) -> dict[str, Any]:
        """Arguments that every family has; sizes are those of the tensors, `eps`, 12 heads and
        224 pixels what `transformers` takes where the configuration is silent."""
        patch, fc1 = self.get("patch_embed.proj.weight"), self.get("blocks.0.mlp.fc1.weight")
        q, width = self.get("blocks.0.q.weight"), self.get("patch_embed.proj.weight").shape[0]
        found = {int(m[1]) for k in self.tensors if (m := re.match(r"blocks\.(\d+)\.", k))}
        heads = int(self.number("num_attention_heads", 12))
        if q.shape[0] != width or width % heads:
            raise ModelError(
                f"{self.kind} has {heads} heads over queries of {q.shape[0]} at width {width}; "
                "heads that fill the width are read",
            )
        head = self.tensors.get("head.weight")
        self.check("hidden_size", width)
        self.check("num_hidden_layers", max(found) + 1)
        side = tuple(patch.shape[2:])
        return {
            "img_size": list(self.size("image_size")),
            "patch_size": side[0] if side[0] == side[1] else list(side),
            "in_chans": int(patch.shape[1]),
            "num_classes": 0 if head is None else int(head.shape[0]),
            "embed_dim": int(width),
            "depth": max(found) + 1,
            "num_heads": heads,
            "mlp_ratio": ratio(int(width), int(fc1.shape[0])),
            "qkv_bias": "blocks.0.q.bias" in self.tensors,
            "norm_eps": float(self.number("layer_norm_eps", eps)),
        }

    def check(self, key: str, found: int) -> None:
        """ModelError where config.json and tensors disagree."""
        said = self.config.get(key)
        if said is not None and said != found:
            raise ModelError(
                f"config.json says `{key}` {said}, and the weights have {found}",
                hint="the folder's files do not belong together",
            )

    def positions(self, args: dict[str, Any], prefix: int, *, antialias: bool = False) -> None:
        """The positions [1, n, d] for the image size, resampled as `transformers` does it."""
        pos = self.get("pos_embed")
        pos = pos[None] if pos.dim() == 2 else pos
        size = self.get("patch_embed.proj.weight").shape[2:]
        own: Size = tuple(args["img_size"])
        grid = own[0] // size[0], own[1] // size[1]
        if pos.shape[1] != prefix + grid[0] * grid[1]:
            raise ModelError(
                f"config.json says `image_size` {by(own)}, which makes {by(grid)} patches, and "
                f"the weights have {pos.shape[1]} positions",
                hint="the folder's files do not belong together",
            )
        any_size = self.kind.startswith("Dinov2")
        wanted = self.img_size or (self.shown if any_size else None) or own
        new = wanted[0] // size[0], wanted[1] // size[1]
        if min(new) < 1:
            raise ModelError(f"images of {by(wanted)} pixels are smaller than a patch")
        args["img_size"] = list(wanted)
        if new != grid:
            first, patches = pos[:, :prefix], pos[:, prefix:]
            patches = patches.float().unflatten(1, grid).permute(0, 3, 1, 2)
            patches = interpolate(
                patches, new, mode="bicubic", align_corners=False, antialias=antialias
            )
            pos = torch.cat([first.float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], 1)
            self.notes.append(
                f"position embeddings resampled from {by(grid)} to {by(new)} patches, as "
                f"`transformers` does it; image size {by(own)} keeps them as they were trained"
            )
        self.tensors["pos_embed"] = pos


def ratio(width: int, hidden: int) -> float:
    """A ratio that timm's int(width * ratio) turns back into `hidden`."""
    found = hidden / width
    return found if int(width * found) == hidden else (hidden + 0.5) / width


def _vit(s: _Source) -> Translated:
    eps = 1e-6 if "MSN" in s.kind else 1e-12
    args = s.common(eps) | {"act_layer": s.activation()}
    s.positions(args, 1)
    return Translated("vit_base_patch16_224", args, s.tensors, s.notes)


def _ijepa(s: _Source) -> Translated:
    args = s.common() | {"act_layer": s.activation(), **_PATCHES_ALONE}
    s.positions(args, 0)
    return Translated("vit_base_patch16_224", args, s.tensors, s.notes)


_PATCHES_ALONE = {"class_token": False, "global_pool": "avg", "fc_norm": False}


def _deit(s: _Source) -> Translated:
    args = s.common() | {"act_layer": s.activation()}
    s.positions(args, 2)
    if "head_dist.weight" in s.tensors and s.classifies:
        return Translated("deit_base_distilled_patch16_224", args, s.tensors, s.notes)
    s.tensors["reg_token"] = s.tensors.pop("dist_token")  # attended to, not read
    return Translated("vit_base_patch16_224", args | {"reg_tokens": 1}, s.tensors, s.notes)


def _dinov2(s: _Source) -> Translated:
    args = s.common(1e-6)
    registers = s.tensors.get("reg_token")
    s.positions(args, 1, antialias=registers is not None)
    args |= {"init_values": 1e-5}
    if s.classifies:
        args |= {"head_reads": "class+patches"}
    if registers is not None:  # which have no positions
        args |= {"reg_tokens": int(registers.shape[1]), "no_embed_class": True}
        pos = s.tensors["pos_embed"]
        s.tensors["cls_token"] = s.get("cls_token") + pos[:, :1]
        s.tensors["pos_embed"] = pos[:, 1:]
    hidden, fc1 = s.get("blocks.0.mlp.fc2.weight").shape[1], s.get("blocks.0.mlp.fc1.weight")
    if fc1.shape[0] == 2 * hidden:
        return Translated("vit_giant_patch14_dinov2", args, s.tensors, s.notes)
    return Translated(
        "vit_base_patch16_224", args | {"act_layer": s.activation()}, s.tensors, s.notes
    )


def _beit(s: _Source) -> Translated:
    args = s.common()
    if s.activation() != "gelu":
        raise ModelError(f"{s.kind} with another activation than GELU is not supported")
    own: Size = tuple(args["img_size"])
    if s.img_size not in (None, own):
        raise ModelError(
            f"{s.kind} has relative positions of {by(own)} pixels, which are not resampled",
            hint=f"leave {setting('model.img_size')} out",
        )
    table = "relative_position_bias_table"
    t = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", k): v for k, v in s.tensors.items()}
    for l in range(args["depth"]):  # timm's BEiT always scales its layers
        for part in "12":
            t.setdefault(f"blocks.{l}.gamma_{part}", torch.ones(args["embed_dim"]))
    args |= {
        "use_abs_pos_emb": "pos_embed" in t,
        "use_rel_pos_bias": f"blocks.0.attn.{table}" in t,
        "use_shared_rel_pos_bias": f"rel_pos_bias.{table}" in t,
        "init_values": 0.1,
        "global_pool": "avg" if "fc_norm.weight" in t else "token",
    }
    return Translated("beit_base_patch16_224", args, t)


def _clip(s: _Source) -> Translated:
    s.tensors["cls_token"] = s.get("cls_token").reshape(1, 1, -1)
    args = s.common(1e-5)
    args |= {"act_layer": s.activation(default="quick_gelu"), "pre_norm": True}
    s.positions(args, 1)
    if not s.classifies:
        return Translated("vit_base_patch16_224", args, s.tensors, s.notes)
    args |= {"global_pool": "avg", "fc_norm": False, "final_norm": False}
    tensors = {k: v for k, v in s.tensors.items() if not k.startswith("norm.")}
    s.notes.append("its last norm is left out: the classifier reads the tokens before it")
    return Translated("vit_base_patch16_224", args, tensors, s.notes)


def _siglip(s: _Source) -> Translated:
    args = s.common(1e-6)
    args |= {"act_layer": s.activation(default="gelu_pytorch_tanh"), **_PATCHES_ALONE}
    s.positions(args, 0)
    if "attn_pool.latent" in s.tensors:
        args["global_pool"] = "map"
        s.attention_pool()
    return Translated("vit_base_patch16_224", args, s.tensors, s.notes)


_BUILDERS: dict[str, Callable[[_Source], Translated]] = {
    "ViTForImageClassification": _vit,
    "ViTMSNForImageClassification": _vit,
    "DeiTForImageClassification": _deit,
    "DeiTForImageClassificationWithTeacher": _deit,
    "Dinov2ForImageClassification": _dinov2,
    "Dinov2WithRegistersForImageClassification": _dinov2,
    "BeitForImageClassification": _beit,
    "Data2VecVisionForImageClassification": _beit,
    "CLIPForImageClassification": _clip,
    "SiglipForImageClassification": _siglip,
    "IJepaForImageClassification": _ijepa,
    "ViTModel": _vit,
    "ViTMSNModel": _vit,
    "ViTMAEModel": _vit,
    "ViTMAEForPreTraining": _vit,
    "DeiTModel": _deit,
    "Dinov2Model": _dinov2,
    "Dinov2WithRegistersModel": _dinov2,
    "BeitModel": _beit,
    "Data2VecVisionModel": _beit,
    "CLIPModel": _clip,
    "CLIPVisionModel": _clip,
    "CLIPVisionModelWithProjection": _clip,
    "SiglipModel": _siglip,
    "SiglipVisionModel": _siglip,
    "IJepaModel": _ijepa,
}
