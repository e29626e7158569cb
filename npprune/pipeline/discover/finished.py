"""What a finished discovery left: its paths and settings, and the same for the other methods.

The paths of other methods, or of other images, are found by `discover` with the run's own
settings, in run folders below the run's: they resume, and are found once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from npprune.data.labels import class_list
from npprune.errors import StoreError, UsageError
from npprune.files import keeping
from npprune.pipeline.common.inputs import run_names
from npprune.pipeline.common.outputs import recordable
from npprune.pipeline.common.results import add_command
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.stage import discover
from npprune.recipe import DataSection, DiscoverSection, Recipe
from npprune.records import Analysis, Manifest, Result
from npprune.store.path_store import PathTable, run_table
from npprune.store.runs import RunFolder
from npprune.words import METHODS


@dataclass
class FinishedRun:
    """A run folder with paths."""

    folder: RunFolder
    manifest: Manifest
    recipe: Recipe
    result: Result
    table: PathTable
    recorded: bool = True  # whether the run's result can be written

    @property
    def settings(self) -> DiscoverSection:
        """How the paths were found."""
        assert self.recipe.discover is not None
        return self.recipe.discover

    @property
    def widths(self) -> list[int]:
        """Hidden units per block."""
        return self.manifest.model.widths

    def name(self, label: int) -> str:
        """The class's name, or its index as text."""
        known = self.result.classes
        return known[label].name if 0 <= label < len(known) else str(label)


def open_finished(run: Path, work: Work | None = None) -> FinishedRun:
    """The run's paths. With `work`, it is said where nothing can be recorded in the run.

    Raises:
        StoreError: no run, or one whose discovery has not ended.
    """
    folder = RunFolder(run)
    table = run_table(folder)
    recorded = work is None or recordable(folder, work)
    return FinishedRun(
        folder, folder.read_manifest(), folder.read_recipe(), folder.read_result(), table, recorded
    )


def paths_of(
    found: FinishedRun,
    method: str,
    work: Work,
    *,
    data: DataSection | None = None,
) -> PathTable:
    """The paths of a method on the run's images, or on those of `data.train`.

    The run's settings hold: K, scope, quadrature, points, accumulation, seed.

    Raises:
        StoreError: the method's paths are of other images than the run's.
    """
    if method == found.settings.method and data is None:
        return found.table
    below = found.folder.path / "methods"
    if data is not None:
        text = data.model_dump_json(
            exclude={"batch_size", "workers", "max_megapixels", "val", "calibration"}
        )
        below = below / hashlib.sha256(text.encode()).hexdigest()[:12]
    work.on("analyze").say(f"paths by {method}: {below / method}")
    if data is None and (there := _there(below / method, found)) is not None:
        return there
    discover(
        found.recipe.model,
        data or found.recipe.data,
        found.settings.model_copy(update={"method": method}),
        below / method,
        work=replace(work, seed=found.recipe.seed, command=""),
        names=None if data is None else run_names(found.result),
    )
    table = open_finished(below / method).table
    if data is None and table.ids.tolist() != found.table.ids.tolist():
        raise StoreError(
            f"`{below / method}` holds paths of other images than `{found.folder.path}`",
            hint="the images have changed: discover again into another folder",
        )
    return table


def methods_of(found: FinishedRun) -> list[str]:
    """The methods whose paths on the run's images have been found, the run's own first."""
    others = [m for m in METHODS if m != found.settings.method]
    below = found.folder.path / "methods"
    return [found.settings.method, *(m for m in others if _there(below / m, found) is not None)]


def _there(run: Path, found: FinishedRun) -> PathTable | None:
    """The paths of a companion run that has ended, on the same images by the same network."""
    try:
        other = open_finished(run)
    except StoreError:  # not there, or not whole: it is found again
        return None
    same = other.table.ids.tolist() == found.table.ids.tolist()
    theirs, ours = ({**f.manifest.settings, "method": "", "seed": 0} for f in (other, found))
    return other.table if same and theirs == ours else None


def choose_labels(found: FinishedRun, classes: Sequence[str | int] | str | None) -> list[int]:
    """The labels that `--classes` names: indices, synsets or names; None: all with paths.

    Raises:
        UsageError: a class that the run has no paths of.
    """
    if classes is None:
        return found.table.classes
    given: Sequence[str | int] = [classes] if isinstance(classes, str) else classes
    if isinstance(classes, str) and Path(classes).is_file():
        given = class_list(Path(classes))
    place: dict[str, int] = {}
    for label in found.table.classes:
        info = found.result.classes[label]
        parts = [part.strip() for part in info.name.split(",")]
        for word in (str(label), info.synset or "", info.name, *parts):
            place.setdefault(word.lower(), label)
    chosen = set()
    for token in given:
        named = place.get(str(token).strip().lower())
        if named is None:
            raise UsageError(
                f"`{found.folder.path}` has no paths of class `{token}`",
                hint="choose among the classes it holds: "
                + ", ".join(f"{c} {found.name(c)}" for c in found.table.classes[:5]),
            )
        chosen.add(named)
    return sorted(chosen)


def record(found: FinishedRun, analyses: dict[str, Analysis], work: Work) -> None:
    """Put analyses into the run's result, if that can be written; one of the same key is replaced.

    Raises:
        UnstoredError: it cannot be written any more; the error carries the analyses.
    """
    if not found.recorded:
        return
    with keeping(analyses), found.folder.updating() as result:
        result.analyses.update(analyses)
        add_command(result, work.command)


def divide(table: PathTable) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Two halves of each class's images: rows to take paths from, rows to evaluate on.

    The order is that of the ids' hashes, so the halves depend on nothing else; an odd image goes
    to the paths. Classes with one image have none to evaluate on: they are returned, too.
    """
    take: list[int] = []
    hold: list[int] = []
    alone: list[int] = []
    for label in table.classes:
        rows = np.flatnonzero(table.labels == label)
        hashes = [hashlib.sha256(str(table.ids[r]).encode()).hexdigest() for r in rows]
        rows = rows[np.argsort(hashes, kind="stable")]
        half = (len(rows) + 1) // 2
        take += rows[:half].tolist()
        hold += rows[half:].tolist()
        if len(rows) == 1:
            alone.append(label)
    return np.array(sorted(take), np.int64), np.array(sorted(hold), np.int64), alone
