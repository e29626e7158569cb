"""Documents against the schemas in `docs/schema`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from npprune.records import SCHEMA_VERSION

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "schema"


def check(kind: str, data: dict[str, Any]) -> None:
    """AssertionError where a document is not as its schema says, or has none; without jsonschema
    (the dev extra) only whether there is one."""
    document = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, "kind": kind, **data}))
    validator = _validator(kind)
    if validator is None:
        return
    for error in validator.iter_errors(document):
        raise AssertionError(f"{kind}: {error.json_path}: {error.message}")


@cache
def _validator(kind: str) -> Any:
    path = PUBLISHED / f"{kind}.json"
    assert path.is_file(), f"no schema of `{kind}`: add it in npprune/cli/documents.py"
    try:
        from jsonschema import Draft202012Validator
    except ImportError:
        return None
    return Draft202012Validator(json.loads(path.read_text(encoding="utf-8")))
