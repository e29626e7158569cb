"""Hierarchies of classes: which node stands above which.

ImageNet's comes with the package (`wordnet.tsv`, from WordNet). Others are read from a file:

- `.json`: {"child": "parent"} or {"child": ["parent", ...]}
- `.tsv` or `.txt`: one `child<TAB>parent` a line; `#` begins a comment
- a name that ends in `is_a.txt`: ImageNet's own list, `parent child` a line
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from npprune.data.labels import read_list
from npprune.errors import DataError, setting
from npprune.untrusted import parse_json

Parents = dict[str, list[str]]


def imagenet_hierarchy() -> Parents:
    """The parents of every ImageNet-1k synset, and theirs, up to the root."""
    text = resources.files("npprune.data").joinpath("wordnet.tsv").read_text(encoding="utf-8")
    return _lines(text, "wordnet.tsv", "\t", parent_first=False)


def read_hierarchy(path: Path) -> Parents:
    """A hierarchy from a file: the parents of each node.

    Raises:
        DataError: the file cannot be read, or does not say which node stands above which.
    """
    hint = f"{setting('hierarchy')} takes a .json or .tsv file of child and parent"
    text = read_list(path, "hierarchy", hint=hint)
    if path.suffix.lower() == ".json":
        return _json(text, path)
    if path.name.endswith("is_a.txt"):
        return _lines(text, str(path), None, parent_first=True)
    return _lines(text, str(path), "\t", parent_first=False)


def _lines(text: str, where: str, separator: str | None, *, parent_first: bool) -> Parents:
    parents: Parents = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        parts = [part.strip() for part in line.split(separator)]
        if len(parts) != 2 or not all(parts):
            order = "parent child" if parent_first else "child<TAB>parent"
            raise DataError(f"hierarchy `{where}`:{number} must be `{order}`, got `{line}`")
        child, parent = reversed(parts) if parent_first else parts
        parents.setdefault(child, []).append(parent)
    if not parents:
        raise DataError(f"hierarchy `{where}` is empty")
    return parents


def _json(text: str, path: Path) -> Parents:
    try:
        data = parse_json(text)
    except ValueError as err:
        raise DataError(f"hierarchy `{path}` is not valid JSON: {err}") from err
    if not isinstance(data, dict) or not data:
        raise DataError(f"hierarchy `{path}` must hold an object, child -> parent")
    parents: Parents = {}
    for child, above in data.items():
        nodes = [above] if isinstance(above, str) else above
        if not isinstance(nodes, list) or not all(isinstance(n, str) and n for n in nodes):
            raise DataError(
                f"hierarchy `{path}`: `{child}` must have a parent or a list of them, "
                f"got {json.dumps(above)[:60]}"
            )
        parents[child] = nodes
    return parents
