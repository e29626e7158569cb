"""What is written to disk: dataclasses to and from JSON, versioned, without torch or files.

Every document carries `schema_version`. A newer version than this program knows is refused, an
unknown field too: a result is read years later by code that must not guess. As text it ends with
the checksum of all the rest; one without, of an older version or made by hand, is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from itertools import pairwise
from operator import index
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from npprune.details import CheckpointDetails, ExportDetails, Line, PruneDetails
from npprune.errors import DamagedError, StoreError, plural
from npprune.untrusted import parse_json

SCHEMA_VERSION = 1
CHECKSUM = "checksum"  # of a document as text
_AGAIN = "take a copy of it, or make it again by the command that wrote it"

R = TypeVar("R")


_adapters: dict[type, TypeAdapter[Any]] = {}  # building one takes milliseconds


def _adapter(cls: type) -> TypeAdapter[Any]:
    if cls not in _adapters:
        kept = with_config(ConfigDict(extra="forbid"))(cls) if is_dataclass(cls) else cls
        _adapters[cls] = TypeAdapter(kept)
    return _adapters[cls]


def to_json(record: Any, *, indent: int | None = 2) -> str:
    """A record as JSON text, keys in declaration order, ending in a newline."""
    data = to_dict(record)
    try:
        if isinstance(record, Document):
            data[CHECKSUM] = digest(data)
        return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as err:  # NaN or infinity
        raise StoreError(
            f"`{_not_finite(data) or type(record).__name__}` is NaN or infinite, which JSON cannot "
            "hold",
            hint="the network gives no finite numbers on these images: check weights and images",
        ) from err


def _not_finite(data: Any, at: str = "") -> str | None:
    """Where the first number is that is not finite; None: nowhere."""
    if isinstance(data, float):
        return None if math.isfinite(data) else at
    if isinstance(data, dict | list | tuple):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            if (found := _not_finite(value, f"{at}.{key}".lstrip("."))) is not None:
                return found
    return None


def to_dict(record: Any) -> dict[str, Any]:
    """A record as JSON-ready dicts and lists; a document gets its `schema_version` first."""
    data: dict[str, Any] = _adapter(type(record)).dump_python(record, mode="json")
    if isinstance(record, Document):
        data = {"schema_version": SCHEMA_VERSION, "kind": record.kind, **data}
    return data


def json_schema(cls: type, kind: str) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a record as a document of this kind, in a file or on stdout."""
    schema = headed(_adapter(cls).json_schema(mode="serialization"), kind)
    if issubclass(cls, Document):
        said = "sha256 of the canonical JSON of the rest"
        schema["properties"][CHECKSUM] = {"type": "string", "description": said}
    return schema


def headed(schema: dict[str, Any], kind: str) -> dict[str, Any]:
    """The schema of an object with `schema_version` and `kind` before the rest."""
    head = {
        "schema_version": {"type": "integer", "minimum": 1, "maximum": SCHEMA_VERSION},
        "kind": {"const": kind},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {**head, **schema["properties"]},
        "required": [*head, *schema.get("required", [])],
    }


def from_dict(cls: type[R], data: dict[str, Any], *, where: str = "") -> R:
    """A record from parsed JSON. StoreError names the field that is wrong, and `where`.

    Unless its checksum tells that it is as it was written, that is a DamagedError.
    """
    place = f" ({where})" if where else ""
    data = dict(data)
    sealed = False
    if issubclass(cls, Document):
        checksum = data.pop(CHECKSUM, None)
        if checksum is not None and checksum != digest(data):
            raise DamagedError(
                f"the file was changed or damaged since it was written: its `{CHECKSUM}` is of "
                f"other content{place}",
                hint=f"{_AGAIN}; if you changed it on purpose, remove the entry `{CHECKSUM}`",
            )
        sealed = checksum is not None
        version = data.pop("schema_version", None)
        kind = data.pop("kind", None)
        if kind != cls.kind:
            raise DamagedError(
                f"expected a {cls.kind} document, got kind {kind!r}{place}", hint=_AGAIN
            )
        if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
            newer = type(version) is int and version > SCHEMA_VERSION
            raise StoreError(
                f"`schema_version` must be 1..{SCHEMA_VERSION}, got {version!r}{place}",
                hint="a newer npprune wrote this file: upgrade npprune" if newer else None,
            )
    try:
        return _adapter(cls).validate_python(data)  # type: ignore[no-any-return]
    except ValidationError as err:
        first = err.errors()[0]
        path = ".".join(str(p) for p in first["loc"])
        said = f"`{path}`: {first['msg'].lower()}{place}"
        raise (StoreError(said) if sealed else DamagedError(said, hint=_AGAIN)) from err
    except StoreError as err:  # what a record itself demands
        raise StoreError(f"{err.message}{place}", hint=err.hint) from err


