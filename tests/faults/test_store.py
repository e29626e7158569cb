"""Everything that is written, killed or out of room before each of its file operations."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from npprune import files
from npprune.errors import NpPruneError
from npprune.store.checkpoints import read_checkpoint
from tests.faults.shim import Killed, operations
from tests.faults.writings import FAULTS, WRITINGS, checkpoint, met, version


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WRITINGS)
def test_before_every_operation(name: str, fault: str, tmp_path: Path) -> None:
    n = 1
    while met(name, fault, n, tmp_path / str(n)):
        n += 1
    assert n > 4


def test_a_checkpoint_where_folders_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two renames a kill leaves no folder: the next writing brings it back first."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    absent = 0
    for n in range(1, 40):
        root = tmp_path / str(n)
        root.mkdir()
        checkpoint(root, 1)
        with operations(root, n) as seen, contextlib.suppress(Killed):
            checkpoint(root, 2)
        if len(seen.names) < n:
            break
        if (root / "c").is_dir():
            assert version(root) in (1, 2)
        else:
            absent += 1
            with pytest.raises(ValueError, match="no"), files.replacing(root / "c"):  # noqa: PT012
                assert version(root) == 1
                raise ValueError("no")
        checkpoint(root, 2)
        assert version(root) == 2
        assert [p.name for p in root.iterdir()] == ["c"]
    assert absent == 1


def test_every_bit_of_a_document_counts(tmp_path: Path) -> None:
    """No flipped bit of a checkpoint's configuration is read as another configuration."""
    checkpoint(tmp_path, 1)
    path = tmp_path / "c" / "config.json"
    good, kept = path.read_bytes(), read_checkpoint(tmp_path / "c")[0]
    refused = 0
    for place in range(0, len(good), 3):
        flipped = bytearray(good)
        flipped[place] ^= 1 << (place % 7)
        path.write_bytes(flipped)
        try:
            assert read_checkpoint(tmp_path / "c")[0] == replace(kept)
        except NpPruneError:
            refused += 1
    assert refused > 0.7 * len(good) / 3  # the others are blanks between entries
