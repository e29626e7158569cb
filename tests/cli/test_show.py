"""What is shown of a result, and in which order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from npprune.cli import console, show
from npprune.cli.console import Output, wrapped
from npprune.records import Benchmark, BenchmarkRow, Environment, Mean, Result
from npprune.report.markdown import render_markdown
from tests.helpers import report_example as example

DOUBT = "labels are probably shifted: the dense network is right on 3 of 36 images"


def test_doubtful_labels_are_the_first_line_on_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    variant = example.variant()
    variant.evaluation = replace(example.evaluation(), label_doubt=DOUBT)
    show.evaluated(Output(as_json=False), variant.evaluation, Path("half"), None)
    assert capsys.readouterr().out.startswith(f"warning: {DOUBT}")
    variant.prune = replace(variant.prune, label_doubt=DOUBT, predicted={})
    show.pruned(Output(as_json=False), variant, Path("half"), dry_run=False)
    assert capsys.readouterr().out.startswith(f"warning: {DOUBT}")


def test_doubtful_labels_are_the_first_line_of_the_report() -> None:
    variant = example.variant()
    variant.evaluation = replace(example.evaluation(), label_doubt=DOUBT)
    lines = render_markdown(example.result([variant])).split("\n\n")
    assert lines[2] == f"L{DOUBT[1:]}."


def _benchmark() -> Benchmark:
    rows = [
        BenchmarkRow(
            example.latency(batch, 900.5, 0.61), 2498.4, 12895.6, 14 << 20, 16 << 20,
            launch_bound=batch == 1, dense_start_ms=1812.4, pruned_start_ms=640.2,
            dense_agreement=example.variant().export.parity[0],  # type: ignore[union-attr]
            pruned_agreement=example.variant().export.parity[0],  # type: ignore[union-attr]
        )
        for batch in (1, 128)
    ]  # fmt: skip
    absent = {"openvino": "the package `openvino` is not here: `pip install openvino`"}
    return Benchmark("dense", "half", "t0", Environment(), rows, 0.5, absent)


def _run(output: Output, large: bool) -> None:
    variant = example.variant()
    variant.prune.warnings = ["the paths need 40 of the 32 units of block 0"]
    done = variant.evaluation = example.evaluation()
    if large:  # the widest that is usual: ImageNet's validation images
        done.dense.top1, done.pruned.top1 = example.rate(37730, 50000), example.rate(36911, 50000)
        done.data.images = 50_000
        done.top1_change = Mean(-0.0164, 0.001, -0.0183, -0.0145, 50_000)
    result: Result = example.result([variant])
    show.result(output, result, Path("."))
    show.evaluated(output, done, Path("ckpt/half"), result)
    show.evaluated(output, done, Path("ckpt/half"), None)


PREDICTED = {
    "drop": 0.197, "drop_low": 0.02, "drop_high": 0.25, "images": 160, "dense_top1": 0.829,
    "pruned_top1": 0.632, "pruned_low": 0.55, "pruned_high": 0.70, "divergence_nats": 0.1234,
}  # fmt: skip


def _pruned(output: Output) -> None:
    variant = example.variant()
    variant.prune = replace(variant.prune, predicted=PREDICTED)
    show.pruned(output, variant, Path("ckpt/half"), dry_run=False)


STAGES = {
    "run": lambda output: _run(output, large=False),
    "large": lambda output: _run(output, large=True),
    "prune": lambda output: _pruned(output),
    "export": lambda output: show.exported(
        output, example.variant().export, Path("ckpt/half/model.onnx")
    ),
    "discover": lambda output: show.discovery(
        output, example.result([]), Path("reports/vit_tiny"), dry_run=False
    ),
    "bench": lambda output: show.benchmark(output, _benchmark(), None),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("columns", [80, 100])
def test_every_summary_fits_the_terminal_as_tables(
    stage: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(console, "_room", lambda _: columns)  # as on a terminal
    STAGES[stage](Output(as_json=False))
    for stream in capsys.readouterr():
        lines = [line for line in stream.splitlines() if not line.startswith("next: ")]
        assert max(map(len, lines), default=0) <= columns
        assert not [line for line in lines if line.startswith("  dense")]  # a table, no list


def test_what_matters_then_what_to_doubt_then_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Output, "warn", lambda self, lines: [self.line(f"DOUBT {s}") for s in lines]
    )
    _run(Output(as_json=False), large=False)
    first, *_ = out = capsys.readouterr().out.splitlines()
    assert first.split("  ", 1)[1] == (
        "top-1 62.0 % on 800 images, −20.5 points (95 % −23.4 to −17.6); 0.71 × the MACs, "
        "0.69 × the latency (ONNX Runtime, CPU, batch 1)"
    )  # piped: on one line
    rows = [line.split("  ")[0] for line in out]
    order = ["Top-1", "MACs per image", "Latency, ONNX Runtime, CPU, batch 1", "Details"]
    order += ["Probability deviation"]
    places = [rows.index(name) for name in order]
    places += [next(i for i, line in enumerate(out) if line.startswith("DOUBT"))]
    places += [next(i for i, line in enumerate(out) if line.startswith("next: npprune "))]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("one two", "one two"),
        ("one two three four", "one two three\n  four"),
        ("use `a b c d e` here", "use\n  `a b c d e`\n  here"),
        ("`much longer than a line holds` x", "`much longer\n  than a line\n  holds` x"),
        ("/a/path/that/is/long/er x", "/a/path/that/is/long/er\n  x"),
    ],
)
def test_lines_are_broken_between_words_and_commands_are_not(text: str, broken: str) -> None:
    assert wrapped(text, 14, "  ") == broken
    assert wrapped(text, None, "  ") == text
