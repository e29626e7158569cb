"""Single neurons removed, and the logit lens: against the plain way of computing them."""

from __future__ import annotations

import pytest
import torch

from npprune.core.attribution.ablation import ablated_logits
from npprune.core.attribution.editing import edited_logits
from npprune.core.attribution.lens import pushes
from npprune.core.view import Scope
from npprune.models.view import make_view
from npprune.models.writing import written
from tests.helpers.tiny import tiny_batch, tiny_swin, tiny_vit


@pytest.mark.parametrize("known", [False, True], ids=["run", "taken out of the stream"])
@pytest.mark.parametrize("scope", ["cls", "all"])
def test_removing_one_neuron_at_a_time_is_editing_with_a_factor_of_0(
    scope: Scope, known: bool
) -> None:
    view = make_view(tiny_vit(init_values=0.5))
    images, _ = tiny_batch(3)
    g = torch.Generator().manual_seed(3)
    neurons = torch.randint(0, view.widths[0], (3, len(view.widths), 2), generator=g)
    writes = [written(view, l) for l in range(3)] if known else None
    found = ablated_logits(view, images, neurons, scope=scope, writes=writes)
    assert found.shape == (3, 3, 2, 7)
    for i, image in enumerate(images):
        for l in range(3):
            for k in range(2):
                factors = [torch.ones(1, h) for h in view.widths]
                factors[l][0, neurons[i, l, k]] = 0
                direct = edited_logits(view, image[None], factors, scope=scope)[0]
                torch.testing.assert_close(found[i, l, k], direct)


def test_in_a_network_of_stages_only_its_last_stage_is_spared_running() -> None:
    view = make_view(tiny_swin())
    images = tiny_batch(2, size=32)[0]
    neurons = torch.tensor([[[0, 3]] * 4, [[1, 2]] * 4])
    writes = [written(view, l) for l in range(4)]
    assert [write is None for write in writes] == [True, True, False, False]
    found = ablated_logits(view, images, neurons, scope=view.scope, writes=writes)
    torch.testing.assert_close(found, ablated_logits(view, images, neurons, scope=view.scope))


def test_paths_of_other_images_are_refused() -> None:
    images, _ = tiny_batch(2)
    with pytest.raises(ValueError, match=r"neurons must be \[2, 3, K\], got \[1, 3, 1\]"):
        ablated_logits(
            make_view(tiny_vit()), images, torch.zeros(1, 3, 1, dtype=torch.int64), scope="cls"
        )


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_lens_is_how_logits_move_with_a_neurons_output(pool: str) -> None:
    """In the last block nothing lies between: a small change of one activation says it all."""
    view = make_view(tiny_vit(global_pool=pool, init_values=0.5))
    images, _ = tiny_batch(4)
    last, unit, step = 2, 5, 1e-5
    tokens = view.tokens(view.scope)

    def final(change: float) -> torch.Tensor:
        def edit(h: torch.Tensor) -> torch.Tensor:
            h = h.clone()
            h[:, tokens, unit] += change
            return h

        x = view.embed(images)
        for l in range(3):
            x = view.block(l, x, edit=edit if l == last else None)
        return x

    with torch.no_grad():
        up, down = view.head(final(step)), view.head(final(-step))
        stream = final(0.0)
    slope = ((up - down) / (2 * step)).mean(0)
    writes = written(view, last)
    assert writes is not None
    lens = pushes(view, stream, scope=view.scope) @ writes[:, unit]
    torch.testing.assert_close(lens, slope - slope.mean(), rtol=1e-5, atol=1e-7)
