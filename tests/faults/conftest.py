"""Faults are of the order of operations, not of the disk: nothing waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.faults.world")


@pytest.fixture(autouse=True, scope="session")
def _without_waiting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
