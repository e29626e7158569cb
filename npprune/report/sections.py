"""A result as a page: which parts there are, in which order, and what is in them."""

from __future__ import annotations

from functools import partial
from pathlib import PurePosixPath
from typing import Any

from npprune.records import (
    ClassRow,
    DiscoverySummary,
    Evaluation,
    ExportRecord,
    Latency,
    Result,
    Variant,
)
from npprune.report import (
    features,
    figures,
    flipped,
    merging,
    numbers,
    provenance,
    reliability,
    text,
    tradeoff,
)
from npprune.report.analyses import section as analysis_section
from npprune.report.document import (
    Figure,
    Fold,
    Item,
    Missing,
    Page,
    Paragraph,
    Section,
    Table,
    cells,
)

WORST, BEST = 20, 10  # classes listed
TOP_NEURONS = 12  # per block, in the frequency picture
CLASSES_DRAWN = 12  # in the picture of class paths
VARIANTS_DRAWN = 8  # panels of kept widths


def build(result: Result) -> Page:
    """The page of a result. Parts that the run does not have yet name the command for them."""
    sections = [
        _accuracy(result),
        _cost(result),
        _speed(result),
        _widths(result),
        _flipped(result),
        _classes(result),
        _reliability(result),
        *(
            analysis_section(f"analysis-{i}", each)
            for i, each in enumerate(result.analyses.values(), 1)
        ),
        *_paths(result),
        provenance.how(result),
        provenance.images(result),
        provenance.environment(result),
        provenance.reproduce(result),
    ]
    return Page(
        title=text.clean(result.name),
        subtitle=f"{result.model.source.architecture}, {text.when(result.created)}",
        headline=numbers.headline(result),
        warnings=numbers.warnings(result),
        cards=numbers.cards(result),
        sections=[s for s in sections if s.items],
    )


# ---------------------------------------------------------------- hints


def folder(variant: Variant) -> str:
    """The checkpoint's folder as a command takes it."""
    return f"ckpt/{PurePosixPath(variant.checkpoint).name or variant.name}"


def _no_variant(result: Result) -> Missing:
    return Missing(
        "Nothing has been pruned in this run yet.",
        f"npprune prune reports/{result.name} --keep 0.5 --calibration folder:TRAIN "
        f"--out ckpt/{result.name}",
    )


def _evaluated(result: Result) -> list[tuple[Variant, Evaluation]]:
    return [(v, v.evaluation) for v in result.variants if v.evaluation]


def _not_evaluated(result: Result) -> list[Item]:
    return [
        Missing(
            f"The accuracy of {text.clean(v.name)} has not been measured.",
            f"npprune eval {folder(v)} --data folder:VAL",
        )
        for v in result.variants
        if v.measured is None
    ]


# ---------------------------------------------------------------- dense and pruned


def _accuracy(result: Result) -> Section:
    section = Section("numbers", "Dense and pruned")
    if not result.variants:
        study = "study" in result.analyses and result.discovery is None  # has no networks to list
        section.items = [] if study else [_no_variant(result)]
        return section
    section.items.append(numbers.comparison(result))
    if done := _evaluated(result):
        section.items += [_accuracy_figure(done), _tradeoff(result, done)]
        section.items.append(
            Paragraph(
                "Intervals of proportions are Wilson's; those of changes and deviations are "
                "paired over the same images. Probability deviation is the mean relative change "
                "of the true class's probability against the dense network; accuracy deviation "
                "the relative change of top-1."
            )
        )
    if any(v.features for v in result.variants):
        section.items.append(Paragraph(features.EXPLAINED))
    for variant, evaluation in done:
        if evaluation.dense_restricted and evaluation.pruned_restricted:
            section.items += _restricted(variant, evaluation)
    section.items += _not_evaluated(result)
    return section


def _accuracy_figure(done: list[tuple[Variant, Evaluation]]) -> Figure:
    rows = []
    dense_seen: set[str] = set()
    for variant, evaluation in done:
        name = text.clean(variant.name)
        if evaluation.data.sha256 not in dense_seen or not evaluation.data.sha256:
            label = "dense" if not dense_seen else f"dense, images of {name}"
            rows.append((label, evaluation.dense.top1, evaluation.dense.top5))
            dense_seen.add(evaluation.data.sha256)
        rows.append((name, evaluation.pruned.top1, evaluation.pruned.top5))
    table = Table(
        ["network", "top-1", "top-5"],
        [cells(label, text.rate(top1), text.rate(top5)) for label, top1, top5 in rows],
    )
    draw = partial(
        figures.accuracy, rows, "Top-1 and top-5 accuracy with 95 % intervals", "accuracy"
    )
    said = (
        "Filled: top-1; hollow: top-5. Both networks saw the same images: whether they differ is "
        "said by the interval of the change in the table, more sharply than by where these overlap."
    )
    return Figure("Accuracy", said, draw, table)


