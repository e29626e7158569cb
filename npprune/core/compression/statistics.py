"""One streaming pass over calibration images: everything that criteria and compensation need.

Per block, summed in float64 (h hidden units read at the input of `fc2`, y = `fc2`'s output, g the
gradient of the loss at y, one row a token):

    moments     sum h, sum |h|, sum h h^T                   over all tokens
    salience    the same sums, each token weighted by |g|^2; sum |g|^2 at each position
    gates       per image a_j = sum over tokens of h_j (W^T g)_j, the gradient of a gate on
                neuron j: sum a (Taylor), sum a^2 (Fisher)
    curvature   sum g g^T                                   over all tokens
    read        all of these once more, over the tokens that the classifier reads alone (see
                `Statistics.side`)

The loss gradient at the outputs is drawn at random so that its outer product is, on average, the
exact curvature of what counts as a change of them (`objective`): for logits the Fisher matrix,
diag(p) - p p^T. It needs no labels.

A state saved half-way resumes where it stopped. A pass over some of the blocks gives the same bits
as one over all of them, if its draws are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from npprune.core.finite import check_outputs, check_scores
from npprune.core.recording import recorded
from npprune.core.view import VitView
from npprune.criteria import NEEDS, Need
from npprune.errors import UsageError

STILL = 1e-6
"""A variance over the squared mean that is rounding, in products of float32."""
Side = Literal["read", "others"]
Total = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Adds named float64 sums on the CPU to those of other processes, for all of them."""
GRADIENTS: frozenset[Need] = frozenset({"salience", "gates", "curvature"})
"""Needs that ask for a backward pass, and so for draws."""

_TARGET = 2.0  # in saved states: the gradient above; 0 and 1 were others


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
    read: BlockSums | None = None  # of the tokens that the classifier reads
    rest: BlockSums | None = None  # of the others: gates, which no difference gives

    def add(self, other: BlockSums) -> None:
        """Add the sums of other images, in place."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if theirs is None:
                continue
            if isinstance(mine, BlockSums):
                mine.add(theirs)
            elif isinstance(mine, Tensor):
                mine += theirs.to(mine.device)
            else:
                setattr(self, f.name, theirs if mine is None else mine + theirs)

    def others(self) -> BlockSums:
        """Of the tokens that the classifier does not read: all less those that it does."""
        read, rest = self.read, self.rest or BlockSums()
        if read is None:
            raise UsageError("these statistics hold no sums of the tokens that are read")
        out = BlockSums(self.tokens - read.tokens, self.images, weight=self.weight - read.weight)
        for name in ("hidden", "absolute", "gram", "salient", "salient_gram", "curvature"):
            whole, part = getattr(self, name), getattr(read, name)
            setattr(out, name, None if whole is None else whole - part)
        if self.position is not None and read.position is not None:
            out.position = self.position[len(read.position) :]
        out.gate, out.gate_square = rest.gate, rest.gate_square
        return out


@dataclass
class Moments:
    """Mean [h] and covariance [h, h] of a block's hidden activations, float64.

    `mean_absolute` [h] is the mean of |h| and `tokens` the (effective) number of rows. A unit that
    does not vary beyond rounding has a covariance of exactly 0 with every other: as a ridge
    regression sees it, it is a part of the bias.
    """

    mean: Tensor
    covariance: Tensor
    mean_absolute: Tensor
    tokens: float

    def __post_init__(self) -> None:
        still = self.covariance.diagonal() <= STILL * self.mean.square()
        if bool(still.any()):
            fixed = still[:, None] | still[None, :]
            self.covariance = self.covariance.masked_fill(fixed, 0.0)

    @classmethod
    def of(cls, mean: Tensor, second: Tensor, mean_absolute: Tensor, tokens: float) -> Moments:
        """From the means of h [h], h h^T [h, h] and |h| [h]."""
        covariance = second - torch.outer(mean, mean)
        return cls(mean, (covariance + covariance.T) / 2, mean_absolute, tokens)

    @property
    def variance(self) -> Tensor:
        """The covariance's diagonal [h]."""
        return self.covariance.diagonal()

    @property
    def second(self) -> Tensor:
        """Mean of h^2, [h]."""
        return self.variance + self.mean.square()


