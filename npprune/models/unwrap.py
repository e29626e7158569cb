"""Finding the network among the tensors of a training checkpoint.

Trainers put the weights under a key (`model_state_dict`), beside an optimizer, a loss or a second,
averaged network, and give every name a prefix (`module.`, `net.`). A network is a group of tensors
of one dictionary whose names have a patch embedding and blocks after one common prefix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from npprune.errors import ModelError

WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where the weights are looked for, in this order, if no group is a network."""

PREFIXES = ("_orig_mod.", "module.", "model.", "net.")
"""Removed from such weights where every name has them."""

Shapes = dict[str, tuple[int, ...]]

_DICTIONARIES = 100_000
_DEPTH = 6  # of dictionaries in dictionaries
_WRAPPED_MODULE = re.compile(r"(^|\.)(?:(?:_orig_mod|_(?:fsdp|checkpoint)_wrapped_module)\.)+")
_FIRST_BLOCK = re.compile(r"((?:.*\.)?)blocks\.0\.(?:attn|norm1|mlp)\.")
_KEPT = re.compile(r"(module\.)?(visual|vision_encoder|beit3)\.")  # timm translates these itself
_AVERAGED = re.compile(r"(?:^|[._`])(?:ema|swa|shadow)(?:[._`]|$)|averag", re.I)
_TRAINING_ONLY = re.compile(
    r"(?:.*\.)?(?:criterion|n_averaged|num_updates|loss(?:_\w+)?|\w+_loss|metrics?|\w+_metrics?"
    r"|acc|accuracy|\w+_acc(?:uracy)?)(?:\.|$)"
)


@dataclass
class Network:
    """The weights of one network in a file, their names without what was before them."""

    path: tuple[str, ...]  # keys of the dictionaries that hold them
    prefix: str
    tensors: dict[str, Tensor]
    rank: int = 2  # 0: averaged weights; 1: a teacher's; 2: others
    beside: dict[str, Tensor] = field(default_factory=dict)  # in no network
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """`state_dict`, `model.` of `state_dict`, or the names without a prefix."""
        return _label(self.path, self.prefix)


def unwrap(loaded: Any, path: Path, like: Callable[[], Shapes] | None = None) -> Network:
    """The network that a file holds.

    Of several copies of one network the most complete is taken, then averaged weights, then a
    teacher's, then the first in the file; of different networks the one that is `like` the
    wanted one. The notes say what was chosen and what was left out.

    Args:
        loaded: what the file held.
        path: the file, for messages.
        like: gives the shapes by name of the wanted network, if it is known.

    Raises:
        ModelError: no tensors, or different networks and none is known to be meant.
    """
    looked = list(islice(_holders(loaded), _DICTIONARIES + 1))
    if len(looked) > _DICTIONARIES:
        raise ModelError(f"checkpoint {path} holds more than {_DICTIONARIES:,} dictionaries")
    holders = {at: tensors for at, tensors in looked if tensors}
    if not holders:
        raise _no_tensors(loaded, path)
    found = [network for at, tensors in holders.items() for network in _networks(at, tensors)]
    if not found:
        found = [_unknown_layout(holders)]
    chosen = _choose(found, path, like)
    if chosen.rank == 0:
        chosen.notes.insert(0, f"averaged weights: the file's {chosen.label}")
    rest = _rest(holders, found)
    chosen.beside = {".".join((*at, name)): t for at, name, t in rest}
    if rest:
        chosen.notes.append(f"left out, being no part of the network: {_named(rest, chosen.path)}")
    return chosen


