"""Run: the whole line of a recipe, and the demo's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from npprune.errors import UsageError
from npprune.pipeline.common.outputs import check_checkpoint, check_run, reads_of
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.demo import network as digits_network
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.evaluate.stage import evaluate
from npprune.pipeline.explore import explore_run
from npprune.pipeline.export.stage import export_checkpoint
from npprune.pipeline.heal.stage import heal_pruned, healed_folder
from npprune.pipeline.prune.measuring import check_budget
from npprune.pipeline.prune.stage import prune
from npprune.recipe import ModelSection, Recipe, load_recipe
from npprune.recipe.sections import ExploreSection
from npprune.records import Result
from npprune.store.runs import RunFolder

EXPLORER = "explore"  # the explorer's folder in the demo's run


def run_recipe(
    recipe: Recipe,
    *,
    root: Path = Path("."),
    run: Path | None = None,
    checkpoint: Path | None = None,
    work: Work | None = None,
    dry_run: bool = False,
) -> Result:
    """discover -> prune (-> heal) -> evaluate -> export -> report, below `root`.

    Writes `reports/<name>/` and `ckpt/<name>/` (else `run` and `checkpoint`); with a `heal` section
    `ckpt/<name>_healed/` too, which is then what is exported. Running again resumes: paths that
    were found before are kept. With `prune: null` it ends with the paths and their report.
    torchrun's processes share all but export and report, which the first one makes. Device and seed
    are the recipe's, whatever `work` says.

    Raises:
        NpPruneError: what a stage raises; GateError where a gate failed.
    """
    work = replace(work or Work(), device=recipe.device, seed=recipe.seed)
    team = work.team
    run = run or root / "reports" / recipe.name
    checkpoint = checkpoint or root / "ckpt" / recipe.name
    if recipe.prune is None and recipe.discover is None:
        raise UsageError(
            "a recipe needs `discover` or `prune`, and both are null",
            hint="`--set discover.topk=1` finds paths",
        )
    if recipe.data.val is None and recipe.prune is not None:
        raise UsageError(
            "`data.val` is needed: the images to evaluate on",
            hint="add it to the recipe, or `--set data.val=folder:PATH`",
        )
    if recipe.prune is not None:
        check_budget(recipe.prune)
    if recipe.model.name == digits_network.NAME:
        if dry_run:
            raise UsageError(
                "a dry run opens the network, and this recipe's is trained by the run itself",
                hint="leave `--dry-run` out: the demo takes a minute or two",
            )
        model = team.on_first(lambda: digits_network.digits_network(root, work))
        recipe = recipe.model_copy(update={"model": model})
    source: Path | ModelSection = recipe.model
    team.on_first(lambda: _check_outputs(recipe, run, checkpoint, write=not dry_run))
    # the command line belongs to the result as a whole, and goes there once
    quietly = replace(work, command="")
    if dry_run and recipe.discover is None:
        raise UsageError(
            "a dry run opens model and images of discovery, and this recipe has none",
            hint="`npprune prune ... --dry-run` shows what would stay",
        )
    if recipe.discover is not None:
        some, few = recipe.data, recipe.discover.images_per_class
        if few is not None:
            some = some.model_copy(update={"images_per_class": few})
        found = discover(recipe.model, some, recipe.discover, run, work=quietly, dry_run=dry_run)
        if dry_run:
            return found
        source = run
        if recipe.prune is None:
            team.on_first(lambda: render_report(run))
            return RunFolder(run).read_result()
    home = run if recipe.discover is not None else checkpoint
    assert recipe.prune is not None
    work.on("prune").say(f"recipe {recipe.name}")
    prune(source, recipe.data, recipe.prune, checkpoint, work=work)
    evaluate(checkpoint, recipe.data, recipe.evaluate, work=quietly)
    shipped = checkpoint
    if recipe.heal is not None:
        data = recipe.data if recipe.data.train or recipe.data.calibration else None
        shipped, _ = heal_pruned(checkpoint, recipe.heal, data=data, work=quietly)
        evaluate(shipped, recipe.data, recipe.evaluate, work=quietly)

    def ship() -> None:
        if recipe.export is not None:
            export_checkpoint(shipped, recipe.data, recipe.export, work=quietly)
        render_report(home)

    team.on_first(ship)
    return RunFolder(home).read_result()


def run_demo(*, root: Path = Path("."), work: Work | None = None) -> Result:
    """Train a small network on scikit-learn's digits and run the shipped recipe `demo` on it.

    Writes `ckpt/demo_dense/` (the trained network), `ckpt/demo/` and `reports/demo/` below
    `root`, the explorer among them. A network trained before with this seed is used again.
    """
    work = work or Work()
    chosen = {"seed": work.seed, "device": work.device}
    result = run_recipe(load_recipe("demo").model_copy(update=chosen), root=root, work=work)
    work.team.on_first(
        lambda: explore_run(
            root / "reports" / "demo",
            ExploreSection(images_per_class=10, neurons=64, ablate=20),
            root / "reports" / "demo" / EXPLORER,
            plan=root / "ckpt" / "demo",
            work=work,
        )
    )
    return result


def _check_outputs(recipe: Recipe, run: Path, checkpoint: Path, *, write: bool) -> None:
    """Every folder that the recipe fills, before its first stage begins."""
    reads = reads_of(recipe.model)
    if recipe.discover is not None:
        check_run(run, reads, write=write)
    if recipe.prune is not None:
        check_checkpoint(checkpoint, reads, write=write)
        if recipe.heal is not None:
            check_checkpoint(healed_folder(checkpoint), reads, write=write)
