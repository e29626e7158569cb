"""What a vision transformer costs, in closed form: parameters, and multiply-accumulates (MACs).

MACs are those of one image: every matrix product counts rows x inner x columns, the two products
inside attention included; biases, norms, activations and the softmax are not counted (the usual
convention, and that of `torch.utils.flop_counter`, whose FLOPs are two per MAC).

Letters: t tokens, d width, h hidden units, n heads, q query/key dimensions and v value dimensions
over all heads, c classes, r tokens merged.

Where tokens merge, the attention of block l sees the tokens that reach it, its MLP r_l fewer;
finding the pairs and adding them up are two products of their own, and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from npprune.errors import GateError, UsageError

Price = Literal["neurons", "params", "macs"]


@dataclass(frozen=True)
class Sizes:
    """The sizes that decide the cost.

    `queries[l]` and `values[l]` sum over block l's heads; None stands for the width, the plain
    case. `fixed_params` is what no size here explains (class token, position embeddings, final
    norm, ...), and `block_params` the same inside one block (norms, layer scales).
    """

    tokens: int  # all of them, class token included
    width: int
    hidden: tuple[int, ...]  # per block
    classes: int
    patches: int  # tokens that come from the image
    patch_inputs: int  # channels x patch height x patch width
    queries: tuple[int, ...] | None = None
    values: tuple[int, ...] | None = None
    gated: bool = False  # fc1 has two halves (SwiGLU): h is the width after the gate
    qkv_bias: bool = True
    key_bias: bool = True  # where there are biases of queries and values
    hidden_bias: bool = True  # fc1
    output_bias: bool = True  # fc2
    norm_params: int = 0  # of each hidden unit, in a norm before fc2
    pooled_only: bool = False  # the last block's MLP runs on the class token alone
    fixed_params: int = 0
    block_params: int = 0
    merged: tuple[int, ...] | None = None  # tokens merged in each block
    read: int | None = None  # tokens of the last block's queries, projection and MLP; None: all
    rotary: int = 0  # numbers of a token's rotary embedding, which merge with it
    own: tuple[int, ...] | None = None  # hidden units of the tokens that are read; 0: they share
    own_tokens: int = 1  # how many tokens are read
    stages: tuple[tuple[int, int], ...] | None = None
    """Per block, tokens and width, where they differ: all but the hidden units is then in
    `fixed_params` and `fixed_macs`."""
    fixed_macs: int = 0

    def __post_init__(self) -> None:
        for name in ("queries", "values", "merged", "own", "stages"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.hidden):
                raise UsageError(
                    f"`{name}` must have one entry per block ({len(self.hidden)}), got {len(value)}"
                )

    def with_hidden(self, hidden: Sequence[int], own: Sequence[int] | None = None) -> Sizes:
        """The same network with other hidden widths, and own ones of the tokens that are read;
        None leaves these as they are."""
        if len(hidden) != len(self.hidden):
            raise UsageError(f"`hidden` must have {len(self.hidden)} entries, got {len(hidden)}")
        return replace(self, hidden=tuple(hidden), own=self.own if own is None else tuple(own))

    def with_tokens(self, merged: Sequence[int] | None, read: int | None = None) -> Sizes:
        """The same network with so many tokens merged in each block, and read of the last one."""
        return replace(self, merged=None if merged is None else tuple(merged), read=read)

    def width_at(self, l: int) -> int:
        """The width of block l's stream."""
        return self.width if self.stages is None else self.stages[l][1]

    def attended(self, l: int) -> int:
        """Tokens that reach block l."""
        if self.stages is not None:
            return self.stages[l][0]
        return self.tokens - sum((self.merged or ())[:l])

    def answered(self, l: int) -> int:
        """Tokens that block l's attention has queries for."""
        return self.read if self.read is not None and self._last(l) else self.attended(l)

    def mlp_tokens(self, l: int) -> int:
        """Tokens that go through block l's MLP; those with hidden units of their own do not."""
        if self.pooled_only and self._last(l):
            return 1
        aside = self.own_tokens if self.own is not None and self.own[l] else 0
        return self.answered(l) - (0 if self.merged is None else self.merged[l]) - aside

    def _last(self, l: int) -> bool:
        return l == len(self.hidden) - 1


def params(sizes: Sizes) -> int:
    """Parameters of the whole network."""
    d = sizes.width
    if sizes.stages is not None:
        return sizes.fixed_params + _hidden(sizes, "params")
    total = sizes.fixed_params + sizes.patch_inputs * d + d + d * sizes.classes + sizes.classes
    for l, h in enumerate(sizes.hidden):
        q, v = _attention(sizes, l)
        total += attention_price(sizes, q, v, "params") + d  # the projection's bias
        total += h * neuron_price(sizes, l, "params") + own_price(sizes, l, "params")
        total += d * int(sizes.output_bias) + sizes.block_params
    return total


