"""The sections of a recipe: their fields, defaults and bounds."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import PydanticCustomError

from npprune import words
from npprune.criteria import CRITERIA

BUDGETS = ("keep", "target_params", "target_macs", "target_latency")
"""Fields of the prune section of which one says how much stays."""
IMG_SIZE = "one side or height x width in pixels, such as `224` or `192x256`"


def _criterion(name: str) -> str:
    """One of the criteria registered now, refused as a word of a Literal would be."""
    if name not in CRITERIA:
        raise PydanticCustomError(
            "literal_error", "unknown", {"expected": ", ".join(f"'{c}'" for c in CRITERIA)}
        )
    return name


CriterionName = Annotated[str, AfterValidator(_criterion)]


class Section(BaseModel):
    """Base of the sections: unknown keys and numbers that are not finite are refused, values are
    checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """`topk: true` would become 1 otherwise."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise PydanticCustomError("not_bool", "must not be true or false")
        return value


Pixels = Annotated[int, Field(ge=1)]


class ModelSection(Section):
    """Which network. `auto` as the name builds the architecture from the checkpoint."""

    name: str
    checkpoint: str | None = None
    num_classes: int | None = Field(None, ge=1)
    img_size: Pixels | list[Pixels] | None = None  # one side, or height and width; `HxW` as text
    num_heads: int | None = Field(None, ge=1)
    released_head: bool = False  # MAE as the paper's released program runs it: normalised twice

    @field_validator("img_size", mode="wrap")
    @classmethod
    def _sides(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """`224`, `"192x256"`, `"192,256"` or `[192, 256]`."""
        if isinstance(value, str) and re.fullmatch(r"\d+([x,]\d+)?", value):
            sides = [int(side) for side in re.split("[x,]", value)]
            value = sides if len(sides) == 2 else sides[0]
        try:
            value = check(value)
        except ValidationError:
            value = []
        if isinstance(value, list) and len(value) != 2:
            raise PydanticCustomError("img_size", "must be " + IMG_SIZE)
        return value


class DataSection(Section):
    """Which images. Sources: `folder:PATH`, `digits`, or timm's `tfds/`, `hfds/`, `wds/`."""

    train: str | None = None
    calibration: str | None = None
    val: str | None = None
    class_map: str | None = None
    classes: list[str | int] | str | None = None  # indices, synsets, names, or a file
    images_per_class: int | None = Field(None, ge=1)
    on_bad_image: Literal["error", "skip"] | None = None  # None: each stage's own default
    batch_size: int = Field(32, ge=1)
    workers: int = Field(0, ge=0)
    # released: as the paper's program, resized straight and normalised as ImageNet
    preprocessing: Literal["model", "released"] = "model"
    # what differs from it; None takes it as it is
    mean: list[float] | None = None
    std: list[Annotated[float, Field(gt=0)]] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] | None = None
    crop_pct: float | None = Field(None, gt=0, le=1)
    crop_mode: Literal["center", "squash", "border"] | None = None


class DiscoverSection(Section):
    """How paths are found. `quadrature` auto, `points` None: see `core.quadrature`."""

    topk: int = Field(1, ge=1)
    method: words.Method = "neuron-path"
    scope: words.ScopeOrAuto = "auto"
    quadrature: words.RuleOrAuto = "auto"
    points: int | None = Field(None, ge=1, le=256)
    accumulation: words.Accumulation = "sum"
    batch_size: int = Field(16, ge=1)  # images; points x images run as one batch
    shard_size: int = Field(256, ge=1)  # images per shard
    memory: float | None = Field(None, gt=0)  # GiB; None: as much as there is
    precision: words.SearchPrecision = "fp32"  # of the network's products
    compile: bool = False  # blocks through torch.compile


class PruneSection(Section):
    """What stays. A budget is one of keep, target_params, target_macs, target_latency.

    `axes` beside `mlp` need measured selection, and one of target_params, target_macs, max_drop.
    """

    axes: list[words.Axis] = Field(["mlp"], min_length=1)
    topk: int | None = Field(None, ge=1)
    keep: float | None = Field(None, gt=0, le=1)
    target_params: float | None = Field(None, gt=0)  # <= 1: share of dense; else a count
    target_macs: float | None = Field(None, gt=0)
    target_latency: float | None = Field(None, gt=0)  # <= 1: share of dense; else milliseconds
    latency_batch: int = Field(1, ge=1)  # images at once while timing
    latency_threads: int | None = Field(None, ge=1)  # None: as many as PyTorch uses
    criterion: CriterionName = "curvature-obs"
    selection: words.Selection = "measured"
    compensation: words.Compensation = "sequential"
    shrinkage: float | None = Field(None, gt=0)  # of the refit; None: chosen on held-out images
    protect_paths: bool = True
    round_to: int = Field(16, ge=1)
    min_keep: int = Field(16, ge=1)
    calibration_images: int | None = Field(None, ge=1)
    keep_head: bool = False  # with classes: all outputs stay
    max_drop: float | None = Field(None, gt=0, le=100)  # points of top-1, predicted
    memory: float | None = Field(None, gt=0)  # GiB for statistics; None: half of the memory


