"""Records: every document comes back as written, and nothing unknown is let in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from npprune import records
from npprune.errors import StoreError
from npprune.records import (
    ClassInfo,
    Document,
    ExportRecord,
    Plan,
    Preprocessing,
    Result,
    json_schema,
    to_json,
)

DOCUMENTS = [c for c in Document.__subclasses__() if c.__module__ == records.__name__]


def _example(kind: Any, full: bool) -> Any:
    """A value of a type: with every optional part filled, or with as little as possible."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Plan:
        return Plan(
            [[0, 2], [1]], [4, 4], *(("ab", "vit", {"k": [1, None]}, [[0], [0]], [3]) * full)
        )
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{f.name: _example(hints[f.name], full) for f in fields(kind)})  # type: ignore[operator]
    if origin in (Union, types.UnionType):
        optional = type(None) in args
        return None if optional and not full else _example(args[0], full)
    if origin is Literal:
        return args[0]
    if origin is list:
        return [_example(args[0], full)] * 2 if full else []
    if origin is tuple:
        kinds = args[:1] * 3 if args[-1] is Ellipsis else args
        return tuple(_example(a, full) for a in kinds)
    if origin is dict:
        return {_example(args[0], full): _example(args[1], full)} if full else {}
    if kind is Any:
        return {"deep": [1, 0.1, None, "é"]}
    return {int: 7, float: 0.1, str: "é < \n", bool: True}[kind]


def test_all_documents_are_known_here() -> None:
    names = {c.__name__ for c in DOCUMENTS}
    assert names >= {"Plan", "ExportRecord", "CheckpointConfig", "Manifest", "Result"}
    assert len({c.kind for c in DOCUMENTS}) == len(DOCUMENTS)
    assert all(c.kind for c in DOCUMENTS)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("cls", DOCUMENTS, ids=lambda c: c.kind)
def test_a_document_comes_back(cls: type[Document], full: bool) -> None:
    record = _example(cls, full)
    text = records.to_json(record)
    assert text.endswith("}\n")
    data = json.loads(text)
    assert list(data)[:2] == ["schema_version", "kind"]
    assert data["schema_version"] == records.SCHEMA_VERSION
    assert data["kind"] == cls.kind
    back = records.from_json(cls, text)
    assert back == record
    assert records.to_json(back) == text
    assert records.digest(back) == records.digest(record)


@pytest.mark.parametrize("cls", DOCUMENTS, ids=lambda c: c.kind)
def test_unknown_versions_kinds_and_fields_are_refused(cls: type[Document]) -> None:
    data = records.to_dict(_example(cls, True))
    newer = records.SCHEMA_VERSION + 1
    with pytest.raises(StoreError, match=rf"`schema_version` must be 1..*, got {newer} \(a.json\)"):
        records.from_dict(cls, data | {"schema_version": newer}, where="a.json")
    for version in (None, 0, "1", True, 1.0):
        with pytest.raises(StoreError, match="`schema_version` must be"):
            records.from_dict(cls, data | {"schema_version": version})
    with pytest.raises(StoreError, match=f"expected a {cls.kind} document, got kind 'x'"):
        records.from_dict(cls, data | {"kind": "x"})
    with pytest.raises(StoreError, match="`colour`: unexpected"):
        records.from_dict(cls, data | {"colour": "red"})


def test_the_hint_to_upgrade_is_only_for_newer_files() -> None:
    data = records.to_dict(_example(Plan, False))
    for version, hint in ((records.SCHEMA_VERSION + 1, "upgrade npprune"), (0, None)):
        with pytest.raises(StoreError) as caught:
            records.from_dict(Plan, data | {"schema_version": version})
        assert (hint or "") in (caught.value.hint or "")
        assert bool(caught.value.hint) == bool(hint)


def test_a_wrong_field_is_named_wherever_it_is() -> None:
    data = records.to_dict(_example(Result, True))
    data["model"]["preprocessing"]["crop_pct"] = "most"
    with pytest.raises(StoreError, match=r"^`model.preprocessing.crop_pct`: .*number.* \(r.json\)"):
        records.from_dict(Result, data, where="r.json")
    data = records.to_dict(_example(Result, True))
    data["model"]["colour"] = 1
    with pytest.raises(StoreError, match=r"^`model.colour`: unexpected"):
        records.from_dict(Result, data)
    data = records.to_dict(_example(Result, True))
    del data["name"]
    with pytest.raises(StoreError, match=r"^`name`: .*required"):
        records.from_dict(Result, data)