def from_json(cls: type[R], text: str, *, where: str = "") -> R:
    """As `from_dict`, from text."""
    try:
        data = parse_json(text)
    except ValueError as err:
        place = f" ({where})" if where else ""
        raise DamagedError(f"not valid JSON: {err}{place}", hint=_AGAIN) from err
    if not isinstance(data, dict):
        place = f" ({where})" if where else ""
        said = f"expected a JSON object, got {type(data).__name__}{place}"
        raise DamagedError(said)
    return from_dict(cls, data, where=where)


def plain_text(name: str) -> str:
    """A file's name as text that every file and terminal can hold.

    Bytes of it that are no UTF-8, which Python keeps as lone surrogates, are written `\\xff`.
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def digest(record: Any) -> str:
    """sha256 of a record's canonical JSON: equal settings have equal digests."""
    data = to_dict(record) if is_dataclass(record) else record
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def checked(given: object, shape: Any, name: str) -> None:
    """StoreError where a free-form part of a record has a known entry of another type."""
    try:
        _adapter(shape).validate_python(given, strict=True)
    except ValidationError as err:
        first = err.errors()[0]
        path = ".".join([name, *map(str, first["loc"])])
        raise StoreError(f"`{path}`: {first['msg'].lower()}") from err


@dataclass
class Document:
    """A record that is a file of its own."""

    kind: ClassVar[str] = ""


# ---------------------------------------------------------------- model and data


@dataclass
class Preprocessing:
    """How an image file becomes the model's input. Travels with the weights."""

    input_size: tuple[int, int, int] = (3, 224, 224)  # channels, height, width
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: str = "bicubic"
    crop_pct: float = 0.9  # the crop's side over the resized image's
    crop_mode: str = "center"  # center | squash (resize straight, no crop) | border


@dataclass
class ClassInfo:
    """One output of the classifier."""

    index: int
    name: str
    synset: str | None = None


@dataclass
class ModelSource:
    """Where weights came from, enough to load them again."""

    architecture: str  # timm name
    model_args: dict[str, Any] = field(default_factory=dict)  # for timm.create_model
    checkpoint: str | None = None  # file as given; None: timm's hub weights
    sha256: str = ""  # of the weights as loaded, see models.weights_sha256; or UNKNOWN_WEIGHTS


UNKNOWN_WEIGHTS = "unknown"  # of imported paths: equal to no network's hash


@dataclass
class ModelInfo:
    """What a network is and what it costs. MACs: multiply-accumulates of one image."""

    source: ModelSource
    params: int
    macs: int
    widths: list[int]  # hidden units per block
    heads: list[int]  # attention heads per block
    embed_dim: int
    num_classes: int
    scope: str  # tokens that the classifier pools: cls | patch | all
    preprocessing: Preprocessing
    query_dims: list[int] | None = None  # of a head, per block; None: as many as values
    merged: list[int] | None = None  # tokens merged in each block; None: in none
    last_for_read: bool = False  # the last block computes only what the classifier reads
    cls_widths: list[int] | None = None
    """Hidden units of the class token's own, per block; 0 and None: all tokens share."""


@dataclass
class DataInfo:
    """What was read from a data source, and how its labels were found."""

    spec: str
    label_rule: str  # e.g. "ImageNet synset folders", "class map FILE", "folder rank"
    images: int
    classes: int
    skipped: list[str] = field(default_factory=list)  # unreadable images, by path
    sha256: str = ""  # of the ordered (id, label) list


