"""The demo's training: its pieces fast, the whole of it behind a marker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from npprune.data.transforms import resolve
from npprune.models.info import model_preprocessing
from npprune.models.view import make_view
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.work import Work
from npprune.pipeline.demo import training as train_demo
from npprune.store.checkpoints import read_config


def train_briefly(monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> tuple[nn.Module, dict]:
    monkeypatch.setattr(train_demo, "EPOCHS", 1)
    monkeypatch.setattr(train_demo, "MODEL_ARGS", {**train_demo.MODEL_ARGS, "depth": 2})
    return train_demo.train_demo_model(Work(seed=seed))


def test_the_seed_decides_and_nothing_global_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, info = train_briefly(monkeypatch, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.rand(7)
    again, _ = train_briefly(monkeypatch, seed=1)
    other, _ = train_briefly(monkeypatch, seed=2)
    weights, same, different = (m.state_dict() for m in (first, again, other))
    assert all(torch.equal(weights[k], same[k]) for k in weights)
    assert not torch.equal(weights["head.weight"], different["head.weight"])
    assert info["accuracy"] == info["correct"] / info["total"]
    assert info["total"] == 400
    assert info["accuracy"] > 0.3  # one epoch of two blocks: chance is 0.1
    assert not first.training


def test_the_model_tells_its_preprocessing_and_is_seen_by_the_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, info = train_briefly(monkeypatch)
    assert resolve(model_preprocessing(model)) == train_demo.PREPROCESSING
    view = make_view(model)
    assert view.widths == (256, 256)
    assert view.scope == "cls"
    assert info["model_args"]["num_classes"] == 10


def test_progress_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo, "EPOCHS", 1)
    monkeypatch.setattr(train_demo, "MODEL_ARGS", {**train_demo.MODEL_ARGS, "depth": 1})
    events: list[Event] = []
    train_demo.train_demo_model(Work(emit=events.append))
    assert [(e.stage, e.done, e.total, e.unit) for e in events] == [("train", 1, 1, "epochs")]


def test_shifts_move_whole_images_by_at_most_a_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_demo, "SHIFTED", 1.0)
    images = torch.zeros(200, 3, 8, 8)
    images[:, :, 4, 4] = 1
    moved = train_demo._shifted(images, torch.Generator().manual_seed(0))
    places = {tuple(p) for p in (moved[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}
    assert torch.all((moved == 1).sum(dim=(1, 2, 3)) == 3)
    monkeypatch.setattr(train_demo, "SHIFTED", 0.0)
    assert torch.equal(train_demo._shifted(images, torch.Generator().manual_seed(0)), images)


def test_the_schedule_warms_up_and_ends_near_nothing() -> None:
    rates = [train_demo._rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.slow
def test_the_demo_model_reaches_its_accuracy(demo_dense: Path) -> None:
    assert read_config(demo_dense).details["trained"]["accuracy"] >= 0.97
