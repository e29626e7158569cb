"""Write the JSON Schemas of npprune's documents: `python docs/schema.py`, into `docs/schema/`."""

from __future__ import annotations

import json
from pathlib import Path

from npprune.cli.documents import schemas

FOLDER = Path(__file__).resolve().parent / "schema"

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for kind, schema in schemas().items():
        text = json.dumps(schema, indent=2) + "\n"
        (FOLDER / f"{kind}.json").write_text(text, encoding="utf-8")
