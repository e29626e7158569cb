"""The paper's experiments on a small network and small images: numbers against direct ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import npprune
from npprune.cli import app
from npprune.core.attribution.editing import edited_logits, members, path_factors
from npprune.core.attribution.votes import class_top
from npprune.core.metrics import true_probability
from npprune.errors import DataError, UsageError
from npprune.models.surgery import apply_plan
from npprune.models.view import make_view
from npprune.pipeline.analyze.editing import edit_neurons
from npprune.pipeline.analyze.editing_tables import relative_change
from npprune.pipeline.analyze.stage import analyze_paths, analyze_scores, analyze_similarity
from npprune.pipeline.common.events import Event
from npprune.pipeline.common.inputs import open_images, open_network
from npprune.pipeline.common.results import render_report
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.finished import divide, open_finished
from npprune.pipeline.discover.stage import discover
from npprune.pipeline.run import run_recipe
from npprune.recipe import DataSection, DiscoverSection, ModelSection, Recipe, load_recipe
from npprune.recipe.sections import EditSection
from npprune.records import Analysis, Plan
from npprune.store.runs import RunFolder
from tests.helpers.digits_network import random_digits_network

IMAGES = {"ant": 7, "bee": 1, "cat": 4, "dog": 4}


def pictures(folder: Path, counts: dict[str, int], seed: int) -> Path:
    """A folder of random 8-bit images, brighter from class to class."""
    rng = np.random.default_rng(seed)
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 120, (8, 8, 3)) + 40 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    dense = random_digits_network(root / "dense")
    pictures(root / "images", IMAGES, 0)
    discover(
        ModelSection(name=str(dense)),
        DataSection(train=f"folder:{root / 'images'}", batch_size=5),
        DiscoverSection(topk=3, points=2),
        root / "run",
    )
    return root


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, to change at will."""
    return Path(shutil.copytree(world / "run", tmp_path / "run"))


def column(analysis: Analysis, name: str) -> list[object]:
    return [row[analysis.columns.index(name)] for row in analysis.rows]


def loaded(run: Path):
    """Model, view, images, labels and table of a run, in its order."""
    found = open_finished(run)
    network = open_network(found.recipe.model, Work("cpu"))
    source = open_images(
        found.recipe.data.train, found.recipe.data, network.info, Work("cpu"),
        asked="data.train", on_bad="error",
    )  # fmt: skip
    batches = list(source.batches())
    x = torch.cat([b.images for b in batches])
    y = torch.cat([b.labels for b in batches])
    return network.model, make_view(network.model), x, y, found.table


@pytest.mark.parametrize(("edit", "factor"), [("remove", 0.0), ("enhance", 3.0)])
def test_own_paths_at_their_images(run: Path, edit: str, factor: float) -> None:
    settings = EditSection(edit=edit, factor=factor if factor else 2.0, topk=[2])
    (key, analysis), = edit_neurons(run, settings).items()  # fmt: skip
    assert key == f"edit-{edit}-image-cls"
    model, view, x, y, table = loaded(run)
    with torch.no_grad():
        before = model(x)
    after = []
    for image, path in zip(x, table.neurons, strict=True):
        scales = [torch.ones(1, h) for h in view.widths]
        for l, units in enumerate(path[:, :2].tolist()):
            scales[l][0, units] = factor
        after.append(edited_logits(view, image[None], scales, scope="cls")[0])
    p, q = true_probability(before, y), true_probability(torch.stack(after), y)
    deviation = 100 * (q - p) / p
    assert column(analysis, "probability dev. %")[1] == pytest.approx(float(deviation.mean()))
    assert column(analysis, "its median %")[1] == pytest.approx(float(deviation.median()))
    top1 = 100 * float((torch.stack(after).argmax(1) == y).double().mean())
    assert column(analysis, "top-1 %")[1] == pytest.approx(top1)
    assert column(analysis, "top-1 %")[0] == pytest.approx(
        100 * float((before.argmax(1) == y).double().mean())
    )
    stored = RunFolder(run).read_result().analyses
    assert stored[key] == analysis
    assert analysis.figure is not None
    assert analysis.figure.kind == "box"


