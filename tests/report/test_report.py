"""The report: what it says, that it is safe to open, and that it is a function of the result."""

from __future__ import annotations

import hashlib
import html.parser
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from npprune.errors import StoreError, UsageError
from npprune.records import (
    Analysis,
    FigureData,
    Result,
    Series,
    from_json,
    to_json,
)
from npprune.report import (
    drawing,
    figures,
    five_numbers,
    learning_curve,
    pareto,
    render_html,
    render_markdown,
    summary,
    svg,
)
from npprune.report.drawing import draw
from npprune.report.markdown import code, escape
from tests.helpers import report_example as example
from tests.helpers.report_example import PNG

HOSTILE = (
    '$\\frac{$ #101112 <script>alert(1)</script> | `x` & "q" $a$ --> \x07\ud800 ](javascript:1) 犬'
)
VOID = {"meta", "br", "hr", "img", "input", "link", "use", "path", "rect"}


class Page(html.parser.HTMLParser):
    """Collects tags with attributes, checks that they nest, and keeps the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")

    def count(self, tag: str) -> int:
        return sum(1 for name, _ in self.tags if name == tag)


def rich() -> Result:
    """Everything at once: three networks, chosen classes, all kinds of analysis."""
    chosen = example.variant("chosen")
    assert chosen.evaluation
    chosen.evaluation.restricted_to = [0, 37, 74]
    chosen.evaluation.dense_restricted = example.evaluation(699, 760).pruned
    chosen.evaluation.pruned_restricted = example.evaluation(648, 752).pruned
    example.seen(chosen.evaluation)
    result = example.result([example.variant(), example.variant("vit_tiny_70", 0.7, 606), chosen])
    names = [f"class {i}" for i in range(4)]
    kinds = {
        "scatter": FigureData("scatter", [Series("a", [1, 2], [0.1, 0.2], labels=["p", "q"])]),
        "bars": FigureData("bars", [Series("a", [1, None, 2])], x_names=names[:3]),
        "box": FigureData("box", [Series("a", [], boxes=[[0, 1, 2, 3, 4]])], x_names=["m"]),
        "heatmap": FigureData(
            "heatmap", x_names=names, y_names=names[:2], matrix=[[0, 1, 2, None], [3, 4, 5, 6]]
        ),
    }
    result.analyses = {k: Analysis(f"The {k}", figure=f) for k, f in kinds.items()}
    result.analyses["heal"] = learning_curve("Recovery", [0, 1, 2], {"kl": [3.0, None, 1.0]})
    result.analyses["study"] = pareto(
        "Study",
        {"obs": [(0.5, 62.0, 58.6, 65.3), (0.7, 75.8, 72.7, 78.6)]},
        x_label="MACs",
        dense=82.5,
        columns=["criterion", "top-1"],
        rows=[["obs", 62.0]],
    )
    return result


@pytest.fixture(scope="module")
def page() -> str:
    return render_html(rich())


# ---------------------------------------------------------------- the page


def test_page_says_what_was_done_with_its_uncertainty() -> None:
    text = Page(render_html(example.result())).text.replace("\u2011", "-")
    assert (
        "vit_tiny_half keeps 4,608 of the 9,216 hidden units of "
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k (50.0 %). On 800 images it reaches 62.0 % top-1 "
        "where the dense network reaches 82.5 % (−20.5 points, 95 % −23.4 to −17.6), at 0.71 × "
        "the MACs and 0.69 × the latency (ONNX Runtime, CPU, batch 1)." in text
    )
    for part in ("496/800, 95 % 58.6–65.3", "15.1 MiB", "gauss-legendre, 5 points", "seed"):
        assert part in text
    assert "imagenet/train/n00000003/broken.JPEG" in text
    assert "npprune prune reports/vit_tiny --topk 5 --keep 0.5 --out ckpt/vit_tiny_half" in text


def test_page_is_well_formed_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert not parsed.open
    assert not {"script", "link", "iframe", "object", "image", "base"} & {
        tag for tag, _ in parsed.tags
    }
    assert "http" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    for tag, attributes in parsed.tags:
        assert ("src" in attributes) is (tag == "img")
        assert re.fullmatch(
            r"data:image/png;base64,[\w+/=]+", attributes.get("src", f"data:image/png;base64,{PNG}")
        )
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")


def test_every_figure_has_its_table_and_a_name(page: str) -> None:
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    # standard ones; the classes of each variant; analyses; probabilities of one
    assert len(figures) == 6 + 3 + 6 + 2
    for figure in figures:
        assert re.search(r'<svg [^>]*role="img" aria-label="[^"]+"', figure)
        table = re.search(r"<details>.*?<tbody>(.*?)</tbody>", figure, re.DOTALL)
        assert table
        assert table[1].count("<tr>") >= 1


def test_ids_are_unique_and_references_resolve(page: str) -> None:
    parsed = Page(page)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))
    assert used
    assert used <= set(ids)


def test_colours_come_from_the_page(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "var(--accent)" in drawn
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawn)) <= {"#ffffff", "#000000"}
    styles = page[page.index("<style>") : page.index("</style>")]
    for name in set(re.findall(r"var\(--([\w-]+)\)", page)):
        assert styles.count(f"--{name}:") == 3, f"{name}: light, dark and print"


def test_hostile_names_stay_text() -> None:
    result = example.result()
    for info in result.classes:
        info.name = HOSTILE
    done = result.variants[0].evaluation
    assert done
    for row in done.classes:
        row.name = HOSTILE
    example.seen(done)
    for image in done.flipped:
        image.name = image.dense = image.pruned = HOSTILE
    done.flipped[0].picture = f'{PNG}"onerror="alert(1)'
    result.name = result.variants[0].name = HOSTILE
    result.variants[0].checkpoint = HOSTILE
    result.variants[0].prune.warnings = [HOSTILE]
    result.variants[0].export = None
    done.data.skipped = [HOSTILE]
    done.data.spec = done.data.label_rule = HOSTILE
    result.commands = [HOSTILE]
    result.environment.versions = {HOSTILE: HOSTILE}
    result.analyses = {
        HOSTILE: Analysis(
            HOSTILE,
            HOSTILE,
            [HOSTILE],
            [[HOSTILE]],
            FigureData(
                "bars",
                [Series(HOSTILE, [1.0]), Series("b", [2.0])],
                x_label=HOSTILE,
                x_names=[HOSTILE],
                reference={HOSTILE: 1.0},
            ),
        )
    }
    page = render_html(result)
    page.encode()
    assert "<script" not in page
    assert page.count("<img") == 1  # what is no picture is none
    assert "onerror" not in page
    parsed = Page(page)
    assert not parsed.open
    assert "<script>alert(1)</script>" in parsed.text
    assert "#101112" in re.findall(r"<svg.*?</svg>", page, re.DOTALL)[-1]  # text is not recoloured
    markdown = render_markdown(result)
    assert "\x07" not in markdown
    prose = re.sub(r"(`+)[^`].*?[^`]\1(?!`)|```sh.*?```", "", markdown, flags=re.DOTALL)
    assert "<script" not in prose
    markdown.encode()


def test_same_result_gives_the_same_bytes(page: str, tmp_path: Path) -> None:
    """In another process, and from its file."""
    result, file = rich(), tmp_path / "result.json"
    file.write_text(to_json(result), encoding="utf-8")
    assert render_markdown(from_json(Result, to_json(result))) == render_markdown(result)
    run = (
        "import hashlib, sys; from pathlib import Path;"
        "from npprune.records import Result, from_json; from npprune.report import render_html;"
        "result = from_json(Result, Path(sys.argv[1]).read_text(encoding='utf-8'));"
        "print(hashlib.sha256(render_html(result).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", run, file], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == hashlib.sha256(page.encode()).hexdigest()


def test_rendering_leaves_matplotlib_and_the_result_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    for module in (drawing, figures):  # draw it, whatever another test has drawn
        monkeypatch.setattr(module, "picture", svg.picture)
    result = example.result()
    before, text = dict(matplotlib.rcParams), to_json(result)
    matplotlib.rcParams["font.size"] = 31
    try:
        styled = render_html(result)
        assert matplotlib.rcParams["font.size"] == 31
    finally:
        matplotlib.rcParams.update(before)
    assert re.findall(r"font-size: [\d.]+px", styled).count("font-size: 31px") == 0
    assert to_json(result) == text


def test_report_loads_no_torch() -> None:
    run = (
        "import sys; sys.path.insert(0, '.'); import tests.helpers.report_example as e;"
        "from npprune.report import render_html, render_markdown, summary;"
        "r = e.result(); summary(r); render_markdown(r);"
        "assert 'matplotlib' not in sys.modules, 'matplotlib';"
        "render_html(r);"
        "assert 'matplotlib' in sys.modules;"
        "bad = {'torch', 'timm', 'torchvision', 'onnx', 'onnxruntime', 'matplotlib.pyplot'};"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- parts that are not there


def test_missing_parts_name_the_command() -> None:
    result = example.result([])
    text = Page(render_html(result)).text
    assert "Nothing has been pruned yet." in text
    assert "npprune prune reports/vit_tiny --keep 0.5" in text
    assert "Kept hidden units" not in text
    assert "rank by frequency" in text
    assert "npprune discover" not in render_markdown(replace(result, commands=[]))

    bare = example.variant()
    bare.evaluation = bare.export = bare.prune.calibration = None
    bare.prune.protected, bare.prune.topk, bare.prune.keep = [], None, None
    result = replace(example.result([bare]), discovery=None, commands=[])
    text = Page(render_html(result)).text
    assert "npprune eval ckpt/vit_tiny_half --data folder:VAL" in text
    assert "npprune export ckpt/vit_tiny_half" in text
    assert "npprune discover vit_tiny_patch16_224" in text
    assert "Its accuracy has not been measured yet." in text
    assert "protected" not in text
    assert "Commands that reproduce this" not in text


def test_a_result_with_nothing_in_it_renders() -> None:
    result = replace(example.result([]), discovery=None, classes=[], commands=[])
    assert "Nothing has been discovered or pruned yet." in render_html(result)
    assert render_markdown(result).startswith("# vit\\_tiny\n")
    assert summary(result).rows[0] == ["Parameters", "5.72 M"]


def test_empty_paths_and_classes_are_left_out() -> None:
    result = example.result()
    assert result.discovery
    assert result.variants[0].evaluation
    result.discovery.frequency = [[] for _ in range(12)]
    result.discovery.class_paths = {}
    result.variants[0].evaluation.classes = []
    page = render_html(result)
    assert "Classes hit worst" not in page
    assert "rank by frequency" not in page


def test_images_that_flipped_are_shown_with_both_predictions() -> None:
    result = example.result()
    (variant,) = result.variants
    assert variant.evaluation
    assert "Who pays" not in render_html(result)
    assert "calibration error" not in render_html(result)
    done = example.seen(variant.evaluation)
    done.outcomes.dense = example.packed([True] * 9 + [False] * 15)  # type: ignore[union-attr]
    done.outcomes.pruned = example.packed([True] * 2 + [False] * 21 + [True])  # type: ignore[union-attr]
    page = Page(render_html(result))
    assert page.count("img") == 2
    assert "Of 24 images 7 were right before and are wrong now, 1 the other way round." in page.text
    assert "great white: lostdense: great white, 91 %pruned: hammer, 42 %" in page.text
    assert "Expected calibration error: 11.7 % dense, 3.1 % pruned" in page.text
    text = render_markdown(result)
    assert "| tabby | gained | grey, 33 % | tabby, 51 % |" in text
    assert "| −50 to 0 % | 9 | 37.5 % |" in text


def test_outcomes_that_do_not_fit_their_images_are_refused() -> None:
    result = example.result()
    assert result.variants[0].evaluation
    done = example.seen(result.variants[0].evaluation)
    done.outcomes.images = 33  # type: ignore[union-attr]
    with pytest.raises(StoreError, match="a bit for each of 33 images, got 3 bytes"):
        render_html(result)


# ---------------------------------------------------------------- warnings and comparisons


def test_slow_onnx_is_the_first_thing_said() -> None:
    slow = example.variant()
    assert slow.export
    slow.export.latency[0] = example.latency(1, 9.84, 1.04)
    slow.prune.warnings = ["path neurons exceed the budget"]
    result = example.result([slow])
    first = (
        "vit_tiny_half is NOT faster than the dense network in ONNX Runtime on this machine "
        "(batch 1: 10.2 ms against 9.84 ms, ratio 1.04 ×, quartiles 1.02–1.07)."
    )
    assert summary(result).notices == [first]
    page = render_html(result)
    assert page.index(first) < page.index("path neurons exceed the budget") < page.index("keeps")
    assert summary(example.result()).notices == []


def test_a_machine_too_busy_to_tell_is_not_called_slower() -> None:
    noisy = example.variant()
    assert noisy.export
    noisy.export.latency[0] = example.latency(1, 9.84, 1.4)
    noisy.export.latency[0].ratio_low = 0.2
    (notice,) = summary(example.result([noisy])).notices
    assert "too busy to tell" in notice
    assert "NOT faster" not in notice


@pytest.mark.parametrize(
    ("spoil", "warning"),
    [
        (lambda v: setattr(v.export, "passed", False), "parity failed"),
        (
            lambda v: setattr(v.evaluation, "data", v.prune.calibration),
            "calibrated and evaluated on the same images",
        ),
        (lambda v: setattr(v.evaluation.data, "images", 17), "evaluated on 17 images only"),
        (
            lambda v: setattr(v.evaluation.preprocessing, "crop_pct", 1.0),
            "another preprocessing than the model's own",
        ),
    ],
)
def test_what_spoils_a_number_is_said_up_front(spoil: object, warning: str) -> None:
    v = example.variant()
    assert warning not in render_markdown(example.result([v]))
    spoil(v)  # type: ignore[operator]
    said = render_markdown(example.result([v])).partition("\n## ")[0]
    assert "- **Warning:** vit\\_tiny\\_half: " in said
    assert warning in said


def test_chosen_classes_show_three_numbers() -> None:
    result = rich()
    result.variants = result.variants[2:]
    text = Page(render_html(result)).text.replace("\u2011", "-")
    assert (
        "Among its 3 chosen classes it reaches 81.0 % top-1 on 800 images, where the dense "
        "network reaches 87.4 % choosing among the same classes (−6.4 points) and 82.5 % choosing "
        "among all" in text
    )
    for line in (
        "pruned, predictions among the chosen classes",
        "dense, predictions among the chosen classes",
        "dense, predictions among all classes",
    ):
        assert line in text


def test_points_of_one_cost_do_not_hide_each_other() -> None:
    points = (("a", 50.0, 82.5), ("b", 50.0, 82.5), ("c", 90.0, 80.0))
    data = FigureData("scatter", [Series(name, [y], [x]) for name, x, y in points])
    svg = draw(data, "", "x")
    found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--s[123]\)', svg)
    (a, high), (b, same), *_ = ((float(x), float(y)) for x, y in found)
    assert high == same
    assert b - a == pytest.approx(7.0)  # points, of a marker of 5.5


def test_summary_of_one_network() -> None:
    shown = summary(example.result())
    assert shown.columns == ["", "dense", "pruned", "change"]
    rows = {row[0]: row[1:] for row in shown.rows}
    assert rows["Top-1"] == [
        "82.5 % (660/800, 95 % 79.7–85.0)",
        "62.0 % (496/800, 95 % 58.6–65.3)",
        "−20.5 points (95 % −23.4 to −17.6)",
    ]
    assert rows["Parameters"] == ["5.72 M", "3.95 M", "−30.9 %"]
    assert rows["ONNX file, fp32"] == ["21.8 MiB", "15.1 MiB", "−31.0 %"]
    assert "Latency, ONNX Runtime, CPU, batch 16" in rows
    assert not any("PyTorch" in label for label in rows)


def test_summary_of_several_networks_side_by_side() -> None:
    other = example.variant("thin", 0.3, 202)
    other.export = None
    assert other.evaluation
    other.evaluation.dense = example.evaluation(640).pruned
    other.evaluation.data.sha256 = "other"
    other.model.heads = [2] * 12
    result = example.result([example.variant(), other])
    shown = summary(result)
    assert shown.columns == ["", "dense", "vit_tiny_half", "thin"]
    rows = {row[0]: row[1:] for row in shown.rows + shown.more}
    assert rows["Top-1"][2].endswith("; dense 80.0 %)")
    assert rows["ONNX file, fp32"][2] == "–"
    assert rows["Attention heads"] == ["36", "–", "24 (−33.3 %)"]
    assert all(len(row) == 4 for row in shown.rows + shown.more)
    labels = [row[0] for row in shown.more]
    assert labels.index("Hidden units") < labels.index("Attention heads")
    assert "not all evaluated on the same images" in render_html(result)


# ---------------------------------------------------------------- Markdown


def test_markdown_tables_have_as_many_cells_as_columns() -> None:
    result = rich()
    result.classes[0].name = "a | b \\| c"
    done = result.variants[0].evaluation
    assert done
    done.classes[0].name, done.classes[0].pruned_top1 = "a | b \\| c\n| d", -9.0
    text = render_markdown(result)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 12
    for table in tables:
        rows = [re.findall(r"(?<!\\)(?:\\\\)*\|", line) for line in table.strip().splitlines()]
        assert len({len(r) for r in rows}) == 1, table
        assert re.fullmatch(r"\|( -+:? \|)+", table.splitlines()[1])
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_markdown_agrees_with_the_page() -> None:
    result = example.result()
    page = render_html(result)
    text = render_markdown(result)
    for heading in re.findall(r"^## (.*)$", text, re.MULTILINE):
        assert heading in page
    assert text.count("\n## ") == page.count("<section ")


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a|b", "a\\|b"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("*x* _y_ `z`", "\\*x\\* \\_y\\_ \\`z\\`"),
        ("1. one", "1\\. one"),
        ("- one", "\\- one"),
        ("a\nb", "a b"),
        ("https://x.y", "h&#8203;ttps://x.y"),
    ],
)
def test_markdown_escapes(raw: str, safe: str) -> None:
    assert escape(raw) == safe


def test_code_spans_hold_backticks() -> None:
    assert code("a") == "`a`"
    assert code("a `b`") == "`` a `b` ``"


# ---------------------------------------------------------------- analyses


def test_pareto_keeps_its_numbers_in_the_table() -> None:
    analysis = rich().analyses["study"]
    assert analysis.figure
    assert analysis.figure.reference == {"dense": 82.5}
    text = render_markdown(replace(example.result([]), analyses={"s": analysis}))
    assert "| obs | 0.5 | 62 | 58.6 | 65.3 |" in text
    assert "| obs | 62 |" in text


def test_learning_curve_needs_a_value_per_step() -> None:
    with pytest.raises(UsageError, match=r"one value per step \(3\), got 2 for `kl`"):
        learning_curve("x", [0, 1, 2], {"kl": [1.0, 2.0]})


def test_five_numbers() -> None:
    assert five_numbers([float(i) for i in range(101)]) == [5.0, 25.0, 50.0, 75.0, 95.0]
    with pytest.raises(UsageError, match="at least one value"):
        five_numbers([])


def test_front_is_what_no_other_point_beats() -> None:
    from npprune.report.drawing import front

    points = [(3.0, 5.0), (1.0, 2.0), (2.0, 1.0), (2.0, 4.0), (3.0, 4.0), (4.0, 5.0)]
    assert front(points) == [(1.0, 2.0), (2.0, 4.0), (3.0, 5.0)]


@pytest.mark.parametrize("kind", ["scatter", "lines", "bars", "box", "heatmap"])
def test_a_figure_without_data_renders(kind: str) -> None:
    result = replace(
        example.result([]), analyses={kind: Analysis("Empty", figure=FigureData(kind))}
    )  # type: ignore[arg-type]
    assert "Empty" in render_html(result)
    assert "Empty" in render_markdown(result)
