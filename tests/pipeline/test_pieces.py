"""A network whose activations would not fit into memory is measured on smaller batches."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from npprune.models.info import model_sizes
from npprune.models.view import make_view
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.work import Work
from npprune.pipeline.prune.measuring import PlanSettings, Subject, measure
from tests.helpers.tiny import tiny_batch, tiny_vit


def test_batches_are_cut_where_their_activations_take_more_than_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view, images = make_view(tiny_vit()), tiny_batch(12)[0]
    subject = Subject(view, list(images.split(6)), lambda: model_sizes(view.model))
    settings = PlanSettings(criterion="magnitude", round_to=4, min_keep=4)
    whole = measure(subject, settings, Work("cpu"))
    assert whole.subject is subject
    # an image: 1.3 x 8 bytes x 17 tokens x 3 blocks x (9 x 24 + 2 x 48) activations
    image = 1.3 * 8 * 17 * 3 * (9 * 24 + 2 * 48)
    memory = SimpleNamespace(total=int(4.5 * image))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    events: list[Event] = []
    cut = measure(subject, settings, Work("cpu", emit=events.append))
    assert [len(x) for x in cut.subject.fit] == [4, 2, 4, 2]
    assert "memory: 4 images at a time" in [e.message for e in events]
    sums = [m.collected.statistics.block(1).gram for m in (whole, cut)]
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)
