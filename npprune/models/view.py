"""timm's vision transformers as a `VitView`: embed -> blocks -> head, computed by timm itself.

The embedding runs the model's own `forward_features` with every block replaced by the identity,
which also records what else each block is called with (rotary embeddings, relative biases,
masks). A hook on `fc2`'s input reads and edits the neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from npprune.core.view import HiddenEdit, Scope
from npprune.errors import ModelError


class TimmView:
    """A timm vision transformer with `blocks`, each with `.attn` and an `.mlp` ending in `.fc2`.

    Raises ModelError, by name and with the reason, for what is not such a transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks = _blocks(model)
        self.widths = tuple(block.mlp.fc2.in_features for block in self.blocks)  # type: ignore[union-attr]
        self.num_prefix_tokens = int(getattr(model, "num_prefix_tokens", 1))  # type: ignore[arg-type]
        self.scope: Scope = _pooled_scope(model)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def tokens(self, scope: Scope) -> slice:
        if scope == "all":
            return slice(None)
        if scope == "patch":
            return slice(self.num_prefix_tokens, None)
        if self.num_prefix_tokens == 0:
            raise ModelError(
                f"scope 'cls' needs a class token, and {type(self.model).__name__} has none",
                hint="use scope 'patch' or 'all'",
            )
        return slice(0, 1)

    def embed(self, images: Tensor) -> Tensor:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        streams: list[Tensor] = []

        def identity(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append((args, kwargs))
            streams.append(x)
            return x

        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced(block, "forward", identity))
            self.model.forward_features(images)  # type: ignore[operator]
        if len(calls) != len(self.blocks):
            raise ModelError(
                f"{type(self.model).__name__} runs {len(calls)} of its {len(self.blocks)} blocks "
                "in forward_features",
                hint="npprune supports plain transformers that run every block once",
            )
        self._calls = calls
        return streams[0]

    def block(self, l: int, x: Tensor, edit: HiddenEdit | None = None) -> Tensor:
        args, kwargs = self._calls[l]
        with self._edited(l, edit):
            return self.blocks[l](x, *args, **kwargs)  # type: ignore[no-any-return]

    def block_and_attention(
        self, l: int, x: Tensor, edit: HiddenEdit | None = None
    ) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.append(output)

        handle = self.blocks[l].attn.register_forward_hook(keep)  # type: ignore[union-attr,operator]
        try:
            y = self.block(l, x, edit)
        finally:
            handle.remove()
        return y, seen[0]

    def tail(self, l: int, x: Tensor, attention: Tensor, edit: HiddenEdit | None = None) -> Tensor:
        def given(*args: Any, **kwargs: Any) -> Tensor:
            return attention

        with _replaced(self.blocks[l].attn, "forward", given):  # type: ignore[arg-type]
            return self.block(l, x, edit)

    def head(self, x: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(x))  # type: ignore[operator,no-any-return]

    def fc2(self, l: int) -> nn.Linear:
        return self.blocks[l].mlp.fc2  # type: ignore[union-attr,return-value]

    @contextmanager
    def _edited(self, l: int, edit: HiddenEdit | None) -> Iterator[None]:
        if edit is None:
            yield
            return
        handle = self.fc2(l).register_forward_pre_hook(lambda module, args: (edit(args[0]),))
        try:
            yield
        finally:
            handle.remove()


def make_view(model: nn.Module) -> TimmView:
    """The view of a timm vision transformer.

    Raises:
        ModelError: the model is not a plain vision transformer; the message says why.
    """
    return TimmView(model)


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Shadow a method on the instance for the duration."""
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__delattr__(module, name)


def _blocks(model: nn.Module) -> list[nn.Module]:
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ModelError(
            f"{name} has no `blocks`: npprune needs a plain vision transformer",
            hint="hierarchical models (Swin, PVT, ...) are not supported",
        )
    for i, block in enumerate(blocks):
        fc2 = getattr(getattr(block, "mlp", None), "fc2", None)
        if not isinstance(fc2, nn.Linear) or not isinstance(
            getattr(block, "attn", None), nn.Module
        ):
            raise ModelError(
                f"{name}: block {i} ({type(block).__name__}) has no `attn` beside an `mlp.fc2`",
                hint="npprune supports blocks of one attention and one two-layer MLP",
            )
    for part in ("forward_features", "forward_head", "norm"):
        if not callable(getattr(model, part, None)):
            raise ModelError(f"{name} has no `{part}`: npprune needs a plain vision transformer")
    return list(blocks)


def _pooled_scope(model: nn.Module) -> Scope:
    if getattr(model, "attn_pool", None) is not None:
        return "all" if getattr(model, "pool_include_prefix", False) else "patch"
    pool = getattr(model, "global_pool", "token")
    if pool in ("token", "map") and int(getattr(model, "num_prefix_tokens", 1)) > 0:  # type: ignore[arg-type]
        return "cls"
    return "all" if getattr(model, "pool_include_prefix", False) else "patch"


def parameters_frozen(model: nn.Module) -> bool:
    """Whether no parameter asks for a gradient."""
    return not any(p.requires_grad for p in model.parameters())


@contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode, parameters without gradients; restored on exit."""
    training = model.training
    wanted = [p.requires_grad for p in model.parameters()]
    model.eval()
    for p in model.parameters():
        p.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield model
    finally:
        model.train(training)
        for p, want in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(want)
