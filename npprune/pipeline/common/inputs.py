"""What every stage begins with: the network, its preprocessing, the images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from npprune.core import metrics
from npprune.data.given import AsGiven, open_given
from npprune.data.labels import RANKED, Asked, KnownNames
from npprune.data.loading import Batch, batches
from npprune.data.opening import open_source
from npprune.data.sources import ImageSource, Sample
from npprune.data.transforms import describe, make_transform, released, resolve
from npprune.data.unlabelled import open_unlabelled
from npprune.errors import DataError, ModelError, StoreError, UsageError, plural, setting
from npprune.models.load import build, load
from npprune.models.probe import read_probe, with_probe
from npprune.models.released_head import released_head
from npprune.pipeline.common.work import MEMORY, Work
from npprune.recipe import DataSection, ModelSection
from npprune.records import (
    CheckpointConfig,
    ClassInfo,
    DataInfo,
    ModelInfo,
    Preprocessing,
    Result,
)
from npprune.report import text
from npprune.store.checkpoints import CONFIG, is_checkpoint, read_checkpoint

S = TypeVar("S", bound=BaseModel)

PREPROCESSING = ("preprocessing", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""Fields of a data section that say how images are prepared."""
OnBad = Literal["error", "skip"]


@dataclass
class Network:
    """A network in evaluation mode on its device, and what it is."""

    model: nn.Module
    info: ModelInfo
    config: CheckpointConfig | None = None  # where it came from a checkpoint folder
    classes: list[ClassInfo] = field(default_factory=list)  # as another library's folder names them
    probed: bool = False  # its classifier is a probe on its features, not its own
    held: bool = False  # by a caller, in memory: its weights alone do not say what it computes

    @property
    def names(self) -> KnownNames | None:
        """The names of its classes, as far as known."""
        if self.config is not None:
            return _own_names(self.config)
        return KnownNames(self.classes) if self.classes else None


def check_weights(network: Network, paths_of: str, run: Path) -> None:
    """StoreError where the paths of a run are of other weights than the network has."""
    sha256 = network.info.source.sha256
    if paths_of != sha256:
        raise StoreError(
            f"the paths of `{run}` are of weights {paths_of[:12]}..., and the network has "
            f"{sha256[:12]}...",
            hint="discover again, or restore the weights",
        )


def require_classifier(network: Network, what: str) -> None:
    """ModelError where a network has no classifier, and `what` reads predictions."""
    if network.info.num_classes == 0:
        raise ModelError(
            f"{what} a class's probability, and {network.info.source.architecture} was loaded "
            "without a classifier",
            hint="prune it by its features, without paths: `npprune prune MODEL --calibration "
            "SOURCE`; or give weights with a classifier",
        )


def remembered(section: type[S], said: Mapping[str, Any], checkpoint: str | Path) -> S:
    """Settings that a checkpoint remembers, as a section of a recipe.

    Raises:
        StoreError: its `config.json` holds other than such settings.
    """
    try:
        return section(**said)
    except ValidationError as err:
        first = err.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise StoreError(
            f"`{checkpoint}`: `{name}` in the details of its {CONFIG}: {first['msg'].lower()}",
            hint="copy or prune the checkpoint again",
        ) from err


def is_cut(config: CheckpointConfig) -> bool:
    """Whether the head has only some classes of the data it came from."""
    return "outputs" in config.details or bool(config.details.get("cut"))


def dense_names(config: CheckpointConfig) -> KnownNames:
    """The names of a checkpoint's classes by the labels of the dense network it was made from."""
    names, outputs = _own_names(config), config.details.get("outputs")
    if outputs is None:
        return names
    classes = [replace(c, index=outputs[c.index]) for c in config.classes]
    return replace(names, classes=classes, within=frozenset(outputs))


def run_names(result: Result) -> KnownNames:
    """The names of the classes that a run found its paths of."""
    found = result.discovery
    return KnownNames(result.classes, ranked=found is not None and RANKED in found.data.label_rule)


def network_names(network: Network, run: KnownNames | None) -> KnownNames | None:
    """The names of a network's classes, with what a run of it found."""
    own = network.names
    if run is None or (own is not None and own.named and not run.named):
        return own
    return replace(run, within=own.within) if own is not None else run


