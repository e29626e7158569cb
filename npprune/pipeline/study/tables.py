"""The tables and plots made of the rows of a study.

Rows that differ in the seed alone are one line of the table: the mean over seeds. All differences
are paired over the evaluation images, which every row has seen.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from npprune.core.metrics import mean_interval
from npprune.criteria import CRITERIA
from npprune.errors import plural
from npprune.pipeline.study.rows import Setting, StudyDense, StudyRow
from npprune.records import Analysis, Mean, Rate
from npprune.report import text
from npprune.report.analyses import pareto

Row = list[str | int | float | None]
HEALED = ["healed, %", "from", "to", "gain, points", "from", "to", "healed KL, nats", "healing, s"]


def _values(correct: str) -> Tensor:
    return torch.tensor([float(c) for c in correct], dtype=torch.float64)


@dataclass
class _Line:
    """The rows of all seeds of one setting."""

    rows: list[StudyRow]

    @property
    def setting(self) -> Setting:
        return self.rows[0].setting

    @cached_property
    def right(self) -> Tensor:
        """Per image, the share of the seeds that got it right, [n]."""
        return torch.stack([_values(row.correct) for row in self.rows]).mean(0)

    @cached_property
    def healed(self) -> Tensor | None:
        """`right` after healing; None where a row was not healed."""
        if not all(row.healed_correct for row in self.rows):
            return None
        return torch.stack([_values(row.healed_correct) for row in self.rows]).mean(0)

    @property
    def top1(self) -> float:
        return float(self.right.mean())

    @property
    def ends(self) -> tuple[float, float]:
        """The 95 % interval of top-1: Wilson's for one seed, else that of the mean over images."""
        return self._ends(self.rows[0].top1, self.right)

    @property
    def healed_ends(self) -> tuple[float, float]:
        """The same of `healed`."""
        assert self.healed is not None
        return self._ends(self.rows[0].healed, self.healed)

    def _ends(self, first: Rate | None, right: Tensor) -> tuple[float, float]:
        if len(self.rows) == 1 and first is not None:
            return first.low, first.high
        found = mean_interval(right)
        return found.low, found.high

    def spread(self) -> float | None:
        """Standard deviation of top-1 over seeds."""
        tops = [row.top1.value for row in self.rows if row.top1 is not None]
        return statistics.stdev(tops) if len(tops) > 1 else None

    def mean(self, what: Callable[[StudyRow], float]) -> float:
        return statistics.fmean(what(row) for row in self.rows)

    def against(self, other: Tensor) -> Mean:
        """Paired difference of top-1."""
        return mean_interval(self.right - other)


def analyses(
    found: Sequence[StudyRow],
    missing: Sequence[Setting],
    dense: StudyDense | None,
    *,
    calibration: str,
    val: str,
    classes: Sequence[int] | None,
    paths: bool,
) -> dict[str, Analysis]:
    """Everything a report shows of a study."""
    lines = _lines([row for row in found if not row.refused])
    said = _said(found, missing, dense, lines, calibration, val, classes)
    if dense is not None and dense.label_doubt:
        said = f"{dense.label_doubt}. {said}"
    if dense is None or not lines:
        axes = any(s.axes != "mlp" for s in missing)
        columns = ["kept", *_words(paths, axes), "seed"]
        rows: list[Row] = [[s.kept, *_word(s, paths, axes), s.seed] for s in missing]
        return {"study": Analysis("Study", said, columns, rows)}
    out = {"study": _table(lines, dense, said, paths)}
    if any(row.latency is not None for line in lines for row in line.rows):
        out["study-latency"] = _latency(lines, dense)
    if paths and (table := _paths(lines)) is not None:
        out["study-paths"] = table
    return out


def _lines(rows: Sequence[StudyRow]) -> list[_Line]:
    """One a setting; budgets descending, the best first within a budget."""
    groups: dict[Any, list[StudyRow]] = {}
    for row in rows:
        groups.setdefault(row.setting.group, []).append(row)
    lines = [_Line(group) for group in groups.values()]
    return sorted(lines, key=lambda x: (x.setting.unit != "neurons", -x.setting.keep, -x.top1))


def _series(s: Setting) -> str:
    """Rows that are one line of the picture."""
    return s.label if s.axes == "mlp" else f"{s.label}, {s.axes}"


