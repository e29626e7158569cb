"""Numbers as text, in one way for the HTML page, the Markdown file and the terminal.

Proportions are shown in %, differences of proportions in points, relative changes in %,
multiply-accumulates in G or M, parameters in M, files in bytes with a binary prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from npprune.errors import plural
from npprune.records import (
    DataInfo,
    DiscoverySummary,
    ExportRecord,
    HealSummary,
    Latency,
    Mean,
    ParityRow,
    Preprocessing,
    PruneSummary,
    Rate,
)

DASH = "–"
MINUS = "−"

PROVIDERS = {
    "CPUExecutionProvider": "CPU",
    "CUDAExecutionProvider": "CUDA",
    "TensorrtExecutionProvider": "TensorRT",
    "CoreMLExecutionProvider": "Core ML",
}
FORMATS = {
    "onnx": "ONNX file",
    "torch": "torch archive",
    "timm": "timm checkpoint",
    "transformers": "transformers folder",
}
RUNTIMES = {
    "onnxruntime": "ONNX Runtime",
    "torch": "PyTorch",
    "torch-compile": "torch.compile",
    "openvino": "OpenVINO",
}


def when(stamp: str) -> str:
    """A time of ISO 8601 in UTC, to the minute and for people; others as they are."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)[:\d.]*(?:\+00:00|Z)", stamp)
    return f"{found[1]}, {found[2]} UTC" if found else stamp


