"""Build the explorer of a run: from its paths, and one pass over its images."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from npprune.core.attribution.lens import pushes
from npprune.core.attribution.votes import frequency
from npprune.errors import DataError, StoreError, UsageError, plural
from npprune.files import check_file, check_folder, refuse_overwriting
from npprune.models.view import TimmView, make_view
from npprune.models.writing import written
from npprune.pipeline.common.inputs import (
    Images,
    Network,
    check_weights,
    open_checkpoint,
    open_images,
)
from npprune.pipeline.common.inputs import open_network as open_dense
from npprune.pipeline.common.outputs import reads_of
from npprune.pipeline.common.threads import same_on_any_threads
from npprune.pipeline.common.work import Work
from npprune.pipeline.discover.finished import FinishedRun, methods_of, open_finished, paths_of
from npprune.pipeline.explore.effects import Effects, interval
from npprune.pipeline.explore.reading import Pass, Pruned, Seen, spread
from npprune.pipeline.explore.site import Site, objection
from npprune.recipe.sections import ExploreSection
from npprune.records import CheckpointConfig, Plan
from npprune.store import atomic
from npprune.store.checkpoints import read_config
from npprune.store.path_store import PathTable
from npprune.store.runs import read_plan

STAGE = "explore"
MAPS_PER_FILE = 50  # images
PUSHED = 5  # labels shown that a neuron pushes up, and down


@dataclass
class Explored:
    """What was built, and where it lies."""

    page: Path
    classes: int
    images: int
    neurons: int
    bytes: int
    seconds: float
    notes: list[str] = field(default_factory=list)  # what is missing, and why


@dataclass
class _Opened:
    """A run with all that the explorer shows of it."""

    found: FinishedRun
    network: Network
    view: TimmView
    tables: dict[str, PathTable]  # by method, the run's own first
    plan: Plan | None = None
    config: CheckpointConfig | None = None  # of the plan's checkpoint
    name: str = ""  # of the checkpoint
    pruned: Pruned | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def table(self) -> PathTable:
        return self.found.table

    @property
    def scope(self) -> Any:
        assert self.found.result.discovery is not None
        return self.found.result.discovery.scope


def explore_run(
    run: Path,
    settings: ExploreSection,
    out: Path,
    *,
    plan: Path | None = None,
    single: bool = False,
    work: Work | None = None,
) -> Explored:
    """Build pages about the classes, neurons and images of a run, to be opened from disk.

    Args:
        run: a run folder of discovery. Images that are not there any more are left out, and the
            pages say so.
        settings: how much is shown.
        out: the folder, replaced as a whole; or the file, with `single`.
        plan: a checkpoint folder that was pruned from the run's network: what it kept and removed.
        single: one file that holds everything.

    Raises:
        NpPruneError: no finished run, other weights, a plan of another network, a place that
            cannot be written.
    """
    started = time.perf_counter()
    work = (work or Work()).on(STAGE)
    _check_place(run, plan, out, single)
    opened = _open(run, settings, plan, work)
    with _site(out, single) as site, same_on_any_threads(work.where):
        seen, neurons = _look(opened, settings, site, work)
        _write(opened, seen, neurons, site, work)
        page = site.finish()
    if single:
        atomic.write_text(out, page)
    where = out if single else out / "index.html"
    size = sum(p.stat().st_size for p in ([out] if single else out.rglob("*")) if p.is_file())
    return Explored(
        where,
        len(opened.table.classes),
        len(seen.dense),
        sum(map(len, neurons)),
        size,
        time.perf_counter() - started,
        opened.notes,
    )


def _check_place(run: Path, plan: Path | None, out: Path, single: bool) -> None:
    reads = [*reads_of(run), *(reads_of(plan) if plan is not None else [])]
    refuse_overwriting(out, reads, replaced=not single)
    if single:
        check_file(out)
        return
    check_folder(out, replaced=True)
    if out.is_dir() and any(out.iterdir()) and (why := objection(out)):
        raise StoreError(f"`{out}` is not replaced: {why}", hint="choose another --out")


@contextlib.contextmanager
def _site(out: Path, single: bool) -> Iterator[Site]:
    if single:
        yield Site(None)
        return
    with atomic.replace_folder(out, objection) as fresh:
        yield Site(fresh)


# ---------------------------------------------------------------- opening


def _open(run: Path, settings: ExploreSection, plan: Path | None, work: Work) -> _Opened:
    found = open_finished(run)
    network = open_dense(found.recipe.model, work)
    source = network.info.source
    check_weights(network, found.manifest.model.source.sha256, run)
    work.say(f"{source.architecture} on {work.where} ({work.reason})")
    names = [found.settings.method, *(settings.methods or methods_of(found))]
    tables = {name: paths_of(found, name, work) for name in dict.fromkeys(names)}
    opened = _Opened(found, network, make_view(network.model), tables)
    if plan is not None:
        opened.plan, opened.config = _plan(found, plan), read_config(plan)
        opened.name = plan.resolve().name
        outputs = opened.config.details.get("outputs")
        opened.pruned = Pruned(open_checkpoint(plan, work).model, outputs)
    return opened


def _plan(found: FinishedRun, folder: Path) -> Plan:
    plan = read_plan(folder)
    ours = found.manifest.model.source.sha256
    if plan.source_sha256 not in ("", ours):
        raise StoreError(
            f"the plan of `{folder}` is of weights {plan.source_sha256[:12]}..., and the paths of "
            f"`{found.folder.path}` are of {ours[:12]}...",
            hint="give a checkpoint that was pruned from the run's own network",
        )
    if plan.widths != found.widths:
        raise StoreError(
            f"the plan of `{folder}` is for hidden layers of {plan.widths}, and the run's are "
            f"{found.widths}"
        )
    return plan


def _images(opened: _Opened, settings: ExploreSection, work: Work) -> tuple[Images | None, Any]:
    """The source, and which of its positions are which rows of the table."""
    found, table, data = opened.found, opened.table, opened.found.recipe.data
    try:
        images = open_images(
            data.train, data, opened.network.info, work, asked="data.train", on_bad="skip",
            names=opened.network.names,
        )  # fmt: skip
    except (DataError, UsageError) as err:
        opened.notes.append(
            f"The images are not where the run found them ({data.train}): {err.message}. Pictures, "
            "activations, predictions and measured effects are left out."
        )
        work.warn(opened.notes[-1])
        return None, {}
    items = images.source.items
    if items is None:
        rows = {int(p): r for r, p in enumerate(table.positions)}
    else:
        place = {item.id: i for i, item in enumerate(items)}
        rows = {place[id]: r for r, id in enumerate(table.ids.tolist()) if id in place}
        if missing := len(table) - len(rows):
            opened.notes.append(
                f"{missing} of {plural(len(table), 'image')} are not in {data.train} any more."
            )
            work.warn(opened.notes[-1])
    if settings.images_per_class is not None:
        taken: Counter[int] = Counter()
        for position in sorted(rows):
            label = int(found.table.labels[rows[position]])
            taken[label] += 1
            if taken[label] > settings.images_per_class:
                del rows[position]
    return images, rows


# ---------------------------------------------------------------- looking


def _look(
    opened: _Opened, settings: ExploreSection, site: Site, work: Work
) -> tuple[Seen, list[list[int]]]:
    """The pass over the images, and the neurons that have pages."""
    ours, topk = opened.table, opened.found.settings.topk
    neurons = [sorted(j for j, _ in block) for block in frequency(ours.neurons, settings.neurons)]
    images, rows = _images(opened, settings, work)
    if images is None or not rows:
        site.data("effects", {})
        return Seen(), neurons
    effects = Effects(opened.view, opened.tables, topk, opened.scope, work.seed)
    reading = Pass(
        opened.view, ours, neurons, opened.scope, pruned=opened.pruned, effects=effects,
        ablate=_in_turn(ours, list(rows.values()), settings.ablate), site=site, work=work,
    )  # fmt: skip
    seen = reading.read(images, rows)
    if lost := len(rows) - len(seen.dense):
        opened.notes.append(f"{plural(lost, 'image')} could not be read.")
    if opened.view.merges:
        opened.notes.append(
            "The network merges tokens: neither lit patches nor single neurons' effects are shown."
        )
    site.data("effects", _effects(ours, effects, seen))
    return seen, neurons


def _in_turn(table: PathTable, rows: list[int], count: int) -> set[int]:
    """So many rows, shared by the classes: the first of each, the second of each, and so on.

    Where there are not enough for all classes, for some that lie evenly among them.
    """
    place: Counter[int] = Counter()
    rounds: dict[int, list[tuple[int, int]]] = {}
    for row in sorted(rows):
        label = int(table.labels[row])
        rounds.setdefault(place[label], []).append((label, row))
        place[label] += 1
    chosen: set[int] = set()
    for _, each in sorted(rounds.items()):
        chosen |= spread([row for _, row in sorted(each)], count - len(chosen))
    return chosen


def _effects(table: PathTable, effects: Effects, seen: Seen) -> dict[str, Any]:
    found = {}
    for label in table.classes:
        rows = [r for r, y in enumerate(table.labels.tolist()) if y == label]
        if (summed := effects.of_class(rows, seen.true)) is not None:
            found[str(label)] = summed
    return found


# ---------------------------------------------------------------- writing


def _write(opened: _Opened, seen: Seen, neurons: list[list[int]], site: Site, work: Work) -> None:
    table = opened.table
    site.data("run", _run(opened, seen, neurons, site))
    site.data("images", [_image(opened, seen, r) for r in range(len(table))])
    site.data(
        "paths",
        {name: [p.reshape(-1).tolist() for p in t.neurons] for name, t in opened.tables.items()},
    )
    ablations = _ablations(table, seen)
    jacobian = None
    if seen.streams:
        jacobian = pushes(opened.view, torch.stack(seen.streams), scope=opened.scope)
    for l, units in enumerate(neurons):
        site.data(f"neurons-{l}", _neurons(opened, seen, l, units, jacobian, ablations))
        work.progress(l + 1, len(neurons), unit="blocks", message="neurons")
    chunks: dict[int, dict[str, Any]] = {}
    for row, values in seen.values.items():
        about = {"values": values, "lit": seen.maps.get(row)}
        chunks.setdefault(row // MAPS_PER_FILE, {})[str(row)] = about
    for chunk, about in sorted(chunks.items()):
        site.data(f"lit-{chunk}", about)


def _run(opened: _Opened, seen: Seen, neurons: list[list[int]], site: Site) -> dict[str, Any]:
    found, info = opened.found, opened.network.info
    summary = found.result.discovery
    assert summary is not None
    counts = Counter(opened.table.labels.tolist())
    height, width = info.preprocessing.input_size[1:]
    return {
        "name": found.result.name,
        "network": info.source.architecture,
        "widths": found.widths,
        "images": found.recipe.data.train,
        "scope": opened.scope,
        "topk": found.settings.topk,
        "methods": list(opened.tables),
        "grid": seen.grid,
        "size": [height, width],
        "ending": site.ending,
        "per_file": MAPS_PER_FILE,
        "labels": [[c.name, c.synset] for c in found.result.classes],
        "classes": [[c, counts[c]] for c in opened.table.classes],
        "neurons": neurons,
        "plan": _plan_said(opened),
        "notes": opened.notes,
    }


def _plan_said(opened: _Opened) -> dict[str, Any] | None:
    plan, config = opened.plan, opened.config
    if plan is None or config is None:
        return None
    said: dict[str, Any] = {"name": opened.name, "keep": plan.keep, "merged": plan.merged}
    if plan.heads is not None:
        dense = opened.network.info.heads
        said["heads"] = [[len(k), d] for k, d in zip(plan.heads, dense, strict=True)]
    if config.prune is not None:
        said["criterion"] = config.prune.criterion
        said["compensation"] = config.prune.compensation
    mine = opened.found.result.variant(opened.name)
    if mine is not None:
        said["macs"] = [opened.found.result.model.macs, mine.model.macs]
    if mine is not None and mine.evaluation is not None:
        e = mine.evaluation
        said["top1"] = [[r.value, r.low, r.high, r.total] for r in (e.dense.top1, e.pruned.top1)]
    return said


def _image(opened: _Opened, seen: Seen, row: int) -> dict[str, Any]:
    table = opened.table
    about: dict[str, Any] = {"id": str(table.ids[row]), "label": int(table.labels[row])}
    if row in seen.dense:
        about |= {"dense": seen.dense[row], "p": seen.true[row][0]}
    if row in seen.pruned:
        about |= {"pruned": seen.pruned[row], "q": seen.true_pruned[row]}
    if row in seen.ablated:
        about["ablated"] = seen.ablated[row]
    return about


def _ablations(table: PathTable, seen: Seen) -> dict[tuple[int, int], list[float]]:
    """Per neuron (block, unit): changes of the true class's probability without it."""
    changes: dict[tuple[int, int], list[float]] = {}
    for row, blocks in sorted(seen.ablated.items()):
        for l, values in enumerate(blocks):
            for k, p in enumerate(values):
                key = (l, int(table.neurons[row, l, k]))
                changes.setdefault(key, []).append(p - seen.true[row][0])
    return changes


