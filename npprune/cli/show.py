"""What each stage found, as tables for people or as the JSON document of `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npprune.cli.console import Output
from npprune.records import (
    Accuracy,
    Benchmark,
    ClassRow,
    DataInfo,
    Evaluation,
    ExportRecord,
    FeatureEvaluation,
    Latency,
    ModelInfo,
    ParityRow,
    PruneSummary,
    Result,
    Variant,
    to_dict,
)
from npprune.report import text

TOKENS = {"cls": "the class token", "patch": "the patch tokens", "all": "all tokens"}
MANY_BLOCKS = 48  # more rows than this are left to the report


# ---------------------------------------------------------------- stages


def discovery(output: Output, result: Result, folder: Path, *, dry_run: bool) -> None:
    """What discovery found and where it lies."""
    output.document("result", to_dict(result))
    rows = [
        ("model", result.model.source.architecture),
        ("network", network(result.model)),
    ]
    found = result.discovery
    if found is not None:
        rows += [
            ("images", data(found.data)),
            ("method", f"{found.method} on {TOKENS.get(found.scope, found.scope)}"),
            ("integral", text.integral(found)),
            ("paths", f"{text.plural(found.images, 'image')}, K = {found.topk} per block"),
        ]
        if found.mean_score is not None:
            score = text.significant(found.mean_score.value)
            spread = text.significant(found.mean_score.standard_error)
            rows.append(("mean score", f"{score} (standard error {spread})"))
        rows.append(("time", text.seconds(found.seconds)))
    output.files(rows)
    if dry_run:
        output.line(f"\ndry run: nothing was computed or written; it would go to {folder}")
        return
    _end(
        output,
        [("run folder", folder), ("result", folder / "result.json")],
        f"npprune prune {folder} --keep 0.5 --out ckpt/{folder.name}_half",
    )


def pruned(output: Output, variant: Variant, folder: Path, *, dry_run: bool) -> None:
    """What stays, block by block."""
    summary = variant.prune
    output.warn(summary.warnings)
    output.document("variant", to_dict(variant))
    _doubts(output, [summary.label_doubt])
    title = "Hidden units" + (" (predicted)" if dry_run else "")
    if len(summary.widths) <= MANY_BLOCKS:
        rows = [
            (str(block), str(dense), str(kept), text.percent(kept / dense, 0), str(protected))
            for block, (dense, kept, protected) in enumerate(
                zip(summary.dense_widths, summary.widths, _protected(summary), strict=True)
            )
        ]
    else:
        rows = []
    dense, kept = sum(summary.dense_widths), sum(summary.widths)
    rows.append(
        ("all", str(dense), str(kept), text.percent(kept / dense), str(sum(_protected(summary))))
    )
    output.table(title, ("block", "dense", "kept", "share", "of paths"), rows)
    if (own := variant.model.cls_widths) is not None:
        output.line()
        few = [(str(block), text.own(width)) for block, width in enumerate(own[:MANY_BLOCKS])]
        output.table("Hidden units of the class token's own", ("block", "own"), few)
    if attention := text.attention(summary):
        output.line()
        each = [(str(block), *row) for block, row in enumerate(attention[:MANY_BLOCKS])]
        output.table("Attention", ("block", "heads", text.dimensions(summary)), each)
    if len(axes := text.axes(summary)) > 1:
        output.line()
        output.table("What each axis gave", ("axis", "MACs", "harm"), axes)
    facts = [
        ("choice", f"{summary.criterion}, {summary.selection}"),
        ("compensation", summary.compensation),
        ("network", network(variant.model)),
    ]
    if any(summary.protected):
        facts.insert(1, ("path neurons kept", text.path_neurons(summary)))
    if (merged := variant.model.merged) is not None:
        facts.insert(2, ("tokens merged", " ".join(map(str, merged)) + " per block"))
    if summary.calibration is not None:
        facts.append(("calibration", data(summary.calibration)))
    facts += predicted(summary.predicted)
    if not dry_run:
        facts.append(("time", text.seconds(summary.seconds)))
    _facts(output, facts)
    if dry_run:
        output.line(f"\ndry run: nothing was written; it would go to {folder}")
        return
    _end(
        output,
        [("checkpoint", folder)],
        f"npprune eval {folder} --data folder:PATH",
    )


def healed(output: Output, variant: Variant, folder: Path) -> None:
    """What training brought, on images that were not trained on."""
    output.document("variant", to_dict(variant))
    summary = variant.heal
    if summary is None:
        output.line(f"dry run: nothing was trained or written; it would go to {folder}")
        return
    output.warn(summary.warnings)
    before, after = summary.before, summary.after
    rows = [
        (
            text.divergence(summary),
            "0",
            text.significant(before.divergence_nats),
            text.significant(after.divergence_nats),
        ),
        text.agreement(summary),
    ]
    if summary.dense_top1 is not None and before.top1 is not None and after.top1 is not None:
        dense, pruned = text.percent(summary.dense_top1), text.percent(before.top1)
        rows.append(("top-1", dense, pruned, text.percent(after.top1)))
    title = f"On {text.plural(summary.held_out, 'image')} not trained on"
    output.table(title, ("", "dense", "pruned", "healed"), rows)
    facts = [
        ("images", data(summary.data)),
        (
            "training",
            f"{summary.method}, {summary.epochs:.3g} "
            f"{'epoch' if summary.epochs == 1 else 'epochs'}, {text.plural(summary.steps, 'step')}",
        ),
        ("ended by", summary.stopped),
        ("kept", f"the weights after step {after.step}"),
        ("time", f"{text.seconds(summary.seconds)}, {summary.images_per_second:.3g} images/s"),
    ]
    if summary.unlabelled is not None:
        facts.insert(1, ("unlabelled", text.data(summary.unlabelled)))
    _facts(output, facts)
    _end(output, [("checkpoint", folder)], f"npprune eval {folder} --data folder:PATH")


def class_name(row: ClassRow) -> str:
    """Index and name, short; the index alone where there is no other name."""
    return text.clip(f"{row.label} {row.name}" if row.name != str(row.label) else row.name, 32)


def predicted(found: dict[str, float]) -> list[tuple[str, str]]:
    """What the held-out calibration images say of the smaller network."""
    if not found:
        return []
    if "cosine" in found:
        return _predicted_features(found)
    before, after = text.percent(found["dense_top1"]), text.percent(found["pruned_top1"])
    low, high = (100 * found[key] for key in ("drop_low", "drop_high"))
    where = text.plural(int(found["images"]), "held-out calibration image")
    return [
        (
            "predicted drop",
            f"{100 * found['drop']:.1f} points of top-1 (95 % {low:.1f} to {high:.1f}), by the "
            f"dense network's probabilities on {where}",
        ),
        (
            "on their labels",
            f"top-1 {before} dense, {after} "
            f"({text.span(found['pruned_low'], found['pruned_high'])}) pruned",
        ),
        ("divergence", f"{text.significant(found['divergence_nats'])} nats from dense"),
    ]


def _predicted_features(found: dict[str, float]) -> list[tuple[str, str]]:
    where = text.plural(int(found["images"]), "held-out calibration image")
    rows = []
    for label, kind in (("pooled", ""), ("patch tokens", "patch_")):
        if f"{kind}cosine" in found:
            low, high = (text.fixed(found[f"{kind}cosine_{end}"], 4) for end in ("low", "high"))
            cosine = text.fixed(found[f"{kind}cosine"], 4)
            error = text.fixed(found[f"{kind}relative_error"], 4)
            said = f"cosine to dense {cosine} (95 % {low}–{high}), relative error {error}"
            rows.append((f"features, {label}", said))
    return [*rows, ("predicted on", where)]


def evaluated(
    output: Output, evaluation: Evaluation | FeatureEvaluation, folder: Path, run: Result | None
) -> None:
    """Dense and pruned side by side; with what they cost where the run is still there."""
    from npprune.report.numbers import summary, warnings

    output.document("evaluation", to_dict(evaluation))
    if isinstance(evaluation, Evaluation):
        _doubts(output, [evaluation.label_doubt])
    output.warn(warnings(run) if run is not None else [])
    output.table(
        f"Dense and pruned on {text.plural(evaluation.data.images, 'image')}, with 95 % intervals",
        ("", "dense", "pruned", "change"),
        summary(run).rows if run is not None else evaluation_rows(evaluation),
    )
    classes = evaluation.classes if isinstance(evaluation, Evaluation) else []
    lost = [row for row in classes if row.deviation < 0]
    worst = sorted(lost, key=lambda row: row.deviation)[:5]
    if worst:
        output.line()
        output.table(
            "Classes that lost most",
            ("class", "images", "dense top-1", "pruned top-1", "deviation"),
            [
                (
                    class_name(row),
                    str(row.images),
                    text.percent(row.dense_top1, 0),
                    text.percent(row.pruned_top1, 0),
                    text.percent(row.deviation, sign=True),
                )
                for row in worst
            ],
        )
    _facts(
        output,
        [
            ("images", data(evaluation.data)),
            ("preprocessing", text.preprocessing(evaluation.preprocessing)),
            ("device", evaluation.device),
            ("time", text.seconds(evaluation.seconds)),
        ],
    )
    _end(output, [], f"npprune export {folder}")


def evaluation_rows(
    evaluation: Evaluation | FeatureEvaluation,
) -> list[tuple[str, str, str, str]]:
    """Rows of (label, dense, pruned, change)."""
    if isinstance(evaluation, FeatureEvaluation):
        from npprune.report import features

        return features.table(evaluation) + [latency_row(row) for row in evaluation.latency]
    rows = _accuracy("", evaluation.dense, evaluation.pruned)
    if evaluation.dense_restricted is not None and evaluation.pruned_restricted is not None:
        among = f", among the {len(evaluation.restricted_to or [])} chosen classes"
        rows += _accuracy(among, evaluation.dense_restricted, evaluation.pruned_restricted)
    for name, mean in (
        ("per image", evaluation.probability_deviation),
        ("per class", evaluation.deviation_by_class),
    ):
        value = f"{text.percent(mean.value, sign=True)} ({text.change_span(mean)})"
        rows.append((f"probability deviation, {name}", "", value, ""))
    rows.append(("same top-1 as dense", "", text.rate(evaluation.agreement), ""))
    return rows + [latency_row(row) for row in evaluation.latency]


def _accuracy(what: str, dense: Accuracy, pruned: Accuracy) -> list[tuple[str, str, str, str]]:
    rows = [
        (f"{name}{what}", text.rate(a), text.rate(b), text.points(b.value - a.value))
        for name, a, b in (("top-1", dense.top1, pruned.top1), ("top-5", dense.top5, pruned.top5))
    ]
    a, b = dense.true_probability.value, pruned.true_probability.value
    label = f"true-class probability{what}"
    return [*rows, (label, text.percent(a), text.percent(b), text.points(b - a))]


def latency_row(row: Latency) -> tuple[str, str, str, str]:
    """One timing: median milliseconds per batch."""
    dense, pruned = text.milliseconds(row.dense_ms), text.milliseconds(row.pruned_ms)
    return text.where(row), dense, pruned, text.percent(row.ratio - 1, sign=True)


def exported(output: Output, record: ExportRecord, path: Path) -> None:
    """The file, and how well it agrees."""
    output.document("export", to_dict(record))
    runs = f"ONNX Runtime ({record.provider})" if record.format == "onnx" else record.provider
    features = "features" in record.details
    output.table(
        f"{runs} against PyTorch",
        ("batch", "images", *text.PARITY[features]),
        [
            (
                str(row.batch),
                str(row.images),
                f"{row.max_relative_error:.1e}",
                text.agrees(row),
            )
            for row in record.parity
        ],
    )
    if record.latency:
        output.line()
        output.table("Latency", ("", "dense", "pruned", "change"), map(latency_row, record.latency))
    slow = [row for row in record.latency if row.ratio >= 1 and row.ratio_low >= 1]
    output.warn(f"not faster than dense on this machine: {text.where(row)}" for row in slow)
    candidates = record.details.get("candidates", [])
    if candidates:
        output.line()
        output.table(
            "Ways of quantising, on held-out images",
            ("", "size", "cosine" if features else "top-1", "kept"),
            [
                (c["name"], text.size(c["bytes"]), text.percent(c["score"]), "*" * c["chosen"])
                for c in candidates
            ],
        )
    facts = [("parity", _verdict(record))]
    opset = f" opset {record.opset}" if record.opset else ""
    facts.append(("file", f"{record.format}{opset}, {record.precision}"))
    if "features" in record.details:
        facts.append(("gives", f"features: {record.details['features']}"))
    if "provider_asked" in record.details:
        asked, why = record.details["provider_asked"], record.details.get("provider_reason", "")
        facts.append(("provider", f"{record.provider}, asked for {asked}: {why}"))
    facts.append(("size", text.size(record.bytes)))
    if record.dense_bytes:
        smaller = text.relative(record.bytes, record.dense_bytes)
        facts.append(("dense size", f"{text.size(record.dense_bytes)} ({smaller})"))
    _facts(output, facts)
    if record.passed:
        _end(output, [(text.FORMATS.get(record.format, record.format), path)], None)


def _verdict(record: ExportRecord) -> str:
    """Passed or failed, by what rule, and the accuracies where labels were known."""
    said = ["passed" if record.passed else "failed"]
    if record.tolerance >= 0:
        said.append(f"at most {text.significant(record.tolerance)} is allowed")
    before, after = record.details.get("torch_top1"), record.details.get("onnx_top1")
    if before is not None and after is not None:
        said.append(f"top-1 {text.percent(after)}, PyTorch {text.percent(before)}")
    if record.details.get("max_drop") is not None:
        said.append(f"at most {record.details['max_drop']:g} points lower is allowed")
    return ", ".join(said)


def benchmark(output: Output, found: Benchmark, folder: Path | None) -> None:
    """Two networks side by side."""
    output.document("benchmark", to_dict(found))
    compared = any(row.pruned_agreement is not None for row in found.rows)
    marked = any(row.marks for row in found.rows)
    rows = []
    for row in found.rows:
        t = row.latency
        gain = [text.percent(found.saved / t.ratio, 0)] if found.saved else []
        rows.append(
            (
                f"{text.where(t)}, {text.plural(t.threads, 'thread')}",
                f"{text.milliseconds(t.dense_ms)} (± {text.milliseconds(t.dense_iqr_ms)})",
                f"{text.milliseconds(t.pruned_ms)} (± {text.milliseconds(t.pruned_iqr_ms)})",
                f"{text.fixed(t.ratio, 2)} ({t.ratio_low:.2f}–{t.ratio_high:.2f})",
                *gain,
                f"{text.fixed(row.pruned_images_per_second)} "
                f"({text.fixed(row.dense_images_per_second)})",
                f"{text.size(row.pruned_memory)} ({text.size(row.dense_memory)})"
                if row.pruned_memory is not None
                else text.DASH,
                *([_agreement(row.pruned_agreement)] if compared else []),
                *([row.marks or text.DASH] if marked else []),
            )
        )
    columns = ["timed in", "dense", "pruned", "ratio"]
    columns += ["of MACs' gain"] if found.saved else []
    columns += ["images/s (dense)", "memory (dense)"]
    columns += ["logits off, same top-1"] if compared else []
    columns += ["marks"] if marked else []
    output.table(f"{found.pruned} compared with {found.dense}: median (spread)", columns, rows)
    facts = [("not here", f"{name}: {why}") for name, why in found.absent.items()]
    if found.macs_ratio is not None:
        facts.insert(0, ("MACs ratio", text.fixed(found.macs_ratio, 2)))
    if any(row.noisy for row in found.rows):
        facts.append(("noisy", "a time or the ratio changed by more than 5 % when repeated"))
    if any(row.launch_bound for row in found.rows):
        facts.append(
            ("launch-bound", "most of the time does not grow with the batch: MACs cannot show")
        )
    if facts:
        _facts(output, facts)
    if folder is not None:
        _end(output, [("JSON", folder / "bench.json"), ("plot", folder / "bench.svg")], None)


def _agreement(row: ParityRow | None) -> str:
    """With PyTorch: `1.2e-06, 100.0 %`."""
    if row is None:
        return text.DASH
    return f"{text.scientific(row.max_relative_error)}, {text.percent(row.top1_agreement)}"


def result(
    output: Output,
    found: Result | Variant | Evaluation | FeatureEvaluation | ExportRecord,
    root: Path,
    *,
    also: Sequence[tuple[str, Path]] = (),
) -> None:
    """The whole line: every variant, dense against pruned, and where things lie, `also` among
    them; or what one stage of it found, where that could not be stored."""
    from npprune.report import summary
    from npprune.report.numbers import doubts

    if isinstance(found, Evaluation | FeatureEvaluation):
        return evaluated(output, found, root, None)
    if isinstance(found, ExportRecord):
        return exported(output, found, root)
    if isinstance(found, Variant):
        return pruned(output, found, root, dry_run=False)
    if output.unstored is not None:
        return discovery(output, found, root, dry_run=False)
    output.document("result", to_dict(found))
    _doubts(output, doubts(found))
    for variant in found.variants:
        output.warn(variant.prune.warnings)
    shown = summary(found)
    output.warn(shown.notices)
    output.table(f"{found.name}, with 95 % intervals", shown.columns, shown.rows)
    folder = root / "reports" / found.name
    if not folder.is_dir():  # without discovery, the checkpoint's folder is the run's
        folder = root / "ckpt" / found.name
    places: list[tuple[str, Path]] = [("HTML report", folder / "report.html")]
    for variant in found.variants:
        checkpoint = _relative(folder / variant.checkpoint)
        places.append(("checkpoint", checkpoint))
        if variant.export is not None:
            places.append(("ONNX file", checkpoint / variant.export.file))
    _end(output, [*places, *also], None)


# ---------------------------------------------------------------- pieces


def network(info: ModelInfo) -> str:
    """Size in a few words."""
    blocks = text.plural(len(info.widths), "block")
    return f"{blocks}, {text.params(info.params)} parameters, {text.macs(info.macs)} MACs"


def data(info: DataInfo) -> str:
    """Where images came from, how their labels were found, how many could not be read."""
    skipped = f", {text.count(len(info.skipped))} unreadable skipped" if info.skipped else ""
    return f"{text.data(info)}, labels by {info.label_rule}{skipped}"


def _doubts(output: Output, lines: Sequence[str]) -> None:
    """The first lines of a result whose labels are probably wrong."""
    said = [line for line in lines if line]
    for line in said:
        output.line(f"warning: {line}")
    if said:
        output.line()
    if output.as_json:
        output.warn(said)


def _protected(summary: PruneSummary) -> Sequence[int]:
    return summary.protected or [0] * len(summary.widths)


def _relative(path: Path) -> Path:
    """A path without `..`, below the current folder where it lies there."""
    full = path.resolve()
    here = Path.cwd()
    return full.relative_to(here) if full.is_relative_to(here) else full


def _facts(output: Output, rows: Sequence[tuple[str, str]]) -> None:
    output.line()
    output.files(rows)


def _end(output: Output, places: Sequence[tuple[str, Path]], following: str | None) -> None:
    """Where things lie, and what comes next; nothing where it could not be stored."""
    if output.unstored is not None:
        return
    if places:
        output.line()
        output.files((name, str(path)) for name, path in places)
    if following:
        output.line()
        output.line(f"next: {following}")