def test_text_that_is_no_document_is_refused() -> None:
    with pytest.raises(StoreError, match=r"not valid JSON: .* \(a.json\)"):
        records.from_json(Plan, '{"kind":', where="a.json")
    with pytest.raises(StoreError, match=r"expected a JSON object, got list \(a.json\)"):
        records.from_json(Plan, "[]", where="a.json")
    with pytest.raises(StoreError, match=r"expected a JSON object, got list$"):
        records.from_json(Plan, "[]")


def test_what_json_cannot_say_is_never_written() -> None:
    with pytest.raises(StoreError, match="`crop_pct` is NaN or infinite, which JSON cannot hold"):
        records.to_json(Preprocessing(crop_pct=float("nan")))


def test_plain_records_and_digests() -> None:
    cat = ClassInfo(3, "cat")
    assert records.from_json(ClassInfo, records.to_json(cat)) == cat
    assert records.digest({"a": 1, "b": [2]}) == records.digest({"b": [2], "a": 1})
    assert records.digest(cat) != records.digest(ClassInfo(3, "dog"))
    # the definition itself: run folders of earlier versions are found again by it
    canonical = '{"a":1,"b":["é",0.5,null]}'.encode()
    assert records.digest({"b": ["é", 0.5, None], "a": 1}) == hashlib.sha256(canonical).hexdigest()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([[0]], "a plan keeps neurons in every block: 2 blocks, got 1 lists"),
        ([[0], []], "`keep[1]` must name at least one neuron, got none"),
        ([[0], [1, 1]], "`keep[1]` must be ascending without repeats"),
        ([[2, 0], [1]], "`keep[0]` must be ascending without repeats"),
        ([[-1, 0], [1]], "`keep[0]` must lie in 0..3, got -1"),
        ([[0], [1, 8]], "`keep[1]` must lie in 0..7, got 8"),
    ],
)
def test_a_wrong_plan_is_refused(keep: list[list[int]], message: str) -> None:
    with pytest.raises(StoreError) as caught:
        Plan(keep, [4, 8])
    assert caught.value.message == message
    data = records.to_dict(Plan([[0], [1]], [4, 8])) | {"keep": keep}
    with pytest.raises(StoreError) as caught:
        records.from_dict(Plan, data, where="plan.json")
    assert caught.value.message == f"{message} (plan.json)"


def test_what_a_plan_says() -> None:
    plan = Plan([[0, 3], [1]], [4, 8])
    assert plan.kept_widths == [2, 1]
    assert plan.kept_fraction == 0.25


def test_a_variant_is_found_by_name() -> None:
    result = _example(Result, True)
    assert result.variant("é < \n") is result.variants[0]
    assert result.variant("x") is None


def test_records_load_without_torch() -> None:
    code = "import sys, npprune.records; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PUBLISHED = Path(__file__).resolve().parents[1] / "docs" / "schema"


def _fields(schema: dict[str, Any]) -> dict[str, list[str]]:
    parts = {"": schema, **schema.get("$defs", {})}
    return {name: sorted(part.get("properties", {})) for name, part in parts.items()}


@pytest.mark.parametrize("cls", [Result, Plan, ExportRecord], ids=lambda c: c.kind)
def test_the_published_schemas_are_of_today(cls: type[Document]) -> None:
    published = json.loads((PUBLISHED / f"{cls.kind}.json").read_text())
    assert _fields(published) == _fields(json_schema(cls, cls.kind)), "run `python docs/schema.py`"


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("cls", [Result, Plan, ExportRecord], ids=lambda c: c.kind)
def test_documents_are_as_the_published_schemas_say(cls: type[Document], full: bool) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (the dev extra)")
    published = json.loads((PUBLISHED / f"{cls.kind}.json").read_text())
    data = json.loads(to_json(_example(cls, full)))
    jsonschema.validate(data, published)
    for wrong in ({**data, "schema_version": 99}, {**data, "kind": "letter"}, {**data, "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, published)
