"""What each stage found, as tables for people or as the JSON document of `--json`.

First what matters (accuracy with its change, cost, measured speed), then the details, then what to
doubt, where things lie, and the next command. Only labels that are probably wrong come before all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from npprune.cli.console import Output
from npprune.records import (
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

if TYPE_CHECKING:
    from npprune.report.numbers import Summary

TOKENS = {"cls": "the class token", "patch": "the patch tokens", "all": "all tokens"}
MARKS = {
    "noisy": "a time or the ratio changed by more than 5 % when repeated",
    "launch-bound": "most of the time does not grow with the batch, and MACs cannot show",
}
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
    output.facts(rows)
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
    output.document("variant", to_dict(variant))
    _doubts(output, [summary.label_doubt])
    output.facts([*predicted(summary.predicted), ("network", network(variant.model))])
    output.line()
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
    ]
    if any(summary.protected):
        facts.insert(1, ("path neurons kept", text.path_neurons(summary)))
    if (merged := variant.model.merged) is not None:
        facts.insert(2, ("tokens merged", " ".join(map(str, merged)) + " per block"))
    if summary.calibration is not None:
        facts.append(("calibration", data(summary.calibration)))
    if not dry_run:
        facts.append(("time", text.seconds(summary.seconds)))
    _facts(output, facts)
    _warn(output, summary.warnings)
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
    before, after = summary.before, summary.after
    rows = [
        text.agreement(summary),
        (
            text.divergence(summary),
            "0",
            text.significant(before.divergence_nats),
            text.significant(after.divergence_nats),
        ),
    ]
    if summary.dense_top1 is not None and before.top1 is not None and after.top1 is not None:
        dense, pruned = text.percent(summary.dense_top1), text.percent(before.top1)
        rows.insert(0, ("top-1", dense, pruned, text.percent(after.top1)))
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
    _warn(output, summary.warnings)
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
    from npprune.report import numbers

    if isinstance(evaluation, FeatureEvaluation):
        output.document("features", to_dict(evaluation))
    else:
        output.document("evaluation", to_dict(evaluation))
        _doubts(output, [evaluation.label_doubt])
    if run is not None:
        _summary(output, numbers.summary(run), "Dense and pruned, with 95 % intervals")
    else:
        output.facts([(folder.name, numbers.brief_accuracy(evaluation))])
        output.line()
        found = [*numbers.accuracies(evaluation), *map(numbers.timing, evaluation.latency)]
        output.table(
            "Dense and pruned, with 95 % intervals",
            ("", "dense", "pruned", "change"),
            [[m.label, *(cell.text for cell in (m.dense, m.pruned, m.change))] for m in found],
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
    _warn(output, numbers.warnings(run) if run is not None else [])
    _end(output, [], f"npprune export {folder}")


def exported(output: Output, record: ExportRecord, path: Path) -> None:
    """The file, and how well it agrees."""
    output.document("export", to_dict(record))
    facts = [("parity", _verdict(record)), ("size", text.size(record.bytes))]
    if record.dense_bytes:
        smaller = text.relative(record.bytes, record.dense_bytes)
        facts.append(("dense size", f"{text.size(record.dense_bytes)} ({smaller})"))
    opset = f" opset {record.opset}" if record.opset else ""
    facts.append(("file", f"{record.format}{opset}, {record.precision}"))
    if "features" in record.details:
        facts.append(("gives", f"features: {record.details['features']}"))
    if "provider_asked" in record.details:
        asked, why = record.details["provider_asked"], record.details.get("provider_reason", "")
        facts.append(("provider", f"{record.provider}, asked for {asked}: {why}"))
    output.facts(facts)
    if record.latency:
        output.line()
        output.table("Latency", ("", "dense", "pruned", "change"), map(_timing, record.latency))
    runs = f"ONNX Runtime ({record.provider})" if record.format == "onnx" else record.provider
    features = "features" in record.details
    output.line()
    output.table(
        f"{runs} against PyTorch",
        ("batch", "images", *text.PARITY[features]),
        [
            (
                str(row.batch),
                str(row.images),
                text.scientific(row.max_relative_error),
                text.agrees(row),
            )
            for row in record.parity
        ],
    )
    if candidates := record.details.get("candidates", []):
        output.line()
        output.table(
            "Ways of quantising, on held-out images",
            ("", "size", "cosine" if features else "top-1", "kept"),
            [
                (c["name"], text.size(c["bytes"]), text.percent(c["score"]), "*" * c["chosen"])
                for c in candidates
            ],
        )
    slow = [row for row in record.latency if row.ratio >= 1 and row.ratio_low >= 1]
    _warn(output, [f"not faster than dense on this machine: {text.where(row)}" for row in slow])
    if record.passed:
        onnx = record.format == "onnx"
        _end(
            output,
            [(text.FORMATS.get(record.format, record.format), path)],
            f"npprune predict {path} IMAGE" if onnx else None,
        )


def _timing(row: Latency) -> tuple[str, str, str, str]:
    dense, pruned = text.milliseconds(row.dense_ms), text.milliseconds(row.pruned_ms)
    return text.where(row), dense, pruned, text.percent(row.ratio - 1, sign=True)


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
    names = [f"{text.where(t)}, {text.plural(t.threads, 'thread')}" for t in _timed(found)]
    output.table(
        f"{found.pruned} compared with {found.dense}: median time of a batch (spread)",
        ["timed in", "dense", "pruned", "ratio", *["of MACs' gain"] * bool(found.saved)],
        [
            (
                name,
                f"{text.milliseconds(t.dense_ms)} (± {text.milliseconds(t.dense_iqr_ms)})",
                f"{text.milliseconds(t.pruned_ms)} (± {text.milliseconds(t.pruned_iqr_ms)})",
                f"{text.fixed(t.ratio, 2)} ({t.ratio_low:.2f}–{t.ratio_high:.2f})",
                *([text.percent(found.saved / t.ratio, 0)] if found.saved else []),
            )
            for name, t in zip(names, _timed(found), strict=True)
        ],
    )
    compared = any(row.pruned_agreement is not None for row in found.rows)
    output.line()
    output.table(
        f"{found.pruned}, then {found.dense}"
        + (f"; agreement of {found.pruned} with PyTorch" if compared else ""),
        [
            "timed in",
            "images/s",
            "start-up",
            "peak memory",
            *(["logits off by", "same top-1"] if compared else []),
        ],
        [
            (
                name,
                f"{text.fixed(row.pruned_images_per_second)} "
                f"({text.fixed(row.dense_images_per_second)})",
                text.DASH
                if row.pruned_start_ms is None or row.dense_start_ms is None
                else f"{text.milliseconds(row.pruned_start_ms)} "
                f"({text.milliseconds(row.dense_start_ms)})",
                f"{text.size(row.pruned_memory)} ({text.size(row.dense_memory)})"
                if row.pruned_memory is not None
                else text.DASH,
                *(_agreement(row.pruned_agreement) if compared else []),
            )
            for name, row in zip(names, found.rows, strict=True)
        ],
    )
    facts = [("not here", f"{name}: {why}") for name, why in found.absent.items()]
    if found.macs_ratio is not None:
        said = "; 100 % of its gain: the time fell by as much" if found.saved else ""
        facts.insert(0, ("MACs ratio", text.fixed(found.macs_ratio, 2) + said))
    for mark, said in MARKS.items():
        if marked := [n for n, row in zip(names, found.rows, strict=True) if mark in row.marks]:
            facts.append((mark, f"{'; '.join(marked)}: {said}"))
    if facts:
        _facts(output, facts)
    if folder is not None:
        _end(output, [("JSON", folder / "bench.json"), ("plot", folder / "bench.svg")], None)


def _timed(found: Benchmark) -> list[Latency]:
    return [row.latency for row in found.rows]


def _agreement(row: ParityRow | None) -> tuple[str, str]:
    """With PyTorch: `1.2e-06`, `100.0 %`."""
    if row is None:
        return text.DASH, text.DASH
    return text.scientific(row.max_relative_error), text.percent(row.top1_agreement)


def result(
    output: Output,
    found: Result | Variant | Evaluation | FeatureEvaluation | ExportRecord,
    root: Path,
    *,
    also: Sequence[tuple[str, Path]] = (),
) -> None:
    """The whole line: every variant, dense against pruned, and where things lie, `also` among
    them; or what one stage of it found, where that could not be stored."""
    from npprune.report.numbers import doubts, summary, warnings

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
    _summary(output, summary(found), f"{found.name}, with 95 % intervals")
    _warn(output, warnings(found))
    folder = root / "reports" / found.name
    if not folder.is_dir():  # without discovery, the checkpoint's folder is the run's
        folder = root / "ckpt" / found.name
    places: list[tuple[str, Path]] = [("HTML report", folder / "report.html")]
    following = None
    for variant in found.variants:
        checkpoint = _relative(folder / variant.checkpoint)
        places.append(("checkpoint", checkpoint))
        following = f"npprune export {checkpoint}"
        if (export := variant.export) is not None:
            file = checkpoint / export.file
            places.append((text.FORMATS.get(export.format, export.format), file))
            following = f"npprune predict {file} IMAGE" if export.format == "onnx" else None
    _end(output, [*places, *also], following)


# ---------------------------------------------------------------- pieces


def _summary(output: Output, shown: Summary, title: str) -> None:
    """A line for each network, the numbers looked for first, the others."""
    if shown.brief:
        output.facts(shown.brief)
        output.line()
    output.table(title, shown.columns, shown.rows)
    if shown.more and len(shown.brief) == 1:  # of several networks, the report has them
        output.line()
        output.table("Details", shown.columns, shown.more)


def _warn(output: Output, messages: Sequence[str]) -> None:
    """What to doubt, after what was found."""
    if messages:
        output.line()
    output.warn(messages)


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
        output.text(f"warning: {line}")
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
    output.facts(rows)


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