def _tradeoff(result: Result, done: list[tuple[Variant, Evaluation]]) -> Figure:
    dense: dict[str, tradeoff.Point] = {}
    points = []
    for variant, evaluation in done:
        name = text.clean(variant.name)
        before, after, _ = numbers.compared(evaluation)
        chosen = ", among the chosen classes" if evaluation.restricted_to is not None else ""
        images = f", images of {name}" if dense else ""
        key = f"{evaluation.data.sha256}{chosen}"
        dense.setdefault(key, tradeoff.Point.of(f"dense{chosen or images}", result.model, before))
        points.append(tradeoff.Point.of(f"{name}{chosen}", variant.model, after))
    found = [("study", tradeoff.studied(result))]
    return tradeoff.figure([*dense.values(), *points], found)


def _restricted(variant: Variant, evaluation: Evaluation) -> list[Item]:
    dense, pruned = evaluation.dense_restricted, evaluation.pruned_restricted
    assert dense is not None
    assert pruned is not None
    chosen = text.plural(len(evaluation.restricted_to or []), "chosen class", "chosen classes")
    rows = [
        ("pruned, predictions among the chosen classes", pruned),
        ("dense, predictions among the chosen classes", dense),
        ("dense, predictions among all classes", evaluation.dense_all or evaluation.dense),
    ]
    table = Table(
        ["network and predictions", "top-1", "top-5"],
        [cells(label, text.rate(a.top1), text.rate(a.top5)) for label, a in rows],
        caption=f"{text.clean(variant.name)} on the images of its {chosen}. Choosing among fewer "
        "classes is easier for any network: compare the first line with the second.",
    )
    return [table]


def _cost(result: Result) -> Section:
    section = Section("cost", "Cost, before and after")
    if not result.variants:
        return section
    found: dict[str, list[float | None]] = {}
    count = len(result.variants)

    def put(label: str, i: int, after: float, before: float) -> None:
        if before:
            found.setdefault(label, [None] * count)[i] = after / before

    for i, v in enumerate(result.variants):
        put("parameters", i, v.model.params, result.model.params)
        put("MACs", i, v.model.macs, result.model.macs)
        put("hidden units", i, sum(v.model.widths), sum(result.model.widths))
        for t in numbers.key_latencies(v):
            put(f"latency, {text.where(t)}", i, t.ratio, 1)
        for x in numbers.exports(v):
            if x.dense_bytes:
                put(text.export_file(x), i, x.bytes, x.dense_bytes)
    names = [text.clean(v.name) for v in result.variants]
    series = [(name, [row[i] for row in found.values()]) for i, name in enumerate(names)]
    table = Table(
        ["share of dense", *names],
        [cells(label, *(text.percent(v) for v in row)) for label, row in found.items()],
    )
    labels = list(found)
    draw = partial(figures.costs, labels, series, "Cost as a share of the dense network's", "costs")
    section.items.append(
        Figure(
            "Share of the dense network's cost",
            "Shorter is better. Where the bar of a latency is longer than that of the MACs, this "
            "machine did not turn all that was saved into speed.",
            draw,
            table,
        )
    )
    return section


def _speed(result: Result) -> Section:
    section = Section("export", "Export: agreement and speed")
    if not result.variants:
        return section
    for v in result.variants:
        name = text.clean(v.name)
        if v.export is None:
            section.items.append(
                Missing(
                    f"{name} has not been exported.",
                    f"npprune export {folder(v)} --out {folder(v)}/model.onnx",
                )
            )
            continue
        for x in numbers.exports(v):
            section.items.append(_parity(name, x))
            if candidates := x.details.get("candidates"):
                section.items.append(_candidates(name, x, candidates))
    rows = [(v, t) for v in result.variants for t in numbers.latencies(v)]
    if rows:
        section.items.append(_latency_table(result, rows))
    return section


