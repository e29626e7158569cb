"""How the numbers were made: methods, images, environment, commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from npprune.records import DataInfo, DiscoverySummary, PruneSummary, Result, Variant
from npprune.report import numbers, text
from npprune.report.document import Commands, Facts, Fold, Item, Paragraph, Section, Table, cells

SKIPPED_LISTED = 200


def how(result: Result) -> Section:
    """Discovery and, for each variant, pruning: every choice that changed the numbers."""
    section = Section("how", "How it was made")
    if result.discovery:
        section.items.append(Paragraph("Discovery"))
        section.items.append(_discovery(result.discovery))
    for v in result.variants:
        section.items.append(Paragraph(f"Pruning: {text.clean(v.name)}"))
        section.items.append(_pruning(v.prune))
        section.items += _details(v)
    return section


def _discovery(found: DiscoverySummary) -> Facts:
    pairs = [
        ("method", found.method),
        ("scope (tokens)", found.scope),
        ("quadrature", text.integral(found)),
        ("neurons per block, K", str(found.topk)),
        ("accumulation", found.accumulation),
        ("precision", found.precision),
        ("images", text.data(found.data)),
        ("time", text.seconds(found.seconds)),
    ]
    if s := found.mean_score:
        low, high = text.significant(s.low), text.significant(s.high)
        pairs.append(
            (
                "mean joint attribution score",
                f"{text.significant(s.value)} (95 % {low} to {high}, n = {text.count(s.n)})",
            )
        )
    return Facts(pairs)


def _pruning(p: PruneSummary) -> Facts:
    pairs = [("criterion", p.criterion), ("selection", p.selection)]
    if p.keep is not None:
        pairs.append(("budget", f"keep {text.percent(p.keep)} of the hidden units"))
    if p.topk is not None:
        pairs.append(("path neurons per class and block", str(p.topk)))
    if any(p.protected):
        pairs.append(("path neurons kept", text.path_neurons(p)))
    pairs += [
        ("widths rounded up to", f"multiples of {p.round_to}" if p.round_to > 1 else "not rounded"),
        ("compensation", p.compensation),
        ("calibration", text.data(p.calibration) if p.calibration else "none"),
        ("time", text.seconds(p.seconds)),
        ("plan sha256", p.plan_sha256),
    ]
    return Facts(pairs)


def _details(v: Variant) -> list[Item]:
    items: list[Item] = []
    if v.prune.predicted:
        rows = [cells(k, text.significant(value)) for k, value in v.prune.predicted.items()]
        title = "Predicted on held-out calibration images, before writing"
        items.append(Fold(title, Table(["quantity", "value"], rows)))
    if v.prune.details:
        rows = [cells(key, _compact(value)) for key, value in v.prune.details.items()]
        items.append(
            Fold("Numbers of the pruning step", Table(["quantity", "value"], rows, text=2))
        )
    return items


def _compact(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        if all(isinstance(v, int | float) for v in value) and not isinstance(value, Mapping):
            return text.listing([text.significant(v) for v in value], 48)
        return text.clip(json.dumps(value, ensure_ascii=False, default=str), 400)
    return text.significant(value)


# ---------------------------------------------------------------- images


def images(result: Result) -> Section:
    """Which images each stage read, how their labels were found, what was skipped."""
    section = Section("images", "Images and labels")
    used: list[tuple[str, DataInfo]] = []
    prepared: list[tuple[str, str]] = [
        ("model's own", text.preprocessing(result.model.preprocessing))
    ]
    if result.discovery:
        used.append(("discovery", result.discovery.data))
    for v in result.variants:
        name = text.clean(v.name)
        if v.prune.calibration:
            used.append((f"calibration, {name}", v.prune.calibration))
        if v.measured:
            used.append((f"evaluation, {name}", v.measured.data))
            if v.measured.preprocessing != result.model.preprocessing:
                other = text.preprocessing(v.measured.preprocessing)
                prepared.append((f"evaluation, {name}", other))
    if used:
        rows = [
            cells(
                role,
                text.clean(info.spec),
                text.clean(info.label_rule),
                text.count(info.images),
                text.count(info.classes),
                text.count(len(info.skipped)),
                info.sha256[:16] or text.DASH,
            )
            for role, info in used
        ]
        columns = ["used for", "source", "labels from", "images", "classes", "skipped", "sha256"]
        section.items.append(Table(columns, rows, text=3))
    section.items.append(Facts([(f"preprocessing, {role}", p) for role, p in prepared]))
    for role, info in used:
        if info.skipped:
            listed = info.skipped[:SKIPPED_LISTED]
            rows = [cells(text.clean(path)) for path in listed]
            total = text.plural(len(info.skipped), "unreadable image")
            more = "" if len(listed) == len(info.skipped) else f", the first {len(listed)}"
            title = f"{total} skipped, {role}{more}"
            section.items.append(Fold(title, Table(["path"], rows)))
    return section


# ---------------------------------------------------------------- environment


def environment(result: Result) -> Section:
    """Device and why, versions, seed, and the hashes that tie the numbers to files."""
    env, source = result.environment, result.model.source
    reason = f" ({env.device_reason})" if env.device_reason else ""
    pairs = [
        ("device", f"{env.device}{reason}"),
        ("threads", str(env.threads) if env.threads else text.DASH),
        ("platform", env.platform or text.DASH),
        ("seed", str(env.seed)),
        ("versions", ", ".join(f"{k} {v}" for k, v in env.versions.items()) or text.DASH),
        ("model", source.architecture),
        ("weights", source.checkpoint or "timm's hub weights"),
        ("weights sha256", source.sha256 or text.DASH),
        ("scope of the classifier", result.model.scope),
    ]
    for v in result.variants:
        name = text.clean(v.name)
        if v.model.source.sha256 and v.model.source.sha256 != source.sha256:
            pairs.append((f"weights sha256, {name}", v.model.source.sha256))
        if v.measured:
            pairs.append((f"evaluated on, {name}", v.measured.device))
        for x in numbers.exports(v):
            pairs.append((f"{x.file} sha256, {name}", x.sha256))
    return Section("environment", "Environment and hashes", [Facts(pairs)])


def reproduce(result: Result) -> Section:
    """The commands of the run, where they were recorded."""
    section = Section("reproduce", "Commands that reproduce this")
    if result.commands:
        section.items.append(Commands([text.clean(c) for c in result.commands]))
    return section
