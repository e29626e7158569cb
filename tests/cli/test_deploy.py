"""export, bench and predict from the command line, and the exported file in bare places."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from npprune.cli import app
from npprune.export.onnx import OnnxForm, export_onnx
from npprune.records import CHECKSUM, Benchmark, ClassInfo, ExportRecord, Preprocessing, from_json
from tests.helpers.deploying import (
    PREPROCESSING,
    network,
    plan_of,
    write_dense,
    write_images,
    write_pruned,
)
from tests.helpers.schemas import check

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch", "timm", "torchvision", "torch_pruning", "onnx", "onnxscript", "sklearn", "scipy",
    "matplotlib", "safetensors", "yaml", "jinja2", "psutil", "filelock",
)  # fmt: skip
BLOCK = """\
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Block())
"""


def bare(code: str, blocked: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, where some packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {set(blocked)!r}\n{BLOCK}{code}"],
        capture_output=True, text=True, timeout=120, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned checkpoint, its dense network, an ONNX file of six classes, and images."""
    root = tmp_path_factory.mktemp("deploy")
    write_images(root / "images", per_class=4)
    dense = write_dense(root / "dense")
    write_pruned(root / "half", root / "dense", dense, plan_of(dense))
    classes = [ClassInfo(i, f"kind {i}", f"n{i:08d}") for i in range(6)]
    classes[3] = ClassInfo(3, 'grey, "striped"\x1b[31m')
    export_onnx(network(), PREPROCESSING, classes, root / "model.onnx")
    export_onnx(
        network(), PREPROCESSING, classes, root / "pixels.onnx", OnnxForm(with_preprocessing=True)
    )
    return root


def run(*args: object) -> int:
    return app.run_app([str(arg) for arg in args])


# ---------------------------------------------------------------- help and wrong arguments


