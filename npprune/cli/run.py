"""`npprune run`: a recipe, the whole line from discovery to report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from npprune import files
from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, choice, option
from npprune.errors import NpPruneError
from npprune.recipe import Recipe, load_recipe, read_recipe, recipe_yaml
from npprune.recipe.messages import Place, recipe_name
from npprune.words import DEVICES

EXAMPLES = """\
Example

  npprune run recipes/vit_tiny_imagenet.yaml --set model.checkpoint=W.safetensors \\
    --set data.train=folder:imagenet/train --set data.val=folder:imagenet/val

The recipes that come with npprune are found by name, too: npprune run vit_tiny_imagenet
"""


@options.run()
def command(
    recipe: Annotated[str, argument("RECIPE", "a YAML file, or a shipped recipe's name")],
    *,
    run: options.RunOptions,
    overrides: Annotated[
        list[str] | None,
        option(RUN, "--set", "KEY=VALUE", "one key of the recipe, e.g. prune.keep=0.5; repeatable"),
    ] = None,
    root: options.Root = Path("."),
    device: Annotated[
        str | None, choice(RUN, "--device", "instead of the recipe's", DEVICES)
    ] = None,
    dry_run: Annotated[
        bool,
        option(RUN, "--dry-run", None, "show the recipe as resolved, open model and images, stop"),
    ] = False,
) -> None:
    """Run a recipe: discover, prune, evaluate, export and report in one go."""
    changes = list(overrides or [])
    if device is not None:
        flags.check_setting(Recipe, "device", device)
        changes.append(f"device={device}")
    resolved, places = read_recipe(recipe, changes)
    try:
        _run(recipe, resolved, root, run, dry_run=dry_run)
    except NpPruneError as err:
        err.name_of = partial(_written, places)
        raise


def _written(places: dict[Place, str], name: str, value: str | None) -> str:
    """A setting as the recipe has it, and where it is written."""
    place = places.get(tuple(name.split(".")))
    return recipe_name(name, value) + (f" ({place})" if place else "")


def _run(given: str, recipe: Recipe, root: Path, run: options.RunOptions, *, dry_run: bool) -> None:
    _refuse_overwriting(given, load_recipe(given), root / "reports" / recipe.name)
    output = Output(as_json=run.as_json)
    if dry_run:
        output.line(recipe_yaml(recipe).rstrip())

    from npprune.pipeline.run import run_recipe

    if dry_run:
        if recipe.discover is not None:
            with output.working() as emit:
                run_recipe(recipe, root=root, work=run.work(emit), dry_run=True)
        output.document("recipe", recipe.model_dump(mode="json"))
        output.line("\ndry run: nothing was computed or written")
        return
    with output.working() as emit:
        result = output.result(run_recipe, recipe, root=root, work=run.work(emit))
    show.result(output, result, root)
    output.finish()


def _refuse_overwriting(given: str, recipe: Recipe, run: Path) -> None:
    """UsageError where the recipe lies where discovery keeps its own part of it: the rest of it
    would be lost."""
    kept = {"name", "model", "data", "discover", "seed"}
    part = type(recipe)(**{name: getattr(recipe, name) for name in kept})
    if recipe.discover is not None and part != recipe:
        files.refuse_overwriting(run / "recipe.yaml", [given], named="name")
