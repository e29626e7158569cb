"""timm's vision transformers as a `VitView`: embed -> blocks -> head, computed by timm itself.

The embedding runs the model's own `forward_features` with every block replaced by the identity,
which also records what else each block is called with (rotary embeddings, relative biases,
masks). A hook on `fc2`'s input reads and edits the neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from npprune.core.objective import Features, Objective, Predictions
from npprune.core.tokens import Merge, Tokens, expanded, match
from npprune.core.view import Given, HiddenEdit, Projections, Scope, Stream
from npprune.errors import ModelError
from npprune.models.attention import answer_first_query, projections
from npprune.models.blocks import NORMED, STAGED, blocks_of
from npprune.models.layouts import foreign_layout
from npprune.models.merging import (
    Merging,
    attend,
    attended,
    check_tokens,
    finish,
    followed,
    paired,
)
from npprune.models.own_units import OwnUnits
from npprune.words import SearchPrecision

"""Of the network's products: float32; float32 with TF32's ten bits on a GPU (see
`pipeline.device.products`); or bfloat16, the stream between the blocks staying float32."""


class TimmView:
    """A timm vision transformer with `blocks`, each with `.attn` and an `.mlp` ending in `.fc2`.

    Raises ModelError, by name and with the reason, for what is not such a transformer.
    """

    def __init__(
        self, model: nn.Module, *, precision: SearchPrecision = "fp32", compiled: bool = False
    ) -> None:
        """compiled: whole blocks that are differentiated go through `torch.compile`."""
        self.precision = precision
        self.model: Any = model
        self.blocks: list[Any] = _blocks(model)
        self.widths: tuple[int, ...] = tuple(block.mlp.fc2.in_features for block in self.blocks)
        self.num_prefix_tokens = prefix_tokens(model)
        self.scope: Scope = _pooled_scope(model)
        self.objective: Objective = Predictions() if classifiers(model) else Features()
        self.tokens_read: int | None = 1 if self.scope == "cls" else None
        if getattr(model, "head_dist", None) is not None:
            self.tokens_read = 2
        if not has_classifier(model):
            self.tokens_read = None
        options = [getattr(block, "token_options", None) for block in self.blocks]
        self.own_units = any(isinstance(block.mlp, OwnUnits) for block in self.blocks)
        self.merges: bool = any(o is not None and o.merged for o in options)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._compiled: list[Any] = [torch.compile(b) for b in self.blocks] if compiled else []

    def tokens(self, scope: Scope) -> slice:
        if scope == "all":
            return slice(None)
        if scope == "patch":
            return slice(self.num_prefix_tokens, None)
        if not has_class_token(self.model):
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
            stack.enter_context(self._products(images))
            for block in self.blocks:
                stack.enter_context(replaced(block, "forward", identity))
            features = self.model.forward_features(images)
        x = self._flat(streams)
        if not self._calls:
            self._check_plain(streams, features)
        self._calls = calls
        return x

    def _flat(self, streams: list[Tensor]) -> Tensor:
        """The stream [b, t, d] before block 0, from what each block is called with."""
        return streams[0]

    def entered(self, l: int, x: Stream) -> Stream:
        return x

    def gathered(self, l: int, values: Tensor) -> Tensor:
        return values

    def _check_plain(self, streams: list[Tensor], features: Any) -> None:
        """With blocks that do nothing, nothing but the final norm may happen to the stream."""
        if len(streams) != len(self.blocks) or any(x is not streams[0] for x in streams):
            raise ModelError(
                f"{type(self.model).__name__} does more between its blocks than run each once",
                hint="npprune supports plain transformers: embedding, blocks, norm, classifier",
            )
        with torch.no_grad():
            expected = self.model.norm(streams[0])
        same = isinstance(features, Tensor) and features.shape == expected.shape
        if not same or not torch.allclose(features, expected, atol=1e-5, equal_nan=True):
            raise ModelError(
                f"{type(self.model).__name__} does more after its blocks than a final norm",
                hint="npprune supports plain transformers: embedding, blocks, norm, classifier",
            )

    def block(
        self,
        l: int,
        x: Stream,
        *,
        edit: HiddenEdit | None = None,
        given: Given | None = None,
        cls_only: bool = False,
        merge: int | Merge | None = None,
    ) -> Stream:
        if self._in_tokens(l, x, merge):
            return self._merge(l, x, merge, edit=edit, given=given, cls_only=cls_only)
        assert isinstance(x, Tensor)
        if self._compiled and x.requires_grad and edit is None and given is None and not cls_only:
            with self._products(x):
                return self._through(l, self._compiled[l], x)  # type: ignore[no-any-return]
        return self._run(l, x, edit=edit, given=given, cls_only=cls_only)

    def _run(
        self, l: int, x: Tensor, *, edit: HiddenEdit | None, given: Given | None, cls_only: bool
    ) -> Any:
        if cls_only:
            given = slice(1, None), x.new_zeros(1, 1, 1).expand(*x[:, 1:].shape)
        one_query = _first_query_only(self.blocks[l].attn) if cls_only else nullcontext()
        with self._products(x), self._edited(l, edit), self._given(l, given), one_query:
            return self._through(l, self.blocks[l], x)

    def _through(self, l: int, block: Any, x: Tensor) -> Any:
        """What the network's forward pass does with block l."""
        args, kwargs = self._called(l)
        return block(x, *args, **kwargs)

    def _in_tokens(self, l: int, x: Tensor | Tokens, merge: int | Merge | None) -> bool:
        return isinstance(x, Tokens) or bool(merge) or isinstance(self.blocks[l], Merging)

    def _merge(
        self,
        l: int,
        x: Tensor | Tokens,
        merge: int | Merge | None,
        *,
        attention: Tensor | None = None,
        edit: HiddenEdit | None = None,
        given: Given | None = None,
        cls_only: bool = False,
    ) -> Any:
        """Block l on tokens that merge, or have merged."""
        block = self.blocks[l]
        check_tokens(self.model, l)
        tokens = followed(x, self.tokens_read is None)
        options = getattr(block, "token_options", None)
        if merge is None:
            merge = 0 if options is None else int(options.merged)
        rope = self._rope(l)
        with self._products(tokens.x), self._edited(l, edit), self._given(l, given):
            if attention is None:
                read = 1 if cls_only else None if options is None else options.read
                attention = attend(block, tokens, rope, read)
            y = attended(block, tokens, attention)
            if isinstance(merge, int):
                pairs = paired(block, tokens, y, merge, self.num_prefix_tokens)
            else:
                pairs = merge
            tokens = finish(block, tokens, y, pairs, rope)
        plain = isinstance(x, Tensor) and tokens.sizes is None
        return tokens.x if plain else tokens

    def _called(self, l: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What block l is called with, beside the stream."""
        if not self._calls:
            raise RuntimeError("call `embed` first: it records what the blocks are called with")
        return self._calls[l]

    def _rope(self, l: int) -> Tensor | None:
        rope: Tensor | None = self._called(l)[1].get("rope")
        return rope

    def _products(self, x: Tensor | Tokens) -> Any:
        x = x if isinstance(x, Tensor) else x.x
        if self.precision != "bf16":
            return nullcontext()  # a caller's own autocast stays
        return torch.autocast(x.device.type, torch.bfloat16)

    def block_and_attention(
        self,
        l: int,
        x: Stream,
        *,
        given: Given | None = None,
        cls_only: bool = False,
        merge: int | Merge | None = None,
    ) -> tuple[Stream, Tensor]:
        if self._in_tokens(l, x, merge):
            attention = self.attention_output(l, x)
            return self.tail(l, x, attention, given=given, merge=merge), attention
        assert isinstance(x, Tensor)
        seen: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.append(output)

        handle = self.blocks[l].attn.register_forward_hook(keep)
        try:
            y = self._run(l, x, edit=None, given=given, cls_only=cls_only)
        finally:
            handle.remove()
        return y, seen[0]

    def attention_output(self, l: int, x: Tensor | Tokens) -> Tensor:
        if isinstance(x, Tensor) and not self._in_tokens(l, x, None):
            nothing = x.new_zeros(1, 1, 1).expand(*x.shape)
            return self.block_and_attention(l, x, given=(slice(None), nothing))[1]
        check_tokens(self.model, l)
        read = getattr(getattr(self.blocks[l], "token_options", None), "read", None)
        with self._products(x):
            return attend(self.blocks[l], followed(x, False), self._rope(l), read)

    def tail(
        self,
        l: int,
        x: Stream,
        attention: Tensor,
        *,
        given: Given | None = None,
        merge: int | Merge | None = None,
    ) -> Stream:
        if self._in_tokens(l, x, merge):
            return self._merge(l, x, merge, attention=attention, given=given)

        def attended(*args: Any, **kwargs: Any) -> Tensor:
            return attention

        with replaced(self.blocks[l].attn, "forward", attended):
            return self.block(l, x, given=given)

    def pairs(self, l: int, x: Tokens, attention: Tensor, merged: int) -> Merge:
        block = self.blocks[l]
        y = attended(block, x, attention)
        return match(block.norm2(y), x.sizes, merged, self.num_prefix_tokens)

    def head(self, x: Tensor | Tokens) -> Tensor:
        if isinstance(x, Tokens):
            x = expanded(x) if self.tokens_read is None else x.x
        with self._products(x):
            outputs: Tensor = outputs_from(self.model, self.model.norm(x))
        return outputs.to(x.dtype)

    def adds(self, l: int) -> bool:
        return type(self.blocks[l]).__name__ not in NORMED

    def fc2(self, l: int) -> nn.Linear:
        return self.blocks[l].mlp.fc2  # type: ignore[no-any-return]

    def norm(self, l: int) -> nn.Module | None:
        norm: nn.Module | None = getattr(self.blocks[l].mlp, "norm", None)
        return None if isinstance(norm, nn.Identity) else norm

    def first(self, l: int) -> list[nn.Linear]:
        mlp = self.blocks[l].mlp
        return [getattr(mlp, name) for name in ("fc1", "fc1_g", "fc1_x") if hasattr(mlp, name)]

    def attention(self, l: int) -> Projections:
        attn = self.blocks[l].attn
        found = projections(attn)
        if found is None:
            raise ModelError(
                f"block {l}: {type(attn).__module__}.{type(attn).__name__} is another attention "
                "than timm's plain one"
            )
        return found

    def classifiers(self) -> list[nn.Linear]:
        return classifiers(self.model)

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

    @contextmanager
    def _given(self, l: int, given: Given | None) -> Iterator[None]:
        """The MLP computes only the tokens whose output is not given."""
        if given is None:
            yield
            return
        tokens, output = given
        mlp: nn.Module = self.blocks[l].mlp
        compute = mlp.forward

        def forward(z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            start, stop, _ = tokens.indices(z.shape[1])
            if start == 0 and stop == z.shape[1]:
                return output
            rest = compute(torch.cat([z[:, :start], z[:, stop:]], 1), *args, **kwargs)
            return torch.cat([rest[:, :start], output, rest[:, start:]], 1)

        with replaced(mlp, "forward", forward):
            yield


@contextmanager
def _first_query_only(attn: nn.Module) -> Iterator[None]:
    """The attention answers the first token alone; the others get what costs least."""
    compute = attn.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        masked = any(v is not None and v is not False for v in (*args, *kwargs.values()))
        first = None if masked else answer_first_query(attn, x)
        if first is None:
            with _FirstQueryOnly():
                return compute(x, *args, **kwargs)  # type: ignore[no-any-return]
        return torch.cat([first, first.new_zeros(1, 1, 1).expand(*x[:, 1:].shape)], 1)

    with replaced(attn, "forward", forward):
        yield


class _FirstQueryOnly(TorchFunctionMode):
    """Attention answers the first token alone; the others get zeros. With a mask: all."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or len(args) != 3 or kwargs.get("is_causal"):
            return func(*args, **kwargs)
        q, k, v = args
        if kwargs.get("attn_mask") is not None:
            return func(q, k, v, **kwargs)
        first = func(q[:, :, :1], k, v, **kwargs)
        return torch.cat([first, first.new_zeros(1, 1, 1, 1).expand(*v[:, :, 1:].shape)], 2)


def make_view(
    model: nn.Module, *, precision: SearchPrecision = "fp32", compiled: bool = False
) -> TimmView:
    """The view of a timm vision transformer.

    Raises:
        ModelError: the model is none that npprune sees through; the message says why.
    """
    from npprune.models.staged import StagedView  # which is a `TimmView`

    kind = StagedView if isinstance(model, STAGED) else TimmView
    return kind(model, precision=precision, compiled=compiled)


def has_classifier(model: nn.Module) -> bool:
    """Whether the network gives logits; else its features are what it is for."""
    return bool(classifiers(model))


def outputs_count(model: nn.Module) -> int:
    """Outputs of the classifier; 0 without one."""
    heads = classifiers(model)
    return heads[0].out_features if heads else 0


def outputs_of(model: nn.Module, images: Tensor) -> Tensor:
    """Images [b, 3, H, W] -> logits [b, c], or features [b, s, d]: what `VitView.head` ends in."""
    if has_classifier(model):
        return model(images)  # type: ignore[no-any-return]
    return outputs_from(model, model.forward_features(images))  # type: ignore[operator]


def outputs_from(model: Any, tokens: Tensor) -> Tensor:
    """The same from the tokens [b, t, d] after the last norm: logits; or the pooled vector and
    after it the patch tokens."""
    pooled: Tensor = model.forward_head(tokens)
    if has_classifier(model):
        return pooled
    if pooled.shape[-1] != tokens.shape[-1]:
        return pooled[:, None]
    patches = tokens.flatten(1, -2)[:, prefix_tokens(model) :]
    return torch.cat([pooled[:, None], patches], 1)


def classifiers(model: nn.Module) -> list[nn.Linear]:
    """The linear layers that give the logits: one, two in distilled models, none in a network
    without a classifier.

    Raises:
        ModelError: the network ends in something else.
    """
    head: Any = model.get_classifier()  # type: ignore[operator]
    heads = [_without_dropout(h) for h in (head if isinstance(head, tuple) else [head])]
    if all(isinstance(h, nn.Identity) for h in heads):
        return []
    if not all(isinstance(h, nn.Linear) for h in heads):
        kinds = ", ".join(type(h).__name__ for h in heads)
        raise ModelError(
            f"{type(model).__name__} must end in a linear classifier, got {kinds}",
            hint="prune it without its head, by its features (`num_classes=0`, "
            "`model.reset_classifier(0)`), and put the head back",
        )
    return heads


def _without_dropout(head: Any) -> Any:
    """The linear layer of a head that is `Sequential(Dropout, Linear)`; any other as it is."""
    if not isinstance(head, nn.Sequential):
        return head
    parts = [part for part in head if not isinstance(part, (nn.Dropout, nn.Identity))]
    return parts[0] if len(parts) == 1 else head


@contextmanager
def replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Shadow a method on the instance for the duration."""
    object.__setattr__(module, name, value)
    try:
        yield
    finally:
        object.__delattr__(module, name)


NOT_PLAIN = {
    "blocks_token_only": "class-attention blocks after the plain ones (CaiT)",
    "cls_attn_blocks": "class-attention blocks after the plain ones (XCiT)",
    "local_up_to_layer": "a class token that joins between the blocks (ConViT)",
    "neck": "a convolutional neck after the blocks (SAM)",
    "q_stride": "pooling between the blocks (Hiera)",
}
"""Parts that say a model with `blocks` is more than embedding, blocks, norm and classifier."""


def _blocks(model: nn.Module) -> list[Any]:
    if isinstance(model, STAGED):
        return blocks_of(model)
    name = type(model).__name__
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)) or len(blocks) == 0:
        raise ModelError(
            f"{name} has no `blocks`: npprune needs a plain vision transformer", hint=_inside(model)
        )
    for part, what in NOT_PLAIN.items():
        if hasattr(model, part):
            raise ModelError(
                f"{name} has {what}, which npprune does not support",
                hint="npprune supports plain transformers: embedding, blocks, norm, classifier",
            )
    for i, block in enumerate(blocks):
        fc2 = getattr(getattr(block, "mlp", None), "fc2", None)
        if not isinstance(fc2, nn.Linear) or not isinstance(
            getattr(block, "attn", None), nn.Module
        ):
            raise ModelError(
                f"{name}: block {i} ({type(block).__name__}) has no `attn` next to its `mlp.fc2`",
                hint="npprune supports blocks of one attention and one two-layer MLP",
            )
        if block in list(blocks)[:i]:
            raise ModelError(
                f"{name}: block {i} is block {list(blocks).index(block)} once more, and would be "
                "pruned with it",
                hint="give each its own: `model.blocks[i] = copy.deepcopy(model.blocks[i])`",
            )
    for part in ("forward_features", "forward_head", "norm"):
        if not callable(getattr(model, part, None)):
            raise ModelError(f"{name} has no `{part}`: npprune needs a plain vision transformer")
    return list(blocks)  # their parts are found at run time


def _inside(model: nn.Module) -> str:
    """The next step for a module without `blocks`: a network in it, or what it is."""
    for part, module in model.named_children():
        if isinstance(getattr(module, "blocks", None), (nn.Sequential, nn.ModuleList)):
            return f"the network is inside it: give its `.{part}`"
    known = foreign_layout(model.state_dict())
    if known is None:
        return "timm's plain vision transformers are supported, such as `vit_small_patch16_224`"
    return f"it is {known[0]}; use timm's network, such as `vit_small_patch16_224`"


def prefix_tokens(model: Any) -> int:
    """Class and register tokens before the patch tokens."""
    return 0 if isinstance(model, STAGED) else int(getattr(model, "num_prefix_tokens", 1))


def has_class_token(model: Any) -> bool:
    """Whether token 0 is a class token; registers may stand there in models without one."""
    embedding = getattr(model, "embeds", model)  # where NaFlex models keep it
    return getattr(embedding, "cls_token", None) is not None


def _pooled_scope(model: Any) -> Scope:
    pool = getattr(model, "global_pool", "token")
    if pool == "":
        raise ModelError(
            f"{type(model).__name__} is built without pooling: it gives no one vector of an image",
            hint="use global_pool token, avg or map",
        )
    if getattr(model, "head_dist", None) is not None:
        return "all"  # class and distillation token: no narrower scope holds both
    if getattr(model, "attn_pool", None) is not None:
        # Eva-type models pool all tokens; ViT-type ones say whether they do.
        return "all" if getattr(model, "pool_include_prefix", True) else "patch"
    if pool == "token" and has_class_token(model):
        return "cls"
    return "all" if getattr(model, "pool_include_prefix", False) else "patch"