def test_a_class_is_never_measured_on_the_images_that_chose_its_neurons(run: Path) -> None:
    table = open_finished(run).table
    take, hold, alone = divide(table)
    assert not set(take.tolist()) & set(hold.tolist())
    assert len(take) + len(hold) == len(table) == 16
    for label, count in enumerate(IMAGES.values()):
        assert int((table.labels[take] == label).sum()) == math.ceil(count / 2)
    assert alone == [1]
    assert all((a == b).all() for a, b in zip(divide(table)[:2], (take, hold), strict=True))

    settings = EditSection(edit="keep", paths=["class"], topk=[5])
    (analysis,) = edit_neurons(run, settings).values()
    assert "Classes with one image have none to evaluate on: bee." in analysis.text
    _, view, x, y, _ = loaded(run)
    hits, kept = [], []
    for row in hold:
        c = int(y[row])
        path = class_top(table.neurons[take], table.labels[take], c, 5)
        factors = path_factors(members(path, view.widths), "keep")
        logits = edited_logits(view, x[row][None], factors, scope="cls")
        hits.append(float(logits.argmax() == c))
    for c in range(4):
        kept += [len(b) for b in class_top(table.neurons[take], table.labels[take], c, 5)]
    assert column(analysis, "top-1 %")[1] == pytest.approx(100 * np.mean(hits))
    assert column(analysis, "kept")[1] == pytest.approx(np.mean(kept))


def test_all_tokens_cost_what_removal_leaves(run: Path) -> None:
    settings = EditSection(edit="keep", paths=["union", "class"], topk=[2], scope=["cls", "all"])
    (analysis,) = edit_neurons(run, settings).values()
    model, view, x, y, table = loaded(run)
    take, hold, _ = divide(table)
    voting = (table.neurons[take], table.labels[take])
    paths = [class_top(*voting, c, 2) for c in range(4)]
    union = [sorted({j for p in paths for j in p[l]}) for l in range(len(view.widths))]
    smaller = apply_plan(model, Plan(keep=union, widths=list(view.widths)))
    with torch.no_grad():
        right = smaller(x[hold]).argmax(1) == y[hold]
    rows = {(row[1], row[2]): row for row in analysis.rows[1:]}
    found = rows["union", "all tokens"]
    size, left = (sum(p.numel() for p in m.parameters()) for m in (model, smaller))
    top1 = 100 * float(right.double().mean())
    assert found[analysis.columns.index("top-1 %")] == pytest.approx(top1)
    assert found[analysis.columns.index("parameters %")] == pytest.approx(100 * left / size)
    one = [apply_plan(model, Plan(keep=p, widths=list(view.widths))) for p in
           ([sorted(b) for b in path] for path in paths)]  # fmt: skip
    mean = np.mean([sum(p.numel() for p in m.parameters()) for m in one])
    assert rows["class", "all tokens"][analysis.columns.index("parameters %")] == pytest.approx(
        100 * mean / size
    )
    assert rows["union", "class token"][analysis.columns.index("parameters %")] is None


def test_the_predicted_class_chooses_without_the_label(run: Path) -> None:
    settings = EditSection(edit="keep", paths=["class", "predicted"], topk=[3])
    (analysis,) = edit_neurons(run, settings).values()
    model, view, x, y, table = loaded(run)
    take, hold, _ = divide(table)
    with torch.no_grad():
        guess = model(x[hold])[:, :4].argmax(1)
    hits = []
    for row, c in zip(hold, guess.tolist(), strict=True):
        path = class_top(table.neurons[take], table.labels[take], c, 3)
        factors = path_factors(members(path, view.widths), "keep")
        hits.append(
            float(edited_logits(view, x[row][None], factors, scope="cls").argmax() == y[row])
        )
    rows = {row[1]: row for row in analysis.rows[1:]}
    place = analysis.columns.index("top-1 %")
    assert rows["predicted"][place] == pytest.approx(100 * np.mean(hits))
    assert set(rows) == {"class", "predicted"}


def test_shares_depths_and_seeds(run: Path) -> None:
    grid = EditSection(
        edit="keep", paths=["class"], topk=[1, 3], fraction=[0.5, 1.0], depth=[1, 2], seeds=2
    )
    (analysis,) = edit_neurons(run, grid, name="grid").values()
    assert len(analysis.rows) == 1 + 2 * 2 * 2
    assert analysis.columns[:4] == ["paths by", "K", "p %", "blocks"]
    assert analysis.figure is not None
    assert analysis.figure.kind == "bars"
    assert [s.name for s in analysis.figure.series] == [
        "p = 50 %, 1 block", "p = 50 %, 2 blocks", "p = 100 %, 1 block", "p = 100 %, 2 blocks",
    ]  # fmt: skip
    again = edit_neurons(run, grid, name="grid")["grid"]
    assert again.rows == analysis.rows
    one = edit_neurons(run, grid.model_copy(update={"seeds": 1}), name="one")["one"]
    p = [row[2] for row in analysis.rows]
    same = [a == b for a, b in zip(analysis.rows, one.rows, strict=True)]
    assert all(s for s, share in zip(same, p, strict=True) if share == 100)
    assert not all(s for s, share in zip(same, p, strict=True) if share == 50)


