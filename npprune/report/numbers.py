"""The key numbers: dense beside pruned, what one is warned of, and the sentence that sums up."""

from __future__ import annotations

from dataclasses import dataclass, field

from npprune.records import (
    Accuracy,
    Evaluation,
    ExportRecord,
    FeatureEvaluation,
    Latency,
    Rate,
    Result,
    Variant,
)
from npprune.report import features, text
from npprune.report.document import Card, Cell, Table


@dataclass
class Measure:
    """One row of the comparison of the dense network with one pruned network."""

    label: str
    dense: Cell
    pruned: Cell
    change: Cell
    key: bool = False  # of the few that are looked for first


@dataclass
class Summary:
    """What the terminal shows of a result: plain text, ready for tables.

    `brief` says it in a line for each pruned network: its name, and accuracy, cost and speed.
    `rows` are the few that are looked for first, `more` the others. Of the `notices` the first
    one says so if a pruned ONNX file is not faster.
    """

    notices: list[str]
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    more: list[list[str]] = field(default_factory=list)
    brief: list[tuple[str, str]] = field(default_factory=list)


def summary(result: Result) -> Summary:
    """The key numbers of a result: columns ("", dense, pruned, change), or one column for each
    pruned network where there are several. Without one, what was discovered."""
    notices = not_faster(result)
    if result.variants:
        table = comparison(result)
        key = {m.label for v in result.variants for m in measures(result, v) if m.key}
        shown = [[c.text for c in row] for row in table.rows]
        return Summary(
            notices,
            table.columns,
            [row for row in shown if row[0] in key],
            [row for row in shown if row[0] not in key],
            [(text.clean(v.name), brief(result, v)) for v in result.variants],
        )
    rows = [
        ["Parameters", text.params(result.model.params)],
        ["MACs", text.macs(result.model.macs)],
        ["Hidden units", text.count(sum(result.model.widths))],
    ]
    if found := result.discovery:
        rows += [
            ["Paths", f"{text.plural(found.images, 'image')}, K = {found.topk}"],
            ["Classes", text.count(found.classes)],
            ["Time", text.seconds(found.seconds)],
        ]
        if found.mean_score:
            rows.insert(
                5, ["Mean joint attribution score", text.significant(found.mean_score.value)]
            )
    return Summary(notices, ["", "dense"], rows)


def brief(result: Result, variant: Variant) -> str:
    """A network in a line: accuracy with its change and interval, cost, measured speed."""
    costs = f"{text.times(macs_ratio(result, variant))} the MACs"
    if timed := key_latencies(variant):
        costs += f", {text.times(timed[0].ratio)} the latency ({text.where(timed[0])})"
    done = variant.measured
    return f"{brief_accuracy(done) if done else 'accuracy not measured yet'}; {costs}"


def brief_accuracy(done: Evaluation | FeatureEvaluation) -> str:
    """`top-1 62.0 % on 800 images, −20.5 points (95 % −23.4 to −17.6)`; of features, how near."""
    if isinstance(done, FeatureEvaluation):
        return features.brief(done)
    a, b, interval = compared(done)
    among = ""
    if done.dense_restricted and done.pruned_restricted:
        among = f" among {text.plural(len(done.restricted_to or []), 'class', 'classes')}"
    return (
        f"top-1 {text.percent(b.value)}{among} on {text.plural(done.data.images, 'image')}, "
        f"{text.points(b.value - a.value)}{f' ({interval})' if interval else ''}"
    )


def compared(done: Evaluation) -> tuple[Rate, Rate, str]:
    """Top-1 of the dense and of the pruned network that are to be compared, both choosing among the
    same classes, and the interval of the change; empty where it was recorded among all classes."""
    if done.dense_all is None and done.dense_restricted and done.pruned_restricted:
        return done.dense_restricted.top1, done.pruned_restricted.top1, ""
    return done.dense.top1, done.pruned.top1, text.change_span(done.top1_change)


# ---------------------------------------------------------------- latency


def latencies(variant: Variant) -> list[Latency]:
    """All timings of a variant, ONNX Runtime first, float32 first, by batch size; the export's own
    before the evaluation's where both timed the same."""
    timed: dict[tuple[str, str, str, int], Latency] = {}
    for part in (variant.export, *variant.more_exports, variant.measured):
        for row in part.latency if part else []:
            timed.setdefault((row.runtime, row.provider, row.precision, row.batch), row)
    return sorted(
        timed.values(),
        key=lambda t: (t.runtime != "onnxruntime", t.precision, t.provider, t.batch),
    )


def exports(variant: Variant) -> list[ExportRecord]:
    """The files that a variant was exported to, the latest first."""
    return ([variant.export] if variant.export else []) + variant.more_exports


