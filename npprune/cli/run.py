"""`npprune run`: a recipe, the whole line from discovery to report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npprune import files
from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, choice, option

if TYPE_CHECKING:
    from npprune.recipe import Recipe

EXAMPLES = """\
Example

  npprune run recipes/vit_tiny_imagenet.yaml --set model.checkpoint=W.safetensors \\
    --set data.train=folder:imagenet/train --set data.val=folder:imagenet/val

The recipes that come with npprune are found by name, too: npprune run vit_tiny_imagenet
"""


def command(
    ctx: typer.Context,
    recipe: Annotated[str, argument("RECIPE", "a YAML file, or a shipped recipe's name")],
    *,
    overrides: Annotated[
        list[str] | None,
        option(RUN, "--set", "KEY=VALUE", "one key of the recipe, e.g. prune.keep=0.5; repeatable"),
    ] = None,
    root: options.Root = Path("."),
    device: Annotated[
        str | None, choice(RUN, "--device", "instead of the recipe's", *options.DEVICES)
    ] = None,
    dry_run: Annotated[
        bool,
        option(RUN, "--dry-run", None, "show the recipe as resolved, open model and images, stop"),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Run a recipe: discover, prune, evaluate, export and report in one go."""
    from npprune.recipe import load_recipe, recipe_yaml

    changes = list(overrides or [])
    if device is not None:
        changes.append(f"device={flags.device(device)}")
    resolved = load_recipe(recipe, changes)
    flags.device(resolved.device)
    _refuse_overwriting(recipe, load_recipe(recipe), root / "reports" / resolved.name)
    output = Output(as_json=as_json)
    if dry_run:
        output.line(recipe_yaml(resolved).rstrip())

    from npprune.pipeline.common.work import Work
    from npprune.pipeline.run import run_recipe

    if dry_run:
        if resolved.discover is not None:
            with output.working() as emit:
                run_recipe(resolved, root=root, work=Work(emit=emit), dry_run=True)
        output.document("recipe", resolved.model_dump(mode="json"))
        output.line("\ndry run: nothing was computed or written")
        return
    with output.working() as emit:
        work = Work(emit=emit, command=flags.command_line(ctx))
        result = output.result(run_recipe, resolved, root=root, work=work)
    show.result(output, result, root)
    output.finish()


def _refuse_overwriting(given: str, recipe: Recipe, run: Path) -> None:
    """UsageError where the recipe lies where discovery keeps its own part of it: the rest of it
    would be lost."""
    kept = {"name", "model", "data", "discover", "seed"}
    part = type(recipe)(**{name: getattr(recipe, name) for name in kept})
    if recipe.discover is not None and part != recipe:
        files.refuse_overwriting(run / "recipe.yaml", [given], flag="name")