def test_other_images_and_other_methods(run: Path, world: Path, tmp_path: Path) -> None:
    other = pictures(tmp_path / "other", {"ant": 3, "bee": 3, "cat": 2, "dog": 2, "elk": 2}, 1)
    shutil.copy(world / "images" / "ant" / "2.png", other / "ant" / "2.png")
    settings = EditSection(
        edit="remove", paths=["class", "image"], methods=["neuron-path", "activation", "random"]
    )
    data = DataSection(val=f"folder:{other}")
    (analysis,) = edit_neurons(run, settings, data).values()
    assert [row[:2] for row in analysis.rows[1:]] == [
        [m, p] for m in ("neuron-path", "activation", "random") for p in ("class", "image")
    ]
    # ant/2.png is an image of the run, and the run has no paths of elks
    assert "3 images left out" in analysis.text
    assert len(list((run / "methods").glob("*/manifest.json"))) == 2
    assert len(list((run / "methods").glob("*/*/manifest.json"))) == 3


def test_other_images_are_prepared_as_the_runs_own(world: Path, tmp_path: Path) -> None:
    """The same pictures under other names give the same numbers, whatever the preparation."""
    discover(
        ModelSection(name=str(world / "dense")),
        DataSection(train=f"folder:{world / 'images'}", preprocessing="released"),
        DiscoverSection(points=2),
        tmp_path / "run",
    )
    manifest = RunFolder(tmp_path / "run").read_manifest()
    assert manifest.settings["preprocessing"]["crop_mode"] == "squash"
    assert manifest.settings["preprocessing"]["interpolation"] == "bilinear"
    other = tmp_path / "other"
    for path in (world / "images").glob("*/*.png"):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, other / path.parent.name / f"copy-{path.name}")
    (own,) = edit_neurons(tmp_path / "run", EditSection()).values()
    (copies,) = edit_neurons(
        tmp_path / "run", EditSection(), DataSection(val=f"folder:{other}")
    ).values()
    assert own.rows == copies.rows


