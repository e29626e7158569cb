"""One undisturbed world for all. Faults are of an order of operations: nothing waits for disks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from npprune.models import info

pytest.register_assert_rewrite("tests.faults.world")

from tests.faults.world import Said, Undisturbed  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def _without_waiting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _built_once() -> Iterator[None]:
    """What costs more than these tiny networks: counting their MACs, building the commands."""
    counted: dict[str, int] = {}
    built: dict[int, Any] = {}
    count, build = info.count_macs, typer.main.get_command

    def macs(model: Any, size: Any) -> int:
        form = f"{model} {size}"
        if form not in counted:
            counted[form] = count(model, size)
        return counted[form]

    def command(program: Any) -> Any:
        if id(program) not in built:
            built[id(program)] = build(program)
        return built[id(program)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(info, "count_macs", macs)
        patch.setattr(typer.main, "get_command", command)
        yield


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().err
