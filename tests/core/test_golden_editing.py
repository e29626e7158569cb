"""The released program's own editing results: probabilities within 1e-4, classes equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import npprune
from npprune.cli import app
from npprune.core.attribution.editing import edited_logits, members, path_factors, stack
from npprune.models.view import make_view
from npprune.pipeline.discover.finished import open_finished
from tests.core.test_golden import images, lines

pytestmark = pytest.mark.golden


@pytest.mark.parametrize("paths", ["path", "activation"])
def test_removed_and_doubled_paths(shared_golden: Path, paths: str) -> None:
    model = npprune.load_model("auto", checkpoint=shared_golden / "vit" / "weights.npz")
    view, x = make_view(model), images(shared_golden, 0)
    probability = lines(shared_golden, f"vit/edit_{paths}_probability", 0)
    predicted = lines(shared_golden, f"vit/edit_{paths}_class", 0)
    assert len(probability) == len(predicted) == len(x) == 10
    for edit in ("base", "remove", "enhance"):
        if edit == "base":
            with torch.no_grad():
                logits = model(x)
        else:
            masks = [members([[n] for n in row["ja"][0]], view.widths) for row in probability]
            factors = stack([path_factors(m, edit, 2.0) for m in masks])
            logits = edited_logits(view, x, factors, scope="cls")
        p = logits.softmax(-1)[:, 0]
        expected = torch.tensor([row[edit][0] for row in probability])
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=0)
        assert logits.argmax(-1).tolist() == [int(row[edit][0]) for row in predicted]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit", "mae"])
def test_the_command_line_has_the_released_programs_settings(
    shared_golden: Path, tmp_path: Path, kind: str
) -> None:
    """From the files on disk to stored paths, by flags alone: equal neurons and scores."""
    run, classes = tmp_path / "run", tmp_path / "classes.txt"
    classes.write_text("airplane\ncat\n")
    weights = shared_golden / kind / ("weights.npz" if kind == "vit" else "weights.pth")
    more = [] if kind == "vit" else ["--num-heads", "3", "--released-head"]
    args = [
        "discover", "auto", "--checkpoint", str(weights), "--data",
        f"folder:{shared_golden / 'images'}", "--class-map", str(classes), "--quadrature",
        "left-riemann", "--preprocessing", "released", "--img-size", "96", "--out", str(run), *more,
    ]  # fmt: skip
    assert app.run_app(args) == 0
    table = open_finished(run).table
    for label in (0, 1):
        rows, own = lines(shared_golden, f"{kind}/neuron_path", label), table.where(label)
        assert own.neurons[..., 0].tolist() == [row["ja"][0] for row in rows]
        scores = [float(torch.tensor(row["ja_score"]).flatten()[0]) for row in rows]
        factor = 1.0 if kind == "vit" else 1 / 196
        assert own.scores * factor == pytest.approx(scores, rel=1e-4)
