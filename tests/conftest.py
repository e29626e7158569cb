"""Fixtures shared by all tests."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Of the long run of faults: `pytest -m faults`."""
    group = parser.getgroup("faults")
    group.addoption("--fault-seed", type=int, default=0, help="of the faults that are chosen")
    group.addoption("--fault-minutes", type=float, default=15.0, help="how long they are tried")
    group.addoption("--fault-report", type=Path, default=Path(os.devnull), help="counts, appended")


SHARED = Path(__file__).resolve().parents[2] / "shared"


def _shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"needs {name} data beside the checkout (../shared/{name}), which is not there")
    return path


@pytest.fixture(autouse=True, scope="module")
def _seeded() -> None:
    """Networks whose initial weights a test leaves to timm: PyTorch's first seed may be random."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _traced_once() -> Iterator[None]:
    """Tests of a process share ONNX traces of the same network, which take seconds each."""
    from npprune.export import onnx
    from tests.helpers import traces

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "_trace", traces.once(onnx._trace))
        yield


@pytest.fixture(autouse=True, scope="session")
def _drawn_once() -> Iterator[None]:
    """Reports of a process share the pictures of equal numbers."""
    from npprune.report import drawing, figures, svg
    from tests.helpers import pictures

    with pytest.MonkeyPatch.context() as patch:
        for module in (drawing, figures):
            patch.setattr(module, "picture", pictures.once(svg.picture))
        yield


@pytest.fixture(autouse=True, scope="session")
def _timed_briefly() -> Iterator[None]:
    """Two networks are timed in turn for two seconds and more: here for a tenth, ten rounds at
    least. What a test says of the times holds for that."""
    from npprune.export import bench

    enough = bench._enough

    def soon(done: int, seconds: float, runs: int | None, least: float, most: int) -> bool:
        return enough(done, seconds, runs, min(least, 0.1), most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_enough", soon)
        yield


@pytest.fixture(autouse=True, scope="session")
def _built_once() -> Iterator[None]:
    """What costs more than tiny networks do: counting their MACs; the parser of all commands,
    which Typer makes anew for every command line."""
    import typer.main

    from tests.helpers.traces import digest

    info: Any = sys.modules.get("npprune.models.info")  # whoever needs it has imported it
    counted: dict[str, int] = {}

    with pytest.MonkeyPatch.context() as patch:
        if info is not None:
            count = info.count_macs

            def macs(model: Any, size: tuple[int, int, int]) -> int:
                key = digest(model, [size], values=False)
                if key not in counted:
                    counted[key] = count(model, size)
                return counted[key]

            patch.setattr(info, "count_macs", macs)
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(autouse=True, scope="session")
def _without_waiting() -> Iterator[None]:
    """No test needs its files after a power cut: nothing waits for disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _documents_as_published() -> Iterator[None]:
    """Whatever test asks for `--json`: the document is as its published schema says."""
    from npprune.cli.console import Output
    from tests.helpers.schemas import check

    plain = Output.document

    def document(self: Output, kind: str, data: dict[str, Any]) -> None:
        check(kind, data)
        plain(self, kind, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Output, "document", document)
        yield


@pytest.fixture(scope="session")
def demo_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's network, trained once for all processes of the tests: copy it to change it."""
    from filelock import FileLock

    from npprune.pipeline.demo.network import digits_network

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{root}.lock"):
        return Path(digits_network(root).name)


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """The released program's outputs, or skip."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_testbed() -> Path:
    """A real ImageNet model and images, or skip."""
    return _shared("testbed")
