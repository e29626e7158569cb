"""Fixtures shared by all tests."""

from __future__ import annotations

import os
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
def shared_golden() -> Path:
    """The released program's outputs, or skip."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_testbed() -> Path:
    """A real ImageNet model and images, or skip."""
    return _shared("testbed")
