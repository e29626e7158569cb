"""Networks: loaded, made smaller by a plan, saved as a checkpoint folder and read again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from npprune.api.arguments import check_model, number, whole
from npprune.api.held import check_described, config_of, in_memory, not_described
from npprune.api.results import Cost, Pruned
from npprune.errors import StoreError, UsageError
from npprune.files import out_folder
from npprune.models.describe import builds, unwrapped
from npprune.models.info import model_info, state
from npprune.models.load import build
from npprune.models.load import load_model as _load_model
from npprune.models.surgery import apply_plan as _apply_plan
from npprune.pipeline.common.inputs import Network
from npprune.records import CheckpointConfig, ClassInfo, Plan
from npprune.store.checkpoints import is_checkpoint, read_checkpoint, write_checkpoint
from npprune.store.runs import read_plan
from npprune.words import ACTIVATIONS, POOLINGS, Activation, Pooling, check_word


def load_model(
    name_or_path: str | Path,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    num_heads: int | None = None,
    activation: Activation | None = None,
    pooling: Pooling | None = None,
) -> nn.Module:
    """A vision transformer with its weights, in evaluation mode on the CPU.

    What was assumed in loading it is warned of (`UserWarning`).

    Args:
        name_or_path: a checkpoint folder written by npprune; a timm name; a folder of
            `transformers` or timm, or its name on the hub; or `auto`, which reads the architecture
            off `checkpoint`.
        checkpoint: a safetensors, PyTorch or JAX `.npz` file, or such a folder; None takes timm's
            published weights from the hub.
        num_classes: outputs of the head, by default the checkpoint's; 0: none, the features alone
            count.
        img_size: input side in pixels, or (height, width); position embeddings are resampled,
            unless the file has just as many as it needs.
        num_heads: attention heads, where neither name nor file says.
        activation: of the hidden units, likewise: gelu, gelu-tanh, quick-gelu, relu or silu.
        pooling: what the classifier reads, likewise: token (the class token) or avg (the mean patch
            token).

    Raises:
        UsageError: a number that cannot be one of classes, pixels or heads.
        ModelError: an unknown or unsupported network, or weights that do not fit it.
        StoreError: a checkpoint folder that is incomplete or was changed.
    """
    num_classes = number("num_classes", num_classes, 0)
    num_heads = number("num_heads", num_heads, 1)
    if activation is not None:
        check_word("activation", activation, ACTIVATIONS)
    if pooling is not None:
        check_word("pooling", pooling, POOLINGS)
    if isinstance(img_size, (tuple, list)) and len(img_size) == 2:
        img_size = (whole("img_size", img_size[0], 1), whole("img_size", img_size[1], 1))
    else:
        img_size = number("img_size", img_size, 1)
    if is_checkpoint(name_or_path):
        config, tensors = read_checkpoint(name_or_path)
        return build(config, tensors)
    return _load_model(
        str(name_or_path),
        checkpoint=checkpoint,
        num_classes=num_classes,
        img_size=img_size,
        num_heads=num_heads,
        activation=activation,
        pooling=pooling,
    )


def apply_plan(model: nn.Module, plan: Plan, *, force: bool = False) -> nn.Module:
    """A copy of the network in which only the plan's neurons remain.

    Args:
        model: the dense network.
        plan: the kept neurons of every block.
        force: apply the plan although it was made for other weights of the same widths.

    Raises:
        UsageError: not a network, or not a plan.
        ModelError: the plan was made for another network, or the network cannot be pruned.
    """
    check_model(model)
    if not isinstance(plan, Plan):
        raise UsageError(
            f"`plan` must be an npprune.Plan, got {type(plan).__name__}",
            hint="`npprune.Plan(keep=..., widths=...)`: the neurons that stay, block by block",
        )
    return _apply_plan(model, plan, force=force)


def save(model: nn.Module | Pruned, out: str | Path) -> Path:
    """Write a network as a checkpoint folder: for `npprune.load`, `load_model`, and every command.

    Args:
        model: what `npprune.prune` gave, with its weights as they are now, or a network.
        out: the folder, which appears as a whole; an older checkpoint there is replaced.

    Returns:
        The folder.

    Raises:
        ModelError: a network that timm's name and arguments do not build again, so that a folder
            cannot hold it; pickle it instead (`torch.save`).
        StoreError: the folder holds other files, or cannot be written.
    """
    folder = out_folder(out)
    if isinstance(model, Pruned):
        module = unwrapped(model.model)
        if not builds(model.config.source, module):
            raise not_described(module)
        write_checkpoint(folder, replace(config_of(model), run=None), state(module), model.plan)
        return folder
    network = in_memory(model)
    check_described(network)
    write_checkpoint(folder, _config(network), state(network.model))
    return folder


def load(folder: str | Path) -> Pruned:
    """What `npprune.prune`, `npprune.heal` or `npprune.save` wrote to a folder.

    Its dense network is found again where the folder says; one that was in memory has to be given
    (`npprune.evaluate(pruned, images, dense=model)`).

    Returns:
        As `npprune.prune`, the network in evaluation mode on the CPU; `.cost` knows no dense sizes.

    Raises:
        StoreError: no checkpoint, an incomplete or changed one, or one of a network that was not
            pruned (`npprune.load_model` reads it).
    """
    config, tensors = read_checkpoint(folder)
    if config.prune is None:
        raise StoreError(
            f"`{folder}` holds a network that was not pruned",
            hint="`npprune.load_model(FOLDER)` gives it",
        )
    model = build(config, tensors)
    info = model_info(model, replace(config.source, sha256=""))
    return Pruned(
        model=model,
        plan=read_plan(folder),
        config=config,
        cost=Cost(info.params, info.macs),
        folder=Path(folder),
        weights=info.source.sha256,
    )


def _config(network: Network) -> CheckpointConfig:
    """What a checkpoint of a network that was not pruned says of itself."""
    info = network.info
    return CheckpointConfig(
        source=info.source,
        widths=info.widths,
        heads=info.heads,
        num_classes=info.num_classes,
        preprocessing=info.preprocessing,
        classes=network.classes or [ClassInfo(i, str(i)) for i in range(info.num_classes)],
        weights_sha256="",
        merged=info.merged,
        last_for_read=info.last_for_read,
    )
