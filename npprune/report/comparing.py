"""Several runs side by side: their networks, and paired tests on the images they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from npprune.core import paired
from npprune.errors import StoreError, UsageError
from npprune.records import Evaluation, Mean, Result, Variant
from npprune.report import flipped, numbers, text, tradeoff
from npprune.report.document import (
    Cell,
    Facts,
    Item,
    Missing,
    Page,
    Paragraph,
    Section,
    Table,
    cells,
)
from npprune.report.sections import folder

CLASSES = 20  # listed
SAID = 4  # sentences above, for each set of images
TESTED = 8  # networks up to which every pair is tested; else each with the first


@dataclass
class Network:
    """One pruned network of one of the runs, under a name that no other has."""

    label: str
    result: Result
    variant: Variant

    @property
    def evaluation(self) -> Evaluation | None:
        """What was measured of it."""
        return self.variant.evaluation


@dataclass
class Tested:
    """A network, dense or pruned, and on which of the images it is right, as bits."""

    label: str
    right: int
    pruned: bool


@dataclass
class Pair:
    """Two networks on the same images: what the second one loses and gains against the first."""

    first: Tested
    second: Tested
    images: int
    lost: int
    gained: int
    p: float = 1.0  # adjusted for the number of pairs

    @property
    def change(self) -> Mean:
        """Top-1 of the second less that of the first, paired."""
        return paired.change(self.lost, self.gained, self.images)


@dataclass
class SameImages:
    """Networks that were evaluated on the same images, and the pairs that are tested."""

    images: int
    spec: str
    networks: list[Tested]
    pairs: list[Pair] = field(default_factory=list)


def build(results: Sequence[Result]) -> Page:
    """The page of several results; every point of a study among them is in the picture.

    Raises:
        UsageError: there are not two networks to compare, nor one and a study.
    """
    networks = _networks(results)
    studies = [r for r in results if tradeoff.studied(r)]
    if len(networks) < 2 and not (networks and studies):
        raise UsageError(
            f"a comparison needs at least two pruned networks, and these runs have {len(networks)}",
            hint="`npprune prune RUN ...` adds one; one run alone: `npprune report RUN`",
        )
    groups = _groups(networks)
    names = list(dict.fromkeys(text.clean(r.name) for r in results))
    sections = [
        _side_by_side(networks, studies),
        Section("tests", "Paired tests", [*_tests(groups), *_untested(networks)]),
        Section("classes", "Classes that differ most", _classes(networks)),
        _origins(networks),
    ]
    return Page(
        title=", ".join(names),
        subtitle=f"{text.plural(len(networks), 'network')} of "
        f"{text.plural(len(results), 'run')} side by side",
        headline=_headline(groups),
        warnings=_warnings(networks, groups),
        cards=[],
        sections=[s for s in sections if s.items],
        source="the result.json of each run",
    )


def _networks(results: Sequence[Result]) -> list[Network]:
    found = [Network(text.clean(v.name), r, v) for r in results for v in r.variants]
    names = Counter(n.label for n in found)
    seen: Counter[str] = Counter()
    for n in found:
        if names[n.label] > 1:
            n.label = f"{text.clean(n.result.name)}: {n.label}"
        seen[n.label] += 1
        if seen[n.label] > 1:
            n.label += f" ({seen[n.label]})"
    return found


def _dense(networks: Sequence[Network]) -> dict[str, str]:
    """What each dense network is called, by the hash of its weights."""
    sources = {n.result.model.source.sha256: n.result.model.source for n in networks}
    if len(sources) == 1:
        return dict.fromkeys(sources, "dense")
    return {
        sha256: f"dense {text.clean(source.architecture)} {sha256[:6]}"
        for sha256, source in sources.items()
    }


# ---------------------------------------------------------------- the same images


def _groups(networks: Sequence[Network]) -> list[SameImages]:
    """Networks by the images that they were evaluated on, dense ones first, each of them once."""
    names = _dense(networks)
    found: dict[str, SameImages] = {}
    dense: dict[str, dict[str, Tested]] = {}
    for n in networks:
        if n.evaluation is None or n.evaluation.outcomes is None:
            continue
        outcomes = n.evaluation.outcomes
        spec = text.clean(n.evaluation.data.spec)
        group = found.setdefault(outcomes.sha256, SameImages(outcomes.images, spec, []))
        if group.images != outcomes.images:
            raise StoreError(
                f"`outcomes` of {n.label} are of {text.plural(outcomes.images, 'image')}, those of "
                f"the same images elsewhere of {text.count(group.images)}",
                hint="evaluate the checkpoint again",
            )
        source = n.result.model.source.sha256
        before = Tested(names[source], flipped.right(outcomes, "dense"), pruned=False)
        dense.setdefault(outcomes.sha256, {}).setdefault(source, before)
        group.networks.append(Tested(n.label, flipped.right(outcomes, "pruned"), pruned=True))
    for sha256, group in found.items():
        group.networks = [*dense[sha256].values(), *group.networks]
        group.pairs = _pairs(group)
    return list(found.values())


def _pairs(group: SameImages) -> list[Pair]:
    chosen = list(combinations(group.networks, 2))
    if len(group.networks) > TESTED:
        chosen = [(group.networks[0], other) for other in group.networks[1:]]
    pairs = [Pair(a, b, group.images, *flipped.changed(a.right, b.right)) for a, b in chosen]
    adjusted = paired.holm([paired.mcnemar(pair.lost, pair.gained) for pair in pairs])
    for pair, p in zip(pairs, adjusted, strict=True):
        pair.p = p
    return pairs


def _tests(groups: Sequence[SameImages]) -> list[Item]:
    items: list[Item] = [_table(group) for group in groups]
    if items:
        items.append(
            Paragraph(
                "Read p first: from 0.05 on, these images do not tell the two apart, whatever the "
                "difference. p is that of the exact McNemar test, which counts only images on "
                "which one of the two is right, adjusted for the number of pairs in its table "
                "(Holm). The interval is that of the paired differences, of this pair alone."
            )
        )
    return items


def _table(group: SameImages) -> Table:
    rows = []
    for pair in group.pairs:
        both = (pair.first.right & pair.second.right).bit_count()
        change = Cell(text.points(pair.change.value), text.change_span(pair.change))
        alone = text.count(pair.gained), text.count(pair.lost)
        none = group.images - both - pair.lost - pair.gained
        rows.append(
            cells(
                pair.second.label, pair.first.label, change, _p(pair.p), *alone,
                text.count(both), text.count(none),
            )
        )  # fmt: skip
    return Table(
        [
            "network", "against", "top-1", "p", "only it is right", "only the other", "both",
            "none",
        ],
        rows,
        caption=f"On the same {text.plural(group.images, 'image')} of {group.spec}, image by "
        "image.",
        text=2,
    )  # fmt: skip


def _p(value: float, equal: str = "") -> str:
    return "< 0.001" if value < 0.001 else equal + text.fixed(value, 3)


def _untested(networks: Sequence[Network]) -> list[Item]:
    """Networks whose outcomes image by image are not known."""
    items: list[Item] = []
    for n in networks:
        if n.evaluation is not None and n.evaluation.outcomes is None:
            items.append(
                Missing(
                    f"{n.label} was evaluated by an older npprune, which did not record single "
                    "images: no paired test.",
                    f"npprune eval {folder(n.variant)} --data {n.evaluation.data.spec}",
                )
            )
        elif n.variant.measured is None:
            items.append(
                Missing(
                    f"The accuracy of {n.label} has not been measured.",
                    f"npprune eval {folder(n.variant)} --data folder:VAL",
                )
            )
    return items


# ---------------------------------------------------------------- side by side


def _side_by_side(networks: Sequence[Network], studies: Sequence[Result]) -> Section:
    columns = [(n.label, numbers.measures(n.result, n.variant)) for n in networks]
    table = numbers.beside(columns)
    return Section("numbers", "Side by side", [*_accuracy_and_cost(networks, studies), table])


def _accuracy_and_cost(networks: Sequence[Network], studies: Sequence[Result]) -> list[Item]:
    names = _dense(networks)
    dense: dict[str, tradeoff.Point] = {}
    points = []
    for n in networks:
        if n.evaluation is not None:
            model, source = n.result.model, n.result.model.source.sha256
            before, after, _ = numbers.compared(n.evaluation)
            dense.setdefault(source, tradeoff.Point.of(names[source], model, before))
            points.append(tradeoff.Point.of(n.label, n.variant.model, after))
    points = [*dense.values(), *points]
    if not points:
        return []
    said = "Whether two networks of the runs differ, the paired tests say more sharply."
    found = [(f"study {text.clean(r.name)}", tradeoff.studied(r)) for r in studies]
    return [tradeoff.figure(points, found, said)]


def _classes(networks: Sequence[Network]) -> list[Item]:
    """The classes on which networks that saw the same images differ most."""
    by_images: dict[str, list[tuple[str, Evaluation]]] = {}
    for n in networks:
        if n.evaluation is not None and n.evaluation.data.sha256:
            by_images.setdefault(n.evaluation.data.sha256, []).append((n.label, n.evaluation))
    items: list[Item] = []
    for group in by_images.values():
        if len(group) < 2:
            continue
        rows = {c.label: c for c in group[0][1].classes}
        top1 = [{c.label: c.pruned_top1 for c in e.classes} for _, e in group]
        spread = {
            label: max(t[label] for t in top1) - min(t[label] for t in top1)
            for label in rows
            if all(label in t for t in top1)
        }
        worst = sorted(
            (label for label, s in spread.items() if s > 0), key=lambda c: (-spread[c], c)
        )[:CLASSES]
        if not worst:
            continue
        items.append(
            Table(
                ["class", "images", "dense", *(label for label, _ in group)],
                [
                    cells(
                        f"{text.clean(rows[c].name)} ({c})",
                        text.count(rows[c].images),
                        text.percent(rows[c].dense_top1, 0),
                        *(text.percent(t[c], 0) for t in top1),
                    )
                    for c in worst
                ],
                caption="Top-1 of single classes on the same images, those with the widest range "
                "first; few images per class make single classes uncertain.",
            )
        )
    return items


def _origins(networks: Sequence[Network]) -> Section:
    pairs = []
    for n in networks:
        source = n.result.model.source
        said = f"{source.architecture}, weights {source.sha256[:12]}; run {n.result.name}"
        said += f" of {text.when(n.result.created)}"
        if n.evaluation is not None:
            said += f"; {text.data(n.evaluation.data)}, on {n.evaluation.device}"
        pairs.append((n.label, text.clean(said)))
    return Section("origins", "Where each is from", [Facts(pairs)])


# ---------------------------------------------------------------- words


def _headline(groups: Sequence[SameImages]) -> list[str]:
    """Each pruned network against the first one."""
    lines = []
    for group in groups:
        between = [p for p in group.pairs if p.first.pruned and p.second.pruned]
        for pair in between[:SAID]:
            if pair.first is not between[0].first:
                break
            what = (
                f"{pair.second.label} and {pair.first.label} are not told apart by"
                if pair.p >= 0.05
                else f"{pair.second.label} is better than {pair.first.label} on"
                if pair.gained > pair.lost
                else f"{pair.second.label} is worse than {pair.first.label} on"
            )
            lines.append(
                f"{what} the same {text.plural(group.images, 'image')}: "
                f"{text.points(pair.change.value)} of top-1 ({text.change_span(pair.change)}, "
                f"p {_p(pair.p, '= ')})."
            )
    return lines


def _warnings(networks: Sequence[Network], groups: Sequence[SameImages]) -> list[str]:
    lines = []
    done = [n.evaluation for n in networks if n.evaluation is not None]
    if len({e.data.sha256 for e in done}) > 1 or len(groups) > 1:
        lines.append(
            "Not all networks were evaluated on the same images: their accuracies are not to be "
            "compared across the tables of paired tests."
        )
    if len({n.result.model.source.sha256 for n in networks}) > 1:
        lines.append("The runs began with different dense networks.")
    if any(e.restricted_to is not None for e in done):
        lines.append(
            "Some of the networks are for chosen classes: choosing among fewer is easier for any "
            "network."
        )
    if any(a.preprocessing != b.preprocessing for a, b in combinations(done, 2)):
        lines.append("Images were prepared differently for some of the networks.")
    return lines