# ---------------------------------------------------------------- numbers


@dataclass
class Rate:
    """A proportion with its 95 % Wilson interval; all of value, low, high in [0, 1]."""

    correct: int
    total: int
    value: float
    low: float
    high: float


@dataclass
class Mean:
    """A mean with its standard error and 95 % interval."""

    value: float
    standard_error: float
    low: float
    high: float
    n: int


@dataclass
class Accuracy:
    """What one network did on one set of images."""

    top1: Rate
    top5: Rate
    true_probability: Mean  # mean softmax probability of the true class


@dataclass
class ClassRow:
    """Dense and pruned on the images of one class."""

    label: int
    name: str
    images: int
    dense_top1: float
    pruned_top1: float
    deviation: float  # mean relative change of the true class's probability
    path_kept: float | None = None  # share of its paths' neurons that stay; None: no paths


@dataclass
class Latency:
    """Milliseconds per batch, dense and pruned, timed in turn in one run after a warm-up."""

    runtime: str  # a word of `words.RUNTIMES`
    provider: str  # what ran, e.g. "CPUExecutionProvider"
    batch: int
    threads: int
    runs: int
    dense_ms: float  # median
    pruned_ms: float
    dense_iqr_ms: float
    pruned_iqr_ms: float
    ratio: float  # pruned over dense, median of paired ratios
    ratio_low: float  # quartiles of the paired ratios
    ratio_high: float
    precision: str = ""  # of both; empty: float32


# ---------------------------------------------------------------- stages


@dataclass
class DiscoverySummary:
    """How the paths of a run were found."""

    method: str
    scope: str
    quadrature: str
    points: int
    topk: int
    accumulation: str
    data: DataInfo
    images: int
    classes: int
    seconds: float
    mean_score: Mean | None
    frequency: list[list[tuple[int, float]]] = field(default_factory=list)
    """Per block: (neuron, share of the images whose path holds it), most frequent first."""
    class_paths: dict[int, list[list[int]]] = field(default_factory=dict)
    """Per class: its most frequent neuron per block, then the next ones (blocks x topk)."""
    timing: dict[str, float] = field(default_factory=dict)
    """Of the last start that computed paths: its `images`, `seconds` and `processes`, and the
    seconds of all processes in `reading`, `search` and `writing`."""
    precision: str = "fp32"
    """Of the network's products: fp32, tf32 or bf16."""
    first_points: int | None = None
    """Points of the integral in block 0; None: as many as in the others."""
    shards: int | None = None
    """That the paths lie in; None: not recorded."""


def _whole(name: str, values: Any) -> list[int]:
    """A list of whole numbers, from one of any integer type or an array."""
    try:
        return [index(value) for value in values]
    except TypeError as err:
        raise StoreError(f"`{name}` must be a list of whole numbers, got {values!r}") from err


def _check_kept(name: str, kept: Sequence[int], width: int) -> None:
    if any(b <= a for a, b in pairwise(kept)):
        raise StoreError(f"`{name}` must be ascending without repeats")
    if kept and (kept[0] < 0 or kept[-1] >= width):
        bad = kept[0] if kept[0] < 0 else kept[-1]
        raise StoreError(f"`{name}` must lie in 0..{width - 1}, got {bad}")


