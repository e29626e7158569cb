"""Write the JSON Schemas of npprune's files: `python docs/schema.py`, into `docs/schema/`."""

from __future__ import annotations

import json
from pathlib import Path

from npprune.records import Document, ExportRecord, Plan, Result, json_schema

FOLDER = Path(__file__).resolve().parent / "schema"
DOCUMENTS: tuple[type[Document], ...] = (Result, Plan, ExportRecord)


def schemas() -> dict[str, str]:
    """The text of each file, by its name."""
    return {
        f"{document.kind}.json": json.dumps(json_schema(document), indent=2) + "\n"
        for document in DOCUMENTS
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