def _neurons(
    opened: _Opened,
    seen: Seen,
    l: int,
    units: list[int],
    jacobian: torch.Tensor | None,
    ablations: dict[tuple[int, int], list[float]],
) -> dict[str, Any]:
    writes = written(opened.view, l) if jacobian is not None else None
    up = down = None
    if jacobian is not None and writes is not None:
        up, down = _pushed((jacobian @ writes[:, units].to(jacobian)).cpu())
    found = {}
    for n, unit in enumerate(units):
        about: dict[str, Any] = {}
        if seen.exemplars:
            kept = seen.exemplars[l]
            about["rows"] = kept.rows[n].tolist()
            about["values"] = kept.values[n].tolist()
            if seen.grid:
                about["lit"] = kept.lit(n)
        if up is not None and down is not None:
            about |= {"up": up[n], "down": down[n]}
        if (changes := ablations.get((l, unit))) is not None:
            about["alone"] = {"n": len(changes), "change": interval(changes)}
        found[str(unit)] = about
    return found


_Labels = list[list[list[float]]]


def _pushed(lens: torch.Tensor) -> tuple[_Labels, _Labels]:
    """Of each neuron the classes [class, logit] that it pushes up most, and down; lens: [c, n]."""
    rows = lens.T.contiguous()
    order = rows.argsort(dim=1, descending=True, stable=True)
    classes = rows.shape[1]
    k = min(PUSHED, classes // 2)
    both = []
    for chosen in (order[:, :k], order[:, classes - k :].flip(1)):
        values = rows.gather(1, chosen).tolist()
        both.append(
            [
                [[c, v] for c, v in zip(*each, strict=True)]
                for each in zip(chosen.tolist(), values, strict=True)
            ]
        )
    return both[0], both[1]
