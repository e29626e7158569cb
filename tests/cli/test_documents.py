"""What `--json` prints is as the published schemas say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import npprune
from npprune.cli import app, documents, show
from npprune.cli.console import Output
from npprune.recipe import load_recipe
from npprune.records import to_dict
from tests.cli.test_show import _benchmark, _pruned
from tests.helpers import report_example as example
from tests.helpers.schemas import PUBLISHED, check
from tests.test_records import _fields

HERE = Path("ckpt/half")


def test_the_published_schemas_are_of_today() -> None:
    found = {path.stem: json.loads(path.read_text()) for path in PUBLISHED.glob("*.json")}
    assert found.keys() == documents.schemas().keys()
    for kind, schema in documents.schemas().items():
        assert _fields(found[kind]) == _fields(schema), "run `python docs/schema.py`"
        assert schema["properties"]["kind"] == {"const": kind}


def test_every_document_that_a_command_prints_has_a_schema() -> None:
    code = Path(npprune.__file__).parent / "cli"
    source = "".join(path.read_text(encoding="utf-8") for path in code.glob("*.py"))
    kinds = set(re.findall(r"\.document\(\s*\"(\w+)\"", source))
    kinds |= set(re.findall(r"\"kind\": \"(\w+)\"", source))
    assert len(kinds) == 14
    assert kinds == documents.schemas().keys() - {"plan"}


SHOWN: dict[str, Any] = {
    "result": lambda o: show.result(o, example.result(), Path(".")),
    "discovery": lambda o: show.discovery(o, example.result([]), HERE, dry_run=False),
    "variant": lambda o: _pruned(o),
    "evaluation": lambda o: show.evaluated(o, example.seen(example.evaluation()), HERE, None),
    "export": lambda o: show.exported(o, example.variant().export, HERE),
    "benchmark": lambda o: show.benchmark(o, _benchmark(), None),
    "environment": lambda _: app.run_app(["env", "--json"]),
    "recipe": lambda o: o.document("recipe", load_recipe("paper_vit_b16").model_dump(mode="json")),
}  # fmt: skip


@pytest.mark.parametrize("what", SHOWN)
def test_documents_on_stdout(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("jsonschema", reason="needs jsonschema (the dev extra)")
    SHOWN[what](Output(as_json=True))
    document = json.loads(capsys.readouterr().out)
    check(document["kind"], document)


def test_a_document_that_differs_is_found() -> None:
    pytest.importorskip("jsonschema", reason="needs jsonschema (the dev extra)")
    for wrong in ({"more": 1}, {"agreement": "high"}):
        with pytest.raises(AssertionError, match="evaluation: "):
            check("evaluation", {**to_dict(example.evaluation()), **wrong})
