"""What a network is: its hash, sizes, cost and preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import timm.data
import torch
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from npprune.core.compression import cost
from npprune.errors import ModelError
from npprune.models.attention import projections
from npprune.models.blocks import entrances
from npprune.models.own_units import kind_of, own_widths
from npprune.models.tokens import tokens_of
from npprune.models.view import make_view, outputs_count
from npprune.records import ModelInfo, ModelSource, Preprocessing


def weights_sha256(model: nn.Module) -> str:
    """sha256 over the state dict: names in order, types, shapes and bytes, wherever it lies."""
    h = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        h.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        data = tensor.detach().cpu().contiguous().flatten()
        h.update(memoryview(data.view(torch.uint8).numpy()))
    return h.hexdigest()


def model_info(model: nn.Module, source: ModelSource) -> ModelInfo:
    """Sizes and cost of a network; fills in the source's hash where it is empty."""
    view = make_view(model)
    preprocessing = model_preprocessing(model)
    if not source.sha256:
        source.sha256 = weights_sha256(model)
    attentions = [projections(block.attn) for block in view.blocks]
    merged, last = tokens_of(model)
    narrow = any(p is not None and p.query_dims != p.value_dims for p in attentions)
    return ModelInfo(
        source=source,
        params=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, preprocessing.input_size),
        widths=[int(w) for w in view.widths],  # type: ignore[arg-type]
        heads=[int(block.attn.num_heads) for block in view.blocks],  # type: ignore[union-attr,arg-type]
        query_dims=[p.query_dims for p in attentions if p is not None] if narrow else None,
        embed_dim=view.fc2(0).out_features,
        num_classes=outputs_count(model),
        scope=view.scope,
        preprocessing=preprocessing,
        merged=merged if any(merged) else None,
        last_for_read=last,
        cls_widths=own_widths(model),
    )


def model_preprocessing(model: nn.Module) -> Preprocessing:
    """The preprocessing that travels with the weights (timm's `pretrained_cfg`), at the input
    size that the network was built for."""
    cfg = timm.data.resolve_model_data_config(model)
    channels, height, width = cfg["input_size"]
    patch: Any = getattr(model, "patch_embed", None)
    built = getattr(patch, "img_size", None)
    if built is not None:
        height, width = built
    if not hasattr(patch, "backbone"):  # whose channels the projection takes
        channels = int(getattr(getattr(patch, "proj", None), "in_channels", channels))
    mean, std = (_per_channel(cfg[name], channels) for name in ("mean", "std"))
    return Preprocessing(
        input_size=(int(channels), int(height), int(width)),
        mean=mean,
        std=std,
        interpolation=str(cfg["interpolation"]),
        crop_pct=float(cfg["crop_pct"]),
        crop_mode=str(cfg["crop_mode"]),
    )


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value for each channel; where there are others than RGB, the mean of all."""
    if len(values) == channels:
        return tuple(float(v) for v in values)
    return (sum(float(v) for v in values) / len(values),) * channels


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image: convolutions and matrix products, attention included.

    Counted by running the network on shapes alone (torch's FLOP counter, meta tensors).
    """
    values: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {k: torch.empty_like(v, device="meta") for k, v in values.items()}
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    # The plain attention kernel is made of products that the counter knows on any device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        answer = functional_call(model, meta, (image,), tie_weights=False)
    _check_answer(model, answer)
    return int(counter.get_total_flops() // 2)


def _check_answer(model: nn.Module, answer: Any) -> None:
    """ModelError where one image does not give one row of outputs."""
    if getattr(model, "distilled_training", False) and model.training:
        return  # of both classifiers apart, until it is in evaluation mode
    outputs = outputs_count(model)
    rows = isinstance(answer, Tensor) and len(answer) == 1
    if not rows or (outputs and tuple(answer.shape) != (1, outputs)):
        found = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ModelError(
            f"{type(model).__name__} must give a tensor of [images, {outputs or 'features'}], and "
            f"of one image gives {found}",
            hint="let its `forward` give the logits alone",
        )


def model_sizes(model: nn.Module) -> cost.Sizes:
    """The sizes that the closed-form cost needs, `cost.params` being exact.

    `cost.macs` equals `count_macs` for networks of plain attention, embedded by one convolution
    and pooled without further products; what others add does not depend on the hidden widths.

    Raises:
        ModelError: the blocks' MLPs are not of one kind, or the patches cannot be counted.
    """
    view = make_view(model)
    patch: Any = getattr(view.model, "patch_embed", None)
    proj = getattr(patch, "proj", None)
    if not isinstance(proj, nn.Conv2d) or len({kind_of(block.mlp) for block in view.blocks}) != 1:
        raise ModelError(
            f"{type(model).__name__}: the closed-form cost needs one patch convolution and blocks "
            "with MLPs of one kind"
        )
    block: Any = view.blocks[0]
    first = block.mlp.fc1_x if hasattr(block.mlp, "fc1_x") else block.mlp.fc1
    gated = hasattr(block.mlp, "fc1_x") or first.out_features == 2 * view.widths[0]
    found = [projections(b.attn) for b in view.blocks]
    width = view.fc2(0).out_features
    attended = tuple(int(getattr(b.attn.proj, "in_features", width)) for b in view.blocks)
    queries = tuple(
        v if p is None else p.heads * p.query_dims for v, p in zip(attended, found, strict=True)
    )
    bias = getattr(getattr(block.attn, "qkv", None), "bias", None)
    apart = _bias_of_queries(block.attn)
    merged, last = tokens_of(model)
    stages = None
    if entrances(model):
        grids = [b.input_resolution for b in view.blocks]
        stages = tuple((h * w, view.fc2(l).out_features) for l, (h, w) in enumerate(grids))
    sizes = cost.Sizes(
        tokens=patch.num_patches + view.num_prefix_tokens,
        width=width,
        hidden=view.widths,
        classes=outputs_count(model),
        patches=patch.num_patches,
        patch_inputs=proj.weight[0].numel(),
        queries=None if set(queries) == {width} else queries,
        values=None if set(attended) == {width} else attended,
        gated=gated,
        qkv_bias=bias is not None or apart is not None,
        key_bias=apart is None,
        hidden_bias=first.bias is not None,
        output_bias=view.fc2(0).bias is not None,
        norm_params=0 if (norm := view.norm(0)) is None else len(list(norm.parameters())),
        merged=tuple(merged) if any(merged) else None,
        read=view.tokens_read if last else None,
        rotary=0 if getattr(model, "rope", None) is None else 2 * int(block.attn.head_dim),
        stages=stages,
    )
    if stages is not None:
        whole = count_macs(model, model_preprocessing(model).input_size)
        sizes = replace(sizes, fixed_macs=whole - cost.macs(sizes))
    if (own := own_widths(model)) is not None:
        sizes = replace(sizes, own=tuple(own), own_tokens=view.tokens_read or 1)
    rest = sum(p.numel() for p in model.parameters()) - cost.params(sizes)
    return replace(sizes, fixed_params=rest)


def _bias_of_queries(attn: Any) -> Tensor | None:
    """That of a network whose keys have none, or are apart."""
    if not isinstance(attn, EvaAttention):
        return None
    bias: Tensor | None = attn.q_bias if attn.qkv is not None else attn.q_proj.bias
    return bias


def state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as contiguous CPU tensors that share no memory, ready for safetensors."""
    return {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}