@dataclass
class Sums:
    """Weighted sums over rows, by name, float64; `weight` is the sum of the rows' weights."""

    weight: float = 0.0
    parts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, weight: float = 0.0, **parts: Tensor) -> None:
        """Add a batch's; tensors that came first are the ones added to."""
        self.weight += weight
        for name, value in parts.items():
            if name in self.parts:
                self.parts[name] += value
            else:
                self.parts[name] = value

    def share(self, total: Total) -> None:
        """Make them the sums over the batches of all processes."""
        mine = {name: value.cpu() for name, value in self.parts.items()}
        weight = torch.tensor(self.weight, dtype=torch.float64)
        found = total({"weight": weight, **mine})
        self.weight = float(found.pop("weight"))
        for name, value in found.items():
            like = self.parts.get(name)
            self.parts[name] = value if like is None else value.to(like.device)

    def moments(self) -> Moments:
        """From the sums `hidden` of w h, `absolute` of w |h| and `gram` of w h h^T."""
        mean, absolute, second = (
            self.parts[name] / self.weight for name in ("hidden", "absolute", "gram")
        )
        return Moments.of(mean, second, absolute, self.weight)


@dataclass
class Statistics:
    """What one pass found. `blocks` maps a block's number to its sums."""

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
        return Moments.of(mean, second, absolute, s.tokens)

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

    def side(self, which: Side) -> Statistics:
        """Those of the tokens that the classifier reads alone, or of all others."""
        return _OneSide(self, which)

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it as named tensors on the CPU, for any file format."""
        flags = [float(need in self.needs) for need in NEEDS]
        out = {"header": torch.tensor([float(self.images), _TARGET, *flags], dtype=torch.float64)}
        for l, sums in self.blocks.items():
            out |= _named(sums, f"{l}.")
        return out

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Statistics:
        """The inverse of `to_tensors`.

        Raises:
            UsageError: a tensor's name is not one that `to_tensors` writes.
        """
        if "header" not in tensors:
            raise UsageError("saved statistics need a tensor `header`, got none")
        images, _, *flags = tensors["header"].tolist()
        needs = tuple(need for need, flag in zip(NEEDS, flags, strict=False) if flag)
        out = cls(needs=needs, images=int(images))
        known = {f.name: f for f in fields(BlockSums)}
        for name, value in tensors.items():
            if name == "header":
                continue
            l, *side, key = name.split(".")
            if not l.isdigit() or key not in known or side not in ([], ["read"], ["rest"]):
                raise UsageError(f"saved statistics hold BLOCK.SUM tensors, got `{name}`")
            scalar = known[key].default is not None
            sums = out.blocks.setdefault(int(l), BlockSums())
            if side:
                part = getattr(sums, side[0]) or BlockSums()
                setattr(sums, side[0], part)
                sums = part
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


class _OneSide(Statistics):
    """Statistics of some of the tokens; one block's sums at a time."""

    def __init__(self, whole: Statistics, which: Side) -> None:
        super().__init__(whole.needs, whole.images)
        self._whole, self._which = whole, which
        self._last: tuple[int, BlockSums] | None = None

    def block(self, l: int) -> BlockSums:
        if self._last is None or self._last[0] != l:
            sums = self._whole.block(l)
            self._last = (
                l,
                self._need(sums.read, "read") if self._which == "read" else sums.others(),
            )
        return self._last[1]

    def _need(self, value: Any, need: Need) -> Any:
        return self._whole._need(value, need)


