"""Whether this tree writes the same bits as another revision: demo, discover, prune, study, heal.

    python benchmarks/same_bits.py HEAD~5
    python benchmarks/same_bits.py HEAD~5 --checkpoint W.safetensors --data folder:imagenet/train

Both revisions run the same commands on the demo's network and digits (with `--checkpoint` also on
that network, a few images), in folders of the same name. Tensors, paths, plans and tables must be
equal byte by byte; JSON is compared without what depends on the hour and the machine (times,
dates, versions, throughput and latency) and without what says nothing (null, false, empty), so that
a field which one side does not know is no difference where it is not used; of plans the content
counts, not the hash, and of ONNX files the graph. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

VOLATILE = re.compile(
    r"(created|date|started|finished|seconds|versions|environment|command|commands|latency\w*|"
    r"throughput|rate|images_per_second|device|reason|timing\w*|bench|memory\w*|sha256_file|"
    r"warnings|notes|details|runtime|parts|plan_sha256)$|, s$"
)
TIMES = re.compile(r"\d[\d.,]* (s|ms|min|h|images per second)\b")  # in a sentence
SKIPPED = {".lock", "report.html", "report.md", "events.jsonl", "export.json", "recipe.yaml"}

DIGITS = [
    "demo",
    "discover ckpt/demo_dense --data digits:train --topk 3 --images-per-class 4 --scope patch "
    "--out reports/patch",
    "discover ckpt/demo_dense --data digits:train --topk 2 --images-per-class 4 "
    "--method knowledge-neuron --quadrature left-riemann --out reports/knowledge",
    "prune reports/patch --topk 3 --keep 0.6 --criterion variance --selection uniform "
    "--compensation least-squares --calibration digits:calibration --out ckpt/uniform",
    "prune ckpt/demo_dense --target-macs 0.6 --axes mlp,heads,qk --calibration digits:calibration "
    "--out ckpt/axes",
    "prune ckpt/demo_dense --max-drop 2 --criterion fisher --compensation mean "
    "--classes 1,2,3,4 --calibration digits:calibration --out ckpt/drop",
    "prune ckpt/demo_dense --target-params 0.6 --criterion taylor --selection global "
    "--compensation none --calibration digits:calibration --out ckpt/global",
    "study reports/patch --calibration digits:calibration --val digits:test "
    "--criteria variance,curvature-obs,random --selections uniform,measured "
    "--compensations least-squares,sequential --keep 0.5 --out reports/study",
    "heal ckpt/uniform --data digits:calibration --epochs 1 --out ckpt/healed",
    "eval ckpt/axes --data digits:test",
]
OWN = [
    "discover {model} --checkpoint {checkpoint} --data {data} --images-per-class 1 "
    "--classes 0,1,2,3,4,5,6,7 --topk 5 --out reports/own",
    "prune {model} --checkpoint {checkpoint} --keep 0.5 --calibration {data} "
    "--calibration-images 100 --out ckpt/own",
]


def run(tree: Path, home: Path, commands: list[str]) -> None:
    """The commands of one tree, each in `home`; ends at the first that fails."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    for command in commands:
        print(f"{home.parent.name}: {command}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "npprune", *command.split()],
            cwd=home, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"exit code {done.returncode}: {command}\n{done.stderr[-2000:]}")


def stable(value: Any) -> Any:
    """JSON without what depends on the hour and the machine, and without what says nothing."""
    if isinstance(value, dict):
        columns = value.get("columns")
        if columns and "rows" in value:  # a table
            steady = [i for i, name in enumerate(columns) if not VOLATILE.search(name)]
            rows = [[row[i] for i in steady] for row in value["rows"]]
            value = {**value, "columns": [columns[i] for i in steady], "rows": rows}
        if "opset" in value:  # an exported file, which names its plan's hash
            value = {**value, "sha256": None}
        kept = {k: stable(v) for k, v in value.items() if not VOLATILE.search(k)}
        return {k: v for k, v in kept.items() if v is not None and v is not False and v != []}
    if isinstance(value, str):
        return TIMES.sub("", value)
    return [stable(v) for v in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """What must be equal: parsed JSON, an ONNX graph, or bytes."""
    if path.suffix == ".onnx":
        return onnx.load(path).graph.SerializeToString(deterministic=True)
    if path.suffix == ".json":
        return stable(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def compare(before: Path, after: Path) -> list[str]:
    """The files that differ or that only one side has."""

    def files(home: Path) -> set[Path]:
        return {
            p.relative_to(home) for p in home.rglob("*") if p.is_file() and p.name not in SKIPPED
        }

    old, new = files(before), files(after)
    said = [f"{p}: only {'before' if p in old else 'after'}" for p in sorted(old ^ new)]
    for p in sorted(old & new):
        a, b = content(before / p), content(after / p)
        if a != b:
            said.append(f"{p}: {_where(a, b)}")
    return said


def _where(a: Any, b: Any, at: str = "") -> str:
    """The first place where two values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if a.get(key) != b.get(key):
                return _where(a.get(key), b.get(key), f"{at}.{key}")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return _where(x, y, f"{at}[{i}]")
    return f"{at or 'content'}: {str(a)[:80]} before, {str(b)[:80]} after"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("revision", help="the other revision, or a folder that holds its tree")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--checkpoint", type=Path, help="weights of a real network")
    parser.add_argument("--data", help="its images, folder:PATH")
    parser.add_argument("--keep", type=Path, help="keep both sides' files below this folder")
    args = parser.parse_args()
    commands = list(DIGITS)
    if args.checkpoint:
        own = {"model": args.model, "checkpoint": args.checkpoint.resolve(), "data": args.data}
        commands += [line.format(**own) for line in OWN]
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        base = args.keep or Path(scratch)
        tree = Path(args.revision).resolve()
        if not (tree / "npprune").is_dir():
            tree = Path(scratch) / "tree"
            subprocess.run(
                ["git", "worktree", "add", "--detach", str(tree), args.revision],
                cwd=here,
                check=True,
            )
        sides = []
        try:
            for side, root in (("before", tree), ("after", here)):
                home = base / side / "home"
                home.mkdir(parents=True, exist_ok=True)
                run(root, home, commands)
                sides.append(home)
        finally:
            if tree.is_relative_to(scratch):
                subprocess.run(
                    ["git", "worktree", "remove", "--force", str(tree)], cwd=here, check=True
                )
        differing = compare(*sides)
    print("\n".join(differing) or "the same bits on both sides")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