def _parity(name: str, x: ExportRecord) -> Table:
    """How one file agrees with the network, and what it was run on."""
    onnx = x.format == "onnx"
    what = f"{x.precision}, opset {x.opset}" if onnx else text.FORMATS.get(x.format, x.format)
    ran = text.PROVIDERS.get(x.provider, x.provider)
    words = f"{name}: {x.file} ({what}, {text.size(x.bytes)}) "
    words += f"in ONNX Runtime ({ran}" if onnx else f"read by {ran}"
    asked = x.details.get("provider_asked")
    if onnx:
        words += f"; asked for: {asked})" if asked else ")"
    words += " against PyTorch on real images, "
    if x.tolerance >= 0:
        words += f"tolerance {text.scientific(x.tolerance, 0)}: "
    error, agrees = text.PARITY["features" in x.details]
    before, after = x.details.get("torch_top1"), x.details.get("onnx_top1")
    if before is not None and after is not None:
        allowed = x.details.get("max_drop")
        limit = f", at most {text.fixed(allowed)} points lower allowed" if allowed else ""
        words += f"top-1 {text.percent(after)}, PyTorch {text.percent(before)}{limit}: "
    return Table(
        ["batch", "images", f"largest {error}", agrees],
        [
            cells(
                str(p.batch),
                text.count(p.images),
                text.scientific(p.max_relative_error),
                text.agrees(p),
            )
            for p in x.parity
        ],
        caption=words + ("passed." if x.passed else "FAILED."),
    )


def _candidates(name: str, x: ExportRecord, candidates: list[dict[str, Any]]) -> Table:
    """The ways of quantising that were tried."""
    return Table(
        ["way", "size", "cosine" if "features" in x.details else "top-1", "kept"],
        [
            cells(
                str(c["name"]),
                text.size(c["bytes"]),
                text.percent(c["score"]),
                "yes" if c["chosen"] else "",
            )
            for c in candidates
        ],
        caption=f"{name}: {x.file}, the ways of quantising compared on images that none of them "
        "was calibrated on. Of equal accuracies the smaller file is kept.",
    )


def _latency_table(result: Result, rows: list[tuple[Variant, Latency]]) -> Table:
    several = len(result.variants) > 1
    out = []
    for v, t in rows:
        macs = numbers.macs_ratio(result, v)
        label = text.where(t)
        out.append(
            cells(
                f"{text.clean(v.name)}: {label}" if several else label,
                f"{text.milliseconds(t.dense_ms)} ± {text.milliseconds(t.dense_iqr_ms)}",
                f"{text.milliseconds(t.pruned_ms)} ± {text.milliseconds(t.pruned_iqr_ms)}",
                f"{text.fixed(t.ratio, 2)} ({text.fixed(t.ratio_low, 2)}"
                f"–{text.fixed(t.ratio_high, 2)})",
                text.fixed(macs, 2),
                text.percent(macs / t.ratio, 0) if t.ratio else text.DASH,
                f"{t.threads}, {t.runs}",
            )
        )
    return Table(
        [
            "timed in",
            "dense",
            "pruned",
            "latency ratio (quartiles)",
            "MACs ratio",
            "of the MACs' speed-up",
            "threads, runs",
        ],
        out,
        caption="Median ± interquartile range per batch, dense and pruned timed in turn after a "
        "warm-up. Ratios are pruned over dense; the last but one column is the measured speed-up "
        "over the one that the MACs promise.",
    )