def _named(sums: BlockSums, prefix: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for f in fields(sums):
        value = getattr(sums, f.name)
        if isinstance(value, BlockSums):
            out |= _named(value, f"{prefix}{f.name}.")
        elif value is not None:
            out[prefix + f.name] = torch.as_tensor(value, dtype=torch.float64).cpu().clone()
    return out


def collect_statistics(
    view: VitView,
    batches: Iterable[Tensor],
    *,
    needs: Iterable[Need] = ("moments", "salience", "gates", "curvature"),
    blocks: Sequence[int] | None = None,
    draws: int = 1,
    generator: torch.Generator | None = None,
    state: Statistics | None = None,
    on_batch: Callable[[Statistics], None] | None = None,
) -> Statistics:
    """One forward pass a batch, and `draws` backward passes if a need asks for gradients.

    Args:
        batches: images [b, 3, H, W] on the model's device.
        needs: which sums to keep; see the module's text.
        blocks: collect these only, to save memory; None: all.
        draws: backward passes a batch; more is less noise.
        generator: source of the draws, on the CPU; required when a gradient is needed.
        state: statistics so far, continued in place; its needs rule.
        on_batch: called with the state after every batch, e.g. to save it.

    Raises:
        UsageError: an unknown need, or a generator missing.
        DataError, ModelError: an image, the weights or the network's answers are not finite.
    """
    stats = state if state is not None else Statistics(_checked(needs))
    wanted = range(len(view.widths)) if blocks is None else blocks
    layers = {l: view.fc2(l) for l in wanted}
    gradients = bool(GRADIENTS & set(stats.needs))
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")
    read = view.tokens_read if "read" in stats.needs else 0
    if read is None:
        raise UsageError("the classifier of this network reads every token: no sums of some alone")
    for images in batches:
        with recorded(layers.values()) as seen, torch.set_grad_enabled(gradients):
            outputs = outputs_of(view, images, gradients)
        check_outputs(view, images, outputs, first=stats.images)
        for l, fc2 in layers.items():  # one at a time: a batch's own sums are as large as all
            sums = stats.blocks.setdefault(l, BlockSums())
            sums.add(_moments(seen[fc2][0].detach(), stats.needs, read))
        for draw in range(draws if gradients else 0):
            if generator is None:
                raise UsageError("the loss gradient is drawn at random and needs a generator")
            v = view.objective.cotangent(outputs.detach(), generator)
            ys = [seen[fc2][1] for fc2 in layers.values()]
            gs = torch.autograd.grad(outputs, ys, v, retain_graph=draw + 1 < draws)
            sizes = [g.flatten(1).sum(1, dtype=torch.float32) for g in gs]
            check_scores(torch.stack(sizes, 1), what="gradients", dtype=images.dtype)
            for (l, fc2), g in zip(layers.items(), gs, strict=True):
                h = seen[fc2][0].detach()
                stats.blocks[l].add(_gradients(fc2, h, g, stats.needs, draws, read))
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


def outputs_of(view: VitView, images: Tensor, gradients: bool) -> Tensor:
    """Logits or features of images, with a graph from the first block on for `gradients`."""
    with torch.no_grad():
        x = view.embed(images)
    if gradients:
        x = x.detach().requires_grad_(True)
    for l in range(len(view.widths)):
        x = view.block(l, x)
    return view.head(x)


def skip_draws(
    generator: torch.Generator, batches: Iterable[Tensor], outputs: Sequence[int]
) -> None:
    """Leave the generator as after the cotangents of batches that another process computes.

    outputs: the shape of one image's.
    """
    for images in batches:
        torch.randint(0, 2, (len(images), *outputs), generator=generator)


def double(x: Tensor) -> Tensor:
    """float64, on the CPU where the device has none (mps)."""
    return (x.cpu() if x.device.type == "mps" else x).to(torch.float64)


def _moments(h: Tensor, needs: tuple[Need, ...], read: int = 0) -> BlockSums:
    """What a batch [b, t, h] adds without a gradient; `read` tokens once more."""
    tokens = h.flatten(0, 1)
    sums = BlockSums(tokens=float(len(tokens)), images=float(len(h)))
    if "moments" in needs:
        rows = double(tokens)
        sums.hidden, sums.absolute = rows.sum(0), rows.abs().sum(0)
        sums.gram = rows.T @ rows
    if read:
        sums.read = _moments(h[:, :read], needs)
    return sums


def _gradients(
    fc2: nn.Linear, h: Tensor, g: Tensor, needs: Sequence[Need], draws: int, read: int = 0
) -> BlockSums:
    """One backward pass' share: h [b, t, h], g [b, t, d]; of `read` tokens once more."""
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
    if read:
        found.read = _gradients(fc2, h[:, :read], g[:, :read], needs, draws)
        if "gates" in needs:
            found.rest = _gradients(fc2, h[:, read:], g[:, read:], ["gates"], draws)
    return found