@pytest.mark.parametrize("verb", ["export", "bench", "predict"])
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"npprune {verb}" in out
    assert "--json" in out
    assert "[default: None]" not in out


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["export", "HALF", "--batch", "0"], "`--batch` must be `dynamic` or a whole number", ""),
        (["export", "HALF", "--batch", "any"], "whole number of at least 1, got `any`", ""),
        (["export", "HALF", "--max-drop", "-1"], "`--max-drop` must be in [0, 100], got", ""),
        (["export", "HALF", "--format", "tflite"], "one of `onnx`, `torch`, `timm`", ""),
        (["export", "HALF", "--out", "a.pt"], "`--out` must end in .onnx", ""),
        (["export", "HALF", "--num-heads", "3"], "`--num-heads` describes a model", "--dense"),
        (["export", "vit_x", "--dense", "HALF"], "`--dense` goes with a checkpoint", ""),
        (["export", "ckpt/none"], "there is no such folder", "npprune prune"),
        (["export", "HALF"], "`--data` is needed: the images to export on", "folder:PATH"),
        (["export", "HALF", "--data", "folder:no"], "no", ""),
        (["bench", "HALF", "HALF"], "one checkpoint folder or two .onnx files are timed", ""),
        (["bench", "a.onnx"], "one checkpoint folder or two .onnx files are timed", ""),
        (["bench", "a.onnx", "b.onnx"], "no ONNX file at a.onnx", "npprune export"),
        (
            ["bench", "HALF", "--runtime", "jax"],
            "`--runtime` must be one of `onnxruntime`",
            "",
        ),
        (["bench", "HALF", "--threads", "0"], "`--threads` must be at least 1 each", ""),
        (["bench", "HALF", "--batch", "1,x"], "`--batch` must be whole numbers separated", ""),
        (["bench", "HALF", "--seconds", "0"], "`--seconds` must be greater than 0", ""),
        (["bench", "DENSE"], "is not pruned", "two .onnx files"),
        (["predict", "no.onnx", "IMAGES"], "no ONNX file at no.onnx", "npprune export"),
        (["predict", "MODEL", "nowhere.png"], "no image at nowhere.png", ""),
        (["predict", "MODEL", "IMAGES", "--topk", "0"], "`--topk` must be at least 1", ""),
        (["predict", "MODEL", "IMAGES", "--format", "xml"], "`table`, `csv`, `json`", ""),
        (["predict", "MODEL", "IMAGES", "--json", "--format", "csv"], "`--json` means", ""),
        (["predict", "MODEL", "IMAGES", "--on-bad-image", "x"], "one of `error`, `skip`", ""),
        (["predict", "MODEL", "IMAGES", "--provider", "npu"], "`--provider` must be one of", ""),
    ],
)
def test_wrong_arguments(
    args: list[str],
    message: str,
    hint: str,
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"HALF": "half", "DENSE": "dense", "MODEL": "model.onnx", "IMAGES": "images"}
    assert run(*(world / places[arg] if arg in places else arg for arg in args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"^error: ", err, re.MULTILINE)
    assert message in err
    assert hint in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- export and bench


def test_export_then_bench(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"folder:{world / 'images'}"
    more = ("--data", source, "--provider", "cpu", "--no-latency", "--json")
    records = []
    for folder in ("dense", "half"):
        target = tmp_path / f"{folder}.onnx"
        assert run("export", world / folder, *more, "--out", target) == 0
        out = capsys.readouterr().out
        records.append(from_json(ExportRecord, out))
        written = json.loads((tmp_path / f"{folder}.export.json").read_text())
        del written[CHECKSUM]
        assert written == json.loads(out)
    assert records[1].bytes < records[0].bytes
    assert records[0].details["provider_asked"] == "cpu"
    assert records[0].details["providers"] == ["CPUExecutionProvider"]
    timing = ("--batch", "1", "--threads", "1", "--seconds", "0.01", "--provider", "cpu")
    paths = (tmp_path / "dense.onnx", tmp_path / "half.onnx")
    assert run("bench", *paths, *timing, "--json", "--no-memory") == 0
    found = from_json(Benchmark, capsys.readouterr().out)
    assert (found.dense, found.pruned, len(found.rows)) == ("dense.onnx", "half.onnx", 1)
    assert run("bench", *paths, *timing, "--out", tmp_path / "bench") == 0
    out = capsys.readouterr().out
    assert "half.onnx compared with dense.onnx" in out
    assert "MACs ratio" in out
    assert {p.name for p in (tmp_path / "bench").iterdir()} == {"bench.json", "bench.svg"}


@pytest.mark.slow
def test_a_model_is_exported_by_its_weights(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    save_file(network().state_dict(), tmp_path / "tiny.safetensors")
    args = ("--checkpoint", "tiny.safetensors", "--num-heads", "3", "--provider", "cpu")
    data = f"folder:{world / 'images'}"
    assert run("export", "auto", *args, "--data", data, "--with-preprocessing", "--batch", 2) == 0
    assert "ONNX file  tiny.onnx" in capsys.readouterr().out
    assert (tmp_path / "tiny.onnx").is_file()
    assert run("predict", "tiny.onnx", world / "images" / "c0", "--topk", "1") == 0


def test_a_file_that_does_not_agree_is_exit_code_1(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from npprune.export import parity

    whole = parity.batched_logits
    monkeypatch.setattr(parity, "batched_logits", lambda *args: whole(*args) + 0.5)
    target = tmp_path / "m.onnx"
    data = f"folder:{world / 'images'}"
    assert run("export", world / "half", "--data", data, "--out", target, "--no-latency") == 1
    err = capsys.readouterr().err
    assert "m.onnx does not agree with the PyTorch network" in err
    assert "relative logit error" in err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- predict


def test_predict_shows_the_likeliest(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = world / "images" / "c0" / "00.png"
    assert run("predict", world / "model.onnx", image, "--topk", "6") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == str(image)
    assert len(lines) == 7
    shares = [float(line.split()[0]) for line in lines[1:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert 'grey, "striped"' in out
    assert "\x1b" not in out


def test_predict_gives_the_same_in_every_format(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("predict", world / "model.onnx", world / "images", "--topk", "2", "--batch", "5")
    assert run(*args, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["schema_version"], found["kind"]) == (1, "predictions")
    check("predictions", found)
    assert len(found["predictions"]) == 24
    target = tmp_path / "p.csv"
    assert run(*args, "--out", target) == 0
    assert "24 predictions" in capsys.readouterr().out
    rows = list(csv.DictReader(target.open(encoding="utf-8", newline="")))
    assert len(rows) == 48
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]
    guesses = [(p["image"], g) for p in found["predictions"] for g in p["guesses"]]
    for row, (image, guess) in zip(rows, guesses, strict=True):
        assert (row["image"], row["name"], int(row["index"])) == (
            image, guess["name"], guess["index"],
        )  # fmt: skip
        assert float(row["probability"]) == pytest.approx(guess["probability"], abs=1e-5)
        assert row["synset"] == (guess["synset"] or "")


def test_unreadable_images(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(world / "images" / "c1", tmp_path / "in")
    (tmp_path / "in" / "01.png").write_bytes(b"nothing")
    args = ("predict", world / "model.onnx", tmp_path / "in", "--topk", "1", "--batch", "1")
    target = tmp_path / "p.json"
    assert run(*args, "--out", target) == 2
    err = capsys.readouterr().err
    assert "cannot read image `" in err
    assert "01.png`: not an image" in err
    assert "--on-bad-image skip" in err
    assert [p.name for p in tmp_path.iterdir()] == ["in"]  # no half a file
    assert run(*args, "--out", target, "--on-bad-image", "skip") == 0
    out, err = capsys.readouterr()
    assert "3 predictions" in out
    assert "1 of 4 images could not be read" in err
    found = json.loads(target.read_text())["predictions"]
    assert [bool(p["error"]) for p in found] == [False, True, False, False]
    for path in (tmp_path / "in").iterdir():
        path.write_bytes(b"nothing")
    assert run(*args, "--on-bad-image", "skip") == 2
    out, err = capsys.readouterr()
    assert out.count("not readable") == 4
    assert "none of the 4 images could be read" in err


def test_a_place_that_cannot_be_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no").write_text("a file")
    target = tmp_path / "no" / "p.csv"
    assert run("predict", world / "model.onnx", world / "images", "--out", target) == 2
    assert f"cannot write `{target}`" in capsys.readouterr().err


def test_predict_needs_no_torch(world: Path) -> None:
    code = (
        "from npprune.cli.app import run_app\n"
        "code = run_app(['predict', 'model.onnx', 'images', '--format', 'csv'])\n"
        "sys.exit(code)\n"
    )
    done = bare(code, HEAVY, world)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 + 24 * 5
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "npprune", "predict", "model.onnx", "images"],
        capture_output=True, text=True, timeout=120, cwd=world,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 0
    assert "onnxruntime" in loaded
    assert not loaded & set(HEAVY)


# ---------------------------------------------------------------- bare places


def test_the_guides_lines_need_only_onnxruntime_and_numpy(world: Path, tmp_path: Path) -> None:
    guide = (ROOT / "docs" / "how-to" / "deploy.md").read_text()
    section = guide.partition("## Without npprune")[2]
    (lines,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    shutil.copy(world / "pixels.onnx", tmp_path / "model.onnx")
    paths = [world / "images" / f"c{c}" / "00.png" for c in range(6)]
    pixels = np.stack([np.asarray(Image.open(p).resize((32, 32))) for p in paths])
    np.save(tmp_path / "pixels.npy", pixels)
    code = f"import numpy\npixels = numpy.load('pixels.npy')\n{lines}"
    others = ("npprune", "PIL", "pydantic", "typer", "rich", *HEAVY)
    done = bare(code, others, tmp_path)
    assert done.returncode == 0, done.stderr
    import torch

    mean, std = (torch.tensor(v) for v in (PREPROCESSING.mean, PREPROCESSING.std))
    images = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = network()(images).argmax(1).tolist()
    names = {i: f"kind {i}" for i in range(6)} | {3: 'grey, "striped"\x1b[31m'}
    assert done.stdout == f"{[names[i] for i in expected]}\n"
    assert len(set(expected)) > 1


SERVE = ("fastapi", "uvicorn", "multipart")


@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in SERVE), reason="needs the [serve] extra"
)
def test_the_endpoint_needs_what_its_image_installs(world: Path) -> None:
    code = (
        f"sys.path.insert(0, {str(ROOT / 'examples')!r})\n"
        "from pathlib import Path\nimport serve\n"
        "app = serve.make_app(Path('model.onnx'), 'cpu')\n"
        "print(sorted(r.path for r in app.routes if r.path in ('/health', '/predict')))\n"
    )
    done = bare(code, ("typer", "rich", *HEAVY), world)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['/health', '/predict']\n"


def test_the_dockerfile_copies_what_is_there_and_runs_as_nobody_special() -> None:
    text = (ROOT / "Dockerfile").read_text()
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignore if line.startswith("!")]
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert [re.match(r"\S+ AS (\w+)", s)[1] for s in stages] == ["serve", "npprune"]  # type: ignore[index]
    for stage in stages:
        assert re.search(r"^USER npprune$", stage, re.MULTILINE)
        assert stage.index("USER") < stage.index("ENTRYPOINT")
        for copied in re.findall(r"^COPY (.*)$", stage, re.MULTILINE):
            for name in copied.split()[:-1]:
                assert (ROOT / name).exists(), name
                assert name in let_in, name
    wanted = re.search(r"serve = \[(.*)\]", (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    pinned = (ROOT / "requirements-serve.txt").read_text()
    assert "--require-hashes" in stages[0]
    for requirement in re.findall(r'"([^"]+)"', wanted[1]):
        name, _, floor = requirement.partition(">=")
        version = re.search(rf"^{name}==([\d.]+) \\\n    --hash=sha256:", pinned, re.MULTILINE)
        assert version is not None, name
        numbers = [tuple(map(int, v.split("."))) for v in (version[1], floor)]
        assert numbers[0] >= numbers[1]


def test_preprocessing_survives_the_way_through_the_file(world: Path) -> None:
    from npprune.export.predict import Classifier

    assert Classifier(world / "model.onnx", provider="cpu").preprocessing == Preprocessing(
        (3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), "bilinear", 1.0
    )
