"""`npprune analyze`: scores of the methods, similarity of classes, preferred paths of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from npprune.cli import flags, options
from npprune.cli.console import Output
from npprune.cli.edit import methods as method_names
from npprune.cli.edit import show_analyses
from npprune.cli.options import argument, choice, option
from npprune.errors import UsageError

EXAMPLES = """\
Examples

  npprune analyze scores reports/vit_tiny
  npprune analyze similarity reports/vit_tiny
  npprune analyze paths reports/vit_tiny --classes tench,goldfish

What is found goes to result.json of the run, and from there to its report.
"""

WHAT = ("scores", "similarity", "paths")
ANALYSIS = "Analysis"


def command(
    ctx: typer.Context,
    what: Annotated[str, argument("WHAT", f"{', '.join(WHAT)}")],
    run: Annotated[Path, argument("RUN", "a run folder of npprune discover")],
    *,
    methods: Annotated[
        str | None,
        option(ANALYSIS, "--methods", "LIST", "scores: of these methods \\[default: all]"),
    ] = None,
    classes: Annotated[
        list[str] | None,
        option(
            ANALYSIS,
            "--classes",
            "LIST|FILE",
            "only these: indices, synsets or names; paths: one picture each, or of `all`",
        ),
    ] = None,
    hierarchy: Annotated[
        Path | None,
        option(
            ANALYSIS,
            "--hierarchy",
            "FILE",
            "similarity: .tsv or .json of child and parent \\[default: WordNet for ImageNet]",
        ),
    ] = None,
    permutations: Annotated[
        int,
        option(ANALYSIS, "--permutations", "N", "similarity: relabellings of the p-value", min=1),
    ] = 10_000,
    device: Annotated[
        str, choice(options.RUN, "--device", "scores: must be there if named", *options.DEVICES)
    ] = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Analyze the paths of a run: scores of the methods, similarity of classes, pictures."""
    if what not in WHAT:
        raise UsageError(f"WHAT must be one of {', '.join(WHAT)}, got `{what}`")
    for name, given, owner in (
        ("--methods", methods, ("scores",)),
        ("--hierarchy", hierarchy, ("similarity",)),
        ("--classes", classes, ("similarity", "paths")),
    ):
        if given is not None and what not in owner:
            raise UsageError(f"`{name}` belongs to `analyze {'` and `'.join(owner)}`")
    folder, where, start = flags.run_folder(run), flags.device(device), flags.seed(seed)
    every = what == "paths" and classes == ["all"]
    chosen = None if every else flags.classes(classes)

    from npprune.pipeline.analyze.stage import analyze_paths, analyze_scores, analyze_similarity
    from npprune.pipeline.common.work import Work

    output = Output(as_json=as_json)
    line = flags.command_line(ctx)
    with output.working() as emit:
        work = Work(where, start, emit, line)
        if what == "scores":
            found = output.result(analyze_scores, folder, method_names(methods), work=work)
        elif what == "similarity":
            found = output.result(
                analyze_similarity,
                folder,
                chosen,
                hierarchy=hierarchy,
                permutations=permutations,
                work=work,
            )
        else:
            found = output.result(analyze_paths, folder, chosen, every=every, work=work)
    show_analyses(output, found, folder)
    output.finish()