@dataclass
class Plan(Document):
    """The neurons that stay. Can be read, edited and applied."""

    kind: ClassVar[str] = "plan"

    keep: list[list[int]]  # per block, ascending indices into the dense hidden layer
    widths: list[int]  # dense hidden units per block
    source_sha256: str = ""  # of the dense weights; empty: applies to any model of these widths
    architecture: str = ""
    how: dict[str, Any] = field(default_factory=dict)  # criterion, budget, topk, seed, ...
    heads: list[list[int]] | None = None  # kept attention heads per block; None: all
    classes: list[int] | None = None  # outputs the head is cut to; None: all
    notes: list[str] = field(default_factory=list)
    query_dims: list[int] | None = None  # query/key dimensions of a head, per block; None: all
    merged: list[int] | None = None  # tokens merged in each block; None: in none
    last_for_read: bool = False  # the last block computes only what the classifier reads
    head_dims: list[int] | None = None  # of a head's queries, keys and values alike; None: all
    cls_keep: list[list[int]] | None = None
    """Per block, hidden units of the tokens that the classifier reads (the class token), beside
    those of the others in `keep`; empty: all tokens share those; None: in every block."""

    def __post_init__(self) -> None:
        self.keep = [_whole(f"keep[{l}]", kept) for l, kept in enumerate(self.keep)]
        self.widths = _whole("widths", self.widths)
        if self.heads is not None:
            self.heads = [_whole(f"heads[{l}]", kept) for l, kept in enumerate(self.heads)]
        for name in ("classes", "query_dims", "head_dims"):
            if getattr(self, name) is not None:
                setattr(self, name, _whole(name, getattr(self, name)))
        if self.cls_keep is not None:
            self.cls_keep = [_whole(f"cls_keep[{l}]", k) for l, k in enumerate(self.cls_keep)]
            if len(self.cls_keep) != len(self.widths):
                raise StoreError(
                    f"`cls_keep` must have one list a block ({len(self.widths)}), "
                    f"got {len(self.cls_keep)}"
                )
        if len(self.keep) != len(self.widths):
            raise StoreError(
                f"a plan keeps neurons in every block: {plural(len(self.widths), 'block')}, "
                f"got {len(self.keep)} lists"
            )
        for block, (kept, width) in enumerate(zip(self.keep, self.widths, strict=True)):
            if not kept:
                raise StoreError(f"`keep[{block}]` must name at least one neuron, got none")
            _check_kept(f"keep[{block}]", kept, width)
            _check_kept(f"cls_keep[{block}]", self.own(block), width)
        if self.merged is not None:
            if len(self.merged) != len(self.widths):
                raise StoreError(
                    f"`merged` must have one entry a block ({len(self.widths)}), "
                    f"got {len(self.merged)}"
                )
            if min(self.merged) < 0:
                raise StoreError(f"`merged` must not be negative, got {min(self.merged)}")

    @property
    def kept_widths(self) -> list[int]:
        """Hidden units per block after pruning."""
        return [len(kept) for kept in self.keep]

    def own(self, block: int) -> list[int]:
        """The hidden units of a block that the tokens which the classifier reads have to
        themselves; empty: all tokens share those of `keep`."""
        return self.cls_keep[block] if self.cls_keep is not None else []

    @property
    def kept_fraction(self) -> float:
        """Share of all hidden units that stay."""
        return sum(self.kept_widths) / sum(self.widths)


@dataclass
class PruneSummary:
    """How a network was made smaller."""

    criterion: str
    selection: str
    compensation: str
    keep: float | None
    topk: int | None
    round_to: int
    widths: list[int]
    dense_widths: list[int]
    protected: list[int]  # path neurons kept per block
    calibration: DataInfo | None
    seconds: float
    plan_sha256: str
    warnings: list[str] = field(default_factory=list)
    predicted: dict[str, float] = field(default_factory=dict)  # on held-out calibration images
    details: dict[str, Any] = field(default_factory=dict)  # shrinkage, condition numbers, harm
    label_doubt: str = ""  # why the calibration images' labels are probably wrong

    def __post_init__(self) -> None:
        checked(self.details, PruneDetails, "details")


@dataclass
class HealPoint:
    """One measurement on the held-out images while healing."""

    step: int
    seconds: float
    divergence_nats: float  # mean KL(dense || healed) of the predictions; see HealSummary.unit
    agreement: float  # share with the dense network's top-1; of features, their mean cosine
    loss: float | None = None  # mean since the last measurement; None: before training
    top1: float | None = None  # None: no labels


@dataclass
class HealSummary:
    """How a pruned network was trained from the dense one, and what it brought."""

    source: str  # the checkpoint that was healed, by name
    method: str  # distillation | layer-wise
    teacher_sha256: str
    settings: dict[str, Any]
    data: DataInfo
    unlabelled: DataInfo | None
    images: int  # trained on
    held_out: int  # measured on, never trained on
    augmentation: str
    steps: int
    epochs: float
    processes: int
    before: HealPoint
    after: HealPoint
    dense_top1: float | None  # on the held-out images; None: no labels
    stopped: str  # why training ended
    seconds: float  # everything: reading images, the teacher, training
    images_per_second: float  # while training
    curve: list[HealPoint] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unit: str = "nats"  # of the divergence; "relative error" of features without a classifier


