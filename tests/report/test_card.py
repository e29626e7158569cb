"""The model card: metadata that parses, numbers of the record, a README of one's own left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from npprune.pipeline.common.results import update_variant
from npprune.records import CheckpointConfig, Preprocessing, Result
from npprune.report.card import is_card, render_card
from npprune.store.checkpoints import objection
from npprune.store.runs import RunFolder
from tests.helpers.report_example import result as example


def config_of(result: Result) -> CheckpointConfig:
    variant = result.variants[0]
    return CheckpointConfig(
        source=result.model.source, widths=variant.model.widths, heads=variant.model.heads,
        num_classes=1000, preprocessing=Preprocessing(), classes=[], weights_sha256="ab" * 32,
        run="..", prune=variant.prune,
    )  # fmt: skip


def test_its_head_is_metadata_and_its_numbers_are_the_records() -> None:
    result = example()
    variant, config = result.variants[0], config_of(result)
    assert variant.evaluation is not None
    evaluation = replace(
        variant.evaluation, data=replace(variant.evaluation.data, spec="folder:/home/me/val")
    )
    architecture = config.source.architecture
    hub = replace(config, details={"dense": {"name": architecture}})
    card = render_card(replace(variant, name='x"\n# y', evaluation=evaluation), hub)
    _, head, body = card.split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["license"] == "unknown"
    assert data["base_model"] == f"timm/{architecture}"
    (index,) = data["model-index"]
    (measured,) = index["results"]
    assert measured["dataset"]["name"] == "folder:val"
    assert measured["metrics"][0]["value"] == pytest.approx(evaluation.pruned.top1.value, abs=1e-6)
    assert "Licence: unknown" in body
    assert "/home/me" not in card
    assert "\n# y" not in body
    assert is_card(card)
    for dense in ({"name": architecture, "checkpoint": "w.safetensors"}, {"name": "ckpt/mine"}, {}):
        assert "base_model" not in render_card(variant, replace(config, details={"dense": dense}))


def test_it_is_written_beside_the_weights_and_a_readme_of_ones_own_stays(tmp_path: Path) -> None:
    result = example()
    config, name = config_of(result), result.variants[0].name
    RunFolder(tmp_path).write_result(result)
    folder = tmp_path / name
    folder.mkdir()
    args = (folder, config, result.variants[0].model, result.model, lambda variant: None)
    update_variant(*args)
    card = folder / "README.md"
    assert card.read_text() == render_card(result.variants[0], config)
    card.write_text("mine")
    update_variant(*args)
    assert card.read_text() == "mine"


def test_a_checkpoint_with_its_card_may_be_replaced_and_with_a_readme_of_ones_own_not(
    tmp_path: Path,
) -> None:
    from npprune.store import atomic

    result = example()
    config = config_of(result)
    atomic.write_json(tmp_path / "config.json", config)
    (tmp_path / "README.md").write_text(render_card(result.variants[0], config))
    assert objection(tmp_path) is None
    (tmp_path / "README.md").write_text("mine")
    assert objection(tmp_path) == "it also holds `README.md`, which npprune did not write"