def test_nothing_left_to_evaluate_on(run: Path, world: Path) -> None:
    data = DataSection(val=f"folder:{world / 'images'}")
    with pytest.raises(DataError, match="no image is left to evaluate on"):
        edit_neurons(run, EditSection(paths=["class"]), data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": [4]}, "`topk` must be at most 3, the neurons per block in this run's paths"),
        ({"topk": [4000], "paths": ["class"]}, "the hidden units of the narrowest block"),
        ({"depth": [3]}, "`depth` must be at most 2, the blocks, got 3"),
        ({"fraction": [0.5]}, "only `edit=keep` removes, got `edit=remove`"),
    ],
)
def test_what_cannot_be_edited_is_refused(run: Path, change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        edit_neurons(run, EditSection(**change))


def test_accuracy_deviation_has_the_ratios_interval() -> None:
    g = torch.Generator().manual_seed(0)
    before = (torch.rand(4000, generator=g) < 0.8).double()
    after = before * (torch.rand(4000, generator=g) < 0.5).double()
    found = relative_change(before, after)
    assert found is not None
    assert found.value == pytest.approx(float(after.mean() / before.mean()) - 1)
    draws = torch.randint(0, 4000, (2000, 4000), generator=g)
    spread = (after[draws].mean(1) / before[draws].mean(1) - 1).std()
    assert found.standard_error == pytest.approx(float(spread), rel=0.1)
    assert relative_change(torch.zeros(3), torch.ones(3)) is None


# ---------------------------------------------------------------- analyses


def test_scores_of_all_methods_on_the_same_images(run: Path) -> None:
    (analysis,) = analyze_scores(run, ["neuron-path", "activation", "random"]).values()
    found = open_finished(run)
    assert column(analysis, "mean")[0] == pytest.approx(found.table.scores.mean())
    model, _, x, y, _ = loaded(run)
    paths = npprune.discover_paths(model, x, y, topk=3, points=2, method="activation")
    assert column(analysis, "mean")[1] == pytest.approx(float(paths.scores.double().mean()))
    gap = found.table.scores - paths.scores.double().numpy()
    assert column(analysis, "neuron-path minus it")[1] == pytest.approx(gap.mean())
    assert column(analysis, "neuron-path higher, % of images")[1] == pytest.approx(
        100 * (gap > 0).mean()
    )
    stamp = (run / "methods" / "random" / "manifest.json").stat().st_mtime_ns
    analyze_scores(run, ["random"])
    assert (run / "methods" / "random" / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(UsageError, match="got `magic`"):
        analyze_scores(run, ["magic"])


def test_similarity_with_a_hierarchy(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "h.tsv"
    file.write_text("ant\tinsect\nbee\tinsect\ncat\tmammal\ndog\tmammal\n"
                    "insect\tanimal\nmammal\tanimal\n")  # fmt: skip
    found = analyze_similarity(run, hierarchy=file, permutations=23)
    heat = found["similarity"].figure
    assert heat is not None
    assert sorted(heat.x_names or []) == ["ant", "bee", "cat", "dog"]
    assert heat.x_names == heat.y_names
    rows = found["similarity-hierarchy"].rows
    assert [row[0] for row in rows] == ["cosine", "rank overlap"]
    assert all(1 / 24 <= row[3] <= 1 for row in rows)  # type: ignore[operator]
    assert len(found["similarity-pairs"].rows) == 6
    curves = found["consistency"].figure
    assert curves is not None
    assert [s.name for s in curves.series] == ["same class", "different classes", "by chance"]
    file.write_text("ant\tinsect\nbee\tinsect\ncat\tmammal\n")
    with pytest.raises(DataError, match="holds none of `dog`"):
        analyze_similarity(run, hierarchy=file)


def test_similarity_without_a_hierarchy_says_so(run: Path) -> None:
    said: list[Event] = []
    found = analyze_similarity(run, ["ant", "cat", 3], work=Work(emit=said.append))
    assert "is no ImageNet-1k synset" in found["similarity-hierarchy"].text
    assert any("--hierarchy FILE" in e.message and e.level == "warning" for e in said)
    with pytest.raises(UsageError, match="at least two classes, got 1"):
        analyze_similarity(run, ["ant"])
    with pytest.raises(UsageError, match="has no paths of class `eel`"):
        analyze_similarity(run, ["ant", "eel"])


def test_pictures_name_followers_and_leavers(run: Path) -> None:
    table = open_finished(run).table
    (key, analysis), = analyze_paths(run, ["ant"]).items()  # fmt: skip
    assert key == "paths-0"
    figure = analysis.figure
    assert figure is not None
    assert figure.kind == "strips"
    own = table.neurons[table.labels == 0]
    for l, (cells, shares) in enumerate(zip(figure.cells or [], figure.matrix or [], strict=True)):
        counts = np.bincount(own[:, l].reshape(-1))
        assert counts[int(cells[0])] == counts.max()
        assert shares[0] == pytest.approx(100 * counts.max() / 21)
    preferred = [int(cells[0]) for cells in figure.cells or []]
    held = {
        str(id): sum(n in path[l] for l, n in enumerate(preferred))
        for id, path in zip(table.ids[table.labels == 0], own, strict=True)
    }
    for _, id, blocks, _ in analysis.rows:
        assert held[str(id)] == blocks
    groups = {w: [row for row in analysis.rows if row[0] == w] for w in ("follows", "leaves")}
    assert [row[2] for row in groups["follows"]] == sorted(held.values(), reverse=True)[:5]
    assert all(row[2] < len(preferred) for row in groups["leaves"])  # type: ignore[operator]
    assert not {row[1] for row in groups["follows"]} & {row[1] for row in groups["leaves"]}
    assert list(analyze_paths(run)) == ["paths"]
    assert list(analyze_paths(run, every=True)) == ["paths-0", "paths-1", "paths-2", "paths-3"]


# ---------------------------------------------------------------- command line and report


def test_a_recipe_may_end_with_the_paths(world: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        name="paths_only",
        model=ModelSection(name=str(world / "dense")),
        data=DataSection(train=f"folder:{world / 'images'}"),
        discover=DiscoverSection(points=1),
        prune=None,
    )
    result = run_recipe(recipe, root=tmp_path)
    assert result.discovery is not None
    assert result.variants == []
    assert (tmp_path / "reports" / "paths_only" / "report.html").is_file()
    assert not (tmp_path / "ckpt").exists()
    with pytest.raises(UsageError, match="needs `discover` or `prune`"):
        run_recipe(recipe.model_copy(update={"discover": None}), root=tmp_path)


def test_the_papers_recipes_end_with_the_paths() -> None:
    for name, scope in (("vit_b16", "cls"), ("vit_b32", "cls"), ("vit_l32", "cls"),
                        ("mae_b16", "patch")):  # fmt: skip
        recipe = load_recipe(f"paper_{name}", ["data.preprocessing=released"])
        assert recipe.prune is None
        assert recipe.discover is not None
        assert (recipe.discover.points, recipe.discover.quadrature) == (20, "left-riemann")
        assert recipe.discover.scope == scope
        assert recipe.data.images_per_class == 50


@pytest.fixture
def reported(run: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    yield run
    html, _ = render_report(run)
    text = html.read_text()
    assert "<svg" in text
    for key, analysis in RunFolder(run).read_result().analyses.items():
        assert analysis.title in text, key


def test_the_commands(reported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(reported)
    for args in (
        ["analyze", "scores", run, "--methods", "neuron-path,random"],
        ["analyze", "similarity", run],
        ["analyze", "paths", run, "--classes", "all"],
        ["eval", run, "--edit", "enhance", "--factor", "4", "--methods", "neuron-path,random"],
        ["eval", run, "--edit", "keep", "--paths", "class,predicted", "--topk", "1,3",
         "--fraction", "0.5,1", "--seeds", "2", "--name", "paper-pruning"],
    ):  # fmt: skip
        assert app.run_app(args) == 0, args
    out = capsys.readouterr().out
    assert "un-edited" in out
    assert "Joint attribution scores" in out
    result = RunFolder(reported).read_result()
    assert "paper-pruning" in result.analyses
    assert "edit-enhance-image-cls" in result.analyses
    assert any("--edit keep" in c for c in result.commands)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["eval", "RUN", "--edit", "double"],
            "`--edit` must be one of `remove`, `enhance`, `keep`",
        ),
        (["eval", "RUN", "--edit", "keep", "--fraction", "2"], "`--fraction`"),
        (["eval", "RUN", "--edit", "keep", "--topk", "one"], "`--topk` must be whole numbers"),
        (["eval", "RUN", "--edit", "keep", "--paths", "labels"], "`--paths`"),
        (["eval", "no/run", "--edit", "keep"], "RUN must be a run folder, got `no/run`"),
        (["eval", "RUN", "--topk", "3"], "`--topk` belongs to `--edit remove|enhance|keep`"),
        (["eval", "RUN"], "`--data` is needed"),
        (["analyze", "words", "RUN"], "one of `scores`, `similarity`, `paths`, got `words`"),
        (
            ["analyze", "paths", "RUN", "--methods", "all"],
            "`--methods` belongs to `analyze scores`",
        ),
    ],
)
def test_wrong_commands_are_told_why(
    world: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app.run_app([str(world / "run") if a == "RUN" else a for a in args]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_notebook_runs(
    demo_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    notebook = Path(__file__).resolve().parents[2] / "examples" / "paper.ipynb"
    shutil.copytree(demo_dense, tmp_path / "ckpt" / demo_dense.name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(notebook), "exec"), names)
    out = capsys.readouterr().out
    for title in ("Joint attribution scores", "Removing", "Keeping only", "Preferred path: 8"):
        assert title in out
    assert (tmp_path / "reports" / "paper_digits" / "report.html").is_file()


@pytest.mark.parametrize("edit", ["remove", "keep"])
def test_forgetting_compares_the_class_with_all_others(run: Path, edit: str) -> None:
    settings = EditSection(edit=edit, paths=["class"], topk=[2], others=True, scope=["all"])  # type: ignore[arg-type]
    found = edit_neurons(run, settings)
    assert list(found) == [f"edit-{edit}-class-all", f"edit-{edit}-class-all-others"]
    analysis = found[f"edit-{edit}-class-all-others"]
    model, view, images, labels, table = loaded(run)
    take, hold, _ = divide(table)
    classes = [c for c in table.classes if (labels[hold] == c).any()]
    others = {c: [i for i in hold if int(labels[i]) != c] for c in classes}
    own, theirs = [], []
    for c in classes:
        masks = members(class_top(table.neurons[take], table.labels[take], c, 2), view.widths)
        factors = [m[None].double() if edit == "keep" else 1.0 - m[None].double() for m in masks]
        mine = [i for i in hold if int(labels[i]) == c]
        for rows, out in ((mine, own), (others[c], theirs)):
            x, y = images[rows], labels[rows]
            with torch.no_grad():
                before = (model(x).argmax(1) == y).double().mean()
            factors = [f.to(x) for f in factors]
            after = (edited_logits(view, x, factors, scope="all").argmax(1) == y).double().mean()
            out.append(100 * float(before - after))
    (row,) = [dict(zip(analysis.columns, r, strict=True)) for r in analysis.rows]
    assert row["class loses"] == pytest.approx(sum(own) / len(own))
    # four classes: every image is seen with the neurons of all three others
    assert row["others lose"] == pytest.approx(sum(theirs) / len(theirs))
    with pytest.raises(UsageError, match="names none of a class"):
        edit_neurons(run, EditSection(others=True))
