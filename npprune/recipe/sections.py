"""The sections of a recipe: each field with its default, its bounds and what is said of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from npprune import words
from npprune.criteria import CRITERIA
from npprune.recipe.settings import OneOf, Rule, setting
from npprune.untrusted import MAX_PIXELS

# Panels of a command's help.
BUDGET = "Budget (one of keep, target-params, target-macs, target-latency)"
CHOICE = "Which neurons stay"
COMPARED = "Compared (lists are separated by commas, and all combined)"
EXPLORER = "What is shown"
EDIT = "Edit the neurons of a run's paths; nothing is removed from the network"
FILE = "File"
IMAGES = "Images"
LENGTH = "Length (one of epochs and minutes)"
MEASURE = "Measurement"
MODEL = "Model"
PREPROCESSING = "Preprocessing (by default the model's own)"
RUN = "Run"
SEARCH = "Search"
SHARED = "The same in all rows"
TEACHING = "Teaching"


class Section(BaseModel):
    """Base of the sections: unknown keys and numbers that are not finite are refused, values are
    checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """`topk: true` would become 1 otherwise."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise PydanticCustomError("not_bool", "must not be true or false")
        return value

    @classmethod
    def key(cls, field: str) -> str:
        """A field's name in a recipe: `prune.keep`."""
        section = cls.__name__.removesuffix("Section").lower()
        return field if section == "recipe" else f"{section}.{field}"


