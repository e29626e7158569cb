"""The document of each command's `--json`, by its `kind`: `docs/schema/` is made from these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from npprune.export.predict import Prediction
from npprune.records import (
    Analysis,
    Benchmark,
    Evaluation,
    ExportRecord,
    FeatureEvaluation,
    Plan,
    Result,
    Variant,
    headed,
    json_schema,
)


@dataclass
class Analyses:
    """`npprune analyze`, `npprune eval --edit`: the sections that were added to the result."""

    analyses: dict[str, Analysis]


@dataclass
class Report:
    """`npprune report`: the two files."""

    html: str
    markdown: str


@dataclass
class Explorer:
    """`npprune explore`: the page, what it holds, and what is missing from it."""

    page: str
    classes: int
    images: int
    neurons: int
    bytes: int
    seconds: float
    notes: list[str]


@dataclass
class Paths:
    """`npprune paths export`: the folder and the names of the files in it."""

    folder: str
    files: list[str]


@dataclass
class Verified:
    """`npprune verify`: the files that were checked, and what is wrong with the damaged ones."""

    folder: str
    files: list[str]
    damaged: dict[str, str]


@dataclass
class GPU:
    """A device of CUDA."""

    name: str
    memory_gib: float


@dataclass
class CUDA:
    """What PyTorch was built with (none: without), and what is there."""

    built: str | None
    devices: list[GPU]


@dataclass
class Environment:
    """`npprune env`."""

    versions: dict[str, str]
    platform: str
    device: str
    device_reason: str
    cuda: CUDA
    onnxruntime_providers: list[str]
    cpus: int | None
    threads: int
    memory_gib: float
    memory_free_gib: float


@dataclass
class Predictions:
    """`npprune predict`."""

    model: str
    predictions: list[Prediction]


RECORDS: dict[str, type] = {
    "result": Result,  # discover, study, run, specialise, demo, paths import
    "plan": Plan,  # a file alone
    "variant": Variant,  # prune, heal
    "evaluation": Evaluation,  # eval
    "features": FeatureEvaluation,  # eval of a network without a classifier
    "export": ExportRecord,  # export
    "benchmark": Benchmark,  # bench
    "analyses": Analyses,
    "report": Report,
    "explorer": Explorer,
    "paths": Paths,
    "verified": Verified,
    "environment": Environment,
    "predictions": Predictions,
}


def schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema of each kind; `recipe` is what `npprune run --dry-run` resolves."""
    from npprune.recipe import Recipe

    found = {kind: json_schema(cls, kind) for kind, cls in RECORDS.items()}
    recipe = Recipe.model_json_schema(mode="serialization")
    return {**found, "recipe": headed(recipe, "recipe")}
