"""What the fields of a section must keep to together: contradictions, each said once.

Recipes and the command line name the same field differently, `prune.keep` and `--keep`: a rule
leaves that to `say(field)` or `say(field, value)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npprune.errors import UsageError
from npprune.recipe.sections import BUDGETS, ExportSection, HealSection, PruneSection, Section

Say = Callable[..., str]


@dataclass(frozen=True)
class Conflict:
    """What is wrong, the field that it is written at, and what to do."""

    field: str
    message: str
    hint: str | None = None


def check(settings: Section) -> None:
    """UsageError, in the words of the command line, where fields contradict each other."""
    found = conflict(settings, flag)
    if found is not None:
        raise UsageError(found.message, hint=found.hint)


def conflict(settings: Section, say: Say) -> Conflict | None:
    """The first contradiction in a section; None where there is none."""
    if isinstance(settings, PruneSection):
        return _budgets(settings, say) or _axes(settings, say)
    if isinstance(settings, HealSection):
        return _length(settings, say) or _layerwise(settings, say)
    return _format(settings, say) if isinstance(settings, ExportSection) else None


def flag(field: str, value: Any = "") -> str:
    """A field as the command line has it."""
    return f"`--{field.replace('_', '-')} {value}".rstrip() + "`"


def key(section: str) -> Say:
    """Fields of a section as a recipe has them."""

    def say(field: str, value: Any = "") -> str:
        return f"`{section}.{field}: {value}`" if value != "" else f"`{section}.{field}`"

    return say


def _budgets(s: PruneSection, say: Say) -> Conflict | None:
    given = [b for b in BUDGETS if getattr(s, b) is not None]
    if len(given) < 2:
        return None
    return Conflict(
        given[1],
        f"a budget is one of {', '.join(map(say, BUDGETS))}, got {' and '.join(map(say, given))}",
        "leave all but one out",
    )


def _axes(s: PruneSection, say: Say) -> Conflict | None:
    """Other axes than hidden units."""
    if set(s.axes) == {"mlp"}:
        return None
    axes = say("axes", ",".join(s.axes))
    hint = f"use {say('target_macs')} or {say('target_params')}, or {say('max_drop')} alone"
    if s.keep is not None:
        return Conflict(
            "keep",
            f"{say('keep')} is a share of the hidden units, and {axes} shares a budget among more",
            hint,
        )
    if s.target_latency is not None:
        return Conflict(
            "target_latency",
            f"{say('target_latency')} knows what hidden units cost, not attention: it does not go "
            f"with {axes}",
            hint,
        )
    if s.target_params is s.target_macs is s.max_drop is None:
        return Conflict(
            "axes",
            f"{say('topk')} alone keeps the paths' hidden units, and {axes} needs a budget that "
            "attention can share",
            hint,
        )
    if s.selection != "measured":
        return Conflict(
            "selection",
            f"{axes} needs {say('selection', 'measured')}, got `{s.selection}`: only measured harm "
            "compares hidden units with heads",
            f"leave {say('selection')} out",
        )
    return None


def _length(s: HealSection, say: Say) -> Conflict | None:
    if (s.epochs is None) != (s.minutes is None):
        return None
    return Conflict(
        "minutes" if s.epochs is not None else "epochs",
        f"one of {say('epochs')} and {say('minutes')} says how long, got "
        + ("none" if s.epochs is None else "both"),
        f"{say('epochs', 8)} goes through the images eight times",
    )


def _layerwise(s: HealSection, say: Say) -> Conflict | None:
    if not s.layerwise:
        return None
    layerwise = say("layerwise")
    if s.epochs is None:
        return Conflict("minutes", f"{layerwise} goes by {say('epochs')}, got {say('minutes')}")
    for field in ("label_weight", "feature_weight"):
        if getattr(s, field):
            return Conflict(
                field,
                f"{say(field)} is for training the whole network, and {layerwise} is given",
                "leave one of the two out",
            )
    if s.augment not in ("auto", "none"):
        return Conflict(
            "augment", f"{layerwise} takes images as they are, got {say('augment', s.augment)}"
        )
    return None


def _format(s: ExportSection, say: Say) -> Conflict | None:
    if s.format == "onnx":
        return None
    for field, value, wrong in (
        ("precision", s.precision, s.precision != "fp32"),
        ("with_preprocessing", "", s.with_preprocessing),
        ("batch", s.batch, s.batch != "dynamic" and s.format == "timm"),
    ):
        if wrong:
            return Conflict(
                field,
                f"{say(field, value)} does not go with {say('format', s.format)}",
                f"leave it out, or export with {say('format', 'onnx')}",
            )
    return None
