"""One streaming pass over calibration images: everything that criteria and compensation need.

Per block, summed in float64 (h hidden units read at the input of `fc2`, y = `fc2`'s output, g the
gradient of the loss at y, one row a token):

    moments     sum h, sum |h|, sum h h^T                   over all tokens
    salience    the same sums, each token weighted by |g|^2; sum |g|^2 at each position
    gates       per image a_j = sum over tokens of h_j (W^T g)_j, the gradient of a gate on
                neuron j: sum a (Taylor), sum a^2 (Fisher)
    curvature   sum g g^T                                   over all tokens

The loss gradient at the logits is one of three (`Target`):

    labels      p - onehot(label): the gradient of the cross-entropy (empirical Fisher)
    sampled     p - onehot(y), y drawn from p: the true Fisher, one drawn label a pass
    fisher      sqrt(p) e - p (sqrt(p) . e), e random signs: its outer product is
                diag(p) - p p^T on average, the exact curvature of KL(dense || changed), with far
                less noise than drawn labels where the network is sure of itself

The last two need no labels. Sums merge, and a state saved half-way goes on where it stopped. A
pass over some of the blocks gives the same bits as one over all of them, if its draws are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor, nn

from npprune.core.view import VitView
from npprune.errors import UsageError

Need = Literal["moments", "salience", "gates", "curvature"]
Target = Literal["labels", "sampled", "fisher"]
NEEDS: tuple[Need, ...] = ("moments", "salience", "gates", "curvature")
TARGETS: tuple[Target, ...] = ("labels", "sampled", "fisher")


@dataclass
class BlockSums:
    """The running sums of one block, float64; None where they were not asked for."""

    tokens: float = 0.0
    images: float = 0.0
    hidden: Tensor | None = None  # [h]
    absolute: Tensor | None = None  # [h]
    gram: Tensor | None = None  # [h, h]
    weight: float = 0.0  # sum of |g|^2
    position: Tensor | None = None  # [t] sum of |g|^2 at each token position
    salient: Tensor | None = None  # [h]
    salient_gram: Tensor | None = None  # [h, h]
    gate: Tensor | None = None  # [h] sum of |a| over images
    gate_square: Tensor | None = None  # [h] sum of a^2 over images
    curvature: Tensor | None = None  # [d, d]

    def add(self, other: BlockSums) -> None:
        """Add the sums of other images, in place."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if theirs is None:
                continue
            if isinstance(mine, Tensor):
                mine += theirs.to(mine.device)
            else:
                setattr(self, f.name, theirs if mine is None else mine + theirs)


@dataclass
class Moments:
    """Mean [h] and covariance [h, h] of a block's hidden activations, float64.

    `mean_absolute` [h] is the mean of |h| and `tokens` the (effective) number of rows.
    """

    mean: Tensor
    covariance: Tensor
    mean_absolute: Tensor
    tokens: float

    @property
    def variance(self) -> Tensor:
        """The covariance's diagonal [h]."""
        return self.covariance.diagonal()

    @property
    def second(self) -> Tensor:
        """Mean of h^2, [h]."""
        return self.variance + self.mean.square()