def _words(paths: bool, axes: bool) -> list[str]:
    more = [*(["path neurons"] if paths else []), *(["axes"] if axes else [])]
    return ["criterion", *more, "selection", "compensation"]


def _word(s: Setting, paths: bool, axes: bool) -> list[str]:
    first = ["kept first" if s.protect else "not used"] if paths else []
    if paths and not s.protect and CRITERIA[s.criterion].paths:
        first = ["criterion"]
    return [s.criterion, *first, *([s.axes] if axes else []), s.selection, s.compensation]


def _table(lines: list[_Line], dense: StudyDense, said: str, paths: bool) -> Analysis:
    before = _values(dense.correct)
    axes = any(line.setting.axes != "mlp" for line in lines)
    seeds = any(len(line.rows) > 1 for line in lines)
    timed = any(row.latency is not None for line in lines for row in line.rows)
    trained = any(line.healed is not None for line in lines)
    columns = [
        "kept", *_words(paths, axes), "top-1, %", "from", "to",
        *(["seeds", "±, seeds"] if seeds else []),
        "to dense, points", "from", "to", "to best, points", "from", "to", "KL, nats", "MACs, %",
        "parameters, M", *(["latency, %"] if timed else []), "seconds",
        *(HEALED if trained else []),
    ]  # fmt: skip
    rows: list[Row] = []
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    best: dict[str, _Line] = {}
    for line in lines:
        s = line.setting
        top = best.setdefault(s.kept, line)  # the first of its budget is the best
        low, high = line.ends
        macs = 100 * line.mean(lambda r: r.macs) / dense.macs
        kl = line.mean(lambda r: r.divergence.value if r.divergence is not None else 0.0)
        spread = line.spread()
        rows.append([
            s.kept, *_word(s, paths, axes),
            _percent(line.top1), _percent(low), _percent(high),
            *([len(line.rows), None if spread is None else _percent(spread)] if seeds else []),
            *_points(line.against(before)),
            *(_points(line.against(top.right)) if line is not top else [0.0, None, None]),
            kl, round(macs, 1), round(line.mean(lambda r: r.params) / 1e6, 3),
            *([_ratio(line)] if timed else []),
            line.mean(lambda r: r.seconds), *(_healing(line) if trained else []),
        ])  # fmt: skip
        points.setdefault(_series(s), []).append((macs, 100 * line.top1, 100 * low, 100 * high))
    return pareto(
        "Study", points, x_label="MACs in % of dense", columns=columns, rows=rows,
        dense=100 * dense.top1.value, text=said,
    )  # fmt: skip


def _healing(line: _Line) -> list[float | None]:
    """Top-1 after healing, what that gained over the same images, and its seconds."""
    if line.healed is None:
        return [None] * len(HEALED)
    low, high = line.healed_ends
    return [
        _percent(float(line.healed.mean())), _percent(low), _percent(high),
        *_points(mean_interval(line.healed - line.right)),
        statistics.fmean(d.value for r in line.rows if (d := r.healed_divergence) is not None),
        round(line.mean(lambda r: r.healing_seconds), 1),
    ]  # fmt: skip


