"""Run folders: `reports/<name>/`, where running again resumes.

The manifest is written first. A folder belongs to one configuration, for good; one process works
in it at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npprune.errors import StoreError, plural, setting
from npprune.records import DataInfo, Manifest, Plan, Result
from npprune.store import atomic

_LOCK = ".lock"
_HOLDER = ".lock.json"


class RunFolder:
    """The files of one run. Nothing is created or read before a method asks for it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest_path = self.path / "manifest.json"
        self.recipe_path = self.path / "recipe.yaml"
        self.plan_path = self.path / "plan.json"
        self.result_path = self.path / "result.json"
        self.paths_folder = self.path / "paths"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.manifest_path.is_file()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; a second process is refused at once, with who holds it."""
        self.refuse_foreign()
        with atomic.locked(self.path, _LOCK, self._holder):
            holder = self.path / _HOLDER
            try:
                about = {"pid": os.getpid(), "host": socket.gethostname()}
                atomic.write_text(holder, json.dumps(about) + "\n")
                yield
            finally:
                with contextlib.suppress(OSError):  # it only serves a message
                    holder.unlink(missing_ok=True)

    def create_or_resume(self, manifest: Manifest, recipe_yaml: str = "") -> bool:
        """Begin a run here, or resume one of the same settings. True: an earlier run resumes.

        Call it with the lock held: what a killed process left half-written is removed. The
        manifest of a run that resumes stays as it was. StoreError where the folder holds a run of
        other settings, or something that is no run.
        """
        self.refuse_foreign()
        resumed = self.exists
        if resumed:
            self.refuse_other_settings(manifest)
        atomic.remove_leftovers(self.path)
        atomic.remove_leftovers(self.paths_folder)
        if not resumed:
            atomic.write_json(self.manifest_path, manifest)
        if recipe_yaml:
            atomic.write_text(self.recipe_path, recipe_yaml)
        return resumed

    def refuse_foreign(self) -> None:
        """StoreError where the path is a file, or a folder with content that is no run."""
        if self.exists or not self.path.exists():
            return
        if not self.path.is_dir():
            raise StoreError(
                f"`{self.path}` is a file, not a folder", hint=f"choose another {setting('out')}"
            )
        try:
            names = sorted(p.name for p in self.path.iterdir() if not _is_ours(p))
        except OSError as err:
            raise atomic.store_error(err, self.path, "read") from err
        if names:
            raise StoreError(
                f"`{self.path}` is not empty and holds no run: it has `{names[0]}`, "
                "and no `manifest.json`",
                hint=f"choose another {setting('out')}, or an empty folder",
            )

    def read_manifest(self) -> Manifest:
        """The manifest; StoreError where there is no run."""
        if not self.exists:
            raise StoreError(
                f"`{self.path}` is not a run folder: it has no `manifest.json`",
                hint="`npprune discover ... --out FOLDER` makes one",
            )
        return atomic.read_json(Manifest, self.manifest_path)

    def read_result(self) -> Result:
        """The result so far; StoreError where nothing was finished yet."""
        if not self.result_path.is_file():
            raise StoreError(
                f"`{self.path}` has no `result.json`",
                hint="run the command that made it again: it resumes where it stopped"
                if self.exists
                else "give the run folder, such as reports/NAME",
            )
        return atomic.read_json(Result, self.result_path)

    def write_result(self, result: Result) -> None:
        """Replace the result."""
        atomic.write_json(self.result_path, result)

    def read_plan(self) -> Plan:
        """The plan of the run."""
        return read_plan(self.plan_path)

    def write_plan(self, plan: Plan) -> None:
        """Replace the plan."""
        atomic.write_json(self.plan_path, plan)

    def _holder(self) -> str:
        try:
            about = json.loads((self.path / _HOLDER).read_text())
            return f"process {about['pid']} on {about['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"  # it may be between taking the lock and saying so

    def refuse_other_settings(self, manifest: Manifest) -> None:
        """StoreError where the run here is of other settings: which, and both values."""
        old = self.read_manifest()
        if old.settings_sha256 == manifest.settings_sha256:
            return
        changes = settings_changes(old.settings, manifest.settings, _said(old), _said(manifest))
        shown = "; ".join(changes[:3]) or "its settings' sha256 differs"
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        raise StoreError(
            f"`{self.path}` belongs to a run of other settings: {shown}{more}",
            hint=f"choose another {setting('out')}, or repeat the settings of the first run",
        )


def read_plan(path: str | Path) -> Plan:
    """A plan from its file, or from the run folder or checkpoint that holds a `plan.json`."""
    path = Path(path)
    if path.is_dir():
        path = path / "plan.json"
    if not path.is_file():
        raise StoreError(f"no plan at `{path}`", hint="`npprune prune` writes a plan.json")
    return atomic.read_json(Plan, path)


def settings_changes(
    old: dict[str, Any],
    new: dict[str, Any],
    old_said: dict[str, str] | None = None,
    new_said: dict[str, str] | None = None,
) -> list[str]:
    """What differs between two settings, as "`discover.topk`: 1 -> 5", in the order of `new`.

    old_said, new_said: what stands for a value that says nothing to a person, such as a hash.
    """
    before, after = _flatten(old), _flatten(new)
    names = [*after, *(name for name in before if name not in after)]
    missing = object()
    changes = []
    for name in names:
        a, b = before.get(name, missing), after.get(name, missing)
        if a != b:
            was, now = (
                (said or {}).get(name) or _show(value, missing)
                for said, value in ((old_said, a), (new_said, b))
            )
            changes.append(f"`{name}`: {was} -> {now}")
    return changes


def _said(manifest: Manifest) -> dict[str, str]:
    """The network and the images of a run in words, by the settings that hold their hashes."""
    source = manifest.model.source
    weights = f", {source.checkpoint}" if source.checkpoint else ""
    images = "data" if "data" in manifest.settings else "val.sha256"
    return {
        "model": f"{source.architecture}{weights} (weights {source.sha256[:12]})",
        images: images_in_words(manifest.data),
        **manifest.said,
    }


def images_in_words(data: DataInfo) -> str:
    """`12 images of 4 classes, folder:val (list 0123456789ab)`; the list is of names and labels."""
    count = f"{plural(data.images, 'image')} of {plural(data.classes, 'class', 'classes')}"
    return f"{count}, {data.spec}" + (f" (list {data.sha256[:12]})" if data.sha256 else "")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names; values as JSON gives them back."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(item, dict) and item:
            flat.update(_flatten(item, name))
        else:
            flat[name] = json.loads(json.dumps(item))
    return flat


def _show(value: Any, missing: object) -> str:
    if value is missing:
        return "(not set)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_ours(path: Path) -> bool:
    """What a run leaves in a folder before its manifest is there."""
    return path.name in (_LOCK, _HOLDER) or atomic.is_leftover(path)
