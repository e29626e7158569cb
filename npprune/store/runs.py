"""Run folders: `reports/<name>/`, where running again resumes.

The manifest is written first. A folder belongs to one configuration, for good; one process works
in it at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from npprune.errors import DamagedError, RecipeError, StoreError, plural, setting
from npprune.recipe import Recipe, load_recipe
from npprune.records import DataInfo, Manifest, Plan, Result
from npprune.store import atomic

_LOCK = ".lock"
_HOLDER = ".lock.json"
_RESULT_LOCK = ".result.lock"
_PATIENCE = 60.0  # seconds; whoever changes a result holds it for a moment
_SEAL = "# sha256 of the lines below: "
LOCKS = (_LOCK, _HOLDER, _RESULT_LOCK)


class RunFolder:
    """The files of one run. Nothing is created or read before a method asks for it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.manifest_path = self.path / "manifest.json"
        self.recipe_path = self.path / "recipe.yaml"
        self.plan_path = self.path / "plan.json"
        self.result_path = self.path / "result.json"
        self.paths_folder = self.path / "paths"
        self.probe_path = self.path / "probe.safetensors"

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

    def create_or_resume(
        self,
        manifest: Manifest,
        recipe_yaml: str = "",
        *,
        warn: Callable[[str], None] = lambda _: None,
    ) -> bool:
        """Begin a run here, or resume one of the same settings. True: an earlier run resumes.

        Call it with the lock held: what a killed process left half-written is removed. The
        manifest of a run that resumes stays as it was; one that is lost or damaged is made again.
        StoreError where the folder holds a run of other settings, or something that is no run.
        """
        self.refuse_foreign()
        resumed = self._resumes(manifest, warn)
        atomic.remove_leftovers(self.path)
        atomic.remove_leftovers(self.paths_folder)
        if not resumed:
            atomic.write_json(self.manifest_path, manifest)
        if recipe_yaml:
            atomic.write_text(self.recipe_path, f"{_SEAL}{_sha256(recipe_yaml)}\n{recipe_yaml}")
        return resumed

    def _resumes(self, manifest: Manifest, warn: Callable[[str], None]) -> bool:
        """Whether the manifest here is one to go on with; a damaged one is set aside."""
        said = f"`{self.path}` has lost its manifest"
        if self.exists:
            try:
                self.refuse_other_settings(manifest)
                return True
            except DamagedError as err:
                said = err.message
        if (owner := self._owner()) is None and not self.exists:
            return False
        if owner not in (None, manifest.settings_sha256):
            raise StoreError(
                f"{said}, and what was found in it is of other settings",
                hint=f"choose another {setting('out')}, or repeat the settings of the first run: "
                "its manifest is made again",
            )
        if self.exists:
            said += f" (kept as `{atomic.set_aside(self.manifest_path, stays=True)}`)"
        warn(f"{said}: made again")
        return False

    def _owner(self) -> str | None:
        """The settings' sha256 that shards or rows here say; None where there are none."""
        parts = [*self.paths_folder.glob("*.json"), *(self.path / "rows").glob("*.json")]
        for path in sorted(parts):
            with contextlib.suppress(StoreError, ValueError, AttributeError):
                return str(json.loads(atomic.read_text(path)).get("settings_sha256", ""))
        return None

    def refuse_foreign(self) -> None:
        """StoreError where the path is a file, or a folder with content that is no run."""
        if self.exists or not self.path.exists() or self._owner():
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

    def read_recipe(self) -> Recipe:
        """The recipe as resolved. DamagedError where it was changed since it was written."""
        first, _, rest = atomic.read_text(self.recipe_path).partition("\n")
        if first.startswith(_SEAL) and _sha256(rest) != first.removeprefix(_SEAL).strip():
            raise DamagedError(
                f"`{self.recipe_path}` was changed or damaged since it was written",
                hint=f"{self.how_to_finish()}, and writes it again; if you changed it on purpose, "
                "remove its first line",
            )
        try:
            recipe = load_recipe(self.recipe_path)
            if recipe.model.probe is not None:  # it lies beside, wherever the folder is
                recipe.model.probe = str(self.probe_path)
            return recipe
        except RecipeError as err:
            err.hint = err.hint or f"{self.how_to_finish()}, and writes it again"
            raise

    def read_result(self) -> Result:
        """The result so far; StoreError where nothing was finished yet."""
        if not self.result_path.is_file():
            raise StoreError(
                f"`{self.path}` has no `result.json`",
                hint=self.how_to_finish()
                if self.exists
                else "give the run folder, such as reports/NAME",
            )
        try:
            return atomic.read_json(Result, self.result_path)
        except DamagedError as err:
            err.hint = f"{self.how_to_finish()}; the damaged file is set aside"
            raise

    def how_to_finish(self) -> str:
        """The next step where something of the run is missing."""
        try:
            command = self.read_manifest().command
        except StoreError:
            command = ""
        again = f"run `{command}` again" if command else "run the command that made it again"
        return f"{again}: it computes only what is missing"

    def write_result(self, result: Result) -> None:
        """Replace the result. Where another process may change it, too: `updating`."""
        atomic.write_json(self.result_path, result)

    @contextlib.contextmanager
    def updating(
        self,
        begin: Callable[[], Result] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> Iterator[Result]:
        """The result to be changed, written at the end of the block; others wait meanwhile.

        begin: makes the result where there is none. warn: a damaged one is set aside with a word,
        and begun anew; None: it is refused.
        """
        with atomic.locked(self.path, _RESULT_LOCK, lambda: "another process", wait=_PATIENCE):
            atomic.remove_leftovers(self.path)
            yield (result := self._begun(begin, warn))
            self.write_result(result)

    def _begun(
        self, begin: Callable[[], Result] | None, warn: Callable[[str], None] | None
    ) -> Result:
        if begin is None or self.result_path.is_file():
            try:
                return self.read_result()
            except DamagedError as err:
                if begin is None or warn is None:
                    raise
                aside = atomic.set_aside(self.result_path, stays=True)
                warn(f"{err.message}: begun anew, the damaged one is `{aside}`")
        return begin()

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
            self._refuse_other_images(old, manifest)
            return
        changes = settings_changes(old.settings, manifest.settings, _said(old), _said(manifest))
        shown = "; ".join(changes[:3]) or "its settings' sha256 differs"
        more = f" (and {len(changes) - 3} more)" if len(changes) > 3 else ""
        raise StoreError(
            f"`{self.path}` belongs to a run of other settings: {shown}{more}",
            hint=f"choose another {setting('out')}, or repeat the settings of the first run",
        )

    def _refuse_other_images(self, old: Manifest, manifest: Manifest) -> None:
        """StoreError where other images have the names of those that the run was begun with."""
        for images, sha256 in manifest.content.items():
            if old.content.get(images, sha256) != sha256:
                raise StoreError(
                    f"`{self.path}` was begun with other images under the same names: files of "
                    f"{setting(f'data.{images}')} have another size or content now",
                    hint=f"bring the images back, or choose another {setting('out')}",
                )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


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
    return path.name in LOCKS or path.name.endswith(atomic.DAMAGED) or atomic.is_leftover(path)
