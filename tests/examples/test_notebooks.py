"""The notebooks run from top to bottom, and come to what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAID = {
    "first_steps": [
        "same prediction:",
        "nats from dense:",
        "100 paths of 10 classes",
        "digits.onnx:",
    ],
    "own_network": [
        "dense: 0.",
        "pruned: 0.",
        "trained further: 0.",
        "% of the MACs: 0.",
        "own.onnx:",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAID)
def test_the_notebook_runs(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if name == "first_steps":  # it trains the demo's network, and finds it trained
        dense = request.getfixturevalue("demo_dense")
        shutil.copytree(dense, tmp_path / "ckpt" / dense.name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    out = capsys.readouterr().out
    assert [said for said in SAID[name] if said not in out] == []


def test_every_notebook_is_run_by_a_test() -> None:
    """`paper` by `tests/pipeline/test_analyze.py`."""
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == {*SAID, "paper"}