class StudySection(Section):
    """What is compared: every combination of the lists.

    `protect` on or off: with or without the path neurons kept first; None: both, where there is
    a run with paths.
    """

    criteria: list[CriterionName] | None = Field(None, min_length=1)  # None: all
    compensations: list[words.Compensation] = Field(["least-squares"], min_length=1)
    selections: list[words.Selection] = Field(["uniform"], min_length=1)
    keep: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.5], min_length=1)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([0], min_length=1)
    protect: list[Literal["on", "off"]] | None = Field(None, min_length=1)
    topk: int | None = Field(None, ge=1)
    round_to: int = Field(16, ge=1)
    min_keep: int = Field(16, ge=1)
    calibration_images: int | None = Field(None, ge=1)
    heal: int | None = Field(None, ge=1)  # epochs that every row is trained for, as well
    latency: bool = False  # in ONNX Runtime, beside the dense network
    latency_batch: int = Field(1, ge=1)
    latency_threads: int | None = Field(None, ge=1)


class HealSection(Section):
    """A short distillation from the dense network. One of epochs and minutes says how long."""

    epochs: int | None = Field(None, ge=1)
    minutes: float | None = Field(None, gt=0)
    lr: float = Field(5e-5, gt=0)
    batch_size: int = Field(16, ge=1)  # images per step, over all processes
    weight_decay: float = Field(0.01, ge=0)
    temperature: float = Field(1.0, gt=0)
    feature_weight: float | None = Field(None, ge=0)  # of the streams; None: see pipeline/teacher
    label_weight: float = Field(0.0, ge=0)  # of the cross-entropy with the labels
    layerwise: bool = False  # each block's MLP on its own
    augment: Literal["auto", "mixed", "flips", "strong", "none"] = "auto"  # auto: by the length
    precision: words.TrainingPrecision = "fp32"
    patience: int = Field(3, ge=1)  # measurements in a row that may rise
    unlabelled: str | None = None  # more images to train on; their labels are not read


class EvaluateSection(Section):
    """How the pruned network is measured."""

    latency: bool = True
    batches: list[Annotated[int, Field(ge=1)]] = Field([1, 16])


class EditSection(Section):
    """The paper's experiments: neurons scaled at some tokens, nothing removed for real.

    Lists are all combined with each other. None: the run's own method, its K, all blocks.
    """

    edit: Literal["remove", "enhance", "keep"] = "remove"
    factor: float = 2.0  # of enhance
    paths: list[Literal["image", "class", "predicted", "union"]] = Field(["image"])
    methods: list[words.Method] | None = None
    topk: list[Annotated[int, Field(ge=1)]] | None = None
    fraction: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0])
    depth: list[Annotated[int, Field(ge=1)]] | None = None
    scope: list[words.ScopeOrAuto] = Field(["auto"])
    seeds: int = Field(1, ge=1)  # draws of a fraction below 1


class ExportSection(Section):
    """How it is shipped."""

    format: words.Format = "onnx"
    opset: int = Field(20, ge=17, le=23)
    precision: words.FilePrecision = "fp32"
    batch: Literal["dynamic"] | Annotated[int, Field(ge=1)] = "dynamic"
    with_preprocessing: bool = False
    max_drop: float | None = Field(None, ge=0, le=100)  # points of top-1; None: 0.5 fp16, 1 int8
    latency: bool = True


class Recipe(Section):
    """The whole line: discover -> plan -> prune (-> heal) -> evaluate -> export -> report."""

    name: str  # also the name of the run's folders
    model: ModelSection
    data: DataSection = Field(default_factory=DataSection)
    discover: DiscoverSection | None = Field(default_factory=DiscoverSection)
    prune: PruneSection | None = Field(default_factory=PruneSection)  # None: paths only
    heal: HealSection | None = None
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    export: ExportSection | None = Field(default_factory=ExportSection)
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    seed: int = Field(0, ge=0, lt=2**32)
