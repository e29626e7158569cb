"""The state of a training: named tensors and a position, replaced as a whole.

A folder beside the result, gone when the result is there. The JSON file names the tensor file it
belongs to and its sha256, and is written last: after a kill at any moment, the pair it names is
there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from npprune.errors import StoreError, setting
from npprune.store import atomic
from npprune.store.runs import settings_changes

STATE = "state.json"
TABLE = "table.safetensors"
LOCK = ".lock"

Tensors = Mapping[str, Any]  # torch tensors on the CPU


class TrainingFolder:
    """Where an interrupted training resumes: `<result>.partial`.

    said: in words what settings that are hashes are of, for the message that refuses others.
    """

    def __init__(self, result: Path, said: dict[str, str] | None = None) -> None:
        self.said = said or {}
        self.path = result.with_name(f"{result.name}.partial")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; a second process is refused at once."""
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(
                f"`{self.path}` is a file, not a folder", hint=f"choose another {setting('out')}"
            )
        with atomic.locked(self.path, LOCK, lambda: "another process"):
            atomic.remove_leftovers(self.path)
            yield

    def save(self, about: dict[str, Any], tensors: Tensors) -> None:
        """Replace the state. `about` is plain JSON and holds the `settings` and the `step`."""
        from safetensors.torch import save

        name = f"state-{about['step']}.safetensors"
        atomic.write_bytes(self.path / name, save(dict(tensors)))
        about = {
            **about,
            "said": self.said,
            "file": name,
            "sha256": atomic.sha256_file(self.path / name),
        }
        atomic.write_text(self.path / STATE, json.dumps(about) + "\n")
        for old in self.path.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What `save` was given last; None where nothing was saved yet.

        Raises:
            StoreError: it is the state of other settings, or it was changed.
        """
        from safetensors.torch import load

        if not (self.path / STATE).is_file():
            return None
        about = json.loads(atomic.read_text(self.path / STATE))
        if about["settings"] != json.loads(json.dumps(settings)):
            words = about.get("said"), self.said
            changes = "; ".join(settings_changes(about["settings"], settings, *words)[:3])
            raise StoreError(
                f"`{self.path}` is an interrupted training of other settings: {changes}",
                hint="repeat those settings, remove the folder, or choose another "
                + setting("out"),
            )
        data = atomic.read_bytes(self.path / about["file"])
        if atomic.sha256_file(self.path / about["file"]) != about["sha256"]:
            raise StoreError(
                f"`{self.path / about['file']}` was changed since it was written",
                hint="remove the folder to train from the beginning",
            )
        return about, load(data)

    def save_table(self, tensors: Tensors) -> None:
        """Keep tensors that the training computes once."""
        from safetensors.torch import save

        atomic.write_bytes(self.path / TABLE, save(dict(tensors)))

    def load_table(self) -> dict[str, Any] | None:
        """What `save_table` was given, or None."""
        from safetensors.torch import load

        path = self.path / TABLE
        return load(atomic.read_bytes(path)) if path.is_file() else None

    def remove(self) -> None:
        """Delete the folder: the result is there. Only files of ours are touched."""
        try:
            for path in [*self.path.glob("state-*.safetensors"), self.path / STATE]:
                path.unlink(missing_ok=True)
            for name in (TABLE, LOCK):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        except OSError as err:
            raise atomic.store_error(err, self.path, "remove") from err