def macs(sizes: Sizes) -> int:
    """Multiply-accumulates of one image."""
    d = sizes.width
    if sizes.stages is not None:
        return sizes.fixed_macs + _hidden(sizes, "macs")
    total = sizes.patches * sizes.patch_inputs * d + d * sizes.classes
    for l, h in enumerate(sizes.hidden):
        q, v = _attention(sizes, l)
        total += attention_price(sizes, q, v, "macs", l) + merging_macs(sizes, l)
        total += h * neuron_price(sizes, l, "macs") + own_price(sizes, l, "macs")
    return total


def neuron_price(sizes: Sizes, l: int, price: Price) -> int:
    """What one hidden unit of block l costs: 1, its parameters, or its MACs of one image."""
    if price == "neurons":
        return 1
    rows = 2 if sizes.gated else 1  # of fc1
    if price == "params":
        own = rows * int(sizes.hidden_bias) + sizes.norm_params
        return (rows + 1) * sizes.width_at(l) + own
    if price == "macs":
        return sizes.mlp_tokens(l) * sizes.width_at(l) * (rows + 1)
    raise UsageError(f"price must be neurons, params or macs, got {price!r}")


def own_price(sizes: Sizes, l: int, price: Price, own: int | None = None) -> int:
    """What block l's hidden units of the tokens that are read cost, their second layer's bias
    included; `own`: so many of them, None: as many as there are."""
    count = own if own is not None else 0 if sizes.own is None else sizes.own[l]
    if price == "params" and count:
        return count * neuron_price(sizes, l, price) + sizes.width * int(sizes.output_bias)
    if price == "macs":
        return count * sizes.own_tokens * sizes.width * (3 if sizes.gated else 2)
    return count


def attention_price(
    sizes: Sizes, q: int, v: int, price: Literal["params", "macs"], l: int = 0
) -> int:
    """What block l's attention costs with q query/key and v value dimensions over all heads:
    the parameters of both projections (without `proj`'s bias), or the MACs of one image."""
    t, answered, d = sizes.attended(l), sizes.answered(l), sizes.width
    if price == "params":
        biases = (q + v + q * int(sizes.key_bias)) * int(sizes.qkv_bias)
        return d * (2 * q + v) + biases + v * d
    if price == "macs":
        return t * d * (q + v) + answered * d * q + answered * t * (q + v) + answered * v * d
    raise UsageError(f"price must be params or macs, got {price!r}")


def merging_macs(sizes: Sizes, l: int) -> int:
    """What merging costs in block l: the distances of A and B, and the sums of those that join."""
    r = 0 if sizes.merged is None else sizes.merged[l]
    if r == 0:
        return 0
    prefix = sizes.tokens - sizes.patches
    patches = sizes.attended(l) - prefix
    a, b = patches - patches // 2, patches // 2
    return a * b * sizes.width + b * r * (sizes.width + sizes.rotary + 1)


def hidden_budget(sizes: Sizes, goal: float, price: Price, *, attention: bool = False) -> float:
    """What the hidden units may cost if the whole network is to cost `goal` parameters or MACs.

    Args:
        attention: the attention's part is to be shared out, too, and belongs to the answer.

    Raises:
        UsageError: a price in other units.
        GateError: what is not pruned costs more than that already.
    """
    if price != "params" and price != "macs":
        raise UsageError(f"price must be params or macs, got {price!r}")
    whole = params(sizes) if price == "params" else macs(sizes)
    hidden = _hidden(sizes, price)
    if attention:
        hidden += sum(
            attention_price(sizes, *_attention(sizes, l), price, l)
            for l in range(len(sizes.hidden))
        )
    if goal <= whole - hidden:
        what = "MLP neuron or attention head" if attention else "MLP neuron"
        raise GateError(
            f"a target of {goal:.4g} {price} is below the {whole - hidden:.4g} that remain "
            f"without any {what}",
            hint="raise the target" + ("" if attention else ": only MLP neurons are removed"),
        )
    return goal - (whole - hidden)


def _hidden(sizes: Sizes, price: Price) -> int:
    return sum(h * neuron_price(sizes, l, price) for l, h in enumerate(sizes.hidden))


def _attention(sizes: Sizes, l: int) -> tuple[int, int]:
    q = sizes.width if sizes.queries is None else sizes.queries[l]
    v = sizes.width if sizes.values is None else sizes.values[l]
    return q, v
