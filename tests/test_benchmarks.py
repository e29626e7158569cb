"""Programs in benchmarks/ that wait for a machine to run on are tried on a tiny network."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_line_on_a_gpu_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["--device", "cpu", "--small", "--images", "16", "--batch", "8", "--providers", "cpu"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *args, "--profile", "--out", str(tmp_path)])
    runpy.run_path(str(ROOT / "benchmarks" / "gpu.py"), run_name="__main__")
    found = json.loads((tmp_path / "gpu.json").read_text())
    stages = {row["stage"]: row for row in found["rows"]}
    assert {"discover", "statistics", "harm (images x options)", "refit", "evaluate"} <= set(stages)
    # a forward pass of 16 images, by hand: 17 tokens, 2 blocks of width 32 and 128 hidden units
    block = 17 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 17 * 17 * 32
    patches = 16 * 3 * 8 * 8 * 32
    macs = 16 * (2 * block + patches + 32 * 10)
    assert stages["evaluate"]["tflop"] * 1e12 == pytest.approx(2 * macs, rel=0.02)
    assert found["runtimes"][0]["provider"] == "cpu"
    assert "| evaluate | fp32 | " in (tmp_path / "gpu.md").read_text()
    assert "aten::" in (tmp_path / "profile.txt").read_text()
