"""`npprune bench`: dense and pruned side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from npprune.cli import flags, options, show
from npprune.cli.console import Output
from npprune.cli.options import RUN, argument, choice, option
from npprune.errors import UsageError
from npprune.words import PROVIDERS, RUNTIMES, SERVED_PRECISIONS, check_word

EXAMPLES = """\
Example: a pruned network compared with the dense one it came from

  npprune bench ckpt/vit_tiny_half --batch 1,16,64 --threads 1,2

Example: two exported files

  npprune bench vit_tiny.onnx vit_tiny_half.onnx --provider cuda

Example: everything that is here, the rest named

  npprune bench ckpt/vit_tiny_half --runtime all --precision all --data folder:imagenet/val

The two run in turn on noise images, so that what else the machine does hits both alike. Where \
timings scatter too much to tell them apart, a warning says so.
"""

TIMING = "Timing"
ALL = "all"


@options.run()
def command(
    sources: Annotated[
        list[Path],
        argument("CKPT | DENSE.onnx PRUNED.onnx", "a folder of npprune prune, or two files"),
    ],
    *,
    run: options.RunOptions,
    runtime: Annotated[
        str | None,
        choice(
            TIMING,
            "--runtime",
            "\\[default: onnxruntime,torch; .onnx files: onnxruntime]",
            (*RUNTIMES, ALL),
            "WORD,WORD",
        ),
    ] = None,
    precision: Annotated[
        str, choice(TIMING, "--precision", "", (*SERVED_PRECISIONS, ALL), "WORD,WORD")
    ] = "fp32",
    batch: Annotated[str, option(TIMING, "--batch", "N,N", "batch sizes")] = "1,16",
    threads: Annotated[
        str | None,
        option(TIMING, "--threads", "N,N", "processor threads \\[default: PyTorch's own choice]"),
    ] = None,
    provider: Annotated[str, options.provider(TIMING, "what runs it")] = "auto",
    seconds: Annotated[
        float, option(TIMING, "--seconds", "S", "for each pair; at least 10 runs of both")
    ] = 2.0,
    memory: Annotated[
        bool, option(TIMING, "--memory/--no-memory", None, "measure peak memory as well")
    ] = True,
    data: Annotated[
        str | None,
        option(
            TIMING,
            "--data",
            "SOURCE",
            "images to run on, and for int8 \\[default: noise; int8: the checkpoint's]",
        ),
    ] = None,
    dense: Annotated[str | None, options.dense(TIMING)] = None,
    out: Annotated[
        Path | None, option(RUN, "--out", "FOLDER", "bench.json and the plot bench.svg")
    ] = None,
) -> None:
    """Time a pruned network and the dense one in turn."""
    runtimes = _words("runtime", runtime or "", RUNTIMES)
    precisions = _words("precision", precision, SERVED_PRECISIONS)
    if seconds <= 0:
        raise UsageError(f"`--seconds` must be greater than 0, got `{seconds:g}`")
    batches, counts = _positive("--batch", batch), _positive("--threads", threads)
    check_word("provider", provider, PROVIDERS)
    flags.existing_file("--dense", dense)
    files = all(path.suffix == ".onnx" for path in sources)
    if len(sources) != (2 if files else 1):
        raise UsageError(
            "one checkpoint folder or two .onnx files are timed, got "
            + " ".join(f"`{path}`" for path in sources)
        )
    if files and dense is not None:
        raise UsageError("`--dense` goes with a checkpoint; the first of two files is dense")
    folder = None if files else flags.checkpoint_folder(sources[0])

    from npprune.pipeline.export.bench import BenchSettings, bench_checkpoint, bench_files

    settings = BenchSettings(
        runtimes, batches or [1, 16], counts, seconds, provider, memory, precisions, data
    )
    output = Output(as_json=run.as_json)
    with output.working() as emit:
        work = run.work(emit)
        if folder is None:
            found = output.result(bench_files, sources[0], sources[1], settings, out=out, work=work)
        else:
            found = output.result(
                bench_checkpoint,
                folder,
                settings,
                dense_checkpoint=dense,
                out=out,
                work=work,
            )
    show.benchmark(output, found, out)
    output.finish()


def _words(field: str, given: str, known: tuple[str, ...]) -> list[str]:
    """Words separated by commas, or `all` alone; none where nothing was given."""
    words = given.split(",") if given else []
    for word in words:
        if words != [ALL]:
            check_word(field, word, known)
    return words


def _positive(flag: str, given: str | None) -> list[int]:
    """Whole numbers of at least 1 separated by commas; none where nothing was given."""
    try:
        values = [int(part) for part in given.split(",")] if given else []
    except ValueError as err:
        raise UsageError(
            f"`{flag}` must be whole numbers separated by commas, got `{given}`"
        ) from err
    if values and min(values) < 1:
        raise UsageError(f"`{flag}` must be at least 1 each, got `{given}`")
    return values