def _own_names(config: CheckpointConfig) -> KnownNames:
    used = config.prune.calibration if config.prune is not None else None
    return KnownNames(
        config.classes,
        within=frozenset(range(config.num_classes)) if is_cut(config) else None,
        ranked=used is not None and RANKED in used.label_rule,
        class_map=config.details.get("data", {}).get("class_map"),
    )


def open_network(section: ModelSection, work: Work) -> Network:
    """Load the network that a recipe names: see `ModelSection`."""
    if (held := _held(section.name, work)) is not None:
        return _probed(held, section)
    if is_checkpoint(section.name):
        return _probed(open_checkpoint(Path(section.name), work), section)
    loaded = load(
        section.name,
        checkpoint=section.checkpoint,
        num_classes=section.num_classes,
        img_size=section.img_size,
        num_heads=section.num_heads,
        activation=section.activation,
        pooling=section.pooling,
    )
    for note in loaded.notes:
        work.say(note)
    if section.released_head:
        work.say("head: pooled tokens are normalised twice, as the released program does")
        return Network(released_head(loaded.model).to(work.where), loaded.info)
    network = Network(loaded.model.to(work.where), loaded.info, classes=loaded.classes)
    return _probed(network, section)


def _probed(network: Network, section: ModelSection) -> Network:
    """The network with the classifier that the section names."""
    if section.probe is None:
        return network
    return with_classifier(network, *read_probe(Path(section.probe)))


def with_classifier(network: Network, weight: Tensor, bias: Tensor) -> Network:
    """A network with a linear classifier on its features; the weights' hash is the backbone's."""
    model = with_probe(network.model, weight, bias)
    info = replace(network.info, num_classes=len(weight))
    return replace(network, model=model, info=info, probed=True)


def open_checkpoint(folder: Path, work: Work) -> Network:
    """Rebuild the network of a checkpoint folder."""
    from npprune.models.info import model_info

    if (held := _held(str(folder), work)) is not None:
        return held
    config, tensors = read_checkpoint(folder)
    model = build(config, tensors)
    info = model_info(model, replace(config.source, sha256=""))
    info.preprocessing = config.preprocessing
    return Network(model.to(work.where), info, config)


def _held(name: str, work: Work) -> Network | None:
    """A copy, to work with, of the network that a caller holds under this name.

    Raises:
        ModelError: it was held once, and is not any more.
    """
    held = work.held.networks.get(name)
    if held is not None:
        model = copy.deepcopy(held.model).eval().requires_grad_(True).to(work.where)
        return replace(held, model=model, info=copy.deepcopy(held.info))
    if name.startswith(MEMORY):
        raise ModelError(
            f"`{name}` was a network in the memory of a Python program",
            hint="save it with `npprune.save`, and give its folder; for the dense network of a "
            "checkpoint, with `--dense FOLDER`",
        )
    return None


