"""The command line: wiring, exit codes, what goes to which stream. No network is built here."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npprune import errors
from npprune.cli import app, flags
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.work import Work
from npprune.recipe import DataSection, DiscoverSection, ModelSection, PruneSection
from npprune.records import (
    Accuracy,
    CheckpointConfig,
    ClassRow,
    DataInfo,
    DiscoverySummary,
    Environment,
    Evaluation,
    ExportRecord,
    Latency,
    Mean,
    ModelInfo,
    ModelSource,
    ParityRow,
    Preprocessing,
    PruneSummary,
    Rate,
    Result,
    Variant,
    to_json,
)

VERBS = ("discover", "prune", "heal", "eval", "export", "report", "run", "demo", "env")


def program(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "npprune", *args],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=120,
    )


# ---------------------------------------------------------------- records for the tests

RATE = Rate(8, 10, 0.8, 0.49, 0.94)
MEAN = Mean(-0.1, 0.01, -0.12, -0.08, 10)
DATA = DataInfo("folder:val", "ImageNet synset folders", 10, 2, ["val/a/broken.jpg"])
MODEL = ModelInfo(
    ModelSource("vit_test"), 1_234_567, 5_000_000, [64, 64], [2, 2], 32, 2, "cls", Preprocessing()
)
LATENCY = Latency("torch", "cpu", 1, 1, 10, 2.0, 1.5, 0.1, 0.1, 0.75, 0.7, 0.8)


def a_result() -> Result:
    found = DiscoverySummary(
        "neuron-path", "cls", "gauss-legendre", 5, 3, "sum", DATA, 10, 2, 1.5, MEAN
    )
    return Result("tiny", "2026-01-01T00:00:00Z", Environment(), MODEL, [], discovery=found)


def a_variant() -> Variant:
    summary = PruneSummary(
        "variance", "uniform", "least-squares", 0.5, 3, 16, [32, 48], [64, 64], [3, 7], DATA,
        2.0, "abc", warnings=["the paths need 40 of the 32 units of block 0"],
    )  # fmt: skip
    summary.predicted = {
        "images": 40.0, "drop": 0.08, "drop_low": 0.02, "drop_high": 0.14, "dense_top1": 0.9,
        "pruned_top1": 0.8, "pruned_low": 0.7, "pruned_high": 0.85, "divergence_nats": 0.125,
    }  # fmt: skip
    return Variant("tiny_half", "../ckpt/tiny_half", MODEL, summary)


def an_evaluation() -> Evaluation:
    accuracy = Accuracy(RATE, RATE, Mean(0.7, 0.01, 0.68, 0.72, 10))
    rows = [
        ClassRow(0, "tench", 5, 1.0, 0.8, -0.2),
        ClassRow(1, "\x1b[31mgoldfish", 5, 1.0, 0.4, -0.6),
    ]
    return Evaluation(
        DATA, Preprocessing(), "cpu", accuracy, accuracy, MEAN, MEAN, -0.1, MEAN, RATE, rows,
        latency=[LATENCY],
    )  # fmt: skip


def an_export(passed: bool = True) -> ExportRecord:
    parity = [ParityRow(n, 10, 1e-6, 1.0) for n in (1, 3, 17)]
    return ExportRecord(
        "model.onnx", "onnx", "fp32", 20, 4_000_000, "abc", "CPUExecutionProvider", parity, 1e-4,
        passed,
    )  # fmt: skip


# ---------------------------------------------------------------- a pipeline that only remembers


PLACES = {"run": "run", "demo": "run", "report": "common.results", "bench": "export.bench"}
"""Modules of stages that are not `<stage>.stage`."""

PARTS = ("device", "seed", "emit", "command")


class Recorder:
    """Stands in for one pipeline function: remembers what it was called with."""

    def __init__(self, answer: Any, events: list[Event] | None = None) -> None:
        self.answer = answer
        self.events = events or []
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.work = Work()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, dict(kwargs)
        work = self.kwargs.pop("work", None)
        if work is None:  # a stage that takes its parts one by one
            parts = {n: self.kwargs.pop(n) for n in list(self.kwargs) if n in PARTS}
            work = Work(**parts)
        self.work = work
        print("a library prints")  # noqa: T201
        for event in self.events:
            self.work.emit(event)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`stage(package, function, answer)` replaces one stage's function by a Recorder."""

    def replace(module: str, function: str, answer: Any, events: Any = None) -> Recorder:
        recorder = Recorder(answer, events)
        place = PLACES.get(module, f"{module}.stage")
        monkeypatch.setattr(f"npprune.pipeline.{place}.{function}", recorder)
        return recorder

    return replace


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny_half"
    folder.mkdir()
    config = CheckpointConfig(
        MODEL.source, [32, 48], [2, 2], 2, Preprocessing(), [], "", run="../tiny"
    )
    (folder / "config.json").write_text(to_json(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    return folder


# ---------------------------------------------------------------- start


def test_version_and_help_load_no_torch() -> None:
    code = (
        "import sys\nfrom npprune.cli.app import run_app\n"
        "for args in (['--version'], ['--help'], *[[v, '--help'] for v in sys.argv[1:]]):\n"
        "    assert run_app(args) == 0, args\n"
        "heavy = {'torch', 'timm', 'onnx', 'onnxruntime', 'sklearn', 'matplotlib', 'click'}\n"
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *VERBS], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("npprune 0")


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run_app([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Example" in out
    assert f"npprune {verb}" in out
    assert "--json" in out
    assert "[default: None]" not in out


def test_no_arguments_show_the_help() -> None:
    done = program()
    assert done.returncode == 2
    assert "discover" in done.stdout + done.stderr


def test_completion() -> None:
    done = program(
        "--help", _NPPRUNE_COMPLETE="complete_bash", COMP_WORDS="npprune ev", COMP_CWORD="1"
    )
    assert done.stdout.split() == ["eval"]
    words = "npprune discover x --method kn"
    done = program("x", _NPPRUNE_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="4")
    assert done.stdout.split() == ["knowledge-neuron"]


def test_report_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(to_json(a_result()))
    code = (
        "import sys\nfrom npprune.cli.app import run_app\n"
        "code = run_app(['report', sys.argv[1], '--json'])\n"
        "sys.exit(' '.join(sorted({'torch', 'timm', 'onnx'} & set(sys.modules))) or code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["html"]).stat().st_size > 1000


# ---------------------------------------------------------------- errors


DISCOVER = ["discover", "vit_test", "--data", "digits"]
PRUNE = ["prune", "vit_test", "--out", "x"]
ERRORS = [
    (errors.NpPruneError, 2),
    (errors.UsageError, 2),
    (errors.RecipeError, 2),
    (errors.ModelError, 2),
    (errors.DataError, 2),
    (errors.DeviceError, 2),
    (errors.StoreError, 2),
    (errors.ExportError, 2),
    (errors.GateError, 1),
]


def test_the_error_table_is_complete() -> None:
    known = {kind for kind, _ in ERRORS} | {errors.PeerError}  # never shown: test_processes.py
    assert known == {errors.NpPruneError, *errors.NpPruneError.__subclasses__()}


@pytest.mark.parametrize(("kind", "code"), ERRORS)
def test_error_table(
    kind: type[errors.NpPruneError], code: int, stage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    stage("demo", "run_demo", kind("the [thing] is `1.5`", hint="try `0.5`"))
    assert app.run_app(["demo", "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "a library prints\nerror: the [thing] is `1.5`\nhint: try `0.5`\n"


@pytest.mark.parametrize(
    ("args", "module", "function", "message", "hint"),
    [
        (PRUNE, "prune", "prune", "`--topk` is not `--topk 5`", "`--no-protect-paths`, `--axes`"),
        (DISCOVER, "discover", "discover", "`--topk` is not `--topk 5`", "`--no-protect-paths`"),
        (
            ["run", "RECIPE", "--set", "prune.axes=[mlp]"],
            "run",
            "run_recipe",
            "`prune.topk` (RECIPE:3) is not `prune.topk: 5` (RECIPE:3)",
            "`prune.protect_paths: false`, `prune.axes` (--set prune.axes=[mlp])",
        ),
    ],
)
def test_errors_name_settings_as_the_user_wrote_them(
    args: list[str], module: str, function: str, message: str, hint: str, stage: Any,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = tmp_path / "x.yaml"
    recipe.write_text("name: x\nmodel: {name: vit}\nprune: {topk: 5}\n")
    error = errors.UsageError(
        f"{errors.setting('prune.topk')} is not {errors.setting('prune.topk', 5)}",
        hint=f"{errors.setting('prune.protect_paths', False)}, {errors.setting('prune.axes')}",
    )
    assert (error.message, error.settings()) == ("`topk` is not `topk=5`", ["prune.topk"] * 2)
    stage(module, function, error)
    assert app.run_app([str(recipe) if arg == "RECIPE" else arg for arg in args]) == 2
    err = capsys.readouterr().err.replace(str(recipe), "RECIPE")
    assert f"error: {message}\nhint: {hint}" in err


def test_each_command_names_its_images(
    stage: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = errors.DataError(f"give others with {errors.setting('data.val')}")
    stage("evaluate", "evaluate", error)
    assert app.run_app(["eval", str(checkpoint), "--data", "digits"]) == 2
    assert "error: give others with `--data`\n" in capsys.readouterr().err


def test_interrupt(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stage("demo", "run_demo", KeyboardInterrupt())
    assert app.run_app(["demo"]) == 130
    assert "interrupted; run the same command again to resume\n" in capsys.readouterr().err


def test_a_bug_is_short_without_debug(
    stage: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage("demo", "run_demo", ValueError("first\nsecond"))
    assert app.run_app(["demo"]) == 70
    err = capsys.readouterr().err
    assert "error: npprune met a bug of its own: ValueError: first\n" in err
    assert "NPPRUNE_DEBUG=1" in err
    assert "Traceback" not in err
    monkeypatch.setenv("NPPRUNE_DEBUG", "1")
    assert app.run_app(["demo"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_no_space_is_not_a_bug(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stage("demo", "run_demo", OSError(28, "No space left on device", "ckpt/demo"))
    assert app.run_app(["demo"]) == 2
    assert "error: no space left on device: ckpt/demo\n" in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    stage("demo", "run_demo", kind("CUDA out of memory. Tried to allocate 2 GiB"))
    assert app.run_app(["demo"]) == 2
    err = capsys.readouterr().err
    assert "error: out of memory: CUDA" in err
    assert "hint: a smaller `--batch-size`" in err


def test_ranks_above_0_say_only_errors(
    stage: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    event = Event("discover", "starts")
    stage("discover", "discover", a_result(), [event])
    assert app.run_app(["discover", "vit_test", "--data", "digits", "--json"]) == 0
    assert capsys.readouterr() == ("", "a library prints\n")
    stage("discover", "discover", errors.DataError("no images"))
    assert app.run_app(["discover", "vit_test", "--data", "digits"]) == 2
    assert "[rank 3] error: no images\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        ([*DISCOVER, "--topk", "0"], "`--topk` must be at least 1, got `0`", "strongest"),
        ([*DISCOVER, "--topk", "a"], "`--topk` must be a whole number, got `a`", "--help"),
        ([*PRUNE, "--keep=many"], "`--keep` must be a number, got `many`", "--help"),
        ([*PRUNE, "--keep", "1.5"], "`--keep` must be in (0, 1], got `1.5`", "`0.5` keeps half"),
        ([*PRUNE, "--keep", "nan"], "`--keep` must be in (0, 1], got `nan`", "half"),
        ([*PRUNE, "--keep", "0"], "`--keep` must be in (0, 1], got `0.0`", "half"),
        (
            [*PRUNE, "--target-macs", "0.7", "--axes", "mlp,qks"],
            "`--axes` must be one of `mlp`, `cls`, `heads`, `qk`, `head-dim`, `tokens`, got `qks`",
            "did you mean `qk`?",
        ),
        ([*PRUNE, "--axes", "mlp,,qk"], "`--axes` must not hold an empty entry", ""),
        ([*PRUNE, "--target-macs", "-1"], "`--target-macs` must be greater than 0", "MACs"),
        (
            [*PRUNE, "--keep", "0.5", "--target-params", "0.5"],
            "got `--keep` and `--target-params`",
            "leave all but one out",
        ),
        (
            [*PRUNE, "--keep", "0.5", "--target-latency", "4"],
            "got `--keep` and `--target-latency`",
            "leave all but one out",
        ),
        (
            [*PRUNE, "--keep", "0.5", "--criterion", "varience"],
            "`--criterion` must be one of `random`",
            "did you mean `variance`?",
        ),
        (
            [*PRUNE, "--keep", "0.5", "--selection", "mesured"],
            "`--selection` must be one of `uniform`, `global`, `measured`, got `mesured`",
            "did you mean `measured`?",
        ),
        (
            ["study", "vit_test", "--val", "digits", "--out", "x", "--criteria", "obs,fishr"],
            "`--criteria` must be one of `random`",
            "did you mean `fisher`?",
        ),
        ([*PRUNE, "--target-macs", "inf"], "`--target-macs` must", ""),
        (
            [*DISCOVER, "--method", "neuron-pth"],
            "`--method` must be one of `neuron-path`, `activation`",
            "did you mean `neuron-path`?",
        ),
        ([*DISCOVER, "--device", "gpu"], "`--device` must be one of `auto`", "npprune env"),
        ([*DISCOVER, "--device", "cuda:x"], "got `cuda:x`", "npprune env"),
        ([*DISCOVER, "--seed", "-1"], "`--seed` must be in [0, 4294967295], got `-1`", ""),
        ([*DISCOVER, "--points", "257"], "`--points` must be in [1, 256], got `257`", "4 points"),
        (
            [*DISCOVER, "--precision", "fp16"],
            "`--precision` must be one of `fp32`, `tf32`, `bf16`, got `fp16`",
            "did you mean `bf16`?",
        ),
        ([*DISCOVER, "--mean", "a,b"], "`--mean` must be numbers separated by commas", ""),
        ([*DISCOVER, "--classes", "1,,2"], "`--classes` must not hold an empty entry", "tench"),
        ([*DISCOVER, "--classes", "no.txt"], "names a file that is not there: `no.txt`", ""),
        ([*DISCOVER, "--class-map", "no.json"], "`--class-map` must be an existing file", ""),
        (
            [*DISCOVER, "--no-crop", "--crop-mode", "center"],
            "`--no-crop` means `--crop-mode squash`",
            "leave one",
        ),
        ([*DISCOVER, "--no-crop", "--crop-pct", "0.9"], "`--no-crop` means `--crop-pct 1`", "one"),
        ([*DISCOVER, "--checkpoint", "no.pth"], "`--checkpoint` must be an existing file", ""),
        (["discover", "auto", "--data", "x"], "MODEL `auto` needs `--checkpoint`", "timm name"),
        (["discover", "vit_test"], "missing option '--data'", "discover --help"),
        (
            ["discover", *DISCOVER[1:], "--topl", "1"],
            "no such option: --topl",
            "did you mean `--topk`? `npprune",
        ),
        (["prun"], "no such command 'prun'", "--help"),
        (["prune", "reports/no", "--out", "x"], "there is no such folder", "npprune discover"),
        (["prune", ".", "--out", "x"], "it holds no manifest.json", "npprune discover"),
        (["report", "reports/no"], "reports/no", ""),
        (["eval", "ckpt/no", "--data", "digits"], "there is no such folder", "npprune prune"),
        (["export", "."], "it holds no config.json", "npprune prune"),
        (["run", "no.yaml"], "no.yaml", ""),
        (["demo", "--device", "tpu"], "got `tpu`", ""),
    ],
)
def test_wrong_arguments(
    args: list[str],
    message: str,
    hint: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.run_app(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert hint in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--batches", "1,0"], "`--batches` must be at least 1 each, got `1,0`"),
        (["--batches", "1,x"], "`--batches` must be whole numbers separated by commas"),
        (["--dense", "no.pth"], "`--dense` must be an existing file, got `no.pth`"),
    ],
)
def test_wrong_arguments_of_eval(
    args: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run_app(["eval", str(checkpoint), "--data", "digits", *args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--opset", "5"], "`--opset` must be in [17, 23], got `5`"),
        (["--precision", "fp8"], "`--precision` must be one of `fp32`, `fp16`, `int8`, got `fp8`"),
        (["--provider", "npu"], "`--provider` must be one of `auto`"),
    ],
)
def test_wrong_arguments_of_export(
    args: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run_app(["export", str(checkpoint), *args]) == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- each verb


def test_discover(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    called = stage("discover", "discover", a_result())
    args = ["--topk", "3", "--points", "7", "--classes", "1,n01440764", "--classes", "tench"]
    args += ["--batch-size", "4", "--no-crop", "--mean", "0.5,0.5,0.5", "--device", "cuda:1"]
    args += ["--seed", "9", "--img-size", "96x64", "--images-per-class", "5"]
    args += ["--precision", "tf32", "--compile"]
    assert app.run_app(["discover", "vit_test.orig", "--data", "folder:a", *args]) == 0
    model, data, settings, out = called.args
    assert model == ModelSection(name="vit_test.orig", img_size=[96, 64])
    assert settings == DiscoverSection(
        topk=3, points=7, batch_size=4, precision="tf32", compile=True
    )
    assert data == DataSection(
        train="folder:a",
        classes=[1, "n01440764", "tench"],
        images_per_class=5,
        batch_size=4,
        mean=[0.5, 0.5, 0.5],
        crop_mode="squash",
        crop_pct=1.0,
    )
    assert out == Path("reports/vit_test")
    assert called.work.command.startswith("npprune discover vit_test.orig ")
    assert (called.work.device, called.work.seed) == ("cuda:1", 9)
    assert called.kwargs == {"dry_run": False}
    shown, talk = capsys.readouterr()
    assert "1.23 M parameters" in shown
    assert "reports/vit_test/result.json" in shown
    assert "next: npprune prune reports/vit_test --keep 0.5" in shown
    assert "10 images of 2 classes, folder:val, labels by ImageNet synset folders" in shown
    assert "1 unreadable skipped" in shown
    assert talk == "a library prints\n"


def test_discover_dry_run(stage: Any, capsys: pytest.CaptureFixture[str]) -> None:
    called = stage("discover", "discover", a_result())
    assert app.run_app([*DISCOVER, "--dry-run"]) == 0
    assert called.kwargs["dry_run"] is True
    out = capsys.readouterr().out
    assert "dry run" in out
    assert "result.json" not in out


def test_prune_a_run(stage: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called = stage("prune", "prune", a_variant())
    args = ["--topk", "5", "--keep", "0.5", "--calibration", "folder:b", "--no-protect-paths"]
    args += ["--cut-head", "--out", "ckpt/half"]
    assert app.run_app(["prune", str(run_folder), *args]) == 0
    source, data, settings, out = called.args
    assert source == run_folder
    assert data == DataSection(calibration="folder:b")
    assert data.model_fields_set == {"calibration"}
    assert settings == PruneSection(topk=5, keep=0.5, protect_paths=False, keep_head=False)
    assert out == Path("ckpt/half")
    shown, talk = capsys.readouterr()
    assert "warning: the paths need 40 of the 32 units of block 0\n" in talk
    rows = [line.split() for line in shown.splitlines()]
    assert ["0", "64", "32", "50", "%", "3"] in rows
    assert ["1", "64", "48", "75", "%", "7"] in rows
    assert ["all", "128", "80", "62.5", "%", "10"] in rows
    assert "8.0 points of top-1 (95 % 2.0 to 14.0), by the dense" in shown
    assert "0.125 nats" in shown
    assert "checkpoint  ckpt/half\n" in shown


def test_prune_a_model(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    called = stage("prune", "prune", a_variant())
    assert app.run_app([*PRUNE, "--keep", "0.5"]) == 0
    assert called.args[0] == ModelSection(name="vit_test")
    (tmp_path / "w.pth").write_bytes(b"")
    args = ["prune", "auto", "--checkpoint", "w.pth", "--num-heads", "3", "--out", "x"]
    assert app.run_app(args) == 0
    assert called.args[0] == ModelSection(name="auto", checkpoint="w.pth", num_heads=3)
    assert app.run_app([*PRUNE, "--axes", "mlp, heads,qk", "--target-macs", "0.7"]) == 0
    assert called.args[2] == PruneSection(axes=["mlp", "heads", "qk"], target_macs=0.7)


def test_eval(stage: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called = stage("evaluate", "evaluate", an_evaluation())
    args = ["eval", str(checkpoint), "--data", "digits:test", "--batches", "1,4"]
    assert app.run_app([*args, "--no-latency"]) == 0
    folder, data, settings = called.args
    assert folder == checkpoint
    assert data == DataSection(val="digits:test")
    assert (settings.latency, settings.batches) == (False, [1, 4])
    assert called.kwargs["dense_checkpoint"] is None
    assert called.work.command == shlex.join(["npprune", *args, "--no-latency"])
    out = capsys.readouterr().out
    assert "8/10, 49.0–94.0" in out
    assert "with 95 % intervals" in out
    worst = out.index("goldfish")
    assert worst < out.index("tench")
    assert "\x1b" not in out
    assert "−25.0 %" in out


def test_eval_shows_the_cost_where_the_run_is_there(
    stage: Any, checkpoint: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage("evaluate", "evaluate", an_evaluation())
    result, variant, other = a_result(), a_variant(), a_variant()
    variant.evaluation, other.name = an_evaluation(), "other"
    variant.checkpoint = "../tiny_half"
    result.variants = [other, variant]
    (run_folder / "result.json").write_text(to_json(result))
    assert app.run_app(["eval", str(checkpoint), "--data", "digits:test"]) == 0
    out, err = capsys.readouterr()
    assert "MACs per image" in out
    assert "other" not in out
    assert "warning: tiny_half: evaluated on 10 images only; mind the interval." in err


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_export(
    passed: bool,
    code: int,
    stage: Any,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called = stage("export", "export_checkpoint", an_export(passed))
    args = ["export", str(checkpoint), "--opset", "18", "--provider", "cpu"]
    assert app.run_app([*args, "--out", "a.onnx"]) == code
    assert called.args[0] == checkpoint
    assert called.args[2].opset == 18
    assert called.kwargs["out"] == Path("a.onnx")
    assert called.kwargs["provider"] == "cpu"
    out = capsys.readouterr().out
    assert ("ONNX file  a.onnx" in out) is passed
    assert ("passed" if passed else "failed") in out


def test_report(stage: Any, run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = (run_folder / "report.html", run_folder / "report.md")
    called = stage("report", "render_report", pages)
    assert app.run_app(["report", str(run_folder)]) == 0
    assert called.args == (run_folder,)
    assert f"HTML report  {pages[0]}\n" in capsys.readouterr().out


def test_run_dry_run_shows_the_recipe(
    stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    called = stage("run", "run_recipe", a_result())
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("name: tiny\nmodel: {name: vit_test}\n")
    args = ["run", str(recipe), "--dry-run", "--set", "prune.keep=0.25", "--device", "cuda:1"]
    assert app.run_app([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "recipe"
    assert found["prune"]["keep"] == 0.25
    assert found["device"] == "cuda:1"
    assert called.kwargs["dry_run"] is True
    assert app.run_app(args) == 0
    assert "keep: 0.25" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["run", "demo"])
def test_run_and_demo(
    verb: str, stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = a_result()
    variant = a_variant()
    variant.evaluation, variant.export = an_evaluation(), an_export()
    variant.checkpoint = "../../ckpt/tiny_half"
    found.variants = [variant]
    (tmp_path / "reports" / "tiny").mkdir(parents=True)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("name: tiny\nmodel: {name: vit_test}\n")
    if verb == "run":
        called = stage("run", "run_recipe", found)
        args = ["run", str(recipe), "--root", str(tmp_path)]
    else:
        called = stage("demo", "run_demo", found)
        args = ["demo", "--out", str(tmp_path), "--seed", "3"]
    assert app.run_app(args) == 0
    assert called.kwargs["root"] == tmp_path
    out = capsys.readouterr().out
    assert "Top-1" in out
    assert f"{tmp_path}/reports/tiny/report.html" in out
    assert f"{tmp_path}/ckpt/tiny_half/model.onnx" in out
    assert called.work.command == shlex.join(["npprune", *args])


def test_env_says_what_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("npprune.pipeline.common.device")
    assert app.run_app(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] == importlib.import_module("torch").__version__
    assert found["device"].split(":")[0] in ("cpu", "cuda", "mps")
    assert found["device_reason"]
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    assert found["memory_gib"] > 0


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("args", "module", "function", "answer", "kind"),
    [
        (DISCOVER, "discover", "discover", a_result, "result"),
        (PRUNE, "prune", "prune", a_variant, "variant"),
        (["eval", "CKPT", "--data", "x"], "evaluate", "evaluate", an_evaluation, "evaluation"),
        (["export", "CKPT", "--out", "m.onnx"], "export", "export_checkpoint", an_export, "export"),
        (["demo"], "demo", "run_demo", a_result, "result"),
    ],
)
def test_json_is_one_document(
    args: list[str],
    module: str,
    function: str,
    answer: Any,
    kind: str,
    stage: Any,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    events = [Event("x", "a word"), Event("x", level="progress", done=1, total=1)]
    stage(module, function, answer(), events)
    args = [str(checkpoint) if arg == "CKPT" else arg for arg in args]
    assert app.run_app([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert list(found)[:2] == ["schema_version", "kind"]
    assert found["kind"] == kind
    assert "a library prints" in err
    assert "x: a word" in err


# ---------------------------------------------------------------- pieces


def test_classes_may_be_a_file(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("tench\n")
    assert flags.classes([str(names)]) == str(names)
    assert flags.classes(["7", "goldfish, n01440764"]) == [7, "goldfish", "n01440764"]
    assert flags.classes(None) is None


def test_folder_name() -> None:
    assert flags.folder_name(ModelSection(name="vit_tiny.augreg")) == "vit_tiny"
    assert flags.folder_name(ModelSection(name="hf-hub:org/vit.x")) == "vit"
    auto = ModelSection(name="auto", checkpoint="a/ViT-B_16-224.npz")
    assert flags.folder_name(auto) == "ViT-B_16-224"


def test_hub_names_are_models_not_folders() -> None:
    found = flags.run_or_model("hf-hub:timm/vit_tiny", {})
    assert found == ModelSection(name="hf-hub:timm/vit_tiny")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_reader_that_leaves_is_no_failure(as_json: bool) -> None:
    code = (
        "import sys\nfrom npprune.cli.console import Output\n"
        "import os; r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
        f"out = Output(as_json={as_json})\n"
        "out.document('x', {'a': 'b' * 100_000})\n"
        "out.table('t', ['a'], [['b']] * 1000)\nout.line('more')\n"
        "sys.stderr.write('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "went on")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "npprune", "--version"],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no space left on device")
