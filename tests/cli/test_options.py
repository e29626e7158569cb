"""Options and recipes say the same of a setting, for both are made of its field."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from npprune.cli import app, demo, discover, evaluate, explore, export, heal, prune, study
from npprune.criteria import CRITERIA
from npprune.errors import RecipeError
from npprune.recipe import DataSection, ModelSection, PruneSection, Recipe, load_recipe
from npprune.recipe.sections import EditSection, Section, StudySection
from npprune.recipe.settings import item_of, told, words_of

SECTIONS: list[type[Section]] = [Recipe, *Section.__subclasses__()]
SECTIONS = list(dict.fromkeys(SECTIONS))
FIELDS = [
    (section, name)
    for section in SECTIONS
    for name, field in section.model_fields.items()
    if "Section" not in str(field.annotation)
]
WORDS = [(s, n) for s, n in FIELDS if words_of(s.model_fields[n])]
NAMED = {
    setting: flag
    for module in (discover, prune, heal, evaluate, explore, export, study, demo)
    for setting, flag in module.command.named.items()  # type: ignore[attr-defined]
}
RECIPE_ONLY = {"name", "discover.batch_size", "discover.images_per_class"}
"""The folder; discover's --batch-size sets both; `specialise` has it as --path-images."""
COMMANDS = {
    "model": ["discover", "x", "--data", "digits"],
    "data": ["discover", "x", "--data", "digits"],
    "discover": ["discover", "x", "--data", "digits"],
    "prune": ["prune", "x", "--out", "o"],
    "heal": ["heal", "x", "--data", "digits", "--out", "o", "--epochs", "1"],
    "edit": ["eval", "x", "--edit", "keep"],
    "explore": ["explore", "x"],
    "export": ["export", "x"],
    "study": ["study", "x", "--val", "digits", "--out", "o"],
}


def test_every_setting_is_told_in_the_help() -> None:
    assert len(FIELDS) > 80
    assert [s.key(n) for s, n in FIELDS if not told(s.model_fields[n]).help] == []


def test_every_setting_is_an_option_or_only_in_recipes() -> None:
    assert {s.key(n) for s, n in FIELDS} - set(NAMED) == RECIPE_ONLY
    for section, name in FIELDS:
        if section.key(name) not in RECIPE_ONLY | {"model.name"}:
            assert told(section.model_fields[name]).panel, section.key(name)


@pytest.mark.parametrize(("section", "name"), WORDS, ids=lambda p: getattr(p, "__name__", p))
def test_a_misspelt_word_is_refused_with_the_nearest(
    section: type[Section], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a recipe with its line, by `--set`, and at the shell."""
    field, key = section.model_fields[name], section.key(name)
    right = words_of(field)[-1]
    wrong = f"{right}q"
    hint = f"did you mean `{right}`?"
    top, _, inner = key.partition(".")
    if top in Recipe.model_fields:
        path = tmp_path / "x.yaml"
        start = "name: x\nmodel: {name: vit}\n"
        value = f"[{wrong}]" if item_of(field) is not None else wrong
        place = f"{key}.0" if item_of(field) is not None else key
        before = "name: x\n" if top == "model" else start
        first = "  name: vit\n" if top == "model" else ""
        path.write_text(f"{before}{top}:\n{first}  {inner}: {value}\n")
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert caught.value.message.startswith(f"`{place}` must be one of `")
        assert caught.value.message.endswith(f"got `{wrong}` ({path}:4)")
        assert caught.value.hint == hint
        path.write_text(start)
        with pytest.raises(RecipeError) as caught:
            load_recipe(path, [f"{key}={value}"])
        assert caught.value.message.endswith(f"got `{wrong}` (--set {key}={value})")
        assert caught.value.hint == hint
    flag = NAMED[key]
    assert app.run_app([*COMMANDS[top], flag, wrong]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: `{flag}` must be one of `")
    assert err.endswith(f"got `{wrong}`\nhint: {hint}\n")


@pytest.mark.parametrize(
    "verb", ["discover", "prune", "study", "heal", "explore", "export", "eval"]
)
def test_the_help_names_every_word(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run_app([verb, "--help"]) == 0
    shown = capsys.readouterr().out.replace("\n", " ")
    for section, name in WORDS:
        if COMMANDS[section.key(name).split(".")[0]][0] == verb:
            missing = [word for word in words_of(section.model_fields[name]) if word not in shown]
            assert missing == [], section.key(name)


def test_a_registered_word_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA, "mine", replace(CRITERIA["variance"], name="mine"))
    assert PruneSection(criterion="mine").criterion == "mine"
    assert StudySection(criteria=["mine"]).criteria == ["mine"]
    assert words_of(StudySection.model_fields["criteria"])[-1] == "mine"


def test_what_was_not_given_stays_unset() -> None:
    from npprune.cli import flags

    given = dict.fromkeys(DataSection.model_fields) | {"no_crop": None, "mean": "0.5,0.5"}
    images = flags.data_section(given)
    assert images.mean == [0.5, 0.5]
    assert images.model_fields_set == {"mean"}
    edit = flags.section(EditSection, topk="1, 5", paths="class,class", fraction=None)
    assert (edit.topk, edit.paths) == ([1, 5], ["class"])
    assert flags.section(ModelSection, name="x", img_size="96").img_size == 96