def _widths(result: Result) -> Section:
    section = Section("widths", "What was kept in each block")
    if not result.variants:
        return section
    dense = result.model.widths
    shown = result.variants[:VARIANTS_DRAWN]
    panels = [(text.clean(v.name), v.prune.widths, v.prune.protected) for v in shown]
    columns = ["block", "dense"]
    for v in shown:
        name = text.clean(v.name) if len(shown) > 1 else ""
        columns += [f"{name} kept".strip(), f"{name} share".strip()]
        columns += [f"{name} path neurons".strip()] if any(v.prune.protected) else []
        columns += [f"{name} class token's own".strip()] if v.model.cls_widths else []
    rows = []
    for b, width in enumerate(dense):
        row = [str(b), text.count(width)]
        for v in shown:
            row += [text.count(v.prune.widths[b]), text.percent(v.prune.widths[b] / width)]
            row += [text.count(v.prune.protected[b])] if any(v.prune.protected) else []
            row += [text.own(v.model.cls_widths[b])] if v.model.cls_widths else []
        rows.append(cells(*row))
    draw = partial(figures.widths, dense, panels, "Kept hidden units per block", "widths")
    section.items.append(
        Figure(
            "Hidden units kept in each block",
            "Outline: dense. Filled: kept. A short bar is a block that gave much.",
            draw,
            Table(columns, rows),
        )
    )
    for i, v in enumerate(shown):
        if attention := text.attention(v.prune):
            section.items.append(
                Table(
                    ["block", "heads", f"{text.dimensions(v.prune)} of a head"],
                    [cells(str(b), *row) for b, row in enumerate(attention)],
                    caption=f"Attention kept in {text.clean(v.name)}.",
                )
            )
        name = text.clean(v.name)
        if merged := v.model.merged:
            gone = [sum(merged[:b]) for b in range(len(merged))]
            table = Table(
                ["block", "tokens merged", "merged before it"],
                [
                    cells(str(b), text.count(r), text.count(g))
                    for b, (r, g) in enumerate(zip(merged, gone, strict=True))
                ],
                caption=f"Patch tokens merged in {name}, between attention and MLP.",
            )
            images = v.measured.merged if v.measured is not None else []
            section.items.append(
                Figure(
                    f"Merged patches in {name}",
                    "Left: what the network sees. Right: every token in the mean colour of the "
                    "patches that it holds; patches that say the same have become one.",
                    partial(merging.draw, images, f"merged-{i}"),
                    table,
                )
                if images
                else table
            )
        if len(axes := text.axes(v.prune)) > 1:
            section.items.append(
                Table(
                    ["axis", "share of the dense MACs", "predicted harm"],
                    [cells(*row) for row in axes],
                    caption=f"What each axis gave in {name}, one after the other: harm is the KL "
                    "divergence from the dense network's predictions, measured with that change "
                    "alone.",
                )
            )
    if len(result.variants) > len(shown):
        rest = len(result.variants) - len(shown)
        section.items.append(Paragraph(f"{text.plural(rest, 'more network')} not drawn."))
    return section


# ---------------------------------------------------------------- classes


def _prefix(result: Result, variant: Variant) -> str:
    return f"{text.clean(variant.name)}: " if len(result.variants) > 1 else ""


def _flipped(result: Result) -> Section:
    done = _evaluated(result)[:VARIANTS_DRAWN]
    found = [flipped.gallery(e, f"{_prefix(result, v)}Lost and gained") for v, e in done]
    return Section("flipped", "Who pays", [g for g in found if g is not None])


def _reliability(result: Result) -> Section:
    items = []
    for i, (v, e) in enumerate(_evaluated(result)[:VARIANTS_DRAWN]):
        prefix = _prefix(result, v)
        items.append(reliability.curve(e, prefix, f"reliability-{i}"))
        items.append(reliability.deviations(e, prefix, f"deviation-{i}"))
    return Section(
        "reliability",
        "Probabilities: calibration and deviation",
        [f for f in items if f is not None],
    )


def _classes(result: Result) -> Section:
    section = Section("classes", "Classes hit worst, and least")
    for v, evaluation in _evaluated(result):
        ranked = sorted(evaluation.classes, key=_harm)
        ranked = [c for c in ranked if c.images]
        if not ranked:
            continue
        prefix = _prefix(result, v)
        worst = ranked[:WORST]
        best = ranked[WORST:][-BEST:][::-1]
        drawn = [(text.clean(c.name), c.dense_top1, c.pruned_top1) for c in worst]
        every = len(worst) == len(ranked)
        which = "All classes, worst first" if every else f"The {WORST} classes that lost most"
        title = prefix + which
        section.items.append(
            Figure(
                title,
                "A dot left of its ring is top-1 that the class lost. Of "
                f"{text.plural(len(ranked), 'class', 'classes')} with images; few images per "
                f"class make single classes uncertain.{_spared(evaluation)}",
                partial(figures.classes, drawn, title, f"classes-{len(section.items)}"),
                _class_table(worst),
            )
        )
        if best:
            title = f"{prefix}The {len(best)} classes that kept or gained most"
            section.items.append(Fold(title, _class_table(best)))
    return section


def _spared(evaluation: Evaluation) -> str:
    """Whether keeping a class's path spares the class, in a sentence."""
    found = evaluation.spared
    if found is None:
        return ""
    verdict = (
        "spared" if found.low > 0 else "hit harder" if found.high < 0 else "not seen to differ"
    )
    return (
        " Classes of whose path more stays are "
        f"{verdict}: rank correlation of path kept and change of probability over {found.n} "
        f"classes {text.fixed(found.value, 2, sign=True)} (95 % "
        f"{text.fixed(found.low, 2, sign=True)} to {text.fixed(found.high, 2, sign=True)})."
    )