def _latency(lines: list[_Line], dense: StudyDense) -> Analysis:
    """Accuracy against measured latency."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    rows: list[Row] = []
    for line in lines:
        ratio, timed = _ratio(line), [r.latency for r in line.rows if r.latency is not None]
        if ratio is None:
            continue
        low, high = line.ends
        points.setdefault(_series(line.setting), []).append(
            (ratio, 100 * line.top1, 100 * low, 100 * high)
        )
        rows.append([
            line.setting.kept, line.setting.how, _percent(line.top1),
            ratio, _percent(statistics.fmean(t.ratio_low for t in timed)),
            _percent(statistics.fmean(t.ratio_high for t in timed)),
            round(statistics.fmean(t.pruned_ms for t in timed), 3),
            round(statistics.fmean(t.dense_ms for t in timed), 3),
        ])  # fmt: skip
    one = next(r.latency for line in lines for r in line.rows if r.latency is not None)
    columns = [
        "kept", "setting", "top-1, %", "latency, % of dense", "lower quartile", "upper quartile",
        "pruned, ms", "dense, ms",
    ]  # fmt: skip
    return pareto(
        "Accuracy against measured latency", points, x_label="latency in % of dense",
        columns=columns, rows=rows, dense=100 * dense.top1.value,
        text=f"{one.provider} in ONNX Runtime, batch {one.batch}, "
             f"{plural(one.threads, 'thread')}; every "
        "network was timed in turn with the dense one, and the ratio is the median of the pairs.",
    )  # fmt: skip


def _paths(lines: list[_Line]) -> Analysis | None:
    """What neuron paths are worth: each use of them compared with the best of the others."""
    others: dict[Any, _Line] = {}
    for line in lines:  # the best first
        s = line.setting
        if not s.protect and not CRITERIA[s.criterion].paths:
            others.setdefault((s.kept, s.axes, s.selection, s.compensation), line)
            others.setdefault((s.kept, s.axes, s.selection, s.compensation, s.criterion), line)
    rows: list[Row] = []
    verdicts = {"better": 0, "worse": 0, "not told apart": 0}
    for line in lines:
        s = line.setting
        if not s.protect and not CRITERIA[s.criterion].paths:
            continue
        place = (s.kept, s.axes, s.selection, s.compensation)
        # path neurons first: against the same criterion without; as the criterion: against the best
        other = others.get((*place, s.criterion)) or others.get(place)
        if other is None:
            continue
        change = line.against(other.right)
        verdict = "better" if change.low > 0 else "worse" if change.high < 0 else "not told apart"
        verdicts[verdict] += 1
        rows.append([
            s.kept, s.label, other.setting.criterion, s.selection, s.compensation,
            verdict, _percent(line.top1), _percent(other.top1), *_points(change),
        ])  # fmt: skip
    if not rows:
        return None
    counted = ", ".join(f"{name} {n}" for name, n in verdicts.items())
    return Analysis(
        "What neuron paths bring",
        "Path neurons kept first are compared with the same criterion without them; a path score "
        "as the criterion with the best criterion that reads no paths. Same budget, selection and "
        f"compensation; differences are paired over the images. Of {len(rows)} comparisons: "
        f"{counted}. At 95 % about one in twenty differs by chance.",
        ["kept", "with paths", "without", "selection", "compensation", "verdict", "with, %",
         "without, %", "difference, points", "from", "to"],
        rows,
    )  # fmt: skip


def _said(
    found: Sequence[StudyRow],
    missing: Sequence[Setting],
    dense: StudyDense | None,
    lines: Sequence[_Line],
    calibration: str,
    val: str,
    classes: Sequence[int] | None,
) -> str:
    """What the table does not say itself."""
    parts = []
    if dense is not None:
        parts.append(
            f"Every row was fitted on the same {plural(dense.calibration, 'image')} of "
            f"{calibration} and "
            f"measured on the same {plural(dense.top1.total, 'image')} of {val}; "
            + (
                "the healed columns are after a short training on the calibration images."
                if any(line.healed is not None for line in lines)
                else "no training."
            )
        )
        among = f" among the {len(classes)} chosen classes" if classes is not None else ""
        parts.append(
            f"Dense top-1{among}: {text.rate(dense.top1)}"
            + (f", over all classes {text.rate(dense.top1_all)}" if classes is not None else "")
            + f"; {text.macs(dense.macs)} MACs, {text.params(dense.params)} parameters."
        )
    if lines:
        parts.append(
            "Intervals are 95 %, over images; differences are paired. The best of a budget was "
            "found on the same images that it is measured on. Seconds are those of a run of that "
            "row alone (statistics, scores, harm, compensation, surgery), whatever the rows shared."
        )
    if any(len(line.rows) > 1 for line in lines):
        parts.append(
            "Lines of several seeds are their mean, with its standard deviation over them; where "
            "nothing is drawn there is one."
        )
    parts += [f"Not possible: {row.setting.name}: {row.refused}." for row in found if row.refused]
    if missing:
        parts.append(f"Not computed yet: {plural(len(missing), 'row')}.")
    return " ".join(parts)


def _percent(share: float) -> float:
    return round(100 * share, 2)


def _points(change: Mean) -> list[float]:
    return [_percent(change.value), _percent(change.low), _percent(change.high)]


def _ratio(line: _Line) -> float | None:
    timed = [row.latency.ratio for row in line.rows if row.latency is not None]
    return _percent(statistics.fmean(timed)) if timed else None