CriterionName = Annotated[str, OneOf(lambda: CRITERIA)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Share = Annotated[float, Field(gt=0, le=1)]
Sides = Annotated[list[Count], Field(min_length=2, max_length=2)]


class ModelSection(Section):
    """Which network. `auto` as the name builds the architecture from the checkpoint."""

    name: str = setting(
        ...,
        "timm name; folder or hub name of a transformers or timm network; or `auto`: the "
        "architecture is read from the checkpoint",
        flag="MODEL",
    )
    checkpoint: str | None = setting(
        None,
        ".safetensors, .pth or .npz, or a folder",
        panel=MODEL,
        metavar="FILE",
        shown="timm's own weights",
    )
    num_classes: int | None = setting(
        None,
        "outputs of the classifier; 0: none, the features alone count",
        panel=MODEL,
        metavar="N",
        ge=0,
    )
    img_size: Annotated[
        Count | Sides | None,
        Rule("one side or height x width in pixels, such as `224` or `192x256`"),
    ] = setting(
        None,
        "input side, or height and width; position embeddings are resampled",
        panel=MODEL,
        metavar="N|HxW",
    )
    num_heads: int | None = setting(
        None, "attention heads per block", panel=MODEL, metavar="N", ge=1
    )
    activation: words.Activation | None = setting(
        None, "of the hidden units, where neither name nor file says", panel=MODEL
    )
    pooling: words.Pooling | None = setting(
        None,
        "the classifier reads the class token or the mean patch token, where neither name nor file "
        "says",
        panel=MODEL,
    )
    probe: str | None = setting(
        None,
        "of a network without a classifier: a linear one on its features, .safetensors with "
        "`weight` and `bias`",
        panel=MODEL,
        metavar="FILE",
        shown="fitted on the images",
    )
    released_head: bool = setting(
        False, "normalise MAE's pooled tokens twice, as the paper's released program", panel=MODEL
    )

    @field_validator("img_size", mode="before")
    @classmethod
    def _sides(cls, value: Any) -> Any:
        """`"192x256"` and `"192,256"` are `[192, 256]`."""
        if isinstance(value, str) and re.fullmatch(r"\d+[x,]\d+", value):
            return [int(side) for side in re.split("[x,]", value)]
        return value


class DataSection(Section):
    """Which images. Sources: `folder:PATH`, `digits`, or timm's `tfds/`, `hfds/`, `wds/`."""

    train: str | None = setting(
        None,
        "images: folder:PATH, digits, or tfds/, hfds/, wds/, torch/ NAME",
        panel=IMAGES,
        metavar="SOURCE",
        hint="for example `folder:PATH` or `digits:train`",
    )
    calibration: str | None = setting(
        None, "images for statistics", panel=IMAGES, metavar="SOURCE", shown="the run's own images"
    )
    val: str | None = setting(None, "images to measure on", panel=IMAGES, metavar="SOURCE")
    class_map: str | None = setting(
        None, "json or txt: class index of each folder's name", panel=IMAGES, metavar="FILE"
    )
    classes: Annotated[
        list[str | int] | str | None,
        Rule("a list of indices, synsets or names, or a file's path"),
    ] = setting(
        None,
        "only these classes: indices, synsets or names, separated by commas, or a file",
        panel=IMAGES,
        metavar="LIST|FILE",
        hint="`1,5,n01440764`, `tench,goldfish`, or a .txt or .json file",
    )
    images_per_class: int | None = setting(
        None, "at most N images of each class", panel=IMAGES, metavar="N", ge=1
    )
    on_bad_image: words.OnBadImage | None = setting(
        None,
        "stop at an image that cannot be read, or skip and count it",
        panel=IMAGES,
        shown="skip; where accuracy is measured: error",
    )
    batch_size: int = setting(32, "images per batch", panel=IMAGES, metavar="N", ge=1)
    workers: int = setting(
        0, "processes that read images; 0: the main one", panel=IMAGES, metavar="N", ge=0
    )
    max_megapixels: float | None = setting(
        None,
        "millions of pixels of the largest image that is decoded, at 4 bytes each",
        panel=IMAGES,
        metavar="N",
        shown=f"{MAX_PIXELS / 1e6:g}; larger ones count as unreadable",
        gt=0,
        le=10_000,
    )
    preprocessing: words.Preparation = setting(
        "model",
        "as the model was trained, or as the paper's released program",
        panel=PREPROCESSING,
    )
    mean: list[float] | None = setting(
        None, "subtracted from pixels in 0 to 1", panel=PREPROCESSING, metavar="R,G,B"
    )
    std: list[Annotated[float, Field(gt=0)]] | None = setting(
        None, "pixels are divided by it, after the mean", panel=PREPROCESSING, metavar="R,G,B"
    )
    interpolation: words.Interpolation | None = setting(
        None, "method of resizing", panel=PREPROCESSING
    )
    crop_pct: float | None = setting(
        None,
        "side of the crop as a share of the resized image's, in (0, 1]",
        panel=PREPROCESSING,
        metavar="SHARE",
        hint="`0.9` crops the middle 90 % of the resized image's side",
        gt=0,
        le=1,
    )
    crop_mode: words.CropMode | None = setting(
        None, "cut the middle out, resize to the input's shape, or pad", panel=PREPROCESSING
    )

    @property
    def max_pixels(self) -> int:
        """Of an image that is decoded."""
        return MAX_PIXELS if self.max_megapixels is None else int(1e6 * self.max_megapixels)


class DiscoverSection(Section):
    """How paths are found. `quadrature` auto, `points` None: see `core.quadrature`."""

    topk: int = setting(
        1,
        "neurons per block in each path",
        panel=SEARCH,
        metavar="K",
        hint="`1` is the strongest neuron of every block, as in the paper",
        ge=1,
    )
    images_per_class: int | None = setting(
        None, "images of each class that paths are found for (None: data.images_per_class)",
        panel=SEARCH, metavar="N", ge=1,
    )  # fmt: skip
    method: words.Method = setting("neuron-path", "how neurons are scored", panel=SEARCH)
    scope: words.ScopeOrAuto = setting(
        "auto", "tokens at which neurons are scored (auto: those the classifier pools)",
        panel=SEARCH,
    )  # fmt: skip
    quadrature: words.RuleOrAuto = setting(
        "auto",
        "rule of the attribution integral (auto: gauss-radau at the class token, mapped-radau "
        "elsewhere)",
        panel=SEARCH,
    )
    points: int | None = setting(
        None,
        "points of the rule",
        panel=SEARCH,
        metavar="M",
        hint="4 points suffice at the class token, 6 elsewhere (12 in block 0); the default is "
        "the best choice",
        shown="4 at the class token, 6 elsewhere (12 in block 0); 20 for left-riemann and "
        "influence-pattern",
        ge=1,
        le=256,
    )
    accumulation: words.Accumulation = setting(
        "sum", "gradients of the whole path, or of its last block alone", panel=SEARCH
    )
    batch_size: int = setting(16, "images searched at once; points x images run as one batch", ge=1)
    shard_size: int = setting(
        256,
        "images per stored shard; an interrupted run loses at most one",
        panel=SEARCH,
        metavar="N",
        ge=1,
    )
    memory: float | None = setting(
        None, "most memory that the search takes, in GiB", panel=SEARCH, metavar="GIB",
        shown="what is free", gt=0,
    )  # fmt: skip
    precision: words.SearchPrecision = setting(
        "fp32", "of matrix products; tf32 needs a CUDA GPU", panel=SEARCH
    )
    compile: bool = setting(
        False, "run the blocks through torch.compile; needs a CUDA GPU", panel=SEARCH
    )


class PruneSection(Section):
    """What stays. A budget is one of keep, target_params, target_macs, target_latency.

    `axes` other than `mlp` need measured selection, and a budget that they can share.
    """

    axes: list[words.Axis] | None = setting(
        None,
        "what may be removed, separated by commas",
        panel=CHOICE,
        metavar="LIST",
        hint="`mlp,heads,qk` lets hidden units, heads and query/key dimensions share the budget",
        shown="all that the network has for fewer MACs, latency or --max-drop alone; else mlp",
        min_length=1,
    )
    topk: int | None = setting(
        None,
        "path neurons per block of each class",
        panel=CHOICE,
        metavar="K",
        hint="`1` keeps each class's most frequent neuron of every block",
        shown="all",
        ge=1,
    )
    keep: float | None = setting(
        None,
        "share of the hidden units that stays, in (0, 1]",
        panel=BUDGET,
        metavar="SHARE",
        hint="`0.5` keeps half of the hidden units",
        gt=0,
        le=1,
    )
    target_params: float | None = setting(
        None,
        "parameters: up to 1 a share of the dense network's, above 1 a count",
        panel=BUDGET,
        metavar="X",
        hint="`0.7` asks for 70 % of the dense parameters, `4e6` for four million",
        gt=0,
    )
    target_macs: float | None = setting(
        None,
        "MACs per image: up to 1 a share of the dense network's, above 1 a count",
        panel=BUDGET,
        metavar="X",
        hint="`0.7` asks for 70 % of the dense MACs, `1e9` for a billion",
        gt=0,
    )
    target_latency: float | None = setting(
        None,
        "latency on this machine: up to 1 a share of the dense network's, above 1 milliseconds",
        panel=BUDGET,
        metavar="X",
        hint="`0.6` asks for 60 % of the dense latency, `4.5` for 4.5 milliseconds",
        gt=0,
    )
    latency_runtime: words.Runtime = setting("onnxruntime", "runs it while timing", panel=BUDGET)
    latency_batch: int = setting(1, "images per run while timing", panel=BUDGET, metavar="N", ge=1)
    latency_threads: int | None = setting(
        None, "threads while timing", panel=BUDGET, metavar="N", shown="PyTorch's", ge=1
    )
    criterion: CriterionName = setting(
        "curvature-obs", "ranks the neurons that no path names", panel=CHOICE
    )
    selection: words.Selection = setting("measured", "how blocks share the budget", panel=CHOICE)
    compensation: words.Compensation = setting(
        "sequential", "closed-form correction of the weights that stay", panel=CHOICE
    )
    shrinkage: float | None = setting(
        None,
        "ridge penalty of the refit, relative to the mean variance",
        panel=CHOICE,
        metavar="X",
        shown="chosen on held-out images",
        gt=0,
    )
    paths: words.PathUse = setting(
        "auto",
        "neurons of paths: auto keeps as many as cost nothing on held-out images, protect all that "
        "fit the budget, prior lets votes raise the criterion's scores",
        panel=CHOICE,
    )
    protect_paths: bool | None = setting(
        None, "short for --paths protect, and off", panel=CHOICE, shown="--paths decides",
        flag="--protect-paths/--no-protect-paths",
    )  # fmt: skip
    round_to: int = setting(16, "widths are multiples of N", panel=CHOICE, metavar="N", ge=1)
    min_keep: int = setting(
        16, "least number of hidden units per block", panel=CHOICE, metavar="N", ge=1
    )
    calibration_images: int | None = setting(
        None, "at most N images for statistics", panel=IMAGES, metavar="N", ge=1
    )
    keep_head: bool = setting(
        False,
        "with a choice of classes: all outputs stay, or only those of the classes",
        panel=CHOICE,
        flag="--keep-head/--cut-head",
    )
    max_drop: float | None = setting(
        None,
        "largest predicted fall of top-1; without a budget: the smallest network within it",
        panel=BUDGET,
        metavar="POINTS",
        hint="`1.0` allows top-1 to fall by one point, as predicted on held-out images",
        gt=0,
        le=100,
    )
    memory: float | None = setting(
        None,
        "memory for statistics; what does not fit is kept on disk",
        panel=RUN,
        metavar="GIB",
        shown="half of the memory",
        gt=0,
    )


class StudySection(Section):
    """What is compared: every combination of the lists.

    `protect` on or off: with or without the path neurons kept first; None: both, where there is
    a run with paths.
    """

    criteria: list[CriterionName] | None = setting(
        None, "rank the neurons", panel=COMPARED, metavar="LIST", shown="all", min_length=1
    )
    compensations: list[words.Compensation] = setting(
        ["least-squares"], "corrections of the weights that stay", panel=COMPARED,
        metavar="LIST", min_length=1,
    )  # fmt: skip
    selections: list[words.Selection] = setting(
        ["uniform"], "how blocks share the budget", panel=COMPARED, metavar="LIST", min_length=1
    )
    keep: list[Share] | None = setting(
        None,
        "shares of the hidden units that stay",
        panel=COMPARED,
        metavar="LIST",
        hint="`0.5,0.7` compares half of the hidden units with 70 %",
        shown="0.5, unless --target-macs is given",
        min_length=1,
    )
    target_macs: list[Share] | None = setting(
        None,
        "shares of the MACs, for each of --axes",
        panel=COMPARED,
        metavar="LIST",
        hint="`0.7,0.5` compares 70 % of the MACs with half of them",
        min_length=1,
    )
    axes: list[str] = setting(
        ["all"],
        "what shares the MACs, joined by +: mlp, mlp+heads+qk, tokens, all, ...",
        panel=COMPARED,
        metavar="LIST",
        hint="`all,mlp` compares all axes with hidden units alone",
        min_length=1,
    )
    seeds: list[Seed] = setting(
        [0], "of criteria that draw at random; others get one row", panel=COMPARED,
        metavar="LIST", min_length=1,
    )  # fmt: skip
    protect: list[words.OnOff] | None = setting(
        None,
        "whether path neurons are kept first",
        panel=COMPARED,
        metavar="LIST",
        shown="both for a run, else off",
        min_length=1,
    )
    topk: int | None = setting(
        None, "path neurons per block of each class", panel=SHARED, metavar="K", shown="all", ge=1
    )
    round_to: int = setting(16, "widths are multiples of N", panel=SHARED, metavar="N", ge=1)
    min_keep: int = setting(
        16, "least number of hidden units per block", panel=SHARED, metavar="N", ge=1
    )
    calibration_images: int | None = setting(
        None, "at most N images for statistics", panel=IMAGES, metavar="N", ge=1
    )
    heal: int | None = setting(
        None, "train every row for so many epochs as well, as npprune heal does", panel=SHARED,
        metavar="EPOCHS", ge=1,
    )  # fmt: skip
    latency: bool = setting(
        False,
        "time every row in ONNX Runtime, compared with the dense network",
        panel=SHARED,
        flag="--latency/--no-latency",
    )
    latency_batch: int = setting(1, "images per run while timing", panel=SHARED, metavar="N", ge=1)
    latency_threads: int | None = setting(
        None, "threads while timing", panel=SHARED, metavar="N", shown="PyTorch's", ge=1
    )


class HealSection(Section):
    """A short distillation from the dense network. One of epochs and minutes says how long."""

    epochs: int | None = setting(None, "times through the images", panel=LENGTH, metavar="N", ge=1)
    minutes: float | None = setting(
        None, "total time, reading the images included", panel=LENGTH, metavar="M", gt=0
    )
    lr: float = setting(5e-5, "highest learning rate", panel=TEACHING, metavar="X", gt=0)
    batch_size: int = setting(
        16, "images per step, over all processes", panel=TEACHING, metavar="N", ge=1
    )
    weight_decay: float = setting(0.01, "of weight matrices", panel=TEACHING, metavar="X", ge=0)
    temperature: float = setting(1.0, "softens the predictions", panel=TEACHING, metavar="T", gt=0)
    feature_weight: float | None = setting(
        None,
        "weight of the loss on each block's output",
        panel=TEACHING,
        metavar="X",
        shown="20, or 0 where blocks do not match",
        ge=0,
    )
    label_weight: float = setting(
        0.0, "weight of the cross-entropy with the labels; 0: labels are not read",
        panel=TEACHING, metavar="X", ge=0,
    )  # fmt: skip
    layerwise: bool = setting(
        False, "train each block's MLP on its own: cheap, gains less", panel=TEACHING
    )
    augment: words.Augment = setting(
        "auto", "changes to the training images (auto: chosen by the length)", panel=TEACHING
    )
    precision: words.TrainingPrecision = setting("fp32", "of matrix products", panel=TEACHING)
    patience: int = setting(
        3, "stop when the held-out divergence has risen N times in a row", panel=LENGTH,
        metavar="N", ge=1,
    )  # fmt: skip
    unlabelled: str | None = setting(
        None, "folder:PATH of more images; they need no labels", panel=IMAGES, metavar="SOURCE"
    )


class EvaluateSection(Section):
    """How the pruned network is measured."""

    latency: bool = setting(True, "time dense and pruned in turn", panel=MEASURE)
    batches: list[Count] = setting(
        [1, 16], "batch sizes that are timed", panel=MEASURE, metavar="N,N"
    )
    thumbnails: bool = setting(
        True, "keep small pictures of some images in the result, for its report", panel=MEASURE
    )


class EditSection(Section):
    """The paper's experiments: neurons scaled at some tokens, nothing removed for real.

    Lists are all combined with each other. None: the run's own method, its K, all blocks.
    """

    edit: words.Edit = setting(
        "remove", "what happens to the neurons; CHECKPOINT is then a run folder", panel=EDIT
    )
    factor: float = setting(2.0, "enhance: times X", panel=EDIT, metavar="X")
    paths: list[words.EditPaths] = setting(
        ["image"], "whose neurons (union: of all classes)", panel=EDIT, metavar="LIST"
    )
    methods: list[words.Method] | None = setting(
        None, "of discover, or `all`", panel=EDIT, metavar="LIST", shown="the run's own"
    )
    topk: list[Count] | None = setting(
        None, "neurons per block", panel=EDIT, metavar="K,K", shown="the run's"
    )
    fraction: list[Share] = setting(
        [1.0], "keep: share of the other neurons that is removed", panel=EDIT, metavar="P,P"
    )
    depth: list[Count] | None = setting(
        None, "only the first D blocks", panel=EDIT, metavar="D,D", shown="all"
    )
    scope: list[words.ScopeOrAuto] = setting(
        ["auto"], "tokens at which neurons are edited", panel=EDIT, metavar="LIST"
    )
    seeds: int = setting(1, "keep: draws of each share below 1", panel=EDIT, metavar="N", ge=1)
    others: bool = setting(
        False, "paths class: what the other classes lose by it, as well", panel=EDIT
    )


class ExploreSection(Section):
    """How much the explorer shows of a run."""

    methods: list[words.Method] | None = setting(
        None,
        "beside the run's own, paths of these; found now where they are not there yet",
        panel=EXPLORER,
        metavar="LIST",
        shown="those that are there",
    )
    images_per_class: int | None = setting(
        None, "pictures of at most N images of each class", panel=EXPLORER, metavar="N",
        shown="all", ge=1,
    )  # fmt: skip
    neurons: int = setting(
        256,
        "pages for at most N neurons of each block, those of the most paths",
        panel=EXPLORER,
        metavar="N",
        ge=1,
    )
    ablate: int = setting(
        100,
        "images whose path neurons are removed one at a time, shared by the classes",
        panel=EXPLORER,
        metavar="N",
        ge=0,
    )


class ExportSection(Section):
    """How it is shipped."""

    format: words.Format = setting(
        "onnx",
        "torch is a torch.export archive; timm and transformers are folders that these load",
        panel=FILE,
    )
    opset: int = setting(20, "ONNX operator set, 17 to 23", panel=FILE, metavar="N", ge=17, le=23)
    precision: words.FilePrecision = setting("fp32", "of the weights", panel=FILE)
    batch: Annotated[words.Dynamic | Count, Rule("`dynamic` or a whole number of at least 1")] = (
        setting("dynamic", "images per run; dynamic: any number", panel=FILE, metavar="dynamic|N")
    )
    with_preprocessing: bool = setting(
        False, "the file takes pixels (uint8, NHWC) and normalises them itself", panel=FILE
    )
    last_for_read: bool = setting(
        False,
        "the last block computes only the tokens that the classifier reads: the same logits, "
        "fewer MACs",
        panel=FILE,
    )
    max_drop: float | None = setting(
        None,
        "exit with 1 where top-1 falls by more",
        panel=FILE,
        metavar="POINTS",
        shown="1.0 for int8, 0.5 for fp16",
        ge=0,
        le=100,
    )
    features: words.FeatureOutput | None = setting(
        None,
        "what a network without a classifier gives: the pooled vector [b, d], the class token, or "
        "the patches as a map [b, d, h, w]",
        panel=FILE,
        shown="pooled",
    )
    latency: bool = setting(True, "time it against the dense network", panel=FILE)


class Recipe(Section):
    """The whole line: discover -> plan -> prune (-> heal) -> evaluate -> export -> report."""

    name: str = setting(..., "name of the run folder and of the checkpoint folder")
    model: ModelSection
    data: DataSection = Field(default_factory=DataSection)
    discover: DiscoverSection | None = Field(default_factory=DiscoverSection)
    prune: PruneSection | None = Field(default_factory=PruneSection)  # None: paths only
    heal: HealSection | None = None
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection | None = Field(default_factory=ExportSection)
    device: Annotated[
        str, Rule(f"one of {', '.join(f'`{device}`' for device in words.DEVICES)}")
    ] = setting(
        "auto",
        "where to compute; a device that is named must exist",
        panel=RUN,
        hint="`npprune env` shows the devices of this machine",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    )
    seed: int = setting(0, "seed of everything random", panel=RUN, metavar="N", ge=0, le=2**32 - 1)
