"""The stages on networks and images in memory: discover, prune, evaluate, heal, export.

Each function takes its settings as keywords, by their names in a recipe, and calls what the command
of its name calls. Nothing is written unless `out` says where; where a stage needs a place, it is a
temporary folder.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from npprune.api.arguments import by_section, data_section, taking
from npprune.api.held import (
    Dense,
    Progress,
    check_described,
    check_shared,
    checkpoint_of,
    config_of,
    held_images,
    held_to_calibrate,
    opened,
    place,
    working,
)
from npprune.api.results import Cost, Found, Pruned
from npprune.errors import UsageError
from npprune.models.describe import unwrapped, with_tensors
from npprune.models.info import weights_sha256
from npprune.models.surgery import apply_plan
from npprune.pipeline.common.inputs import Network
from npprune.pipeline.discover.stage import discover as _discover
from npprune.pipeline.evaluate.stage import evaluate as _evaluate
from npprune.pipeline.export.stage import export_checkpoint, export_model
from npprune.pipeline.heal.stage import heal as _heal
from npprune.pipeline.prune.stage import prune as _prune
from npprune.recipe import (
    DataSection,
    DiscoverSection,
    EvaluateSection,
    ExportSection,
    HealSection,
    ModelSection,
    PruneSection,
    section_of,
)
from npprune.records import (
    Evaluation,
    ExportRecord,
    FeatureEvaluation,
    HealSummary,
)
from npprune.store.checkpoints import is_checkpoint, read_checkpoint, read_config
from npprune.store.runs import read_plan
from npprune.words import PROVIDERS, PathUse, Provider, check_word

Model = nn.Module | Pruned | str | Path
COMMON = ("out", "device", "seed", "progress")


@taking(DiscoverSection, DataSection, ModelSection)
def discover(
    model: Model,
    images: Any,
    *,
    out: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = None,
    **settings: Any,
) -> Found:
    """The neuron path of every image: `npprune discover`.

    Example:
        import timm, torch, npprune

        model = timm.create_model("vit_tiny_patch16_224")
        images, labels = torch.randn(8, 3, 224, 224), torch.arange(8)
        found = npprune.discover(model, (images, labels), topk=5)
        found.neurons  # [8, 12, 5]

    Args:
        model: a plain vision transformer of timm's in memory, or what the command takes: a name, a
            folder. It is left as it was.
        images: what gives images [channels, height, width] or batches of them, float and prepared
            for the network, with their labels: a DataLoader, a data set, a list, tensors
            `(images, labels)`, or a source's name such as `folder:PATH`. PIL images are prepared as
            the network's preprocessing says. Without labels, those are the network's predictions.
        out: the run folder, where an interrupted call resumes; None: one that goes with the result.
        device: auto, cpu, cuda, cuda:N or mps; None: where the network is.
        progress: a function that gets every `Event`, True, False, or None: a bar where one can be
            seen.
        settings: those of `npprune discover`, of the images, and of a network by its name.

    Returns:
        `.neurons` int64 [images, blocks, topk], `.scores` float64 [images], `.labels` int64
        [images], `.ids`, `.class_paths`, `.folder`.

    Raises:
        UsageError: arguments that do not fit each other or the network.
        DataError: images or labels that the network cannot take.
        ModelError: not a plain vision transformer.

    Source: "Discovering Influential Neuron Path in Vision Transformers", ICLR 2025.
    """
    kinds = (DiscoverSection, DataSection, ModelSection)
    asked, of_images, of_model = by_section(settings, kinds, COMMON)
    search = section_of(DiscoverSection, asked)
    with working(progress, device, seed, model) as work, ExitStack() as stack:
        check_shared(out, work)
        section, _ = opened(model, of_model, work)
        data = data_section(of_images, train=held_images(images, work, section))
        folder = stack.enter_context(place(out))
        result = _discover(section, data, search, folder, work=work)
        temporary = None if out is not None else stack.pop_all()  # it goes when the paths do
        return Found(folder, result, work.held.images.get(data.train or ""), temporary)


@taking(PruneSection, DataSection, ModelSection)
def prune(
    model: Model,
    images: Any = None,
    *,
    paths: Found | str | Path | None = None,
    use_paths: PathUse = "auto",
    out: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = None,
    **settings: Any,
) -> Pruned:
    """A smaller network: `npprune prune`.

    Example:
        import timm, torch, npprune

        model = timm.create_model("vit_tiny_patch16_224")
        images = torch.randn(64, 3, 224, 224)  # a thousand of real ones
        pruned = npprune.prune(model, images, target_macs=0.5)
        print(pruned)
        logits = pruned.model(images[:1])  # an ordinary nn.Module

    Args:
        model: as for `npprune.discover`; a pruned network can be pruned again.
        images: to calibrate on, as for `npprune.discover`; a thousand make sense. None: those that
            the paths are of.
        paths: what `npprune.discover` gave for this network, or a run folder; None: the criterion
            alone decides.
        use_paths: auto, protect, prior or off: the setting `prune.paths` of a recipe.
        out: a checkpoint folder to write as well; None: nothing is written.
        device: as for `npprune.discover`.
        progress: as for `npprune.discover`.
        settings: those of `npprune prune`, of the images, and of a network by its name. One of
            keep, target_params, target_macs, target_latency and max_drop is needed.

    Returns:
        `.model` (in evaluation mode), `.plan`, `.predicted`, `.cost`.

    Raises:
        GateError: more than `max_drop` is predicted to be lost.
        UsageError, DataError, ModelError: as for `npprune.discover`.
        ModelError: a network that a folder cannot hold, where `out` was given.
    """
    kinds = (PruneSection, DataSection, ModelSection)
    asked, of_images, of_model = by_section(settings, kinds, (*COMMON, "paths", "use_paths"))
    wish = section_of(PruneSection, {**asked, "paths": use_paths})
    with working(progress, device, seed, model) as work, place(out) as folder:
        check_shared(out, work)
        section, network = opened(model, of_model, work)
        if out is not None:
            check_described(network)
        run, source = held_to_calibrate(paths, images, work, section)
        variant = _prune(
            run or section,
            data_section(of_images, calibration=source),
            wish,
            folder,
            work=work,
            network=section,
            keep=out is not None,
        )
        pruned = _pruned(network, folder, Path(out) if out is not None else None)
        pruned.cost = Cost(
            variant.model.params, variant.model.macs, network.info.params, network.info.macs
        )
        return pruned


@taking(EvaluateSection, DataSection)
def evaluate(
    pruned: Pruned | str | Path,
    images: Any,
    *,
    dense: Dense = None,
    device: str | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Evaluation | FeatureEvaluation:
    """Dense and pruned network on the same images: `npprune eval`.

    Args:
        pruned: what `npprune.prune` gave, or a checkpoint folder.
        images: as for `npprune.discover`, with labels; features need none.
        dense: the network it was pruned from, where `pruned` does not have it: a network, or a
            file or folder of its weights.
        device: as for `npprune.discover`.
        progress: as for `npprune.discover`.
        settings: those of `npprune eval` and of the images.

    Returns:
        `.dense` and `.pruned` accuracy with 95 % intervals (`.top1.value` in [0, 1]),
        `.top1_change`, `.agreement`, `.probability_deviation`, `.classes`, and `.latency` in
        milliseconds. Of a network without a classifier: `.agreement` of the features (`.cosine`,
        `.relative_error`, and those of patch tokens), and `.probes` where images have labels. It
        also goes into the report of the run that a folder belongs to.

    Raises:
        DataError: images without labels, or that the network cannot take.
        ModelError: the dense network is not there, or has other weights.
    """
    asked, of_images = by_section(
        settings, (EvaluateSection, DataSection), ("dense", "device", "progress")
    )
    wish = section_of(EvaluateSection, asked)
    with working(progress, device, 0, pruned) as work:
        folder, named = checkpoint_of(pruned, dense, work)
        config = config_of(pruned) if isinstance(pruned, Pruned) else read_config(pruned)
        labelled = config.num_classes > 0
        data = data_section(of_images, val=held_images(images, work, labelled=labelled))
        return _evaluate(folder, data, wish, dense_checkpoint=named, work=work)


@taking(HealSection, DataSection)
def heal(
    pruned: Pruned,
    images: Any,
    *,
    dense: Dense = None,
    any_teacher: bool = False,
    out: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: Progress = None,
    **settings: Any,
) -> HealSummary:
    """Train a pruned network, in place, to predict what its dense network does: `npprune heal`.

    Args:
        pruned: what `npprune.prune` gave. Its `.model` gets the new weights.
        images: as for `npprune.discover`; labels are not needed.
        dense: the teacher, where `pruned` does not have it.
        any_teacher: another teacher than the network that was pruned.
        out: a checkpoint folder to write as well, where an interrupted call resumes.
        device: as for `npprune.discover`.
        progress: as for `npprune.discover`.
        settings: those of `npprune heal` and of the images; one of epochs and minutes is needed.

    Returns:
        What it brought, on images that were held out: `.before` and `.after` with
        `.divergence_nats`, `.agreement`, `.top1`. It is `pruned.healing` as well.

    Raises:
        GateError: the loss is not a number any more; the network is as it was.
        UsageError, DataError, ModelError: as for `npprune.prune`.
    """
    named_arguments = (*COMMON, "dense", "any_teacher")
    asked, of_images = by_section(settings, (HealSection, DataSection), named_arguments)
    wish = section_of(HealSection, asked)
    if not isinstance(pruned, Pruned):
        pruned_type = type(pruned).__name__
        raise UsageError(
            f"`pruned` must be what `npprune.prune` or `npprune.load` gives, got {pruned_type}"
        )
    with working(progress, device, seed, pruned) as work, place(out) as folder:
        check_shared(out, work)
        checkpoint, named = checkpoint_of(pruned, dense, work, any_dense=any_teacher)
        data = data_section(of_images, train=held_images(images, work))
        variant = _heal(
            checkpoint, data, wish, folder, dense_checkpoint=named, any_teacher=any_teacher,
            work=work,
        )  # fmt: skip
        config, tensors = read_checkpoint(folder)
        network = with_tensors(unwrapped(pruned.model), tensors)
    pruned.config = config if out is not None else replace(config, run=None)
    pruned.healing, pruned.folder = variant.heal, Path(out) if out is not None else None
    pruned.weights = weights_sha256(network)
    assert variant.heal is not None
    return variant.heal


@taking(ExportSection, DataSection, ModelSection)
def export(
    model: Model,
    out: str | Path,
    images: Any = None,
    *,
    provider: Provider = "auto",
    dense: Dense = None,
    progress: Progress = None,
    **settings: Any,
) -> ExportRecord:
    """A file that gives the network's answers, compared before it gets its name: `npprune export`.

    Args:
        model: what `npprune.prune` gave (timed beside its dense network), a network, or what the
            command takes.
        out: the file, `.onnx`, or `.pt2` for `format="torch"`; a folder for timm and transformers.
            What was measured is written beside it, as JSON.
        images: to compare on, as for `npprune.discover`. None: those that a folder was calibrated
            on.
        provider: what runs the comparison: auto, cpu or cuda.
        dense: as for `npprune.evaluate`.
        progress: as for `npprune.discover`.
        settings: those of `npprune export`, of the images, and of a network by its name.

    Returns:
        `.parity` at each batch size, `.bytes`, `.sha256`, `.latency`.

    Raises:
        GateError: the file does not agree with the network; nothing keeps its name.
        UsageError, DataError, ModelError: as for `npprune.prune`.
    """
    kinds = (ExportSection, DataSection, ModelSection)
    asked, of_images, of_model = by_section(
        settings, kinds, ("out", "images", "provider", "dense", "progress")
    )
    wish = section_of(ExportSection, asked)
    check_word("provider", provider, PROVIDERS)
    with working(progress, "cpu", 0, model) as work:
        target = Path(out)
        if isinstance(model, Pruned) or (isinstance(model, (str, Path)) and is_checkpoint(model)):
            folder, named = checkpoint_of(model, dense, work)
            data = data_section(of_images, val=held_images(images, work, _dense_of(work)))
            return export_checkpoint(
                folder, data, wish, out=target, provider=provider, dense_checkpoint=named,
                work=work,
            )  # fmt: skip
        section, _ = opened(model, of_model, work)
        data = data_section(of_images, val=held_images(images, work, section))
        return export_model(section, data, wish, out=target, provider=provider, work=work)


def _dense_of(work: Any) -> ModelSection | None:
    """The dense network that a pruned one is exported beside, where it is held."""
    names = [name for name in work.held.networks if not name.endswith(":pruned")]
    return ModelSection(name=names[0]) if names else None


def _pruned(network: Network, folder: Path, out: Path | None) -> Pruned:
    """The network of a checkpoint that was just written, out of the caller's own."""
    config, tensors = read_checkpoint(folder)
    plan = read_plan(folder)
    model = with_tensors(apply_plan(network.model, plan), tensors).eval()
    return Pruned(
        model=model,
        plan=plan,
        config=config if out is not None else replace(config, run=None),
        cost=Cost(0, 0),
        dense=network.model,
        folder=out,
        weights=weights_sha256(model),
    )
