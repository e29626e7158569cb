"""The floors of the house: who may import whom."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_import_contracts_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"Contracts: (\d+) kept, 0 broken", done.stdout)
    assert found, done.stdout
    assert int(found.group(1)) >= 9


def test_only_one_room_creates_timm_models() -> None:
    def creates(path: Path) -> bool:
        calls = (n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        return any(isinstance(f, ast.Attribute) and f.attr == "create_model" for f in calls)

    users = [p.relative_to(ROOT) for p in (ROOT / "npprune").rglob("*.py") if creates(p)]
    assert {p.parent.as_posix() for p in users} == {"npprune/models"}
