"""timm's published weights from the Hugging Face hub, or instructions where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from npprune.errors import ModelError, setting

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
