"""Removing neurons, attention heads and classes for real, and masking them for comparison.

Every function that changes structure works on a deep copy. Hidden units are removed through
torch-pruning's dependency graph of each MLP; the group of `fc1`'s outputs must reach `fc2`'s
inputs (and a gate's other half) and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from timm.layers import GluMlp, Mlp, RmsNorm, SwiGLU
from torch import Tensor, nn

from npprune.core.compression.attention import shrink_by_weights, smaller_qkv, stand_ins
from npprune.core.compression.harm import SmallerNorm
from npprune.errors import ModelError, setting
from npprune.models.attention import check_heads
from npprune.models.blocks import is_linear
from npprune.models.info import weights_sha256
from npprune.models.merging import check_tokens
from npprune.models.own_units import check_own, give_own, own_mlp
from npprune.models.tokens import apply_tokens, patch_tokens, tokens_of
from npprune.models.uneven import set_head_dim, set_heads, set_query_dim
from npprune.models.view import TimmView, classifiers, make_view, outputs_count
from npprune.records import Plan


def apply_plan(model: nn.Module, plan: Plan, *, force: bool = False) -> nn.Module:
    """A copy of the network with only the plan's neurons, heads, their dimensions and classes.

    Every parameter keeps its type, device and `requires_grad`, every module its mode.
    Narrower queries, keys and values are the best that the weights alone can say; `set_qkv` gives
    them the values that calibration found, as `set_fc2` does for the second layers.

    Args:
        model: the dense network that the plan was made for.
        plan: what stays.
        force: apply the plan to other weights of the same widths as well.

    Raises:
        ModelError: the plan was made for another network, or the network cannot be pruned.
    """
    check_plan(model, plan, force=force)
    # The dependency graph is read off autograd's, whatever the caller has switched off.
    with torch.inference_mode(False), torch.enable_grad():
        pruned = copy.deepcopy(model)
        view = make_view(pruned)
        for l, kept in enumerate(plan.keep):
            own = copy.deepcopy(view.blocks[l].mlp) if plan.own(l) else None
            _remove_units(view.blocks[l].mlp, l, kept)
            if own is not None:
                _remove_units(own, l, plan.own(l))
                give_own(view.blocks[l].mlp, own, _read(view))
        for l, heads in enumerate(plan.heads or []):
            _remove_heads(view, l, heads)
        for l, query_dims in enumerate(plan.query_dims or []):
            _narrow(view, l, query_dims)
        for l, head_dim in enumerate(plan.head_dims or []):
            _narrow(view, l, head_dim, values=True)
        if plan.classes is not None:
            _cut(pruned, plan.classes)
    widths = list(make_view(pruned).widths)
    if widths != plan.kept_widths:
        raise AssertionError(f"pruned widths {widths}, planned {plan.kept_widths}")
    return _with_tokens(pruned, plan)


def mask_plan(model: nn.Module, plan: Plan, *, force: bool = False) -> nn.Module:
    """A copy of the network in which what the plan removes is zeroed where it is read; a norm of
    hidden units is one of those that stay.

    Its logits equal those of `apply_plan`'s network up to rounding: the reference for the surgery.
    """
    check_plan(model, plan, force=force)
    masked = copy.deepcopy(model)
    view = make_view(masked)
    for l, kept in enumerate(plan.keep):
        mlp: Any = view.blocks[l].mlp
        own: Any = copy.deepcopy(mlp) if plan.own(l) else None
        if (norm := view.norm(l)) is not None:
            smaller = SmallerNorm(norm, kept)
            norm.register_forward_hook(lambda m, args, out, r=smaller: r(args[0]))  # type: ignore[misc]
        _mask_inputs(mlp.fc2, torch.tensor(kept))
        if own is not None:
            _mask_inputs(own.fc2, torch.tensor(plan.own(l)))
            give_own(mlp, own, _read(view))
    for l, heads in enumerate(plan.heads or []):
        attn: Any = view.blocks[l].attn
        channels = torch.arange(attn.proj.in_features).unflatten(0, (attn.num_heads, -1))
        _mask_inputs(attn.proj, channels[list(heads)].flatten())
    for l, dims in enumerate(plan.query_dims or plan.head_dims or []):
        if dims != _query_dims(view, l):
            p = view.attention(l)
            if plan.heads is not None:  # the means of heads that go are no part of the bias
                mask: Any = p.proj.npprune_mask
                with torch.no_grad():
                    p.proj.weight.mul_(mask)
            found = shrink_by_weights(p, dims, values=plan.head_dims is not None)
            for layer, r in stand_ins(p, found).items():
                weight = torch.zeros_like(layer.weight)
                weight[:, list(r.keep)] = r.weight
                _set_linear(layer, f"block {l}: attention", weight, r.bias)
    if plan.classes is not None:
        _cut(masked, plan.classes)
    return _with_tokens(masked, plan)


def _with_tokens(model: nn.Module, plan: Plan) -> nn.Module:
    """Merging tokens as the plan says, in place; one that says nothing leaves the network's own."""
    if plan.merged is None and not plan.last_for_read:
        return model
    return apply_tokens(model, plan.merged, plan.last_for_read)