@dataclass
class Statistics:
    """What one pass found. `blocks` maps a block's number to its sums."""

    target: Target = "fisher"
    needs: tuple[Need, ...] = ("moments",)
    images: int = 0
    blocks: dict[int, BlockSums] = field(default_factory=dict)

    def moments(self, l: int, salience: float = 0.0) -> Moments:
        """Mean and covariance of block l, tokens weighted (1 - salience) evenly + salience by
        their share of the squared loss gradient.

        With class-token pooling the last block's patch tokens have no gradient at all: they
        should not steer what is kept there. A part of even weight keeps the estimate full-rank.
        """
        s = self.block(l)
        absolute = self._need(s.absolute, "moments") / s.tokens
        mean = self._need(s.hidden, "moments") / s.tokens
        second = self._need(s.gram, "moments") / s.tokens
        if salience:
            share = salience if s.weight > 0 else 0.0
            total = max(s.weight, torch.finfo(torch.float64).tiny)
            salient = self._need(s.salient, "salience") / total
            gram = self._need(s.salient_gram, "salience") / total
            mean = (1 - share) * mean + share * salient
            second = (1 - share) * second + share * gram
        covariance = second - torch.outer(mean, mean)
        return Moments(mean, (covariance + covariance.T) / 2, absolute, s.tokens)

    def fisher(self, l: int) -> Tensor:
        """Mean over images of the squared gate gradient, [h]."""
        s = self.block(l)
        return self._need(s.gate_square, "gates") / s.images

    def taylor(self, l: int) -> Tensor:
        """Mean over images of the absolute gate gradient, [h]."""
        s = self.block(l)
        return self._need(s.gate, "gates") / s.images

    def position_weights(self, l: int, salience: float) -> Tensor:
        """(1 - salience) + salience x the squared loss gradient at each token position over its
        mean, [t]: the token weighting of `moments`, averaged over images."""
        position = self._need(self.block(l).position, "salience")
        mean = position.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return (1 - salience) + salience * position / mean

    def curvature(self, l: int) -> Tensor:
        """G = mean over tokens of g g^T, [d, d]."""
        s = self.block(l)
        return self._need(s.curvature, "curvature") / s.tokens

    def merge(self, other: Statistics) -> None:
        """Add what another pass found on other images (or other blocks), in place.

        Raises:
            UsageError: the two did not collect the same things.
        """
        if (self.target, set(self.needs)) != (other.target, set(other.needs)):
            raise UsageError(
                "statistics merge only if they hold the same: "
                f"{self.target} {sorted(self.needs)} and {other.target} {sorted(other.needs)}"
            )
        for l, sums in other.blocks.items():
            self.blocks.setdefault(l, BlockSums()).add(sums)
        self.images += other.images

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors on the CPU, for any file format."""
        flags = [float(need in self.needs) for need in NEEDS]
        out = {
            "header": torch.tensor(
                [float(self.images), float(TARGETS.index(self.target)), *flags],
                dtype=torch.float64,
            )
        }
        for l, sums in self.blocks.items():
            for f in fields(sums):
                value = getattr(sums, f.name)
                if value is not None:
                    out[f"{l}.{f.name}"] = torch.as_tensor(value, dtype=torch.float64).cpu().clone()
        return out

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Statistics:
        """The inverse of `to_tensors`.

        Raises:
            UsageError: a tensor's name is not one that `to_tensors` writes.
        """
        if "header" not in tensors:
            raise UsageError("saved statistics need a tensor `header`, got none")
        images, target, *flags = tensors["header"].tolist()
        needs = tuple(need for need, flag in zip(NEEDS, flags, strict=True) if flag)
        out = cls(target=TARGETS[int(target)], needs=needs, images=int(images))
        known = {f.name: f for f in fields(BlockSums)}
        for name, value in tensors.items():
            if name == "header":
                continue
            l, _, key = name.partition(".")
            if not l.isdigit() or key not in known:
                raise UsageError(f"saved statistics hold BLOCK.SUM tensors, got `{name}`")
            scalar = known[key].default is not None
            sums = out.blocks.setdefault(int(l), BlockSums())
            setattr(sums, key, float(value) if scalar else value.clone())
        return out

    def block(self, l: int) -> BlockSums:
        """The sums of block l: all that the numbers above are read from."""
        if l not in self.blocks:
            raise UsageError(f"no statistics of block {l}, only of {sorted(self.blocks)}")
        return self.blocks[l]

    def _need(self, value: Tensor | None, need: Need) -> Tensor:
        if value is None:
            raise UsageError(
                f"statistics hold {list(self.needs)}, and {need!r} is needed",
                hint="collect them again with the missing need",
            )
        return value


def collect_statistics(
    view: VitView,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    *,
    needs: Iterable[Need] = NEEDS,
    blocks: Sequence[int] | None = None,
    target: Target = "fisher",
    draws: int = 1,
    generator: torch.Generator | None = None,
    state: Statistics | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """One forward pass a batch, and `draws` backward passes if a need asks for gradients.

    Args:
        batches: (images [b, 3, H, W], labels [b]) on the model's device; labels are read only
            for target "labels" and may be None otherwise.
        needs: which sums to keep; see the module's text.
        blocks: collect these only, to save memory; None: all.
        draws: backward passes a batch, for targets that draw; more is less noise.
        generator: source of the draws, on the CPU; required by "sampled" and "fisher" when a
            gradient is needed.
        state: statistics so far, continued in place; its needs and target rule.
        on_batch: called with the state after every batch, e.g. to save it.

    Raises:
        UsageError: an unknown need or target, or labels or a generator missing.
    """
    stats = state if state is not None else Statistics(target, _checked(needs), 0, {})
    wanted = range(len(view.widths)) if blocks is None else blocks
    gradients = bool({"salience", "gates", "curvature"} & set(stats.needs))
    draws = 1 if stats.target == "labels" else draws
    if stats.target not in TARGETS or draws < 1:
        raise UsageError(f"target must be one of {TARGETS} and draws >= 1, got {stats.target!r}")
    if gradients and stats.target != "labels" and generator is None:
        raise UsageError(f"target {stats.target!r} draws at random and needs a generator")
    for images, labels in batches:
        with _recorded(view, wanted) as seen, torch.set_grad_enabled(gradients):
            logits = logits_of(view, images, gradients)
        for l in wanted:  # a block at a time: the batch's own sums are as large as the running ones
            sums = stats.blocks.setdefault(l, BlockSums())
            sums.add(_moments(seen[l][0].detach(), stats.needs))
        for draw in range(draws if gradients else 0):
            v = cotangent(logits.detach(), stats.target, labels, generator)
            ys = [seen[l][1] for l in wanted]
            gs = torch.autograd.grad(logits, ys, v, retain_graph=draw + 1 < draws)
            for l, g in zip(wanted, gs, strict=True):
                h = seen[l][0].detach()
                _add_gradient(stats.blocks[l], view.fc2(l), h, g, stats.needs, draws)
        stats.images += len(images)
        if on_batch is not None:
            on_batch(stats)
    return stats


def _checked(needs: Iterable[Need]) -> tuple[Need, ...]:
    asked = set(needs)
    unknown = asked - set(NEEDS)
    if unknown or not asked:
        raise UsageError(f"needs must be some of {NEEDS}, got {sorted(asked) or 'none'}")
    return tuple(need for need in NEEDS if need in asked)


@contextmanager
def _recorded(view: VitView, blocks: Iterable[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Record (input, output) of `fc2` of each block as the view runs."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def record(l: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[l] = (inputs[0], output)

        return hook

    handles = [view.fc2(l).register_forward_hook(record(l)) for l in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def logits_of(view: VitView, images: Tensor, gradients: bool) -> Tensor:
    """Logits [b, c] of images, with a graph from the first block on if gradients are wanted."""
    with torch.no_grad():
        x = view.embed(images)
    if gradients:
        x = x.detach().requires_grad_(True)
    for l in range(len(view.widths)):
        x = view.block(l, x)
    return view.head(x)


def cotangent(
    logits: Tensor, target: Target, labels: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """The loss gradient at the logits, [b, c]; see the module's text."""
    p = logits.softmax(dim=1)
    if target == "fisher":
        signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
        root = p.sqrt()
        return root * signs - p * (root * signs).sum(dim=1, keepdim=True)
    if target == "sampled":
        labels = torch.multinomial(p.float().cpu(), 1, generator=generator)[:, 0]
    if labels is None:
        raise UsageError("target 'labels' needs labels, and a batch came without")
    return p - nn.functional.one_hot(labels.to(p.device).long(), p.shape[1]).to(p)