@dataclass
class MergedImage:
    """An image, and which token holds each of its patches after some of the blocks."""

    name: str  # of its class
    png: str  # base64; as the network sees it
    grid: list[int]  # rows and columns of patches
    blocks: list[int]
    tokens: list[list[int]]  # for each of these blocks, a number for each patch


@dataclass
class Outcomes:
    """Which images each network gets right: a bit for each image in the order read, the first one
    highest, as base64."""

    images: int
    sha256: str  # of the ids and labels of the images that were read
    dense: str
    pruned: str


@dataclass
class FlippedImage:
    """An image that one of two networks gets right and the other wrong."""

    name: str  # of its class
    picture: str  # base64 of a WebP, JPEG or PNG file; as the network sees it
    lost: bool  # right before, wrong now; False: the other way round
    dense: str  # predicted class
    dense_probability: float  # of that class
    pruned: str
    pruned_probability: float


@dataclass
class ConfidenceBin:
    """Images whose predicted class has a probability in one of the bins."""

    confidence: float  # mean probability of the predicted class
    accuracy: Rate  # top-1


@dataclass
class Reliability:
    """How sure a network is, against how often it is right."""

    error: float  # expected calibration error: mean over images of |confidence - accuracy| of bins
    bins: list[ConfidenceBin]  # of equal width, those that have images, ascending


@dataclass
class Histogram:
    """How many values lie from each edge to the next; the last count: at or above the last edge."""

    edges: list[float]
    counts: list[int]


@dataclass
class Evaluation:
    """Dense and pruned on the same images in one run."""

    data: DataInfo
    preprocessing: Preprocessing
    device: str  # that both ran on
    dense: Accuracy  # choosing among the classes that the pruned network has
    pruned: Accuracy
    probability_deviation: Mean  # per image: (p_pruned - p_dense) / p_dense, of the true class
    deviation_by_class: Mean  # the same, averaged per class first, as the paper does
    accuracy_deviation: float  # (top1_pruned - top1_dense) / top1_dense
    top1_change: Mean  # paired, pruned minus dense, in [-1, 1]
    agreement: Rate  # same top-1 prediction as dense
    classes: list[ClassRow]  # those that have images, by label
    latency: list[Latency] = field(default_factory=list)  # at each batch size, where timed
    dense_all: Accuracy | None = None  # choosing among all, where the pruned network has fewer
    restricted_to: list[int] | None = None  # chosen classes; then the next two are set
    dense_restricted: Accuracy | None = None  # predictions limited to the chosen classes
    pruned_restricted: Accuracy | None = None
    dense_model: ModelInfo | None = None
    pruned_model: ModelInfo | None = None
    seconds: float = 0.0  # without timing
    label_doubt: str = ""  # why the labels are probably wrong; empty: no reason
    spared: Mean | None = None  # rank correlation, over classes, of path kept and deviation
    merged: list[MergedImage] = field(default_factory=list)  # where the pruned network merges
    outcomes: Outcomes | None = None  # right or wrong, image by image
    flipped: list[FlippedImage] = field(default_factory=list)  # some, spread over the images
    dense_reliability: Reliability | None = None  # how far its probabilities hold
    pruned_reliability: Reliability | None = None
    deviations: Histogram | None = None  # probability deviation per image


@dataclass
class FeatureAgreement:
    """A pruned network's features beside the dense one's, per image.

    The pooled vector: the class token, or what the network pools its tokens to. Relative error:
    |dense - pruned|^2 / |dense|^2. Of patch tokens, the mean over an image's.
    """

    cosine: Mean
    relative_error: Mean
    patch_cosine: Mean | None = None
    patch_relative_error: Mean | None = None


