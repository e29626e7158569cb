"""The first command of the README, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_demo_runs_to_the_end_from_any_folder_and_again(tmp_path: Path) -> None:
    def run() -> dict:
        done = subprocess.run(
            [sys.executable, "-m", "npprune", "demo", "--json"],
            cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"},
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = run()
    for name in ("reports/demo/report.html", "reports/demo/report.md", "ckpt/demo/model.onnx",
                 "reports/demo/explore/index.html"):  # fmt: skip
        assert (tmp_path / name).stat().st_size > 1000
    again = run()
    for document in (first, again):
        result = document.get("result", document)
        (variant,) = result["variants"]
        assert variant["evaluation"]["dense"]["top1"]["value"] >= 0.97
        assert variant["evaluation"]["pruned"]["top1"]["value"] >= 0.9
        assert variant["export"]["passed"] is True
        assert sum(variant["prune"]["widths"]) == 768
