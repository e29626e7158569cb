"""The words that name a choice, in one place: the same in `core`, recipes and the command line.

Knows no torch and no pydantic, so that every room may read it at no cost.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, get_args

from npprune.errors import UsageError

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

Axis = Literal["mlp", "heads", "qk"]
AXES: tuple[Axis, ...] = get_args(Axis)

SearchPrecision = Literal["fp32", "tf32", "bf16"]
TrainingPrecision = Literal["fp32", "bf16"]
FilePrecision = Literal["fp32", "fp16", "int8"]
SEARCH_PRECISIONS: tuple[SearchPrecision, ...] = get_args(SearchPrecision)
TRAINING_PRECISIONS: tuple[TrainingPrecision, ...] = get_args(TrainingPrecision)
FILE_PRECISIONS: tuple[FilePrecision, ...] = get_args(FilePrecision)

Format = Literal["onnx", "torch", "timm"]
FORMATS: tuple[Format, ...] = get_args(Format)

PROVIDERS = ("auto", "cpu", "cuda", "tensorrt")


def did_you_mean(word: object, known: Iterable[str]) -> str | None:
    """The nearest right word as a hint; None where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean `{near[0]}`?" if near else None


def check_word(name: str, word: object, known: Iterable[str]) -> None:
    """UsageError, with the nearest right word, where a word is not one of those known.

    Args:
        name: what the word is for, as the caller knows it: an argument or a flag.
    """
    known = list(known)
    if word not in known:
        words = ", ".join(f"`{k}`" for k in known)
        raise UsageError(
            f"`{name}` must be one of {words}, got `{word}`", hint=did_you_mean(word, known)
        )
