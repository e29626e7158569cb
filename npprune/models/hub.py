"""Weights and folders from the Hugging Face hub, or instructions where there is no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from npprune.errors import ModelError, NpPruneError, setting
from npprune.models.folders import weights_files

FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")
TIMEOUT = 10.0  # seconds to wait for the hub's first answer


def fetch(name: str, cfg: dict[str, Any]) -> Path:
    """The local copy of the weights that timm publishes under `name`, downloaded when needed.

    Args:
        name: timm name, for messages.
        cfg: timm's `pretrained_cfg` of that name.

    Raises:
        ModelError: timm publishes no weights, or the hub cannot be reached; the hint says which
            file to fetch and how to pass it.
    """
    repo = cfg.get("hf_hub_id")
    if not repo:
        url = cfg.get("url")
        raise ModelError(
            f"timm publishes no weights on the hub for {name}",
            hint=(f"download {url} and pass it" if url else "pass weights")
            + f" with {setting('model.checkpoint', 'FILE')}",
        )
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repo, _, revision = str(repo).partition("@")
    where: dict[str, Any] = {"repo_id": repo, "revision": revision or None}
    named = cfg.get("hf_hub_filename")
    files = ((named,) if named else ()) + FILES
    for file in files:
        try:
            return Path(hf_hub_download(filename=file, local_files_only=True, **where))
        except LocalEntryNotFoundError:
            continue
    try:
        for file in files:
            try:
                # One request without retries first: offline, the download itself would go on
                # trying for half a minute.
                get_hf_file_metadata(hf_hub_url(filename=file, **where), timeout=TIMEOUT)
                return Path(hf_hub_download(filename=file, **where))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
    except Exception as err:
        lines = str(err).strip().splitlines() or [""]
        raise ModelError(
            f"the weights of {name} are not on this machine, and the hub cannot be reached: "
            f"{type(err).__name__}: {lines[0][:160]}",
            hint=f"fetch `{files[0]}` of https://huggingface.co/{repo} elsewhere and pass it "
            f"with {setting('model.checkpoint', 'FILE')}",
        ) from err
    raise ModelError(
        f"the hub's {repo} holds none of {', '.join(files)}",
        hint=f"pass a weights file with {setting('model.checkpoint', 'FILE')}",
    )


DESCRIPTION = "config.json"
_WEIGHTS = (*FILES[:1], "model.safetensors.index.json", *FILES[1:], "pytorch_model.bin.index.json")
_OPTIONAL = ("preprocessor_config.json", "processor_config.json")


def fetch_folder(repo: str) -> Path:
    """The local copy of a network on the hub: `config.json`, weights, preprocessing.

    Args:
        repo: `OWNER/NAME`, or `OWNER/NAME@REVISION`.

    Raises:
        ModelError: no such network, no weights in it, or the hub cannot be reached; the hint says
            which files to fetch and how to pass them.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    name, _, revision = repo.partition("@")
    where: dict[str, Any] = {"repo_id": name, "revision": revision or None}

    def cached(file: str) -> Path:
        return Path(hf_hub_download(filename=file, local_files_only=True, **where))

    def downloaded(file: str) -> Path:
        # One request without retries first, see `fetch`.
        get_hf_file_metadata(hf_hub_url(filename=file, **where), timeout=TIMEOUT)
        return Path(hf_hub_download(filename=file, **where))

    try:
        return _whole(cached)
    except HFValidationError as err:
        raise ModelError(f"`{repo}` is no name of the hub: {err}", hint="OWNER/NAME") from err
    except EntryNotFoundError:
        pass
    try:
        return _whole(downloaded)
    except EntryNotFoundError as err:
        raise ModelError(
            f"the hub's {name} lacks {DESCRIPTION}, or weights ({', '.join(_WEIGHTS)})",
            hint=f"pass a weights file with {setting('model.checkpoint', 'FILE')}",
        ) from err
    except NpPruneError:
        raise
    except Exception as err:
        missing = isinstance(err, RepositoryNotFoundError)
        lines = str(err).strip().splitlines() or [""]
        raise ModelError(
            f"{name} is not on this machine, and "
            + (
                "the hub has no network of that name that you may read"
                if missing
                else f"the hub cannot be reached: {type(err).__name__}: {lines[0][:160]}"
            ),
            hint=f"fetch `{DESCRIPTION}`, `{FILES[0]}` and, where there is one, `{_OPTIONAL[0]}` "
            f"of https://huggingface.co/{name} elsewhere, into one folder, and give that folder as "
            f"the model, or with {setting('model.checkpoint', 'FOLDER')}",
        ) from err


def is_fetched(repo: str) -> bool:
    """Whether a network on the hub lies on this machine already; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    name, _, revision = repo.partition("@")

    def cached(file: str) -> Path:
        found = try_to_load_from_cache(name, file, revision=revision or None)
        if not isinstance(found, str):
            raise EntryNotFoundError(file)
        return Path(found)

    try:
        _whole(cached)
    except (EntryNotFoundError, HFValidationError):
        return False
    return True


def _whole(get: Callable[[str], Path]) -> Path:
    """All files of a network by one way; EntryNotFoundError where a needed one is missing."""
    from huggingface_hub.errors import EntryNotFoundError

    folder = get(DESCRIPTION).parent
    for i, file in enumerate(_WEIGHTS):
        try:
            path = get(file)
            break
        except EntryNotFoundError:
            if i == len(_WEIGHTS) - 1:
                raise
    if path.name.endswith(".index.json"):
        for part in weights_files(path):
            get(part)
    for file in _OPTIONAL:
        try:
            get(file)
        except EntryNotFoundError:
            continue
    return folder
