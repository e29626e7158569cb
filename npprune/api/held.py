"""What a caller holds, under names that the stages know, and the work that they do with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from npprune.api.arguments import SEEDS, check_model, model_section, whole
from npprune.api.results import Found, Pruned
from npprune.data.given import AsGiven, Given
from npprune.errors import ModelError, UsageError
from npprune.files import out_folder
from npprune.models.describe import describe, is_described, unwrapped
from npprune.models.info import model_info, weights_sha256
from npprune.models.view import outputs_count
from npprune.pipeline.common.events import Emit
from npprune.pipeline.common.inputs import Network, open_network
from npprune.pipeline.common.work import MEMORY, Work
from npprune.progress import showing
from npprune.recipe import ModelSection
from npprune.records import CheckpointConfig, ClassInfo, ModelSource
from npprune.store.checkpoints import is_checkpoint, read_config

MODEL, DENSE, PRUNED, IMAGES = (
    f"{MEMORY}{what}" for what in ("model", "dense", "pruned", "images")
)

Dense = nn.Module | Pruned | str | Path | None
"""The network that another was pruned from, or where its weights are."""
Progress = bool | Emit | None
"""A function that gets every event; True: a bar; False: silence; None: a bar where one is seen."""


@contextmanager
def working(progress: Progress, device: str | None, seed: int, of: object) -> Iterator[Work]:
    """The work of one call, on `device`, else where the network `of` is."""
    seed = whole("seed", seed, 0, SEEDS - 1)
    module = of.model if isinstance(of, Pruned) else of
    if device is None and isinstance(module, nn.Module):
        parameter = next(module.parameters(), None)
        device = "cpu" if parameter is None else str(parameter.device)
    if device == "meta":
        check_model(module)
    with torch.inference_mode(False), torch.enable_grad(), showing(progress) as emit:
        yield Work(device=str(device or "auto"), seed=seed, emit=emit)


@contextmanager
def place(out: str | Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is gone afterwards."""
    if out is not None:
        yield out_folder(out)
        return
    with TemporaryDirectory(prefix="npprune-") as folder:
        yield Path(folder) / "npprune"


def check_shared(out: str | Path | None, work: Work) -> None:
    """UsageError where torchrun's processes have no folder to share."""
    if out is None and work.team.count > 1:
        raise UsageError(
            f"{work.team.count} processes share this work through a folder, and `out` was not "
            "given",
            hint="`out=FOLDER`, the same for all",
        )


def in_memory(model: nn.Module | Pruned, known: ModelSource | None = None) -> Network:
    """A network of the caller's, as the stages know one. It is not changed.

    known: its description, if its weights are still those.

    Raises:
        UsageError: not a network, or not one of float32.
        ModelError: not a plain vision transformer.
    """
    if isinstance(model, Pruned):
        module = _float32(unwrapped(model.model))
        config = replace(config_of(model), run=None, weights_sha256=weights_sha256(module))
        info = model_info(module, replace(config.source, sha256=""))
        info.preprocessing = config.preprocessing
        return Network(module, info, config, held=True)
    module = unwrapped(model) if isinstance(model, nn.Module) else model
    check_model(module)
    module = _float32(module)
    if known is not None and known.sha256 == weights_sha256(module):
        return Network(module, model_info(module, known), held=True)
    return Network(module, model_info(module, describe(module)), held=True)


def config_of(pruned: Pruned) -> CheckpointConfig:
    """What a folder would say of the network as it is now: it may have another classifier."""
    config, outputs = pruned.config, outputs_count(unwrapped(pruned.model))
    if outputs == config.num_classes:
        return config
    classes = [ClassInfo(i, str(i)) for i in range(outputs)]
    details = {k: v for k, v in config.details.items() if k not in ("outputs", "classes")}
    return replace(config, num_classes=outputs, classes=classes, details=details)


def opened(model: Any, given: Mapping[str, Any], work: Work) -> tuple[ModelSection, Network]:
    """The network of a call, by the name that the stages will call it; held by the work.

    Args:
        given: settings of the model section, for a network by its name.

    Raises:
        UsageError: settings for a network that is in memory.
    """
    if isinstance(model, (str, Path)):
        section = model_section(model, given)
        network = open_network(section, work)
    else:
        if given:
            raise UsageError(
                f"`{next(iter(given))}` is for a network given by its name, and this one is in "
                "memory",
                hint="build it as it is to be, and give it",
            )
        section, network = ModelSection(name=MODEL), in_memory(model)
    work.held.networks[section.name] = network
    return section, network