@dataclass
class Images:
    """A source with the transform that suits a network."""

    source: ImageSource
    preprocessing: Preprocessing
    transform: Callable[..., Tensor]
    section: DataSection
    on_bad: OnBad
    work: Work
    skipped: list[str] = field(default_factory=list)

    def batches(
        self,
        batch_size: int | None = None,
        indices: Sequence[int] | None = None,
        entries: Iterable[tuple[int, Sample]] | None = None,
    ) -> Iterator[Batch]:
        """Batches in order; what cannot be read is refused or collected in `skipped`.

        `indices`: positions to read; `entries`: of a stream, positions and samples to read.
        """
        before = len(self.skipped)
        for batch in batches(
            self.source,
            self.transform,
            batch_size or self.section.batch_size,
            on_bad=self.on_bad,
            skipped=self.skipped,
            workers=self.section.workers,
            indices=indices,
            entries=entries,
        ):
            before = self._say_skipped(before)
            yield batch
        self._say_skipped(before)

    def evenly(self, count: int) -> list[int] | None:
        """The positions of so many images, or of all, evenly over the source; None of a stream,
        which is read from its beginning."""
        items = self.source.items
        if items is None:
            return None
        n = min(count, len(items))
        return [i * len(items) // n for i in range(n)]

    def info(self) -> DataInfo:
        """What was read so far, with what was skipped."""
        return self.source.info(self.skipped)

    def _say_skipped(self, before: int) -> int:
        for name in self.skipped[before:]:
            self.work.warn(f"skipped `{name}`: it cannot be read")
        return len(self.skipped)


def open_images(
    spec: str | None,
    section: DataSection,
    network: ModelInfo,
    work: Work,
    *,
    asked: str,
    on_bad: OnBad,
    preprocessing: Preprocessing | None = None,
    names: KnownNames | None = None,
) -> Images:
    """Open a data source for a network and say how labels and preprocessing were found.

    `asked`: the setting that names the source, such as `data.val`. `names`: what the network calls
    its classes; they decide where there is no class map. A network without a classifier needs no
    labels: a folder is then read as it is arranged, where it says none.

    Raises:
        UsageError: no source was named; DataError: it cannot be read.
    """
    if spec is None:
        raise UsageError(
            f"{setting(asked)} is needed: the images to {work.stage} on",
            hint=f"e.g. {setting(asked, 'folder:PATH')}",
        )
    held = work.held.images.get(spec)
    if held is None and spec.startswith(MEMORY):
        raise DataError(
            f"`{spec}` were images in the memory of a Python program",
            hint=f"give images with {setting(asked, 'SOURCE')}",
        )
    base = preprocessing or network.preprocessing
    pre = resolve(
        released(base) if section.preprocessing == "released" else base,
        mean=section.mean,
        std=section.std,
        interpolation=section.interpolation,
        crop_pct=section.crop_pct,
        crop_mode=section.crop_mode,
        from_files=held is None,
    )
    of: dict[str, Any] = {
        "num_classes": network.num_classes or None,
        "class_map": section.class_map,
        "known": names,
        "classes": section.classes,
        "images_per_class": section.images_per_class,
        "max_pixels": section.max_pixels,
    }
    try:
        source = open_source(spec, **of) if held is None else open_given(held, spec, Asked(**of))
    except DataError as err:
        wanted = network.num_classes or section.classes is not None or section.class_map is not None
        if wanted or not spec.startswith("folder:"):
            raise
        source = open_unlabelled(spec, section.max_pixels)  # raises where there are no images
        work.say(f"labels are not used: {err.message}")
    count = "a stream" if source.length is None else plural(source.length, "image")
    work.say(f"{spec}: {count}, labels by {source.label_rule}")
    work.say(f"preprocessing: {describe(pre)}")
    for note in source.notes:
        work.warn(note)
    transform = make_transform(pre) if held is None else AsGiven(pre)
    return Images(source, pre, transform, section, section.on_bad_image or on_bad, work)


def class_names(images: Images, num_classes: int) -> list[ClassInfo]:
    """One entry for each output of the classifier; unnamed ones carry their index."""
    known = {c.index: c for c in images.source.classes}
    return [known.get(i, ClassInfo(i, str(i))) for i in range(num_classes)]


def label_doubt(predicted: Tensor, labels: Tensor, outputs: int, source: ImageSource) -> str:
    """What to say first where the dense network's predictions do not fit the labels; else nothing.

    That is where its top-1 is not above chance (by the 95 % interval, on images enough to tell
    from what lies halfway to all right), or clearly higher if names are ranked as plain text.

    Args:
        predicted: the dense network's top-1, [n].
        labels: [n].
        outputs: classes that it chose among.
    """
    if outputs < 2 or len(labels) == 0:
        return ""
    total = len(labels)
    found, other = metrics.wilson(int((predicted == labels).sum()), total), None
    if source.text_order is not None:
        moved = torch.tensor([source.text_order.get(int(y), int(y)) for y in labels])
        other = metrics.wilson(int((predicted == moved).sum()), total)
    better = other is not None and other.low > found.high
    chance = 1 / outputs
    if not better and (found.low > chance or found.high >= (1 + chance) / 2):
        return ""
    said = (
        f"labels are probably shifted: the dense network is right on {found.correct} of "
        f"{text.plural(total, 'image')} of {source.spec} ({text.percent(found.value)}), where "
        f"chance is {text.percent(chance)} (labels by {source.label_rule})"
    )
    if better and other is not None:
        return (
            f"{said}; if class names are ranked in plain text order, as torchvision does, it is "
            f"right on {other.correct} ({text.percent(other.value)}): name the classes in that "
            "order with --class-map FILE, one a line"
        )
    return (
        f"{said}; to check, see what `npprune predict` says of some images (after `npprune "
        "export`); --class-map FILE says the label of every folder"
    )