def key_latencies(variant: Variant) -> list[Latency]:
    """Those in ONNX Runtime; PyTorch's where there are none."""
    rows = latencies(variant)
    return [t for t in rows if t.runtime == "onnxruntime"] or rows


def macs_ratio(result: Result, variant: Variant) -> float:
    """Pruned over dense."""
    return variant.model.macs / result.model.macs


def not_faster(result: Result) -> list[str]:
    """A sentence for each variant whose ONNX file was not faster than the dense one here, or
    where the machine was too noisy to tell: half of the paired ratios lie on either side of 1."""
    lines = []
    for variant in result.variants:
        timed = [t for t in key_latencies(variant) if t.runtime == "onnxruntime"]
        slow = [t for t in timed if t.ratio >= 1 and t.ratio_low >= 1]
        unclear = [t for t in timed if t.ratio_low < 1 <= t.ratio_high]
        if slow:
            lines.append(
                f"{variant.name} is NOT faster than the dense network in ONNX Runtime on this "
                f"machine ({_timings(slow)})."
            )
        if unclear:
            lines.append(
                f"{variant.name}: this machine was too busy to tell whether it is faster than the "
                f"dense network in ONNX Runtime ({_timings(unclear)}); "
                "time it again on a quiet one."
            )
    return lines


def _timings(rows: list[Latency]) -> str:
    return "; ".join(
        f"batch {t.batch}: {text.milliseconds(t.pruned_ms)} against "
        f"{text.milliseconds(t.dense_ms)}, ratio {text.times(t.ratio)}, "
        f"quartiles {t.ratio_low:.2f}\u2013{t.ratio_high:.2f}"
        for t in rows
    )


# ---------------------------------------------------------------- the comparison


def measures(result: Result, variant: Variant) -> list[Measure]:
    """Accuracy first, then cost."""
    done = variant.measured
    return (accuracies(done) if done else []) + _cost(result, variant)


def _rates(label: str, dense: Accuracy, pruned: Accuracy, top: str, change: str = "") -> Measure:
    a, b = getattr(dense, top), getattr(pruned, top)
    return Measure(
        label,
        Cell(text.percent(a.value), text.rate_detail(a)),
        Cell(text.percent(b.value), text.rate_detail(b)),
        Cell(text.points(b.value - a.value), change),
        key=top == "top1",
    )


def accuracies(done: Evaluation | FeatureEvaluation) -> list[Measure]:
    """What was measured on images."""
    if isinstance(done, FeatureEvaluation):
        return [Measure(*row) for row in features.rows(done)]
    dense, pruned, none = done.dense, done.pruned, Cell(text.DASH)
    rows = [
        _rates("Top-1", dense, pruned, "top1", text.change_span(done.top1_change)),
        _rates("Top-5", dense, pruned, "top5"),
    ]
    if done.dense_all is None and done.dense_restricted and done.pruned_restricted:
        label = f"Top-1 among the {text.count(len(done.restricted_to or []))} chosen classes"
        rows.append(_rates(label, done.dense_restricted, done.pruned_restricted, "top1"))
    a, b = dense.true_probability, pruned.true_probability
    deviation, by_class = done.probability_deviation, done.deviation_by_class
    return [
        *rows,
        Measure(
            "Mean probability of the true class",
            Cell(text.percent(a.value), text.span(a.low, a.high)),
            Cell(text.percent(b.value), text.span(b.low, b.high)),
            Cell(text.points(b.value - a.value)),
        ),
        Measure(
            "Probability deviation",
            none,
            Cell(text.percent(deviation.value, sign=True), text.change_span(deviation)),
            none,
        ),
        Measure(
            "Probability deviation, by class",
            none,
            Cell(text.percent(by_class.value, sign=True), text.change_span(by_class)),
            none,
        ),
        Measure(
            "Accuracy deviation", none, Cell(text.percent(done.accuracy_deviation, sign=True)), none
        ),
        Measure(
            "Agreement with dense",
            none,
            Cell(text.percent(done.agreement.value), text.rate_detail(done.agreement)),
            none,
        ),
    ]


