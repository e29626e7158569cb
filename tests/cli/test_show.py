"""What is shown of a result, and in which order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from npprune.cli import show
from npprune.cli.console import Output
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
