"""Recipes: what is accepted, and the words of every refusal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from npprune.errors import RecipeError
from npprune.recipe import (
    DiscoverSection,
    ModelSection,
    PruneSection,
    Recipe,
    load_recipe,
    recipe_yaml,
    shipped_recipes,
)
from npprune.recipe.sections import StudySection
from npprune.recipe.settings import bounds

GOOD = """\
name: x
model:
  name: vit
data:
  train: folder:a
prune:
  keep: 0.5
"""


def _file(folder: Path, text: str) -> Path:
    path = folder / "x.yaml"
    path.write_text(text)
    return path


def _refused(folder: Path, text: str, *overrides: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_file(folder, text), list(overrides))
    return caught.value


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(_file(tmp_path, GOOD))
    assert recipe.name == "x"
    assert recipe.data.train == "folder:a"
    assert recipe.prune.keep == 0.5
    assert recipe.discover == DiscoverSection()


# ---------------------------------------------------------------- messages

MESSAGES = [  # the changed line of GOOD, the new text, the message without the file, the hint
    (
        "keep: 0.5",
        "keep: 1.5",
        "`prune.keep` must be in (0, 1], got `1.5`",
        7,
        "`0.5` keeps half of the hidden units",
    ),
    ("keep: 0.5", "keep: half", "`prune.keep` must be a number in (0, 1], got `half`", 7, None),
    ("keep: 0.5", "keep: .nan", "`prune.keep` must be in (0, 1], got `NaN`", 7, None),
    ("keep: 0.5", "keep: true", "`prune.keep` must be a number in (0, 1], got `true`", 7, None),
    ("keep: 0.5", "kepe: 0.5", "unknown key `prune.kepe`", 7, "did you mean `prune.keep`?"),
    (
        "keep: 0.5",
        "points: 5",
        "unknown key `prune.points`",
        7,
        "did you mean `discover.points`?",
    ),
    ("keep: 0.5", "topk: 0", "`prune.topk` must be at least 1, got `0`", 7, None),
    (
        "keep: 0.5",
        "topk: 1.5",
        "`prune.topk` must be a whole number at least 1, got `1.5`",
        7,
        None,
    ),
    (
        "keep: 0.5",
        "target_params: -1",
        "`prune.target_params` must be greater than 0, got `-1`",
        7,
        None,
    ),
    (
        "keep: 0.5",
        "compensation: least_squares",
        "`prune.compensation` must be one of `none`, `mean`, `least-squares`, `sequential`, "
        "got `least_squares`",
        7,
        "did you mean `least-squares`?",
    ),
    (
        "keep: 0.5",
        "protect_paths: maybe",
        "`prune.protect_paths` must be true or false, got `maybe`",
        7,
        None,
    ),
    (
        "  keep: 0.5",
        "  - 1",
        "`prune` must be a section (a mapping of keys), got `[1]`",
        6,
        None,
    ),
    (
        "keep: 0.5",
        "axes: [mlp, head]",
        "`prune.axes.1` must be one of `mlp`, `cls`, `heads`, `qk`, `head-dim`, `tokens`, got "
        "`head`",
        7,
        "did you mean `heads`?",
    ),
    ("name: x", "nam: x", "unknown key `nam`", 1, "did you mean `name`?"),
    (
        "name: x",
        "name: ../x",
        "`name` must be able to name a folder, got `../x`",
        1,
        "no `/`, and no `.` or blank in front",
    ),
    ("name: x", "name: 7", "`name` must be text, got `7`", 1, None),
    ("  name: vit", "  checkpoint: w", "`model.name` is missing", 2, None),
    ("name: x", "name: x\ndevice: gpu", "`device` must be one of `auto`, `cpu`", 2, None),
    ("name: x", "name: x\nseed: -1", "`seed` must be in [0, 4294967295], got `-1`", 2, None),
    (
        "train: folder:a",
        "classes: {a: 1}",
        "`data.classes` must be a list of indices, synsets or names, or a file's path",
        5,
        None,
    ),
    (
        "train: folder:a",
        "classes: [3, [4]]",
        "`data.classes` must be a list of indices, synsets or names, or a file's path, got "
        "`[3, [4]]`",
        5,
        None,
    ),
    ("train: folder:a", "mean: [a, 1, 2]", "`data.mean.0` must be a number, got `a`", 5, None),
    (
        "train: folder:a",
        "batch_size: true",
        "`data.batch_size` must be a number at least 1, got `true`",
        5,
        None,
    ),
    ("name: x", "name: x\nexport: no", "`export` must be a section", 2, None),
    ("name: x", "name: x\nexport: false", "`export` must be a section", 2, None),
    ("name: x", "name: x\nevaluate: {batches: [0]}", "`evaluate.batches.0` must be", 2, None),
]


@pytest.mark.parametrize(("old", "new", "message", "line", "hint"), MESSAGES)
def test_a_wrong_value_is_refused_with_its_place(
    tmp_path: Path, old: str, new: str, message: str, line: int, hint: str | None
) -> None:
    assert old in GOOD
    err = _refused(tmp_path, GOOD.replace(old, new, 1))
    assert err.message.startswith(message)
    assert err.message.endswith(f" ({tmp_path / 'x.yaml'}:{line})")
    if hint:
        assert err.hint == hint


def test_a_hopeless_key_gets_the_list(tmp_path: Path) -> None:
    err = _refused(tmp_path, GOOD + "zzzzzz: 1\n")
    assert (err.hint or "").startswith("known here: `name`, `model`, `data`")


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        (GOOD + "  keep: 0.6\n", "duplicate key `prune.keep`: it is already in line 7", 8),
        (GOOD + "name: y\n", "duplicate key `name`: it is already in line 1", 8),
        ("name: [x\n", "not valid YAML", 2),
        ("name: x\n\tmodel: y\n", "not valid YAML", 2),
        (GOOD + "---\nname: y\n", "not valid YAML: but found another document", 8),
        ("name: !!python/object:os.system x\n", "not valid YAML: could not determine", 1),
        ("name: *nobody\n", "not valid YAML: found undefined alias", 1),
        ("a: &a [*a]\n", "aliases must not contain themselves", 1),
        ("? [a, b]\n: 1\n", "a key must be text", 1),
        ("name: x\nmodel:\n  <<: 3\n", "`<<` must name a mapping", 3),
        ("- name\n", 'a recipe must be a mapping of sections, got `["name"]`', 1),
        ("", "a recipe must be a mapping of sections, got nothing", 1),
    ],
)
def test_wrong_yaml_is_refused_with_its_line(
    tmp_path: Path, text: str, message: str, line: int
) -> None:
    err = _refused(tmp_path, text)
    assert err.message.startswith(message)
    assert err.message.endswith(f"x.yaml:{line})")


def test_aliases_that_grow_without_bound_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 2]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    assert "grow without bound" in _refused(tmp_path, "\n".join(lines)).message


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    assert "nested too deeply" in _refused(tmp_path, "a: " + "[" * 5000).message


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"name: \x00\n")
    with pytest.raises(RecipeError, match="not valid YAML: special characters"):
        load_recipe(tmp_path / "x.yaml")


@pytest.mark.parametrize("other", ["target_params", "target_macs", "target_latency"])
def test_two_budgets_contradict_each_other(tmp_path: Path, other: str) -> None:
    err = _refused(tmp_path, GOOD + f"  {other}: 0.7\n")
    assert err.message == (
        "a budget is one of `prune.keep`, `prune.target_params`, `prune.target_macs` and "
        f"`prune.target_latency`, got `prune.keep` and `prune.{other}` ({tmp_path / 'x.yaml'}:8)"
    )
    assert f"`prune.{other}` (--set" in _refused(tmp_path, GOOD, f"prune.{other}=0.7").message
    recipe = load_recipe(_file(tmp_path, GOOD + "  target_macs: 0.7\n"), ["prune.keep=null"])
    assert (recipe.prune.keep, recipe.prune.target_macs) == (None, 0.7)


# ---------------------------------------------------------------- YAML


def test_scalars_are_what_they_look_like(tmp_path: Path) -> None:
    text = GOOD.replace("keep: 0.5", "keep: 1e-3").replace("name: vit", "name: on")
    recipe = load_recipe(_file(tmp_path, text), ["data.classes=[no, 010, 1:30, n01440764, 7]"])
    assert recipe.prune.keep == 0.001
    assert recipe.model.name == "on"
    assert recipe.data.classes == ["no", "010", "1:30", "n01440764", 7]
    recipe = load_recipe(_file(tmp_path, text), ["prune.protect_paths=no", "name=2024-01-01"])
    assert recipe.prune.protect_paths is False
    assert recipe.name == "2024-01-01"


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "0.001", "1.0e-3", ".001", "+1e-3", "100e-5"])
def test_numbers_in_every_spelling(tmp_path: Path, number: str) -> None:
    assert load_recipe(_file(tmp_path, GOOD), [f"prune.keep={number}"]).prune.keep == 0.001


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = (
        "name: x\nmodel: {name: vit}\n"
        "data: &d\n  train: &t folder:a\n  val: *t\n  batch_size: 8\n"
        "discover: {<<: {topk: 3, points: 7}, topk: 2}\n"
    )
    recipe = load_recipe(_file(tmp_path, text))
    assert recipe.data.val == "folder:a"
    assert recipe.discover == DiscoverSection(topk=2, points=7)
    late = "discover:\n  topk: 0\n  <<: {topk: 3}\n"
    err = _refused(tmp_path, GOOD + late)
    assert err.message == f"`discover.topk` must be at least 1, got `0` ({tmp_path / 'x.yaml'}:9)"
    err = _refused(tmp_path, text.replace("points: 7", "points: 0"))
    assert err.message == (
        f"`discover.points` must be in [1, 256], got `0` ({tmp_path / 'x.yaml'}:7)"
    )


# ---------------------------------------------------------------- --set


def test_overrides(tmp_path: Path) -> None:
    path = _file(tmp_path, GOOD + "discover: null\n")
    assert load_recipe(path).discover is None
    recipe = load_recipe(
        path,
        [
            "prune.keep=0.25",
            "discover.topk=5",
            "data.train=folder:/a b/c=d",
            "evaluate.batches=[1]",
        ],
    )
    assert recipe.prune.keep == 0.25
    assert recipe.discover == DiscoverSection(topk=5)
    assert recipe.data.train == "folder:/a b/c=d"
    assert recipe.evaluate.batches == [1]
    assert load_recipe(path, ["data.train="]).data.train is None
    assert load_recipe(path, ["prune={topk: 3}", "discover={}"]).prune == PruneSection(topk=3)
    assert load_recipe(path, ["prune.keep=0.1", "prune.keep=0.2"]).prune.keep == 0.2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.keep=1.5", "`prune.keep` must be in (0, 1], got `1.5` (--set prune.keep=1.5)"),
        ("prune={keep: 2}", "`prune.keep` must be in (0, 1], got `2` (--set prune={keep: 2})"),
        ("prune.kepe=1", "unknown key `prune.kepe` (--set prune.kepe=1)"),
        ("prun.keep=1", "unknown key `prun` (--set prun.keep=1)"),
        ("name.first=x", "`name` is a value, not a section (--set name.first=x)"),
        ("prune.keep", "`--set` must be KEY=VALUE, got `prune.keep`"),
        ("=1", "`--set` must be KEY=VALUE, got `=1`"),
        ("prune..keep=1", "`--set` must be KEY=VALUE, got `prune..keep=1`"),
        ("data.train=[a", "not valid YAML: "),
        ("model={}", "`model.name` is missing (--set model={})"),
    ],
)
def test_a_wrong_override_says_so(tmp_path: Path, override: str, message: str) -> None:
    err = _refused(tmp_path, GOOD, override)
    assert err.message.startswith(message)
    assert "--set" in err.message


def test_an_override_does_not_hide_the_line_of_its_neighbours(tmp_path: Path) -> None:
    err = _refused(tmp_path, GOOD.replace("keep: 0.5", "keep: 5"), "prune.topk=1")
    assert err.message.endswith("x.yaml:7)")


# ---------------------------------------------------------------- round trip, shipped recipes


def test_yaml_of_a_recipe_gives_it_back(tmp_path: Path) -> None:
    recipe = Recipe(
        name="no",
        model=ModelSection(name="1e-3", checkpoint="a: b #c", img_size=96),
        discover=None,
        seed=3,
    )
    recipe.data.classes = ["yes", "010", 3, "0x1F", "~", "1:30", "1_0", "é", "=", "2024-01-01"]
    recipe.data.mean = [0.485, 1e-7, 1.0]
    recipe.prune.target_macs = 1e9
    text = recipe_yaml(recipe)
    assert load_recipe(_file(tmp_path, text)) == recipe
    assert recipe_yaml(load_recipe(_file(tmp_path, text))) == text
    plain = yaml.safe_load(text)  # other readers agree about the texts
    assert plain["name"] == "no"
    assert plain["model"]["name"] == "1e-3"
    assert plain["data"]["classes"] == recipe.data.classes


@pytest.mark.parametrize("said", ["[192, 256]", "192x256", '"192,256"'])
def test_an_image_size_may_have_two_sides(said: str, tmp_path: Path) -> None:
    recipe = load_recipe(_file(tmp_path, GOOD), [f"model.img_size={said}"])
    assert recipe.model.img_size == [192, 256]
    assert load_recipe(_file(tmp_path, recipe_yaml(recipe))) == recipe
    for wrong in ("[192]", "0", "192x", "[1, 2, 3]", "true", "[8, 0]"):
        with pytest.raises(RecipeError, match=r"`model\.img_size` must be one side or"):
            load_recipe(_file(tmp_path, GOOD), [f"model.img_size={wrong}"])


def test_every_shipped_recipe_loads() -> None:
    shipped = shipped_recipes()
    folder = Path(__file__).resolve().parents[2] / "recipes"
    seen = 0
    for name, path in shipped.items():
        recipe = load_recipe(name)
        assert recipe == load_recipe(path)
        assert recipe.name == name == path.stem
        header = path.read_text().split(f"\nname: {name}\n")[0]
        for word in ("# command:  npprune", "# time: ", "# expect: "):
            assert word in header, f"{path} lacks `{word}`"
        assert all(line.startswith("#") for line in header.strip().splitlines())
        seen += 1
    assert seen == len(list(folder.glob("*.yaml"))) >= 4
    assert {"demo", "vit_tiny_imagenet", "deit_small_imagenet", "vit_base_paper"} <= set(shipped)


def test_the_paper_recipe_has_the_papers_setting() -> None:
    recipe = load_recipe("vit_base_paper")
    assert recipe.discover is not None
    assert (recipe.discover.quadrature, recipe.discover.points) == ("left-riemann", 20)
    assert recipe.data.images_per_class == 50
    assert recipe.prune.topk is not None


def test_a_missing_file_gets_the_nearest_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("vit_tiny_imagnet", "recipes/vit_tiny_imagenet.yml"):
        with pytest.raises(RecipeError, match=r"no recipe at `.*vit_tiny") as caught:
            load_recipe(name)
        assert caught.value.hint == "did you mean the shipped recipe `vit_tiny_imagenet`?"
    with pytest.raises(RecipeError) as caught:
        load_recipe("zzz")
    assert "one of the shipped recipes: `deit_small_imagenet`, `demo`" in (caught.value.hint or "")
    with pytest.raises(RecipeError, match="got the folder"):
        load_recipe(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder does not hide a shipped recipe, a file does
    assert load_recipe("demo").name == "demo"
    (tmp_path / "vit_base_paper").write_text(GOOD)
    assert load_recipe("vit_base_paper").name == "x"


def test_bounds_in_words() -> None:
    fields = PruneSection.model_fields
    assert bounds(fields["keep"]) == "in (0, 1]"
    assert bounds(fields["round_to"]) == "at least 1"
    assert bounds(fields["target_macs"]) == "greater than 0"
    assert bounds(fields["criterion"]) == ""
    assert bounds(StudySection.model_fields["keep"], item=True) == "in (0, 1]"


# ---------------------------------------------------------------- words and contradictions


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("criterion: varience", "`prune.criterion` must be one of `random`, ", "variance"),
        ("selection: mesured", "`prune.selection` must be one of `uniform`, ", "measured"),
        ("compensation: sequental", "`prune.compensation` must be one of `none`, ", "sequential"),
        ("target_params: .inf", "`prune.target_params` must be a finite number greater", None),
        ("shrinkage: .nan", "`prune.shrinkage` must be a finite number greater than 0", None),
        (
            "axes: [mlp, qk]",
            "`prune.keep` is a share of the hidden units, and with `prune",
            None,
        ),
        ("max_drop: 101", "`prune.max_drop` must be in (0, 100], got `101`", None),
    ],
)
def test_what_would_fail_after_minutes_is_refused_at_once(
    tmp_path: Path, line: str, message: str, hint: str | None
) -> None:
    name, _, value = line.partition(": ")
    for err in (
        _refused(tmp_path, GOOD + f"  {line}\n"),
        _refused(tmp_path, GOOD, f"prune.{name}={value}"),
    ):
        assert err.message.startswith(message)
        assert err.message.endswith((".yaml:8)", ".yaml:7)", f"(--set prune.{name}={value})"))
        assert hint is None or err.hint == f"did you mean `{hint}`?"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("heal: {lr: 1e-4}", "one of `heal.epochs` and `heal.minutes` says how long, got none"),
        ("heal: {epochs: 1, minutes: 1}", "one of `heal.epochs` and `heal.minutes` says how long"),
        ("heal: {minutes: .inf}", "`heal.minutes` must be a finite number greater than 0"),
        ("heal: {minutes: 1, layerwise: true}", "`heal.layerwise` needs `heal.epochs`"),
        ("heal: {epochs: 1, precision: fp16}", "`heal.precision` must be one of `fp32`, `bf16`"),
        (
            "export: {format: timm, precision: int8}",
            "`export.precision: int8` does not go with",
        ),
        ("export: {precision: int4}", "`export.precision` must be one of `fp32`, `fp16`, `int8`"),
        ("discover: {precision: fp16}", "`discover.precision` must be one of `fp32`, `tf32`"),
        ("discover: {method: activations}", "`discover.method` must be one of `neuron-path`"),
        ("device: cuda:x", "`device` must be one of `auto`"),
    ],
)
def test_contradictions_of_other_sections(tmp_path: Path, section: str, message: str) -> None:
    err = _refused(tmp_path, GOOD + section + "\n")
    assert err.message.startswith(message)
    assert err.message.endswith(":8)")


@pytest.mark.parametrize("line", ["topk: 2", "criterion: path-votes"])
def test_what_reads_paths_needs_discovery(tmp_path: Path, line: str) -> None:
    err = _refused(tmp_path, GOOD + f"  {line}\ndiscover: null\n")
    assert err.message.startswith(f"`prune.{line}` reads paths, and `discover` is null (")
    load_recipe(_file(tmp_path, GOOD + f"  {line}\n"))


def test_a_standard_deviation_is_positive(tmp_path: Path) -> None:
    err = _refused(tmp_path, GOOD.replace("train: folder:a", "std: [0.5, 0, 0.5]"))
    assert err.message.startswith("`data.std.1` must be greater than 0, got `0`")


def test_recipes_load_without_torch() -> None:
    code = (
        "import sys; from npprune.recipe import load_recipe; load_recipe('demo');"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
