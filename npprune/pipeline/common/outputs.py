"""Before the work: what a command reads is not overwritten, and what it makes can be written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from npprune.errors import NpPruneError, StoreError, UsageError
from npprune.files import check_folder, foreign_folder, lies_in, refuse_overwriting
from npprune.pipeline.common.work import Work
from npprune.recipe import ModelSection
from npprune.store.checkpoints import (
    CONFIG,
    PLAN,
    WEIGHTS,
    is_checkpoint,
    objection,
    read_config,
)
from npprune.store.runs import RunFolder

LOCAL = "local-dir:"  # before a folder in timm's own form


def check_checkpoint(out: Path, reads: Iterable[str | Path], *, write: bool = True) -> None:
    """Refuse `out` as a checkpoint folder, which is replaced as a whole.

    write: False for a dry run, which asks only what would be overwritten.

    Raises:
        UsageError: it is read, holds what is read, or lies inside a checkpoint that is read.
        StoreError: it holds files of others, or cannot be written.
    """
    reads = list(reads)
    refuse_overwriting(out, reads, replaced=True)
    for read in reads:
        if is_checkpoint(read) and lies_in(out, Path(read)):
            raise UsageError(
                f"`--out` must not lie inside the checkpoint that is read, got `{out}` (`{read}`)",
                hint="choose a folder next to it: a checkpoint folder holds its own files alone",
            )
    if write:
        check_folder(out, replaced=True)
        if out.is_dir() and any(out.iterdir()) and (why := objection(out)):
            raise StoreError(f"`{out}` is not replaced: {why}", hint="choose another --out")


def check_run(out: Path, reads: Iterable[str | Path], *, write: bool = True) -> None:
    """Refuse `out` as a run folder, in which an earlier run is resumed.

    Raises:
        UsageError: it is what is read.
        StoreError: it holds anything but a run, or cannot be written.
    """
    refuse_overwriting(out, reads)
    RunFolder(out).refuse_foreign()
    if write:
        check_folder(out)


def reads_of(source: Path | ModelSection) -> list[str | Path]:
    """The files and folders behind a network or a run: what must not be overwritten.

    For a checkpoint, those of the network that it was pruned from, too: it is measured against it.
    """
    if isinstance(source, ModelSection):
        found: list[str | Path] = [source.checkpoint] if source.checkpoint else []
        if source.name.startswith(LOCAL):
            found.append(source.name.removeprefix(LOCAL))
        elif foreign_folder(source.name) is not None:
            found.append(source.name)
        return found + (_checkpoint(Path(source.name)) if is_checkpoint(source.name) else [])
    if is_checkpoint(source):
        return _checkpoint(source)
    run = RunFolder(source)
    return [source, *(reads_of(run.read_recipe().model) if run.exists else [])]


def _checkpoint(folder: Path) -> list[str | Path]:
    dense = read_config(folder).details.get("dense", {})
    near = [folder / dense[key] for key in ("name_relative", "checkpoint_relative") if key in dense]
    named = [dense["checkpoint"]] if dense.get("checkpoint") else []
    named += [dense["name"]] if dense.get("name") and is_checkpoint(dense["name"]) else []
    own = [folder / name for name in (CONFIG, WEIGHTS, PLAN)]
    return [folder, *own, *named, *near]


def recordable(run: RunFolder | None, work: Work) -> bool:
    """Whether what is found can go into a run's result; where not, that is said at once."""
    if run is None:
        return False
    try:
        check_folder(run.path)
    except NpPruneError as err:
        work.warn(f"{err.message}: what is found is shown, not recorded")
        return False
    return True
