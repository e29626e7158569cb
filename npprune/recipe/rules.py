"""What the fields of a section must keep to together: contradictions, each said once."""

from __future__ import annotations

from npprune.budget import budget_of, budgets
from npprune.errors import UsageError, setting
from npprune.recipe.sections import ExportSection, HealSection, PruneSection, Section
from npprune.words import check_axes


class Conflict(UsageError):
    """Settings that contradict each other; `field` is the one to look at: `prune.keep`."""

    def __init__(self, field: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


def check(settings: Section) -> None:
    """Conflict (a UsageError) where the fields of a section contradict each other."""
    if isinstance(settings, PruneSection):
        _budgets(settings)
        _axes(settings)
        _paths(settings)
    elif isinstance(settings, HealSection):
        _length(settings)
        _layerwise(settings)
    elif isinstance(settings, ExportSection):
        _format(settings)


def _budgets(s: PruneSection) -> None:
    try:
        budget_of(s)
    except UsageError as err:
        message, hint = err.said(setting)
        raise Conflict(f"prune.{budgets(s)[-1]}", message, hint=hint) from err


def _axes(s: PruneSection) -> None:
    """Other axes than hidden units."""
    if s.axes is None or set(s.axes) == {"mlp"}:
        return
    axes = setting("prune.axes", ",".join(s.axes))
    try:
        check_axes(s.axes)
    except UsageError as err:
        message, hint = err.said(setting)
        raise Conflict("prune.axes", message, hint=hint) from err
    latency, macs, params, drop = (
        setting(f"prune.{name}")
        for name in ("target_latency", "target_macs", "target_params", "max_drop")
    )
    hint = f"use {macs}, {latency} or {params}, or {drop} alone"
    if s.keep is not None:
        raise Conflict(
            "prune.keep",
            f"{setting('prune.keep')} is a share of the hidden units, and with {axes} other "
            "parts share the budget",
            hint=hint,
        )
    if s.target_params is not None and "tokens" in s.axes:
        raise Conflict(
            "prune.target_params",
            f"{params} is not met by merging tokens, which removes no parameter, and {axes} was "
            "given",
            hint=f"leave `tokens` out, or use {macs} or {latency}",
        )
    if budget_of(s) is s.max_drop is None:
        raise Conflict(
            "prune.axes",
            f"{setting('prune.topk')} alone keeps the paths' hidden units, and {axes} needs a "
            "budget that other parts can share",
            hint=hint,
        )
    if s.selection != "measured":
        raise Conflict(
            "prune.selection",
            f"{axes} needs {setting('prune.selection', 'measured')}, got `{s.selection}`: only "
            "measured harm compares hidden units with other parts",
            hint=f"leave {setting('prune.selection')} out",
        )


def _paths(s: PruneSection) -> None:
    """`protect_paths` is another word for two of the values of `paths`."""
    short = setting("prune.protect_paths", s.protect_paths)
    same = {None: s.paths, True: "protect", False: "off"}[s.protect_paths]
    if s.paths not in ("auto", same):
        raise Conflict(
            "prune.paths",
            f"{setting('prune.paths', s.paths)} and {short} contradict each other",
            hint=f"leave {setting('prune.protect_paths')} out",
        )


def _length(s: HealSection) -> None:
    if (s.epochs is None) == (s.minutes is None):
        raise Conflict(
            "heal.minutes" if s.epochs is not None else "heal.epochs",
            f"one of {setting('heal.epochs')} and {setting('heal.minutes')} says how long, got "
            + ("none" if s.epochs is None else "both"),
            hint=f"{setting('heal.epochs', 8)} goes through the images eight times",
        )


def _layerwise(s: HealSection) -> None:
    if not s.layerwise:
        return
    layerwise = setting("heal.layerwise")
    if s.epochs is None:
        raise Conflict(
            "heal.minutes",
            f"{layerwise} needs {setting('heal.epochs')}, got {setting('heal.minutes')}",
        )
    for field in ("label_weight", "feature_weight"):
        if getattr(s, field):
            raise Conflict(
                f"heal.{field}",
                f"{setting(f'heal.{field}')} is for training the whole network, and {layerwise} "
                "is given",
                hint="leave one of the two out",
            )
    if s.augment not in ("auto", "none"):
        raise Conflict(
            "heal.augment",
            f"{layerwise} takes images as they are, got {setting('heal.augment', s.augment)}",
        )


def _format(s: ExportSection) -> None:
    if s.format == "onnx":
        return
    for field, value, wrong in (
        ("precision", s.precision, s.precision != "fp32"),
        ("with_preprocessing", None, s.with_preprocessing),
        ("last_for_read", None, s.last_for_read and s.format in ("timm", "transformers")),
        ("batch", s.batch, s.batch != "dynamic" and s.format in ("timm", "transformers")),
    ):
        if wrong:
            raise Conflict(
                f"export.{field}",
                f"{setting(f'export.{field}', value)} does not go with "
                f"{setting('export.format', s.format)}",
                hint=f"leave it out, or export with {setting('export.format', 'onnx')}",
            )
