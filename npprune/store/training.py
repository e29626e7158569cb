"""The state of a training: named tensors and a position, replaced as a whole.

A folder beside the result, gone when the result is there. The JSON file names the tensor file it
belongs to and its sha256, and is written last: after a kill at any moment, the pair it names is
there. What is damaged is set aside with a word, and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from npprune.errors import DamagedError, StoreError, setting
from npprune.records import CHECKSUM, digest
from npprune.store import atomic
from npprune.store.runs import settings_changes

STATE = "state.json"
TABLE = "table.safetensors"
TABLE_SHA256 = "table.sha256"
LOCK = ".lock"

Tensors = Mapping[str, Any]  # torch tensors on the CPU


class TrainingFolder:
    """Where an interrupted training resumes: `<result>.partial`.

    said: in words what settings that are hashes are of, for the message that refuses others.
    warn: is told of damage.
    """

    def __init__(
        self,
        result: Path,
        said: dict[str, str] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.said, self.warn = said or {}, warn
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
        about[CHECKSUM] = digest(about)
        atomic.write_text(self.path / STATE, json.dumps(about) + "\n")
        for old in self.path.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What `save` was given last; None where nothing was saved yet, or it was damaged.

        Raises:
            StoreError: it is the state of other settings.
        """
        from safetensors.torch import load

        if not (self.path / STATE).is_file():
            return None
        try:
            about = _sealed(self.path / STATE)
            data = self._checked(about["file"], about["sha256"])
        except DamagedError as err:
            aside = atomic.set_aside(self.path / STATE)
            self.warn(f"{err.message}: the training begins anew; kept as `{aside}`")
            return None
        if about["settings"] != json.loads(json.dumps(settings)):
            words = about.get("said"), self.said
            changes = "; ".join(settings_changes(about["settings"], settings, *words)[:3])
            raise StoreError(
                f"`{self.path}` is an interrupted training of other settings: {changes}",
                hint="repeat those settings, remove the folder, or choose another "
                + setting("out"),
            )
        return about, load(data)

    def save_table(self, tensors: Tensors) -> None:
        """Keep tensors that the training computes once."""
        from safetensors.torch import save

        data = save(dict(tensors))
        atomic.write_bytes(self.path / TABLE, data)
        atomic.write_text(self.path / TABLE_SHA256, hashlib.sha256(data).hexdigest() + "\n")

    def load_table(self) -> dict[str, Any] | None:
        """What `save_table` was given; None where it is not there as it was written."""
        from safetensors.torch import load

        if not (self.path / TABLE).is_file():
            return None
        try:
            sha256 = atomic.read_text(self.path / TABLE_SHA256).strip()
            return load(self._checked(TABLE, sha256))
        except StoreError as err:
            self.warn(f"{err.message}: computed again")
            return None

    def _checked(self, name: str, sha256: str) -> bytes:
        """A file's bytes; DamagedError where they are not those that were written."""
        path = self.path / name
        data = atomic.read_bytes(path) if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise DamagedError(f"`{path}` was changed or damaged since it was written")
        return data

    def damaged(self) -> Iterator[tuple[Path, str]]:
        """Every file of the state, and what is wrong with it; empty where nothing is."""
        state, table = self.path / STATE, self.path / TABLE
        try:
            about = _sealed(state)
        except StoreError as err:
            yield state, err.message
            return
        yield state, ""
        wanted = {about["file"]: about["sha256"]}
        if table.is_file() and (self.path / TABLE_SHA256).is_file():
            wanted[TABLE] = atomic.read_text(self.path / TABLE_SHA256).strip()
        for name, sha256 in wanted.items():
            try:
                self._checked(name, sha256)
                yield self.path / name, ""
            except StoreError as err:
                yield self.path / name, err.message

    def remove(self) -> None:
        """Delete the folder: the result is there. Only files of ours are touched.

        The state goes first: killed in between, the training is as if it had not begun.
        """
        known = [self.path / STATE, *self.path.glob("state-*.safetensors")]
        known += [self.path / name for name in (TABLE, TABLE_SHA256)]
        known += self.path.glob(f"*{atomic.DAMAGED}")
        try:
            for path in [*known, self.path / LOCK]:
                path.unlink(missing_ok=True)
            self.path.rmdir()
        except OSError as err:
            raise atomic.store_error(err, self.path, "remove") from err


def _sealed(path: Path) -> dict[str, Any]:
    """A state's JSON; DamagedError where its checksum, which older ones lack, does not fit."""
    try:
        about: dict[str, Any] = json.loads(atomic.read_text(path))
        checksum = about.pop(CHECKSUM, None)
        if checksum not in (None, digest(about)) or not {"settings", "file", "sha256"} <= set(
            about
        ):
            raise ValueError
    except (ValueError, AttributeError) as err:
        raise DamagedError(f"`{path}` was changed or damaged since it was written") from err
    return about