@dataclass
class Probe:
    """A simple classifier on the pooled features, each image judged without itself."""

    name: str  # k-NN | ridge probe
    dense: Rate
    pruned: Rate
    change: Mean  # paired, pruned minus dense, in [-1, 1]


@dataclass
class FeatureEvaluation:
    """Dense and pruned on the same images in one run, where there is no classifier."""

    data: DataInfo
    preprocessing: Preprocessing
    device: str
    agreement: FeatureAgreement
    probes: list[Probe] = field(default_factory=list)  # empty without labels
    latency: list[Latency] = field(default_factory=list)
    dense_model: ModelInfo | None = None
    pruned_model: ModelInfo | None = None
    seconds: float = 0.0
    merged: list[MergedImage] = field(default_factory=list)  # where the pruned network merges


@dataclass
class ParityRow:
    """A runtime against PyTorch at one batch size."""

    batch: int
    images: int
    max_relative_error: float  # max |its - torch's| / max |torch's| over all logits or features
    top1_agreement: float  # same top-1; of features: nearest to torch's of the same image
    cosine: float | None = None  # of features, the least of all images


@dataclass
class ExportRecord(Document):
    """An exported file and how well it agrees with the network it came from."""

    kind: ClassVar[str] = "export"

    file: str  # file name
    format: str  # onnx | torch | timm
    precision: str  # fp32 | fp16 | int8
    opset: int
    bytes: int
    sha256: str
    provider: str
    parity: list[ParityRow]
    tolerance: float
    passed: bool
    dense_bytes: int | None = None
    latency: list[Latency] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # of every file that belongs to it

    def __post_init__(self) -> None:
        checked(self.details, ExportDetails, "details")


@dataclass
class BenchmarkRow:
    """One timing, with what follows from it. Memory in bytes; None: not measured."""

    latency: Latency
    dense_images_per_second: float
    pruned_images_per_second: float
    dense_memory: int | None = None
    pruned_memory: int | None = None
    warning: str | None = None  # too noisy to tell
    repeat_off: float | None = None  # largest relative change of a time or the ratio when repeated
    noisy: bool = False  # `repeat_off` is above 5 %
    fixed_share: float | None = None  # of the dense time: what another batch size does not change
    launch_bound: bool = False  # `fixed_share` is above a half
    dense_start_ms: float | None = None  # from opening to the first logits, in this process
    pruned_start_ms: float | None = None
    dense_agreement: ParityRow | None = None  # with PyTorch in float32 on the CPU
    pruned_agreement: ParityRow | None = None

    @property
    def marks(self) -> str:
        """`noisy, launch-bound`; empty where there is nothing to say."""
        said = [("noisy", self.noisy), ("launch-bound", self.launch_bound)]
        return ", ".join(word for word, so in said if so)


@dataclass
class Benchmark(Document):
    """Two networks timed side by side."""

    kind: ClassVar[str] = "benchmark"

    dense: str
    pruned: str
    created: str
    environment: Environment
    rows: list[BenchmarkRow]
    macs_ratio: float | None = None  # pruned over dense; None: not known
    absent: dict[str, str] = field(default_factory=dict)  # asked for and not here -> why
    images: str | None = None  # that they ran on; None: noise
    int8: list[str] = field(default_factory=list)  # the kinds of int8 files, dense and pruned

    @property
    def saved(self) -> float | None:
        """`macs_ratio` where there are fewer MACs: what a ratio of times can be a share of."""
        return self.macs_ratio if self.macs_ratio and self.macs_ratio < 1 else None


@dataclass
class CheckpointConfig(Document):
    """`config.json` beside `model.safetensors`: all that rebuilding the network needs."""

    kind: ClassVar[str] = "checkpoint"

    source: ModelSource  # the dense network
    widths: list[int]
    heads: list[int]
    num_classes: int
    preprocessing: Preprocessing
    classes: list[ClassInfo]
    weights_sha256: str
    plan_sha256: str = ""
    run: str | None = None  # the run folder, relative to this one
    prune: PruneSummary | None = None
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    merged: list[int] | None = None  # tokens merged in each block; None: in none
    last_for_read: bool = False  # the last block computes only what the classifier reads

    def __post_init__(self) -> None:
        checked(self.details, CheckpointDetails, "details")
        checked(self.run, Line, "run")
        outputs = self.details.get("outputs")
        if outputs is None:
            return
        if len(outputs) != self.num_classes:
            raise StoreError(
                f"`details.outputs` must name {plural(self.num_classes, 'output')}, got "
                f"{len(outputs)}"
            )
        if any(not 0 <= c.index < len(outputs) for c in self.classes):
            raise StoreError(f"`classes` must be outputs, 0..{len(outputs) - 1}")


