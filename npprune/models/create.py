"""timm's names: those of today, those with a tag, and the networks that they build."""

from __future__ import annotations

import difflib
import re
from typing import Any

import timm
import torch
from timm.models._registry import _deprecated_models
from torch import nn

from npprune.errors import ModelError, setting

_HUB = re.compile(r"^(?:hf-hub|hf_hub|local-dir):|/")


def create(name: str, args: dict[str, Any], **timm_options: Any) -> nn.Module:
    """`timm.create_model` in evaluation mode, leaving the global random state as it was.

    Raises:
        ModelError: the architecture does not take these arguments.
    """
    name, _ = current_name(name)
    published(name)
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in args.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(name, **timm_options, **known).eval()
        except (TypeError, AssertionError, ValueError, ZeroDivisionError) as err:
            given = ", ".join(f"{k}={v}" for k, v in args.items())
            lines = str(err).strip().splitlines() or [type(err).__name__]
            raise ModelError(
                f"timm cannot build {name} with {given or 'its defaults'}: {lines[0][:160]}",
                hint="check the image size and the number of heads",
            ) from err


def current_name(name: str) -> tuple[str, list[str]]:
    """timm's name of today for one that it has renamed, and a note that says so.

    Raises:
        ModelError: timm removed the model.
    """
    if name not in _deprecated_models:
        return name, []
    current = _deprecated_models[name]
    if current is None:
        raise ModelError(f"timm has removed {name}, without a successor", hint="use another model")
    return current, [f"timm has renamed {name}: it is {current} now"]


def published(name: str) -> dict[str, Any]:
    """timm's pretrained configuration of a name; ModelError with the nearest names if unknown."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise _unknown_name(name)
    tagged = timm.list_models(f"{base}.*", pretrained=True)
    if name != base and name not in tagged:
        raise ModelError(
            f"timm has no weights tagged {name.partition('.')[2]!r} for {base}",
            hint=f"there are: {', '.join(tagged[:6])}" if tagged else f"give `{base}` alone",
        )
    cfg = timm.get_pretrained_cfg(name)
    return cfg.to_dict() if cfg is not None else {}


def _unknown_name(name: str) -> ModelError:
    last = re.sub(r"^.*[/:]", "", name).replace("-", "_")
    base = last.partition(".")[0]
    near = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.6)
    hint = f"near: {', '.join(near)}" if near else "`timm.list_models('vit*')` lists them"
    if last == base and _deprecated_models.get(base):
        hint = f"timm calls it `{_deprecated_models[base]}`"
    elif _HUB.search(name) and last in timm.list_models(pretrained=True):
        hint = f"networks on the hub are given by timm's name alone: `{last}`"
    elif _HUB.search(name):
        hint += "; other weights of the hub: download the file, and pass it with "
        hint += setting("model.checkpoint")
    return ModelError(f"timm has no model named {name!r}", hint=hint)
