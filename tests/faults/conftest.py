"""One undisturbed world for all. Faults are of an order of operations: nothing waits for disks."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.faults.world")

from tests.faults.world import Said, Undisturbed  # noqa: E402


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: capsys.readouterr().err
