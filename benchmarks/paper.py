"""All experiments of the paper on one network and one folder of images, and their tables.

    python benchmarks/paper.py MODEL CHECKPOINT SOURCE --out reports/paper [--classes N]
        [--images-per-class N] [--methods all] [--thin]

Each step is one npprune command, printed before it runs with its time after it. Run it again to go
on: the paths resume inside their commands, and a step whose sections are in the run's result.json
is not repeated. At the end the run's report.md holds all tables and report.html all figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path


def steps(run: str, methods: str, thin: bool) -> list[tuple[str, list[str]]]:
    """(key of the section that a command adds, the command)."""
    k, p, depth = (
        ("1,10,50", "0.5,1", "3,12") if thin else ("1,5,10,20,50", "0.1,0.3,0.5,1", "3,6,9,12")
    )
    edit = ["eval", run, "--edit"]
    own = ["--methods", methods]
    seeds = ["--seeds", "1" if thin else "3"]
    return [
        ("scores", ["analyze", "scores", run, *own]),
        ("similarity", ["analyze", "similarity", run]),
        ("paths", ["analyze", "paths", run]),
        ("remove", [*edit, "remove", *own, "--name", "remove"]),
        ("enhance", [*edit, "enhance", *own, "--name", "enhance"]),
        ("remove-class", [*edit, "remove", "--paths", "class", *own, "--name", "remove-class"]),
        ("enhance-class", [*edit, "enhance", "--paths", "class", *own, "--name", "enhance-class"]),
        (
            "keep-share",
            [*edit, "keep", "--paths", "class,predicted", "--topk", k, "--fraction", p, *seeds,
             "--name", "keep-share"],
        ),
        (
            "keep-depth",
            [*edit, "keep", "--paths", "class,predicted", "--topk", k, "--depth", depth,
             "--name", "keep-depth"],
        ),
        (
            "keep-methods",
            [*edit, "keep", "--paths", "class,predicted", "--topk", "1,10", "--methods",
             "neuron-path,activation,random", "--name", "keep-methods"],
        ),
        (
            "keep-removed",
            [*edit, "keep", "--paths", "class,predicted,union", "--topk", k, "--scope", "cls,all",
             "--name", "keep-removed"],
        ),
    ]  # fmt: skip


def npprune(*args: str) -> None:
    """Run one command, with its time."""
    print("$", shlex.join(["npprune", *args]), flush=True)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "npprune", *args], check=True)
    print(f"# {time.perf_counter() - started:.0f} s\n", flush=True)


def done(run: Path) -> set[str]:
    """The sections that the run's result holds."""
    result = run / "result.json"
    return set(json.loads(result.read_text())["analyses"]) if result.is_file() else set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("checkpoint")
    parser.add_argument("source", help="folder:PATH, one folder per ImageNet synset")
    parser.add_argument("--out", type=Path, default=Path("reports/paper"))
    parser.add_argument("--classes", type=int, default=20, help="evenly over the sorted folders")
    parser.add_argument("--images-per-class", type=int, default=50)
    parser.add_argument("--topk", type=int, default=1)
    parser.add_argument("--methods", default="all")
    parser.add_argument("--thin", action="store_true", help="fewer K, p, depths and seeds")
    args = parser.parse_args()

    folders = sorted(p.name for p in Path(args.source.split(":", 1)[1]).iterdir() if p.is_dir())
    count = min(args.classes, len(folders))
    chosen = [folders[i * len(folders) // count] for i in range(count)]
    npprune(
        "discover", args.model, "--checkpoint", args.checkpoint, "--data", args.source,
        "--classes", ",".join(chosen), "--images-per-class", str(args.images_per_class),
        "--topk", str(args.topk), "--out", str(args.out),
    )  # fmt: skip
    for key, command in steps(str(args.out), args.methods, args.thin):
        if key in done(args.out):
            print(f"# {key}: done before\n")
        else:
            npprune(*command)
    npprune("report", str(args.out))


if __name__ == "__main__":
    main()