def fixed(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A number with so many decimals and a true minus; a dash for None, NaN and infinity."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = round(value, digits) + 0.0  # no negative zero
    text = f"{rounded:+,.{digits}f}" if sign and rounded else f"{rounded:,.{digits}f}"
    return text.replace("-", MINUS)


def percent(value: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A share in [0, 1] (or a relative change) as `62.0 %`."""
    text = fixed(None if value is None else 100 * value, digits, sign=sign)
    return text if text == DASH else f"{text} %"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of two shares in percentage points: `−20.5 points`."""
    text = fixed(None if value is None else 100 * value, digits, sign=True)
    return text if text == DASH else f"{text} points"


def span(low: float, high: float, *, scale: float = 100, sign: bool = False) -> str:
    """The ends of a 95 % interval: `95 % 58.6–65.3`; signed ends are joined by `to`."""
    a, b = fixed(low * scale, sign=sign), fixed(high * scale, sign=sign)
    return f"95 % {a} to {b}" if sign else f"95 % {a}–{b}"


def attention(summary: PruneSummary) -> list[tuple[str, str]]:
    """Heads and dimensions of a head that stay in each block, `2 of 3` and `32 of 64`; empty
    where attention is as it was."""
    found = summary.details.get("attention") or {}
    names = ("heads", "query_dims")
    pairs = [(found.get(f"dense_{name}", []), found.get(name, [])) for name in names]
    if all(dense == kept for dense, kept in pairs):
        return []
    columns = [[f"{k} of {d}" for d, k in zip(dense, kept, strict=True)] for dense, kept in pairs]
    return list(zip(*columns, strict=True))


def dimensions(summary: PruneSummary) -> str:
    """Which dimensions of a head `attention` speaks of."""
    return "dimensions" if "value_dims" in summary.details["attention"] else "query/key dimensions"


def own(width: int) -> str:
    """Hidden units of the class token's own in one block: `64`, or `shared`."""
    return count(width) if width else "shared"


def path_neurons(summary: PruneSummary) -> str:
    """`1,204 of 4,130, with 38.0 % of the votes`."""
    kept = sum(summary.protected)
    if (found := summary.details.get("paths")) is None:
        return count(kept)
    return f"{count(kept)} of {count(found['of'])}, with {percent(found['votes'])} of the votes"


AXES = {
    "last block": "last block for what is read",
    "tokens": "tokens",
    "attention": "attention",
    "mlp": "hidden units",
}


def axes(summary: PruneSummary) -> list[tuple[str, str, str]]:
    """Axis, what it took of the dense network's MACs, predicted harm: `tokens`, `−38.0 %`, `0.020
    nats`; empty where MACs were not what the budget counts."""
    found = summary.details.get("axes") or []
    return [
        (
            AXES.get(row["axis"], row["axis"]),
            percent(-row["macs"], sign=True),
            f"{fixed(row['nats'], 3)} {harm_unit(summary)}",
        )
        for row in found
        if row["macs"] or row["nats"]
    ]


def harm_unit(summary: PruneSummary) -> str:
    """What harm is counted in: `nats`, or `relative error` of features."""
    return str(summary.details.get("harm_unit", "nats"))


def divergence(summary: HealSummary) -> str:
    """What healing lowered, and in what."""
    if summary.unit == "nats":
        return "divergence from dense, nats"
    return "relative error of the features"


def agreement(summary: HealSummary) -> tuple[str, str, str, str]:
    """A row: what agrees with the dense network, before and after healing."""
    before, after = summary.before.agreement, summary.after.agreement
    if summary.unit == "nats":
        return "same top-1 as dense", "", percent(before), percent(after)
    return "cosine to dense", "1", fixed(before, 4), fixed(after, 4)


PARITY = {
    False: ("relative logit error", "same top-1"),
    True: ("relative error", "least cosine"),
}
"""Columns of a file's comparison: of logits, of features."""


def agrees(row: ParityRow) -> str:
    """The second of them."""
    return percent(row.top1_agreement) if row.cosine is None else fixed(row.cosine, 6)


def rate_detail(rate: Rate) -> str:
    """`496/800, 95 % 58.6–65.3`."""
    return f"{rate.correct:,}/{rate.total:,}, {span(rate.low, rate.high)}"


def rate(value: Rate) -> str:
    """`62.0 % (496/800, 95 % 58.6–65.3)`."""
    return f"{percent(value.value)} ({rate_detail(value)})"


def change_span(mean: Mean) -> str:
    """The interval of a signed mean share: `95 % −23.4 to −17.6`."""
    return span(mean.low, mean.high, sign=True)


def count(value: int) -> str:
    """An integer with thousands separators."""
    return f"{value:,}".replace("-", MINUS)


def params(value: int) -> str:
    """Parameters: `5.72 M`; in k below a tenth of a million."""
    return f"{value / 1e6:,.2f} M" if value >= 1e5 else f"{value / 1e3:,.1f} k"


def macs(value: int) -> str:
    """Multiply-accumulates of one image: `1.08 G`; in M below a tenth of a billion."""
    return f"{value / 1e9:,.2f} G" if value >= 1e8 else f"{value / 1e6:,.1f} M"


def size(value: int | None) -> str:
    """Bytes with a binary prefix: `21.8 MiB`."""
    if value is None:
        return DASH
    amount = float(value)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}" if unit == "B" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.2f} GiB"


def milliseconds(value: float) -> str:
    """`3.12 ms`, with about three significant digits; seconds from 10 s."""
    if not math.isfinite(value):
        return DASH
    if value >= 1e4:
        return f"{value / 1e3:,.1f} s"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def seconds(value: float) -> str:
    """`0.4 s`, `42 s`, `3 min 05 s`, `1 h 02 min`."""
    if value < 10:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def times(value: float | None) -> str:
    """A ratio: `0.61 ×`."""
    text = fixed(value, 2)
    return text if text == DASH else f"{text} ×"


def relative(pruned: float, dense: float) -> str:
    """The relative change of a cost: `−38.9 %`."""
    return percent(pruned / dense - 1, sign=True) if dense else DASH


def scientific(value: float, digits: int = 1) -> str:
    """A small error: `2.1e−6`."""
    if not math.isfinite(value):
        return DASH
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def significant(value: Any) -> str:
    """A cell whose meaning is unknown here: text as it is, numbers with four digits."""
    if value is None:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return DASH
        mantissa, e, exponent = f"{value:.4g}".partition("e")
        return (f"{mantissa}e{int(exponent)}" if e else mantissa).replace("-", MINUS)
    return str(value)


def listing(values: Sequence[Any], limit: int = 12) -> str:
    """`1, 2, 3 and 40 more`."""
    shown = ", ".join(str(v) for v in values[:limit])
    rest = len(values) - limit
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def clip(text: str, limit: int) -> str:
    """At most `limit` characters on one line, an ellipsis for what was cut."""
    line = clean(text)
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"


def clean(text: str) -> str:
    """One line without control characters: names come from files and may hold anything."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def where(latency: Latency) -> str:
    """What a latency was timed on: `ONNX Runtime, CPU, batch 1`; with the precision of the files
    where that is not float32."""
    return f"{runtime(latency)}, batch {latency.batch}"


def runtime(latency: Latency) -> str:
    """`ONNX Runtime, CPU`, or `ONNX Runtime, CPU, int8`."""
    name = RUNTIMES.get(latency.runtime, latency.runtime)
    where = f"{name}, {PROVIDERS.get(latency.provider, latency.provider)}"
    return f"{where}, {latency.precision}" if latency.precision else where


def export_file(record: ExportRecord) -> str:
    """What an export is called in a list of costs: `ONNX file, fp32`."""
    return f"{FORMATS.get(record.format, record.format)}, {record.precision}"


def preprocessing(p: Preprocessing) -> str:
    """`3 × 224 × 224, bicubic, crop 0.9 (center), mean 0.5 0.5 0.5, std 0.5 0.5 0.5`."""
    shape = " × ".join(str(n) for n in p.input_size)
    mean = " ".join(f"{v:.4g}" for v in p.mean)
    std = " ".join(f"{v:.4g}" for v in p.std)
    crop = f"crop {p.crop_pct:.4g} ({p.crop_mode})"
    return f"{shape}, {p.interpolation}, {crop}, mean {mean}, std {std}"


def integral(found: DiscoverySummary) -> str:
    """`mapped-radau, 6 points (12 in block 0)`."""
    first = f" ({found.first_points} in block 0)" if found.first_points else ""
    return f"{found.quadrature}, {plural(found.points, 'point')}{first}"


def data(info: DataInfo) -> str:
    """`800 images of 100 classes, folder:val`."""
    images = plural(info.images, "image")
    if info.classes == 0:
        return f"{images}, {info.spec}"
    return f"{images} of {plural(info.classes, 'class', 'classes')}, {info.spec}"
