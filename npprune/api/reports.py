"""What is made of runs: study, analyze, explore, report.

Each function calls what the command of its name calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import nn

from npprune.api.arguments import by_section, data_section, taking
from npprune.api.held import (
    Progress,
    check_shared,
    held_images,
    held_to_calibrate,
    hold_run,
    opened,
    place,
    working,
)
from npprune.api.results import Found, Pruned
from npprune.errors import UsageError
from npprune.pipeline.analyze.stage import analyze_paths, analyze_scores, analyze_similarity
from npprune.pipeline.common.results import render_comparison, render_report
from npprune.pipeline.explore import explore_run
from npprune.pipeline.study.stage import study as _study
from npprune.recipe import DataSection, ModelSection, StudySection, section_of
from npprune.recipe.sections import ExploreSection
from npprune.records import Analysis, Result
from npprune.words import check_word

Run = Found | str | Path
"""What `npprune.discover` gave, or a run folder."""
Model = nn.Module | Pruned | str | Path
ANALYSES = ("scores", "similarity", "paths")


@taking(StudySection, DataSection, ModelSection)
def study(
    model: Model,
    images: Any,
    val: Any,
    *,
    paths: Run | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Result:
    """Ways to prune one network, compared on the same images: `npprune study`.

    Args:
        model: as for `npprune.discover`.
        images: to calibrate on, as for `npprune.discover`; None: those that the paths are of.
        val: to measure accuracy on, with labels.
        paths: what `npprune.discover` gave for this network, or a run folder: for criteria by
            paths.
        out: the folder of rows and report, where an interrupted call resumes and others add rows;
            None: one that is gone afterwards.
        device: as for `npprune.discover`.
        progress: as for `npprune.discover`.
        settings: those of `npprune study`, of the images, and of a network by its name.

    Returns:
        `.analyses["study"]`, a table: `.columns` and `.rows`; and others beside it.

    Raises:
        UsageError, DataError, ModelError: as for `npprune.prune`.
    """
    kinds = (StudySection, DataSection, ModelSection)
    asked, of_images, of_model = by_section(settings, kinds, ("paths", "out", "device", "progress"))
    wish = section_of(StudySection, asked)
    with working(progress, device, 0, model) as work, place(out) as folder:
        check_shared(out, work)
        section, _ = opened(model, of_model, work)
        run, source = held_to_calibrate(paths, images, work, section)
        measured = held_images(val, work, labelled=True, name="val")
        data = data_section(of_images, calibration=source, val=measured)
        return _study(run or section, data, wish, folder, work=work)


def analyze(
    what: Literal["scores", "similarity", "paths"],
    paths: Run,
    *,
    model: Model | None = None,
    methods: Iterable[str] | None = None,
    classes: Iterable[int | str] | None = None,
    every: bool = False,
    hierarchy: str | Path | None = None,
    permutations: int = 10_000,
    device: str | None = None,
    progress: Progress = None,
) -> dict[str, Analysis]:
    """Tables and figures about the paths of a run: `npprune analyze`.

    Args:
        what: scores (of the methods' paths), similarity (of classes), or paths (pictures).
        paths: what `npprune.discover` gave, or a run folder. Its result holds the tables as well.
        model: the network, where it was in memory; `scores` alone needs it.
        methods: scores: of these methods; None: all.
        classes: similarity, paths: only these; None: all, or those that show most.
        every: paths: one picture of every class.
        hierarchy: similarity: a file of child and parent; None: WordNet for ImageNet.
        permutations: similarity: relabellings of the p-value.
        device: as for `npprune.discover`.
        progress: as for `npprune.discover`.

    Returns:
        By name, `.title`, `.text`, `.columns`, `.rows` and `.figure`.

    Raises:
        UsageError: an unknown word; StoreError: no finished run.
    """
    check_word("what", what, ANALYSES)
    chosen = classes if classes is None or isinstance(classes, str) else list(classes)
    with working(progress, device, 0, model) as work:
        run = hold_run(paths, work)
        if model is not None:
            opened(model, {}, work)
        if what == "scores":
            named = None if methods is None else list(methods)
            return analyze_scores(run, named, work=work)
        if what == "similarity":
            tree = None if hierarchy is None else Path(hierarchy)
            return analyze_similarity(
                run, chosen, hierarchy=tree, permutations=permutations, work=work
            )
        return analyze_paths(run, chosen, every=every, work=work)


@taking(ExploreSection)
def explore(
    paths: Run,
    out: str | Path,
    *,
    model: Model | None = None,
    plan: str | Path | None = None,
    single: bool = False,
    device: str | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Path:
    """Pages that show paths on their images, to be opened from disk: `npprune explore`.

    Args:
        paths: what `npprune.discover` gave, or a run folder.
        out: the folder, replaced as a whole; with `single`, the file.
        model: the network, where it was in memory.
        plan: a checkpoint folder that was pruned from the network: what it removed.
        single: one file that holds everything.
        device: as for `npprune.discover`.
        progress: as for `npprune.discover`.
        settings: those of `npprune explore`.

    Returns:
        The page to open.

    Raises:
        StoreError: no finished run, or a place that cannot be written.
    """
    beside = ("out", "model", "plan", "single", "device", "progress")
    (asked,) = by_section(settings, (ExploreSection,), beside)
    wish = section_of(ExploreSection, asked)
    with working(progress, device, 0, model) as work:
        run = hold_run(paths, work)
        if model is not None:
            opened(model, {}, work)
        checkpoint = None if plan is None else Path(plan)
        found = explore_run(run, wish, Path(out), plan=checkpoint, single=single, work=work)
        return found.page


def report(*runs: Run, out: str | Path | None = None) -> tuple[Path, Path]:
    """A run's result as one HTML page and as Markdown; several runs compared: `npprune report`.

    Args:
        runs: what `npprune.discover` gave, run folders, or their `result.json`.
        out: the folder to write to; None: the first run's.

    Returns:
        The HTML page and the Markdown file.

    Raises:
        StoreError: there is no result, or the folder cannot be written.
    """
    if not runs:
        raise UsageError("a run is needed", hint="`npprune.report(found)`, or a run folder")
    folders = [run.folder if isinstance(run, Found) else Path(run) for run in runs]
    target = None if out is None else Path(out)
    if len(folders) > 1:
        return render_comparison(folders, out=target)
    return render_report(folders[0], out=target)