def _cost(result: Result, variant: Variant) -> list[Measure]:
    dense, pruned = result.model, variant.model

    def row(label: str, before: int, after: int, show: object) -> Measure:
        a, b = (Cell(show(n)) for n in (before, after))  # type: ignore[operator]
        key = label in ("Parameters", "MACs per image")
        return Measure(label, a, b, Cell(text.relative(after, before)), key)

    rows = [
        row("Parameters", dense.params, pruned.params, text.params),
        row("MACs per image", dense.macs, pruned.macs, text.macs),
        row("Hidden units", sum(dense.widths), sum(pruned.widths), text.count),
    ]
    if pruned.cls_widths:
        rows.append(row("Class token's own hidden units", 0, sum(pruned.cls_widths), text.count))
    if dense.heads != pruned.heads:
        rows.append(row("Attention heads", sum(dense.heads), sum(pruned.heads), text.count))
    if attention := variant.prune.details.get("attention"):
        names = ("dense_heads", "dense_query_dims"), ("heads", "query_dims")
        before, after = (
            sum(n * q for n, q in zip(attention[h], attention[r], strict=True)) for h, r in names
        )
        if before != after:
            label = text.dimensions(variant.prune).capitalize()
            rows.append(row(f"{label} of all heads", before, after, text.count))
    if dense.num_classes != pruned.num_classes:
        rows.append(row("Classes", dense.num_classes, pruned.num_classes, text.count))
    rows += [timing(t) for t in key_latencies(variant)]
    for x in exports(variant):
        change = Cell(text.relative(x.bytes, x.dense_bytes) if x.dense_bytes else text.DASH)
        sizes = Cell(text.size(x.dense_bytes)), Cell(text.size(x.bytes))
        rows.append(Measure(text.export_file(x), *sizes, change, key=True))
    return rows


def timing(t: Latency) -> Measure:
    """One timing: median time of a batch."""
    change = Cell(
        text.percent(t.ratio - 1, sign=True),
        f"ratio {text.fixed(t.ratio, 2)}, quartiles "
        f"{text.fixed(t.ratio_low, 2)}–{text.fixed(t.ratio_high, 2)}",
    )
    dense, pruned = Cell(text.milliseconds(t.dense_ms)), Cell(text.milliseconds(t.pruned_ms))
    return Measure(f"Latency, {text.where(t)}", dense, pruned, change, key=True)


def comparison(result: Result) -> Table:
    """Dense beside pruned. One variant: a column for the change; several: one column each."""
    if len(result.variants) == 1:
        only = measures(result, result.variants[0])
        rows = [[Cell(m.label), m.dense, m.pruned, m.change] for m in only]
        return Table(["", "dense", "pruned", "change"], rows)
    return beside([(text.clean(v.name), measures(result, v)) for v in result.variants])


def beside(columns: list[tuple[str, list[Measure]]]) -> Table:
    """The measures of several networks: a column each, by name, after the dense network's."""
    by_variant = [{m.label: m for m in found} for _, found in columns]
    labels: list[str] = []
    for found in by_variant:  # keep each variant's own order, new labels before what follows them
        at = 0
        for label in found:
            if label in labels:
                at = labels.index(label) + 1
            else:
                labels.insert(at, label)
                at += 1
    rows = []
    for label in labels:
        given = [found.get(label) for found in by_variant]
        dense = next(m.dense for m in given if m)
        rows.append([Cell(label), dense, *(_beside(m, dense) for m in given)])
    return Table(["", "dense", *(name for name, _ in columns)], rows)


def _beside(m: Measure | None, dense: Cell) -> Cell:
    """A variant's cell where the dense column is shared; its own dense value if it differs."""
    if m is None:
        return Cell(text.DASH)
    own = f"dense {m.dense.value}" if m.dense.value != dense.value else ""
    change = m.change.value if m.change.value != text.DASH else ""
    return Cell(m.pruned.value, "; ".join(s for s in (change, m.pruned.detail, own) if s))


# ---------------------------------------------------------------- words


def doubts(result: Result) -> list[str]:
    """Why the labels behind the numbers are probably wrong; before all else."""
    lines = []
    for v in result.variants:
        lines.append(v.prune.label_doubt)
        lines.append(v.evaluation.label_doubt if v.evaluation else "")
    return [f"{line[0].upper()}{line[1:]}." for line in dict.fromkeys(lines) if line]


def headline(result: Result) -> list[str]:
    """What was done and what came of it, a sentence or two for each variant."""
    model = result.model
    name, blocks = model.source.architecture, len(model.widths)
    if result.variants:
        return [*doubts(result), *(_sentence(result, v) for v in result.variants)]
    if found := result.discovery:
        each = text.plural(found.topk, "neuron")
        return [
            f"The most influential neuron path of {text.plural(found.images, 'image')} of "
            f"{text.plural(found.classes, 'class', 'classes')} through {name}: {each} in each of "
            f"its {text.plural(blocks, 'block')}. Nothing has been pruned yet."
        ]
    if "study" in result.analyses:
        size = text.plural(blocks, "block")
        return [f"Ways to prune {name} ({size}), compared on the same images."]
    return [f"{name}, {text.plural(blocks, 'block')}. Nothing has been discovered or pruned yet."]