def double(x: Tensor) -> Tensor:
    """float64, on the CPU where the device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def _moments(h: Tensor, needs: tuple[Need, ...]) -> BlockSums:
    """What a batch [b, t, h] adds without a gradient."""
    tokens = h.flatten(0, 1)
    sums = BlockSums(tokens=float(len(tokens)), images=float(len(h)))
    if "moments" in needs:
        rows = double(tokens)
        sums.hidden, sums.absolute = rows.sum(0), rows.abs().sum(0)
        sums.gram = rows.T @ rows
    return sums


def _add_gradient(
    sums: BlockSums, fc2: nn.Linear, h: Tensor, g: Tensor, needs: tuple[Need, ...], draws: int
) -> None:
    """Add one backward pass' share: h [b, t, h], g [b, t, d]."""
    found = BlockSums()
    if "gates" in needs:
        a = double((h * (g @ fc2.weight.detach())).sum(dim=1))
        found.gate, found.gate_square = a.abs().sum(0) / draws, a.square().sum(0) / draws
    rows = double(g.flatten(0, 1))
    if "curvature" in needs:
        found.curvature = rows.T @ rows / draws
    if "salience" in needs:
        weight = rows.square().sum(dim=1) / draws
        tokens = double(h.flatten(0, 1))
        found.weight = float(weight.sum())
        found.position = weight.reshape(h.shape[:2]).sum(0)
        found.salient = weight @ tokens
        # the weights are a random draw: products in the model's precision, sums in float64
        scaled = h.flatten(0, 1) * weight.sqrt().to(h)[:, None]
        found.salient_gram = double(scaled.T @ scaled)
    sums.add(found)