def _harm(row: ClassRow) -> tuple[float, float, int]:
    return (row.pruned_top1 - row.dense_top1, row.deviation, row.label)


def _class_table(rows: list[ClassRow]) -> Table:
    columns = ["class", "images", "dense top-1", "pruned top-1", "change", "probability deviation"]
    paths = any(c.path_kept is not None for c in rows)
    return Table(
        columns + ["path kept"] * paths,
        [
            cells(
                f"{text.clean(c.name)} ({c.label})",
                text.count(c.images),
                text.percent(c.dense_top1),
                text.percent(c.pruned_top1),
                text.points(c.pruned_top1 - c.dense_top1),
                text.percent(c.deviation, sign=True),
                *([text.DASH if c.path_kept is None else text.percent(c.path_kept)] * paths),
            )
            for c in rows
        ],
    )


# ---------------------------------------------------------------- paths


def _paths(result: Result) -> list[Section]:
    section = Section("paths", "Neuron paths")
    found = result.discovery
    if found is None:
        section.items.append(
            Missing(
                "No neuron paths were searched in this run.",
                f"npprune discover {result.model.source.architecture} --data folder:TRAIN "
                f"--topk 5 --out reports/{result.name}",
            )
        )
        return [section]
    if any(found.frequency):
        section.items.append(_frequency(found))
    if found.class_paths:
        section.items.append(_class_paths(result, found))
    return [section]


def _frequency(found: DiscoverySummary) -> Figure:
    top = [block[:TOP_NEURONS] for block in found.frequency]
    longest = max(len(block) for block in top)
    strips = [
        (f"block {b}", [(str(n), text.percent(share, 0), share) for n, share in block])
        for b, block in enumerate(top)
    ]
    ranks = [str(i + 1) for i in range(longest)]
    table = Table(
        ["block", *(f"rank {r}" for r in ranks)],
        [
            cells(
                str(b),
                *(f"{n}: {text.percent(share)}" for n, share in block),
                *[text.DASH] * (longest - len(block)),
            )
            for b, block in enumerate(top)
        ],
        caption="Neuron: share of the images whose path holds it.",
    )
    largest = max((share for block in top for _, share in block), default=0.0)
    draw = partial(
        figures.strips, strips, ranks, "rank by frequency", "Path frequency per block", "frequency"
    )
    return Figure(
        "The neurons that paths pass through most often",
        f"Each cell is one neuron of the block: its index and the share of "
        f"{text.plural(found.images, 'image')} whose path (K = {found.topk}) holds it. "
        f"Strongest colour: {text.percent(largest, 0)}. A dark cell is a neuron that many images "
        "share; in an even row they go different ways.",
        draw,
        table,
    )


def _class_paths(result: Result, found: DiscoverySummary) -> Figure:
    names = {c.index: c.name for c in result.classes}
    labels = sorted(found.class_paths)[:CLASSES_DRAWN]
    paths = {label: found.class_paths[label] for label in labels}
    blocks = max(len(p) for p in paths.values())
    firsts = {label: [ks[0] if ks else None for ks in path] for label, path in paths.items()}
    strips = []
    for label in labels:
        row = []
        for b, neuron in enumerate(firsts[label]):
            same = sum(1 for other in firsts.values() if b < len(other) and other[b] == neuron)
            row.append((text.DASH if neuron is None else str(neuron), "", same / len(labels)))
        strips.append((text.clean(names.get(label, f"class {label}")), row))
    columns = [str(b) for b in range(blocks)]
    table = Table(
        ["class", *(f"block {b}" for b in columns)],
        [
            cells(f"{strip[0]} ({label})", *(text.listing(ks, 5) for ks in paths[label]))
            for label, strip in zip(labels, strips, strict=True)
        ],
        caption="The most frequent path neurons of each class, the first one drawn.",
    )
    total = len(found.class_paths)
    part = (
        f" {len(labels)} of {text.plural(total, 'class', 'classes')} are shown; all are in "
        "result.json."
        if total > len(labels)
        else ""
    )
    draw = partial(
        figures.strips, strips, columns, "block", "Preferred path of each class", "class-paths"
    )
    return Figure(
        "The preferred path of each class",
        "The most frequent path neuron of the class in each block. The stronger its colour, "
        f"the more of the classes shown share that neuron; a pale row is a path of its own.{part}",
        draw,
        table,
    )