@dataclass
class Variant:
    """One pruned network of a run: how it was made, and what was measured of it."""

    name: str
    checkpoint: str  # folder, relative to the run's
    model: ModelInfo
    prune: PruneSummary
    evaluation: Evaluation | None = None
    export: ExportRecord | None = None  # the latest
    more_exports: list[ExportRecord] = field(default_factory=list)  # other files, latest first
    heal: HealSummary | None = None  # where it was trained after pruning
    features: FeatureEvaluation | None = None  # in place of `evaluation`, without a classifier

    @property
    def measured(self) -> Evaluation | FeatureEvaluation | None:
        """What was measured beside the dense network: predictions, or features."""
        return self.features if self.evaluation is None else self.evaluation


@dataclass
class Environment:
    """What the numbers were made with."""

    versions: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    device_reason: str = ""
    threads: int = 0
    platform: str = ""
    seed: int = 0


@dataclass
class Manifest(Document):
    """Written first into a run folder; another configuration never reuses the folder."""

    kind: ClassVar[str] = "manifest"

    name: str
    created: str
    environment: Environment
    model: ModelInfo
    data: DataInfo
    settings: dict[str, Any]  # what decides the bits of the paths
    settings_sha256: str
    inputs: dict[str, str] = field(default_factory=dict)  # file -> sha256
    said: dict[str, str] = field(default_factory=dict)  # setting -> in words what its hash is of
    shards: int | None = None  # that the paths will lie in; None: known in the end, of a stream
    content: dict[str, str] = field(default_factory=dict)  # set of images -> sha256 of their files
    command: str = ""  # that began it, and finishes it


@dataclass
class Series:
    """One group of points, bars, or boxes of a figure. `x` None: the figure's `x_names`."""

    name: str
    y: list[float | None]
    x: list[float] | None = None
    low: list[float | None] | None = None  # ends of the intervals of y
    high: list[float | None] | None = None
    labels: list[str] | None = None  # of single points
    boxes: list[list[float]] | None = None  # kind "box": 5, 25, 50, 75, 95 % quantiles each


@dataclass
class FigureData:
    """What a figure shows, not how: the report draws it."""

    kind: Literal["scatter", "lines", "bars", "box", "heatmap", "strips"]
    series: list[Series] = field(default_factory=list)
    x_label: str = ""
    y_label: str = ""
    x_names: list[str] | None = None  # categories; the columns of a heatmap
    y_names: list[str] | None = None  # the rows of a heatmap
    matrix: list[list[float | None]] | None = None  # heatmap, rows x columns; strips, widths
    cells: list[list[str]] | None = None  # strips: the segments' names
    reference: dict[str, float] = field(default_factory=dict)  # horizontal lines by name
    front: bool = False  # scatter: join the points no other beats (smaller x, larger y)
    log_x: bool = False


@dataclass
class Analysis:
    """A section of the report beside the standard ones: a table, and a figure if there is one."""

    title: str
    text: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str | int | float | None]] = field(default_factory=list)
    figure: FigureData | None = None


@dataclass
class Result(Document):
    """Everything a report shows. Reports are pure functions of this."""

    kind: ClassVar[str] = "result"

    name: str
    created: str
    environment: Environment
    model: ModelInfo
    classes: list[ClassInfo]
    discovery: DiscoverySummary | None = None
    variants: list[Variant] = field(default_factory=list)
    analyses: dict[str, Analysis] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)  # that made it, in order

    def variant(self, name: str) -> Variant | None:
        """The variant of this name, or None."""
        return next((v for v in self.variants if v.name == name), None)
