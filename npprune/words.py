"""The words that name a choice, in one place: the same in `core`, recipes and the command line.

Knows no torch and no pydantic, so that every room may read it at no cost.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Literal, get_args

from npprune.errors import UsageError, setting

Method = Literal["neuron-path", "activation", "influence-pattern", "knowledge-neuron", "random"]
METHODS: tuple[Method, ...] = get_args(Method)

Scope = Literal["cls", "patch", "all"]
"""The tokens a neuron is read and scaled at: class token, patch tokens, or all of them."""
SCOPES: tuple[Scope, ...] = get_args(Scope)
ScopeOrAuto = Literal["auto", Scope]

Rule = Literal["gauss-radau", "mapped-radau", "gauss-legendre", "left-riemann"]
"""Quadrature over alpha. Left-Riemann is the paper's."""
RULES: tuple[Rule, ...] = get_args(Rule)
RuleOrAuto = Literal["auto", Rule]

Accumulation = Literal["sum", "last"]
ACCUMULATIONS: tuple[Accumulation, ...] = get_args(Accumulation)

Selection = Literal["uniform", "global", "measured"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)

Compensation = Literal["none", "mean", "least-squares", "sequential"]
COMPENSATIONS: tuple[Compensation, ...] = get_args(Compensation)

Activation = Literal["gelu", "gelu-tanh", "quick-gelu", "relu", "silu"]
"""Of the hidden units, where a weights file does not say it."""
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

Pooling = Literal["token", "avg"]
"""What a classifier reads, where a file does not say: class token or mean patch token."""
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

Axis = Literal["mlp", "cls", "heads", "qk", "head-dim", "tokens"]
"""What may be removed: hidden units (of the class token apart from the patches'), attention heads,
query/key dimensions, the same with value dimensions; patch tokens merge."""
AXES: tuple[Axis, ...] = get_args(Axis)
ALL_AXES: tuple[Axis, ...] = tuple(axis for axis in AXES if axis not in ("cls", "head-dim"))
"""What `all` stands for: `head-dim` takes what `qk` takes, and more; `cls` has not paid yet (see
docs/measurements.md)."""

FeatureOutput = Literal["pooled", "cls", "patches"]
"""What a file of a network without a classifier gives: the pooled vector, the class token, or the
patch tokens as a map."""

PathUse = Literal["auto", "protect", "prior", "off"]
"""What path neurons are to pruning: kept as far as that costs nothing; kept first; votes that raise
the criterion's scores as far as that costs nothing; nothing."""
PATH_USES: tuple[PathUse, ...] = get_args(PathUse)

SearchPrecision = Literal["fp32", "tf32", "bf16"]
TrainingPrecision = Literal["fp32", "bf16"]
FilePrecision = Literal["fp32", "fp16", "int8"]
SEARCH_PRECISIONS: tuple[SearchPrecision, ...] = get_args(SearchPrecision)
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)
FILE_PRECISIONS: tuple[FilePrecision, ...] = get_args(FilePrecision)

Dynamic = Literal["dynamic"]
"""A file that takes any number of images at once."""

Format = Literal["onnx", "torch", "timm", "transformers"]
FORMATS: tuple[Format, ...] = get_args(Format)

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]
"""ONNX Runtime's execution providers."""
PROVIDERS: tuple[Provider, ...] = get_args(Provider)

Runtime = Literal["onnxruntime", "torch", "torch-compile", "openvino"]
"""What can run a network, and be its clock."""
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

ServedPrecision = Literal["fp32", "bf16", "fp16", "int8"]
"""In which a runtime may compute; none has all of them everywhere."""
SERVED_PRECISIONS: tuple[ServedPrecision, ...] = get_args(ServedPrecision)

DEVICES = ("auto", "cpu", "cuda", "cuda:N", "mps")

Edit = Literal["remove", "enhance", "keep"]
"""What happens to a path's neurons in the paper's experiments; `keep`: to all others."""
EDITS: tuple[Edit, ...] = get_args(Edit)

EditPaths = Literal["image", "class", "predicted", "union"]
"""Whose neurons are edited."""

Augment = Literal["auto", "mixed", "flips", "strong", "none"]

OnBadImage = Literal["error", "skip"]
ON_BAD_IMAGE: tuple[OnBadImage, ...] = get_args(OnBadImage)

Preparation = Literal["model", "released"]
"""How images become input: as the model was trained, or as the paper's released program does."""

Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos"]
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)

CropMode = Literal["center", "squash", "border"]
CROP_MODES: tuple[CropMode, ...] = get_args(CropMode)

OnOff = Literal["on", "off"]

Layout = Literal["batch", "image"]
"""What a line of the paper's files holds."""
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Analysis = Literal["scores", "similarity", "paths"]
ANALYSES: tuple[Analysis, ...] = get_args(Analysis)

TableFormat = Literal["table", "csv", "json"]
"""How predictions are written."""
TABLE_FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that is most like a misspelt one; None where none is."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return near[0] if near else None


def did_you_mean(word: object, known: Iterable[str]) -> str | None:
    """The nearest right word as a hint; None where none is near."""
    near = nearest(word, known)
    return f"did you mean `{near}`?" if near else None


def check_word(name: str, word: object, known: Iterable[str]) -> None:
    """UsageError, with the nearest right word, where a word is not one of those known.

    Args:
        name: the setting or argument that the word is for.
    """
    known = list(known)
    if word not in known:
        words = ", ".join(f"`{k}`" for k in known)
        raise UsageError(
            f"{setting(name)} must be one of {words}, got `{word}`", hint=did_you_mean(word, known)
        )


def check_axes(named: Collection[str]) -> None:
    """UsageError for axes that exclude each other."""
    if {"qk", "head-dim"} <= set(named):
        raise UsageError(
            f"{setting('prune.axes')}: `qk` narrows queries and keys alone, `head-dim` values as "
            f"well, got both: `{','.join(named)}`",
            hint="`qk` suits CPUs; `head-dim` keeps one head dimension, as fused attention on "
            "GPUs wants it",
        )
