"""Healing: the dense network's predictions, taught to the pruned one in a short training.

Losses are per image, so that uneven batches and several processes weigh every image the same.
Whatever is random is drawn from a generator of (seed, place in the training): nothing has to be
remembered to go on after an interruption.

Sources: distillation at a temperature as in Hinton et al. (2015); images mixed in uniformly drawn
shares, the teacher seeing the same mixture, as in Beyer et al. (CVPR 2022).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from npprune.core.tokens import expanded, followed
from npprune.core.view import VitView

WARM_UP = 0.1  # share of the training
NO_LABEL = -1


# ---------------------------------------------------------------- losses


def feature_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the streams after each block, every token normalised: [b].

    Streams [b, t, d], one for each block; the student's may end earlier, where it computes no more.
    Without the normalisation the few tokens and channels of huge activations would be all that
    counts.
    """
    total = torch.zeros(len(student[0]), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        d, theirs = (ours.shape[-1],), theirs[:, : ours.shape[1]]
        gap = functional.layer_norm(ours.float(), d) - functional.layer_norm(theirs.float(), d)
        total = total + gap.square().mean(dim=(1, 2))
    return total / len(student)


def label_loss(student: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [b] of logits [b, c]; 0 where the label is -1 (none)."""
    return functional.cross_entropy(
        student.float(), labels, ignore_index=NO_LABEL, reduction="none"
    )


def streams_and_outputs(view: VitView, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The stream after each block [b, t, d], and the logits or features.

    Where tokens merge, every patch has the value of the token that holds it.
    """
    x: Any = view.embed(images)
    if view.merges:
        x = followed(x)
    streams = []
    for l in range(len(view.widths)):
        x = view.block(l, x)
        plain = x if isinstance(x, Tensor) else x.x if x.where is None else expanded(x)
        streams.append(plain)
    return streams, view.head(x)


# ---------------------------------------------------------------- schedule and averages


def rate(progress: float, warm_up: float = WARM_UP) -> float:
    """The learning rate's factor at `progress` in [0, 1]: linear warm-up, half a cosine to 0."""
    if progress < warm_up:
        return progress / warm_up
    rest = min(1.0, (progress - warm_up) / (1 - warm_up))
    return 0.5 * (1 + math.cos(math.pi * rest))


def averaging_decay(steps: int) -> float:
    """The decay of the weights' running mean: over about 3 % of the steps, 5 to 10,000 of them."""
    return 1 - 1 / min(10_000.0, max(5.0, 0.03 * steps))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the running mean of the weights towards the model's; other buffers are copied."""
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
    for kept, value in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(value)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """For the optimiser: matrices are decayed, biases and norms are not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


# ---------------------------------------------------------------- what is random


def generator_at(seed: int, *place: int | str) -> torch.Generator:
    """A generator of its own for each place in the training."""
    text = ":".join(map(str, (seed, *place)))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(value >> 1)


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """A permutation of 0..n-1 for an epoch."""
    return torch.randperm(n, generator=generator_at(seed, "order", epoch))


def epoch_flips(seed: int, epoch: int, n: int) -> Tensor:
    """Which of n images are mirrored in an epoch: bool [n].

    The halves swap from one epoch to the next, so that every image is seen both ways.
    """
    mirrored = torch.rand(n, generator=generator_at(seed, "flip", epoch // 2)) < 0.5
    return mirrored if epoch % 2 == 0 else ~mirrored


def partners(n: int) -> Tensor:
    """Whom each of n images is mixed with: pairs of neighbours, an odd last one with the first.

    Pairs stay together when several processes share a batch.
    """
    other = torch.arange(n) ^ 1
    if n % 2:
        other[-1] = 0
    return other


def mix(images: Tensor, share: float) -> Tensor:
    """Each image mixed with its partner in the batch, `share` of itself: same shape."""
    return share * images + (1 - share) * images[partners(len(images))]


# ---------------------------------------------------------------- block by block


@dataclass(frozen=True)
class Reconstructed:
    """One block's regression: its error before and after, over the target's variance."""

    block: int
    before: float
    after: float


def reconstruct_blocks(
    student: VitView,
    dense: VitView,
    batches: Sequence[Tensor],
    *,
    epochs: int,
    learning_rate: float,
    seed: int = 0,
    tokens: int = 64,
    first: int = 0,
    on_block: Callable[[Reconstructed], None] | None = None,
) -> list[Reconstructed]:
    """Train each block's MLP to give what the dense block gives on the same input.

    In forward order, each block on the stream that the blocks before it, trained already, really
    produce; nothing is propagated back through the network. Attention is not trained.

    Args:
        student: the pruned network, its second layers compensated already; changed in place.
        dense: the network it came from, with the same number of blocks.
        batches: images held in memory, and their streams too: images x tokens x width.
        tokens: positions of each image that are learnt from, the prefix tokens always.
        first: blocks before this one were trained already.

    Returns: one entry for each block trained.
    """
    done = []
    with torch.no_grad():
        streams = [student.embed(images) for images in batches]
        dense.embed(batches[0])  # it records what its blocks are called with
    for l in range(len(student.widths)):
        if l >= first:
            samples = [
                _sample(student, dense, l, x, tokens, generator_at(seed, "tokens", l, i))
                for i, x in enumerate(streams)
            ]
            found = _regress(student, l, samples, epochs, learning_rate, seed)
            done.append(found)
            if on_block is not None:
                on_block(found)
        with torch.no_grad():
            streams = [student.block(l, x) for x in streams]
    return done


_Sample = tuple[Tensor, Tensor, Tensor]
"""Stream before the block, its attention's output, the dense block's output: each [b, s, d]."""


@torch.no_grad()
def _sample(
    student: VitView, dense: VitView, l: int, x: Tensor, tokens: int, g: torch.Generator
) -> _Sample:
    target = dense.block(l, x)
    x = student.entered(l, x)
    attention = student.attention_output(l, x)
    prefix = student.num_prefix_tokens
    patches = torch.randperm(x.shape[1] - prefix, generator=g)[: max(1, tokens - prefix)] + prefix
    chosen = torch.cat([torch.arange(prefix), patches.sort().values]).to(x.device)
    return x[:, chosen], attention[:, chosen], target[:, chosen]


def _regress(
    student: VitView, l: int, samples: list[_Sample], epochs: int, learning_rate: float, seed: int
) -> Reconstructed:
    x, attention, _ = samples[0]
    everything = [p for p in student.model.parameters() if p.requires_grad]
    reached = torch.autograd.grad(
        student.tail(l, x, attention).sum(), everything, allow_unused=True
    )
    trained = [p for p, grad in zip(everything, reached, strict=True) if grad is not None]
    start = [p.detach().clone() for p in trained]
    scale = torch.cat([(y - a - z).flatten() for z, a, y in samples[:4]]).var().clamp_min(1e-12)

    def error(sample: _Sample) -> Tensor:
        z, a, y = sample
        return (student.tail(l, z, a) - y).square().mean() / scale

    before = _mean(error, samples)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    steps = epochs * len(samples)
    for step in range(steps):
        if step % len(samples) == 0:
            order = epoch_order(seed, step // len(samples), len(samples))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate((step + 0.5) / steps)
        loss = error(samples[int(order[step % len(samples)])])
        gradients = torch.autograd.grad(loss, trained)
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    optimizer.zero_grad()
    after = _mean(error, samples)
    if not after <= before:  # it diverged: the closed-form start was better
        with torch.no_grad():
            for p, value in zip(trained, start, strict=True):
                p.copy_(value)
        after = before
    return Reconstructed(l, before, after)


@torch.no_grad()
def _mean(error: Callable[[_Sample], Tensor], samples: Iterable[_Sample]) -> float:
    values = [float(error(sample)) for sample in samples]
    return sum(values) / len(values)
