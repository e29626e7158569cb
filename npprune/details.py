"""What is read of the free-form parts of records (`details`): the entries and their types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, NonNegativeInt
from typing_extensions import Required, TypedDict


def _line(value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or "\0" in value):
        raise ValueError("must be text without NUL")
    return value


Line = Annotated[Any, AfterValidator(_line)]
"""None, or text that can be a path: bytes of it that are no UTF-8 are lone surrogates."""


class Open(TypedDict, total=False):
    """Entries that are read, each of its type where it is there; others may be beside them."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class DenseReference(Open, total=False):
    """Where the dense network of a checkpoint is: arguments of a recipe's `model`, and paths."""

    name: Line
    checkpoint: Line
    name_relative: Line
    checkpoint_relative: Line


class RememberedData(Open, total=False):
    """Images that a checkpoint was made with: settings of a recipe's `data`."""

    calibration: Line
    class_map: Line


class Trained(Open, total=False):
    """How the demo's network was trained."""

    seed: int


class CheckpointDetails(Open, total=False):
    """What is read of `CheckpointConfig.details`."""

    dense: DenseReference
    data: RememberedData
    trained: Trained
    outputs: list[NonNegativeInt]
    classes: list[NonNegativeInt]
    cut: bool


class AttentionDetails(Open, total=False):
    """Heads and query/key dimensions of each block."""

    dense_heads: list[int]
    heads: list[int]
    dense_query_dims: list[int]
    query_dims: list[int]


class PathDetails(Open, total=False):
    """Neurons of paths, and the share of votes of those that stay."""

    of: Required[int]
    votes: Required[float]


class AxisDetails(Open, total=False):
    """What one axis took."""

    axis: Required[str]
    macs: Required[float]
    nats: Required[float]


class PruneDetails(Open, total=False):
    """What is read of `PruneSummary.details`."""

    attention: AttentionDetails
    paths: PathDetails
    axes: list[AxisDetails]
    harm_unit: str


class Candidate(Open, total=False):
    """A way of quantising that was tried."""

    name: Required[str]
    bytes: Required[int]
    score: Required[float]
    chosen: Required[bool]


class ExportDetails(Open, total=False):
    """What is read of `ExportRecord.details`."""

    candidates: list[Candidate]
    provider_asked: str
    features: str
    provider_reason: str
    torch_top1: float | None
    onnx_top1: float | None
    max_drop: float | None