def _holders(
    value: Any, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dictionary, its own tensors, and the keys that lead there.

    Keys other than text and numbers are passed over: nobody names a weight so, and the text of
    nested ones has no bound.
    """
    if not isinstance(value, dict) or len(at) > _DEPTH:
        return
    items = {str(k): v for k, v in value.items() if isinstance(k, str | int)}
    tensors = {_WRAPPED_MODULE.sub(r"\1", k): v for k, v in items.items() if isinstance(v, Tensor)}
    yield at, tensors
    for key, inner in items.items():
        yield from _holders(inner, (*at, key))


def _networks(at: tuple[str, ...], tensors: dict[str, Tensor]) -> list[Network]:
    """The networks of one dictionary: one for each prefix before a patch embedding and blocks."""
    before = {m[1] for name in tensors if (m := _FIRST_BLOCK.match(name))}
    counters = [n.removesuffix("n_averaged") for n in tensors if n.endswith("n_averaged")]
    networks, rest = [], dict(tensors)
    for prefix in sorted(before, key=len, reverse=True):  # `model.` leaves what is `model.ema.`
        embedding = (f"{prefix}patch_embed.", f"{prefix}embeds.")
        if _KEPT.match(prefix) or not any(name.startswith(embedding) for name in rest):
            continue
        inside = {k: v for k, v in rest.items() if k.startswith(prefix)}
        rest = {k: v for k, v in rest.items() if k not in inside}
        own = {k.removeprefix(prefix): v for k, v in inside.items()}
        own = {k: v for k, v in own.items() if not _TRAINING_ONLY.match(k)}
        rank = 1 if "teacher" in _label(at, prefix) else 2
        if _AVERAGED.search(_label(at, prefix)) or any(prefix.startswith(c) for c in counters):
            rank = 0
        networks.append(Network(at, prefix, own, rank))
    names = list(tensors)  # in the order of the file
    return sorted(networks, key=lambda n: names.index(n.prefix + next(iter(n.tensors))))


def _label(at: tuple[str, ...], prefix: str) -> str:
    key = ".".join(at)
    if key and prefix:
        return f"`{prefix}` of `{key}`"
    return f"`{key or prefix}`" if key or prefix else "names without a prefix"


def _unknown_layout(holders: dict[tuple[str, ...], dict[str, Tensor]]) -> Network:
    """The weights where no group has timm's names: by key, else the largest dictionary."""
    named = next(((key,) for key in WRAPPERS if (key,) in holders), None)
    at = named or max(holders, key=lambda a: len(holders[a]))
    tensors, removed = holders[at], ""
    while shared := next((p for p in PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(shared): v for k, v in tensors.items()}
        removed += shared
    return Network(at, removed, tensors, 0 if _AVERAGED.search(_label(at, removed)) else 2)


def _choose(found: list[Network], path: Path, like: Callable[[], Shapes] | None) -> Network:
    """One of the networks, with a note of what was not taken."""
    if len(found) == 1:
        return found[0]
    first = _block_shapes(found[0])
    fits = found
    rule = "the most complete, then averaged weights, then a teacher's, then the first"
    if any(_block_shapes(other) != first for other in found):
        wanted = like() if like is not None else {}
        scores = [sum(wanted.get(k) == s for k, s in _shapes(n).items()) for n in found]
        fits = [n for n, score in zip(found, scores, strict=True) if 0 < score == max(scores)]
        rule = "it fits the named architecture"
        if not fits:
            raise ModelError(
                f"checkpoint {path} holds {len(found)} different networks: "
                + ", ".join(n.label for n in found),
                hint=f"save the one you mean alone; for {found[0].label}: "
                f"`{_alone(found[0], found, path)}`",
            )
    chosen = min(fits, key=lambda n: (-_size(n), n.rank))
    others = [n for n in found if n is not chosen]
    chosen.notes.append(
        f"the file holds {len(found)} networks: took {chosen.label} ({rule}), not "
        f"{', '.join(n.label for n in others)}; to take {others[0].label}, save it alone: "
        f"`{_alone(others[0], found, path)}`"
    )
    return chosen


def _shapes(network: Network) -> Shapes:
    return {k: tuple(v.shape) for k, v in network.tensors.items()}


def _block_shapes(network: Network) -> Shapes:
    """What two copies of one network have in common, whatever their heads."""
    return {k: s for k, s in _shapes(network).items() if k.startswith("blocks.")}


def _size(network: Network) -> int:
    return sum(name != "mask_token" for name in network.tensors)  # for pretraining alone


def _alone(network: Network, found: list[Network], path: Path) -> str:
    """Python that writes one network of a file to a file of its own.

    `weights_only=False` is no risk here: the file was read, so it holds nothing but plain data.
    """
    if path.suffix == ".safetensors":
        value, modules = "safetensors.torch.load_file(FILE)", "torch, safetensors.torch"
    else:
        value, modules = "torch.load(FILE, weights_only=False)", "torch"
    value += "".join(f"[{key!r}]" for key in network.path)
    beside = [n.prefix for n in found if n.path == network.path and n is not network]
    within = [p for p in beside if p.startswith(network.prefix)]
    tests = [f"k.startswith({network.prefix!r})"] if network.prefix else []
    tests += [f"not k.startswith({prefix!r})" for prefix in within]
    if tests:
        value = f"{{k: v for k, v in {value}.items() if {' and '.join(tests)}}}"
    return f"import {modules}; torch.save({value}, 'alone.pth')"


Rest = list[tuple[tuple[str, ...], str, Tensor]]


def _rest(holders: dict[tuple[str, ...], dict[str, Tensor]], found: list[Network]) -> Rest:
    """The tensors of the file that are in no network."""
    used = {(n.path, n.prefix + name) for n in found for name in n.tensors}
    return [
        (at, name, tensor)
        for at, tensors in holders.items()
        for name, tensor in tensors.items()
        if (at, name) not in used
    ]


def _named(rest: Rest, chosen: tuple[str, ...]) -> str:
    """Their names; where they lie under another key than the network, the key and a count."""
    parts = Counter(name if at in (chosen, ()) else at[0] for at, name, _ in rest)
    said = [f"`{part}`" + (f" ({n} tensors)" if n > 1 else "") for part, n in parts.items()]
    return ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")


def _no_tensors(loaded: Any, path: Path) -> ModelError:
    what = type(loaded).__name__
    if isinstance(loaded, dict):
        keys = [repr(k) if isinstance(k, str | int) else type(k).__name__ for k in list(loaded)[:4]]
        what = f"a dictionary with {', '.join(keys) or 'nothing'}"
    return ModelError(
        f"checkpoint {path} must hold named tensors, got {what}",
        hint="save `model.state_dict()`, alone or under a key such as `model` or `state_dict`",
    )
