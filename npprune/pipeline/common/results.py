"""The result of a run: stages add what they found, and reports are rendered from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from npprune.errors import StoreError
from npprune.files import CARD, check_folder, refuse_overwriting
from npprune.records import CheckpointConfig, ModelInfo, Result, Variant
from npprune.report import card
from npprune.report.html import render_html
from npprune.report.markdown import render_markdown
from npprune.store import atomic
from npprune.store.runs import RunFolder

if TYPE_CHECKING:
    from npprune.pipeline.common.work import Work


def update_variant(
    checkpoint: Path,
    config: CheckpointConfig,
    model: ModelInfo,
    dense: ModelInfo,
    update: Callable[[Variant], None],
    *,
    command: str = "",
) -> Result | None:
    """Change what the checkpoint's run says of it; None where the checkpoint has no run."""
    run = run_of(checkpoint, config)
    if run is None or config.prune is None:
        return None
    with run.updating() as result:
        variant = result.variant(checkpoint.resolve().name)
        if variant is None:
            variant = Variant(
                name=checkpoint.resolve().name,
                checkpoint=os.path.relpath(checkpoint, run.path),
                model=model,
                prune=config.prune,
            )
            result.variants.append(variant)
        update(variant)
        add_command(result, command)
    _write_card(checkpoint, variant, config)
    return result


def _write_card(checkpoint: Path, variant: Variant, config: CheckpointConfig) -> None:
    """The checkpoint's model card; a README.md of someone else stays, and a folder that cannot be
    written goes without."""
    path = checkpoint / CARD
    if path.is_file() and not card.is_card(atomic.read_text(path)):
        return
    if os.access(checkpoint, os.W_OK):
        atomic.write_text(path, card.render_card(variant, config))


def add_command(result: Result, command: str) -> None:
    """Remember a command line that made part of the result, once, in the order of last use."""
    if command:
        result.commands = [c for c in result.commands if c != command] + [command]


def run_of(
    checkpoint: Path, config: CheckpointConfig, work: Work | None = None
) -> RunFolder | None:
    """The run folder a checkpoint belongs to, or None where it is not there any more.

    A checkpoint names its run, and anyone can write that: the run has to know the checkpoint, too.
    Where it does not, `work` says so.
    """
    if config.run is None:
        return None
    run = RunFolder(Path(os.path.normpath(checkpoint / config.run)))
    if not run.result_path.is_file():
        return None
    if not _knows(run, checkpoint, config):
        if work is not None:
            work.warn(
                f"`{checkpoint}` names the run `{run.path}`, whose result does not list it: what "
                "is found is shown, not recorded"
            )
        return None
    return run


def _knows(run: RunFolder, checkpoint: Path, config: CheckpointConfig) -> bool:
    """Whether a run made a checkpoint: it names this folder, or, where the folder was moved or
    renamed since, a variant of the same plan."""
    variants = run.read_result().variants
    plan = config.prune.plan_sha256 if config.prune is not None else None
    named = next((v for v in variants if v.name == checkpoint.resolve().name), None)
    if named is None:
        return any(v.prune.plan_sha256 == plan for v in variants)
    place = run.path / named.checkpoint
    if place.exists():
        return os.path.realpath(place) == os.path.realpath(checkpoint)
    return named.prune.plan_sha256 == plan


def render_report(run: Path, *, out: Path | None = None) -> tuple[Path, Path]:
    """Render `report.html` and `report.md` of a run (or of a `result.json`) into `out`.

    Raises:
        StoreError: there is no result, or the folder cannot be written.
    """
    if run.is_file():
        result, folder = atomic.read_json(Result, run), run.parent
    elif run.is_dir() or not run.exists():
        result, folder = RunFolder(run).read_result(), run
    else:
        raise StoreError(f"`{run}` is neither a run folder nor a result.json")
    target = out or folder
    html, markdown = target / "report.html", target / "report.md"
    for path in (html, markdown):
        refuse_overwriting(path, [run if run.is_file() else folder / "result.json"])
    check_folder(target)
    atomic.write_text(html, render_html(result))
    atomic.write_text(markdown, render_markdown(result))
    return html, markdown