def checkpoint_of(
    pruned: Any, dense: Dense, work: Work, *, any_dense: bool = False
) -> tuple[Path, str | None]:
    """A pruned network and its dense one, held by the work: the folder of the first (or the name
    that stands for one), and where the dense weights are, if that was said.

    Raises:
        ModelError: the dense network has other weights than those that were pruned.
    """
    named = str(dense) if isinstance(dense, (str, Path)) else None
    if isinstance(pruned, (str, Path)):
        folder, config = Path(pruned), read_config(pruned)
    elif isinstance(pruned, Pruned):
        network = in_memory(pruned)
        assert network.config is not None
        folder, config = Path(PRUNED), network.config
        lies = pruned.folder is not None and is_checkpoint(pruned.folder)
        if lies and pruned.weights == config.weights_sha256:  # its run is told of it
            folder = pruned.folder or folder
        dense = pruned.dense if dense is None else dense
    else:
        raise UsageError(
            f"this takes what `npprune.prune` gives, or a checkpoint folder, got "
            f"{type(pruned).__name__}",
            hint="`pruned = npprune.prune(model, images, target_macs=0.5)`",
        )
    if isinstance(dense, Pruned):
        dense = dense.model
    if isinstance(dense, nn.Module):
        held = in_memory(dense, config.source)
        if held.info.source.sha256 != config.source.sha256 and not any_dense:
            raise ModelError(
                "the dense network has other weights than those that were pruned: it was trained "
                "or changed since",
                hint="give the network as it was with `dense=`; for a second round, that is what "
                "the first one gave",
            )
        name = str(config.details.get("dense", {}).get("name") or config.source.architecture)
        work.held.networks[name] = held
    if folder == Path(PRUNED):
        work.held.networks[PRUNED] = network
    return folder, named


def check_described(network: Network) -> None:
    """ModelError where no checkpoint folder can hold a network, because nothing builds it again."""
    if network.held and network.config is None and not is_described(network.info.source):
        raise not_described(network.model)


def not_described(model: nn.Module) -> ModelError:
    """The error of a network that no folder can hold."""
    return ModelError(
        f"a folder cannot hold this {type(model).__name__}: it was changed in a way that timm's "
        "name and arguments do not build again",
        hint="leave `out` out and keep the network itself, `torch.save(pruned.model, FILE)`",
    )


def held_images(
    images: Any,
    work: Work,
    section: ModelSection | None = None,
    *,
    labelled: bool = False,
    name: str = "images",
) -> str | None:
    """The name of a call's images; what is in memory is held by the work.

    Args:
        section: the network that says the labels of images without; None: they stay without.
        labelled: images without labels are refused.
        name: what they are called, where a call has several kinds.
    """
    if images is None or isinstance(images, str):
        return images
    if isinstance(images, Path):
        return f"folder:{images}"
    predict = None if section is None or _headless(section, work) else _predicting(section, work)
    held = f"{MEMORY}{name}"
    work.held.images[held] = Given(images, predict, labelled)
    return held


def held_to_calibrate(
    paths: Found | str | Path | None, images: Any, work: Work, section: ModelSection
) -> tuple[Path | None, str | None]:
    """The run folder, if there is one, and the name of the images to calibrate on; None: the run's.

    Raises:
        UsageError: there is neither.
    """
    run = None if paths is None else hold_run(paths, work)
    source = held_images(images, work, section)
    if source is None and run is None:
        raise UsageError(
            "`images` are needed: those to calibrate on",
            hint="give a DataLoader, `(images, labels)`, or `folder:PATH`",
        )
    return run, source


def hold_run(paths: Found | str | Path, work: Work) -> Path:
    """The run folder with paths; the images that they are of are held by the work."""
    if isinstance(paths, Found):
        if isinstance(paths.images, Given):
            work.held.images.setdefault(IMAGES, paths.images)
        return paths.folder
    if isinstance(paths, (str, Path)):
        return Path(paths)
    raise UsageError(
        f"`paths` must be what `npprune.discover` gives, or a run folder, got "
        f"{type(paths).__name__}",
        hint="how pruning uses them is said by `use_paths`",
    )


def _float32(model: nn.Module) -> nn.Module:
    """The network, or a copy where gradients cannot go through it.

    Raises:
        UsageError: another precision.
        ModelError: weights that are no numbers.
    """
    found = {t.dtype for t in model.parameters()}
    if found != {torch.float32}:
        kinds = ", ".join(sorted(str(d).removeprefix("torch.") for d in found))
        raise UsageError(
            f"the network must be of float32, got {kinds or 'no parameters'}",
            hint="`model.float()`; a pruned network can be made half precision afterwards",
        )
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(f"`{name}` of the network holds NaN or infinity")
    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model) if any(t.is_inference() for t in tensors) else model


def _headless(section: ModelSection, work: Work) -> bool:
    """Whether a network that is held has no classifier."""
    network = work.held.networks.get(section.name)
    return network is not None and network.info.num_classes == 0


def _predicting(section: ModelSection, work: Work) -> Callable[[Sequence[Any]], Tensor]:
    """Images, prepared or PIL -> the network's own top-1 [b]."""
    found: list[Network] = []

    @torch.no_grad()
    def predict(images: Sequence[Any]) -> Tensor:
        if not found:
            found.append(open_network(section, work))
        fit = AsGiven(found[0].info.preprocessing)
        x = torch.stack([fit(image) for image in images])
        logits: Tensor = found[0].model(x.to(work.where))
        return logits.argmax(1).cpu()

    return predict