def cut_head(model: nn.Module, classes: Sequence[int]) -> nn.Module:
    """A copy whose classifier has only the outputs `classes`, in this order.

    Raises:
        ModelError: a class is not an output of the classifier, or is named twice.
    """
    cut = copy.deepcopy(model)
    _cut(cut, classes)
    return cut


def set_fc2(model: nn.Module, l: int, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give block l's `fc2` other values, in place; it gets a bias where it had none.

    Args:
        weight: [d, k], with k the block's hidden units.
        bias: [d]; None leaves the bias as it is.

    Raises:
        ModelError: a shape does not agree.
    """
    _set_linear(make_view(model).fc2(l), f"block {l}: `fc2`", weight, bias)


def set_own_fc2(model: nn.Module, l: int, weight: Tensor, bias: Tensor | None = None) -> None:
    """As `set_fc2`, the second layer of the tokens that have hidden units of their own."""
    mlp: Any = own_mlp(make_view(model).blocks[l])
    if mlp is None:
        raise ModelError(f"block {l}: all tokens share one MLP")
    _set_linear(mlp.fc2, f"block {l}: `mlp.cls.fc2`", weight, bias)


def set_qkv(model: nn.Module, l: int, weight: Tensor, bias: Tensor | None) -> None:
    """Give block l's queries, keys and values other values, in place.

    Raises:
        ModelError: a shape does not agree.
    """
    _set_linear(make_view(model).attention(l).joint, f"block {l}: `qkv`", weight, bias)


def set_proj(model: nn.Module, l: int, weight: Tensor, bias: Tensor) -> None:
    """Give the last layer of block l's attention other values, in place.

    Raises:
        ModelError: a shape does not agree.
    """
    _set_linear(make_view(model).attention(l).proj, f"block {l}: `proj`", weight, bias)


def set_classifiers(model: nn.Module, values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give the layers that give the logits other weights and biases, in place.

    Raises:
        ModelError: a shape does not agree.
    """
    for layer, (weight, bias) in zip(classifiers(model), values, strict=True):
        _set_linear(layer, "the classifier", weight, bias)


def _set_linear(layer: nn.Linear, name: str, weight: Tensor, bias: Tensor | None) -> None:
    for part, value, shape in (
        ("weight", weight, tuple(layer.weight.shape)),
        ("bias", bias, (layer.out_features,)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ModelError(f"{name} needs a {part} of {list(shape)}, got {list(value.shape)}")
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            if layer.bias is None:
                layer.bias = nn.Parameter(
                    layer.weight.new_zeros(layer.out_features),
                    requires_grad=layer.weight.requires_grad,
                )
            layer.bias.copy_(bias)


def check_axes(model: nn.Module, axes: Sequence[str]) -> None:
    """ModelError, by name and with the reason, where there is nothing of an axis to take from."""
    if "tokens" in axes:
        patch_tokens(model)
        if any(tokens_of(model)[0]):
            raise ModelError(
                "the network merges tokens already",
                hint="prune the network that it was made from, or leave `tokens` out of the axes",
            )
    view = make_view(model)
    for l, block in enumerate(view.blocks):
        if "tokens" in axes:
            check_tokens(model, l)
        if "cls" in axes:
            check_own(block.mlp, l, view.tokens_read)
        for axis in ("heads", "qk", "head-dim"):
            if axis in axes:
                check_heads(model, l, axis)


def check_prunable(model: nn.Module) -> None:
    """ModelError, by name and with the reason, where hidden units cannot be removed one by one."""
    for l, block in enumerate(make_view(model).blocks):
        mlp = block.mlp
        kind = f"block {l}: {type(mlp).__module__}.{type(mlp).__name__}"
        if not isinstance(mlp, (Mlp, GluMlp, SwiGLU)):
            raise ModelError(
                f"{kind} is not a two-layer MLP that npprune can prune",
                hint="plain and gated MLPs (Mlp, GluMlp, SwiGLU) can be pruned",
            )
        for name in ("fc1", "fc1_g", "fc1_x", "fc2"):
            layer = getattr(mlp, name, None)
            if layer is not None and not is_linear(layer):
                raise ModelError(
                    f"block {l}: `mlp.{name}` must be a linear layer of a weight and a bias alone, "
                    f"got {type(layer).__name__} of {', '.join(dict(layer.named_parameters()))}",
                    hint="merge adapters and parametrizations into the weight first: peft's "
                    "`merge_and_unload`, torch's `remove_parametrizations`",
                )
        if not isinstance(mlp.norm, (nn.Identity, nn.LayerNorm, nn.RMSNorm, RmsNorm)):
            raise ModelError(
                f"{kind} has a {type(mlp.norm).__name__} between its activation and `fc2`, which "
                "npprune does not know how to make smaller",
                hint="paths of such a network can be found; choose another to prune",
            )


def check_plan(model: nn.Module, plan: Plan, *, force: bool = False) -> None:
    """ModelError if the plan does not belong to this network, or cannot be carried out on it."""
    check_prunable(model)
    view = make_view(model)
    if list(view.widths) != plan.widths:
        raise ModelError(
            f"the plan is for {len(plan.widths)} blocks of {_short(plan.widths)} hidden units, "
            f"the network has {len(view.widths)} of {_short(list(view.widths))}",
            hint="apply a plan to the dense network that it was made for",
        )
    if plan.source_sha256 and not force:
        sha = weights_sha256(model)
        if sha != plan.source_sha256:
            raise ModelError(
                f"the plan was made for weights {plan.source_sha256[:12]}, the network's are "
                f"{sha[:12]}",
                hint="apply it to the weights it was made for, or empty its `source_sha256` to "
                "apply it to any network of these widths",
            )
    if plan.heads is not None:
        if len(plan.heads) != len(view.blocks):
            raise ModelError(
                f"the plan names heads for {len(plan.heads)} blocks, the network has "
                f"{len(view.blocks)}"
            )
        for l, kept in enumerate(plan.heads):
            _check_heads(view, l, kept)
    if plan.query_dims is not None and plan.head_dims is not None:
        raise ModelError(
            "the plan has `query_dims` and `head_dims`: values are as wide as the queries, or stay"
        )
    for name, axis in (("query_dims", "qk"), ("head_dims", "head-dim")):
        dims = getattr(plan, name)
        if dims is None:
            continue
        if len(dims) != len(view.blocks):
            raise ModelError(
                f"the plan names {name.replace('_dims', ' dimensions')} for {len(dims)} blocks, "
                f"the network has {len(view.blocks)}"
            )
        for l, kept in enumerate(dims):
            _check_dims(view, l, kept, f"{name}[{l}]", axis)
    if plan.cls_keep is not None:
        for l, block in enumerate(view.blocks):
            if plan.own(l):
                check_own(block.mlp, l, view.tokens_read)
    if plan.classes is not None:
        _check_classes(model, plan.classes)


def _read(view: TimmView) -> int:
    assert view.tokens_read is not None  # `check_plan`
    return view.tokens_read


def _short(widths: list[int]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else str(widths)


def _remove_units(mlp: Any, l: int, kept: list[int]) -> None:
    fc2: nn.Linear = mlp.fc2
    gone = sorted(set(range(fc2.in_features)) - set(kept))
    if not gone:
        return
    trainable = {name: p.requires_grad for name, p in mlp.named_parameters()}
    names = {id(module): name for name, module in mlp.named_modules()}
    mlp.requires_grad_(True)
    example = fc2.weight.new_zeros(1, 2, fc2.out_features)
    graph = tp.DependencyGraph().build_dependency(mlp, example_inputs=example, verbose=False)
    first = mlp.fc1_x if isinstance(mlp, SwiGLU) else mlp.fc1
    group = graph.get_pruning_group(first, tp.prune_linear_out_channels, idxs=gone)
    reached = {names[id(d.target.module)] for d, _ in group if id(d.target.module) in names}
    wanted = {"fc2", "fc1_g", "fc1_x"} if isinstance(mlp, SwiGLU) else {"fc2", "fc1"}
    if has_norm := not isinstance(mlp.norm, nn.Identity):
        wanted.add("norm")
    if reached != wanted or not graph.check_pruning_group(group):
        raise ModelError(
            f"block {l}: removing hidden units of {type(mlp).__name__} would change "
            f"{', '.join(sorted(reached))}, not {', '.join(sorted(wanted))} alone"
        )
    group.prune()
    if has_norm and mlp.norm.normalized_shape != (len(kept),):
        mlp.norm.normalized_shape = (len(kept),)
    for name, p in mlp.named_parameters():  # torch-pruning has made new ones
        p.requires_grad_(trainable[name])
    rows = len(kept) * (2 if isinstance(mlp, GluMlp) else 1)
    if fc2.in_features != len(kept) or first.out_features != rows:
        raise AssertionError(
            f"block {l}: fc1 {first.out_features}, fc2 {fc2.in_features} after keeping {len(kept)}"
        )


def _check_heads(view: TimmView, l: int, kept: Sequence[int]) -> None:
    count = int(view.blocks[l].attn.num_heads)
    if list(kept) == list(range(count)):
        return
    if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= count:
        raise ModelError(
            f"`heads[{l}]` must be ascending within 0..{count - 1}, at least one, got {list(kept)}"
        )
    check_heads(view.model, l, "heads")


def _check_dims(view: TimmView, l: int, dims: int, name: str, axis: str) -> None:
    full = _query_dims(view, l)
    if dims == full:
        return
    if not 1 <= dims < full:
        raise ModelError(f"`{name}` must be in 1..{full}, got {dims}")
    check_heads(view.model, l, axis)


def _query_dims(view: TimmView, l: int) -> int:
    attn: Any = view.blocks[l].attn
    return int(getattr(attn, "query_dim", attn.proj.in_features // attn.num_heads))


def _remove_heads(view: TimmView, l: int, kept: Sequence[int]) -> None:
    attn: Any = view.blocks[l].attn
    count = int(attn.num_heads)
    if len(kept) == count:
        return
    index = torch.tensor(list(kept), device=attn.proj.weight.device)
    p = view.attention(l)

    def rows(value: Tensor) -> Tensor:
        """Of queries, keys and values of all heads, those of the kept ones."""
        if p.qkv is None:
            return value.unflatten(0, (-1, count, attn.head_dim))[:, index].flatten(0, 2)
        return torch.cat([part[index].flatten(0, 1) for part in p.split(value)])

    for name in ("qkv", "q_proj", "k_proj", "v_proj"):
        layer = getattr(attn, name, None)
        if layer is not None:
            bias = None if layer.bias is None else rows(layer.bias)
            _resize(layer, rows(layer.weight), bias)
    for name in ("q_bias", "k_bias", "v_bias"):
        value = getattr(attn, name, None)
        if isinstance(value, nn.Parameter):
            setattr(attn, name, _parameter(rows(value), value))
        elif value is not None:  # a buffer
            setattr(attn, name, rows(value))
    columns = attn.proj.weight.unflatten(1, (count, -1))[:, index].flatten(1)
    _resize(attn.proj, columns, None)
    set_heads(attn, len(kept), l)


def _narrow(view: TimmView, l: int, dims: int, *, values: bool = False) -> None:
    if dims == _query_dims(view, l):
        return
    p = view.attention(l)
    smaller = shrink_by_weights(p, dims, values=values)
    weight, bias = smaller_qkv(p, smaller)
    _resize(p.joint, weight, bias)
    if smaller.proj is None:
        set_query_dim(view.blocks[l], dims, l)
        return
    _resize(p.proj, smaller.proj.weight, smaller.proj.bias)
    set_head_dim(view.blocks[l].attn, dims)


def _resize(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    like = layer.weight
    layer.weight = _parameter(weight, like)
    if bias is not None:
        layer.bias = _parameter(bias, like if layer.bias is None else layer.bias)
    layer.out_features, layer.in_features = weight.shape


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=like.requires_grad)


def _mask_inputs(layer: nn.Linear, kept: Tensor) -> None:
    """Let only these inputs through; the mask moves with the module and is not saved."""
    mask = layer.weight.new_zeros(layer.in_features)
    mask[kept.to(mask.device)] = 1
    layer.register_buffer("npprune_mask", mask, persistent=False)
    layer.register_forward_pre_hook(_apply_mask)


def _apply_mask(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] * layer.npprune_mask, *args[1:])


def _check_classes(model: nn.Module, classes: Sequence[int]) -> None:
    outputs = outputs_count(model)
    if outputs == 0:
        raise ModelError(
            f"{type(model).__name__} has no classifier to cut to some classes",
            hint=f"leave {setting('data.classes')} out",
        )
    if not classes:
        raise ModelError("`classes` must name at least one class, got none")
    bad = [c for c in classes if not 0 <= c < outputs]
    if bad:
        raise ModelError(f"`classes` must lie in 0..{outputs - 1}, got {bad[0]}")
    if len(set(classes)) != len(classes):
        twice = next(c for i, c in enumerate(classes) if c in classes[:i])
        raise ModelError(f"`classes` must not repeat, got {twice} twice")


def _cut(model: nn.Module, classes: Sequence[int]) -> None:
    _check_classes(model, classes)
    for head in classifiers(model):
        index = torch.tensor(list(classes), device=head.weight.device)
        head.weight = _parameter(head.weight[index], head.weight)
        if head.bias is not None:
            head.bias = _parameter(head.bias[index], head.bias)
        head.out_features = len(classes)
    model.num_classes = len(classes)  # type: ignore[assignment]
