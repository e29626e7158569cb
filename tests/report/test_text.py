"""Numbers as text."""

from __future__ import annotations

import math

import pytest

from npprune.report import text
from tests.helpers import report_example as example


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (text.rate(example.rate(496, 800)), "62.0 % (496/800, 95 % 58.6–65.3)"),
        (text.percent(-0.0001), "0.0 %"),
        (text.percent(-0.312, sign=True), "−31.2 %"),
        (text.percent(0.0, sign=True), "0.0 %"),
        (text.percent(None), "–"),
        (text.percent(math.nan), "–"),
        (text.points(0.205), "+20.5 points"),
        (text.points(-0.205), "−20.5 points"),
        (text.span(-0.1, 0.2, sign=True), "95 % −10.0 to +20.0"),
        (text.params(5_717_416), "5.72 M"),
        (text.params(38_600), "38.6 k"),
        (text.macs(1_258_000_000), "1.26 G"),
        (text.macs(898_000_000), "0.90 G"),
        (text.macs(12_340_000), "12.3 M"),
        (text.size(512), "512 B"),
        (text.size(22_880_114), "21.8 MiB"),
        (text.size(3 * 1024**3), "3.00 GiB"),
        (text.size(None), "–"),
        (text.milliseconds(9.84), "9.84 ms"),
        (text.milliseconds(121.3), "121 ms"),
        (text.milliseconds(12_000), "12.0 s"),
        (text.seconds(4.04), "4.0 s"),
        (text.seconds(185), "3 min 05 s"),
        (text.seconds(3725), "1 h 02 min"),
        (text.times(0.612), "0.61 ×"),
        (text.relative(5, 0), "–"),
        (text.count(-1234), "−1,234"),
        (text.plural(1, "class", "classes"), "1 class"),
        (text.plural(1200, "image"), "1,200 images"),
        (text.scientific(2.14e-6), "2.1e−6"),
        (text.scientific(1e-4, 0), "1e−4"),
        (text.significant(True), "yes"),
        (text.significant(123456.0), "1.235e5"),
        (text.significant(-0.00012), "−0.00012"),
        (text.significant(None), "–"),
        (text.listing(list(range(5)), 3), "0, 1, 2 and 2 more"),
        (text.clip("a" * 9, 5), "aaaa…"),
        (text.clean("a\nb\x00\ud800"), "a b"),
        (
            text.preprocessing(example.preprocessing()),
            "3 × 224 × 224, bicubic, crop 0.9 (center), mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        ),
        (text.when("2026-11-27T20:38:01+00:00"), "2026-11-27, 20:38 UTC"),
        (text.when("yesterday"), "yesterday"),
        (text.where(example.latency(16, 1.0, 0.5)), "ONNX Runtime, CPU, batch 16"),
        (text.where(example.latency(1, 1.0, 0.5, "torch")), "PyTorch, cpu, batch 1"),
    ],
)
def test_numbers_read_as_agreed(got: str, want: str) -> None:
    assert got == want