def _sentence(result: Result, variant: Variant) -> str:
    dense, kept = sum(result.model.widths), sum(variant.model.widths)
    who = result.model.source.architecture
    what = (
        f"{text.clean(variant.name)} keeps {text.count(kept)} of the {text.count(dense)} hidden "
        f"units of {who} ({text.percent(kept / dense)})"
    )
    costs = f"{text.times(macs_ratio(result, variant))} the MACs"
    if timed := key_latencies(variant):
        costs += f" and {text.times(timed[0].ratio)} the latency ({text.where(timed[0])})"
    done = variant.evaluation
    if variant.features is not None:
        return f"{what}. {features.sentence(variant.features)}, at {costs}."
    if done is None:
        return f"{what}, at {costs}. Its accuracy has not been measured yet."
    a, b, interval = compared(done)
    if done.dense_restricted and done.pruned_restricted:
        everywhere = (done.dense_all or done.dense).top1
        chosen = text.plural(len(done.restricted_to or []), "chosen class", "chosen classes")
        return (
            f"{what}. Among its {chosen} it reaches {text.percent(b.value)} top-1 on "
            f"{text.plural(done.data.images, 'image')}, where the dense network reaches "
            f"{text.percent(a.value)} choosing among the same classes "
            f"({text.points(b.value - a.value)}) and {text.percent(everywhere.value)} choosing "
            f"among all, at {costs}."
        )
    return (
        f"{what}. On {text.plural(done.data.images, 'image')} it reaches "
        f"{text.percent(b.value)} top-1 where the dense network reaches {text.percent(a.value)} "
        f"({text.points(b.value - a.value)}, {interval}), at {costs}."
    )


def warnings(result: Result) -> list[str]:
    """All a reader must know before the numbers, the slow first."""
    lines = not_faster(result)
    for v in result.variants:
        name = text.clean(v.name)
        for x in exports(v):
            if not x.passed:
                lines.append(f"{name}: {x.file} does not agree with PyTorch (parity failed).")
        lines += [f"{name}: {w}" for w in v.prune.warnings]
        if v.measured is None:
            continue
        used, seen = v.prune.calibration, v.measured.data
        if used and used.sha256 and used.sha256 == seen.sha256:
            lines.append(
                f"{name}: calibrated and evaluated on the same images; the accuracy is flattered."
            )
        if seen.images < 100:
            lines.append(
                f"{name}: evaluated on {text.plural(seen.images, 'image')} only; mind the interval."
            )
        if v.measured.preprocessing != v.model.preprocessing:
            lines.append(f"{name}: evaluated with another preprocessing than the model's own.")
    sources = {
        "discovery": result.discovery.data if result.discovery else None,
        **{f"calibration of {v.name}": v.prune.calibration for v in result.variants},
        **{f"evaluation of {v.name}": v.measured.data for v in result.variants if v.measured},
    }
    for role, info in sources.items():
        if info and info.skipped:
            lines.append(
                f"{text.plural(len(info.skipped), 'unreadable image')} skipped in the {role} "
                f"(listed under Images)."
            )
    seen_hashes = {v.measured.data.sha256 for v in result.variants if v.measured}
    if len(seen_hashes) > 1:
        lines.append(
            "The pruned networks were not all evaluated on the same images: compare each with "
            "the dense accuracy of its own evaluation."
        )
    return list(dict.fromkeys(lines))


def cards(result: Result) -> list[Card]:
    """The few largest numbers, for a run with one pruned network."""
    if len(result.variants) != 1:
        return []
    v = result.variants[0]
    shown: list[Card] = []
    if done := v.evaluation:
        a, b, interval = compared(done)
        chosen = done.dense_restricted and done.pruned_restricted
        label = "Top-1 among chosen classes" if chosen else "Top-1 accuracy"
        note = f"{text.points(b.value - a.value)}{f', {interval}' if interval else ''}"
        shown.append(Card(label, text.percent(b.value), text.percent(a.value), note))
    elif v.features is not None:
        shown += features.cards(v.features)
    for m in _cost(result, v):
        if m.label in ("Parameters", "MACs per image"):
            shown.append(Card(m.label, m.pruned.value, m.dense.value, m.change.value))
    if timed := key_latencies(v):
        t = timed[0]
        shown.append(
            Card(
                "Latency",
                text.milliseconds(t.pruned_ms),
                text.milliseconds(t.dense_ms),
                f"{text.percent(t.ratio - 1, sign=True)}, {text.where(t)}",
            )
        )
    if v.export:
        a_bytes = v.export.dense_bytes
        change = text.relative(v.export.bytes, a_bytes) if a_bytes else ""
        name = text.FORMATS.get(v.export.format, v.export.format)
        shown.append(Card(name, text.size(v.export.bytes), text.size(a_bytes), change))
    return shown
