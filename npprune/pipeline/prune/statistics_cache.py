"""The pass over the calibration images: its sums are kept, found again, and resumed.

What is saved is read only by a command that would compute the same bits: the key holds the
network, the decoded images batch by batch, the draws, and what computes. Where the sums of all
blocks do not fit into memory, groups of blocks are collected in several passes with the same
draws, and read from disk one block at a time afterwards: the numbers are the same.

Several processes take a stretch of the batches each, with the draws that one process would make
for them, and keep its sums by themselves; then these are added up.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npprune.core.compression.statistics import (
    GRADIENTS,
    BlockSums,
    Statistics,
    collect_statistics,
    outputs_of,
    skip_draws,
)
from npprune.core.view import VitView
from npprune.criteria import NEEDS, Need
from npprune.errors import plural
from npprune.files import scratch
from npprune.pipeline.common.inputs import Network
from npprune.pipeline.common.memory import allowed_bytes
from npprune.pipeline.common.processes import Processes
from npprune.pipeline.common.work import Work
from npprune.records import to_dict
from npprune.store.runs import RunFolder
from npprune.store.statistics_store import StatisticsStore

STAGE = "statistics"
VERSION = 1  # of the sums: one more whenever `collect_statistics` gives other bits
TARGET = "fisher"  # as saved: the loss gradient of `collect_statistics`
DRAWS = 1
SAVE_SECONDS = 30.0  # between two saved states of a pass,
SAVE_SHARE = 10  # and at least so many times as long as a save takes
WORK = 8  # matrices [h, h] at work on one block: its covariance, inverse and copies
_GENERATOR = "generator"


@dataclass
class StatisticsCache:
    """Where a command's statistics are kept, and how much memory they may take.

    home: the folder of all sets; None: they are not kept. network: what decides the sums besides
    images and draws (see `identity`). memory: GiB for the sums, None: half of the memory.
    write: whether anything may be written to the home.
    """

    home: Path | None = None
    network: dict[str, Any] = field(default_factory=dict)
    memory: float | None = None
    write: bool = True
    images: str = ""  # sha256 of the decoded images, once it was computed


@dataclass
class Collected:
    """The statistics, the seconds they took (now or before), and what a record should say."""

    statistics: Statistics
    seconds: float
    record: dict[str, Any]


def statistics_home(run: RunFolder | None, out: Path) -> Path:
    """The run folder's; without a run a hidden folder next to the checkpoint, shared by all that
    stand there: the checkpoint itself is replaced as a whole, and another budget has another."""
    return run.path / "statistics" if run is not None else out.resolve().parent / ".statistics"


def identity(network: Network, outputs: list[int] | None = None) -> dict[str, Any]:
    """What a network is, as far as it decides what it computes.

    outputs: the classes that its head is cut to.
    """
    source = network.info.source
    return {
        "sha256": source.sha256,
        "architecture": source.architecture,
        "arguments": to_dict(source)["model_args"],
        "class": type(network.model).__qualname__,
        "heads": network.info.heads,
        "outputs": outputs,
    }


def collect(
    view: VitView,
    batches: Sequence[Tensor],
    needs: Iterable[Need],
    generator: torch.Generator,
    cache: StatisticsCache,
    work: Work,
) -> Collected:
    """The statistics of the calibration images: found, resumed, or computed.

    The generator is left as after one whole pass, whatever was found.
    """
    ordered = tuple(n for n in NEEDS if n in set(needs))
    if work.team.count > 1:
        return _collect_together(view, batches, ordered, generator, cache, work)
    return _Collecting(view, batches, ordered, generator, cache, work).run()


@contextlib.contextmanager
def own_batches(
    view: VitView,
    batches: Sequence[Tensor],
    generator: torch.Generator,
    team: Processes,
    *,
    draws: bool = True,
) -> Iterator[Sequence[Tensor]]:
    """This process's stretch of the batches; the generator begins where one process would be, and
    is left as after all of them."""
    mine = team.stretch(len(batches))
    before, after = batches[: mine.start], batches[mine.stop :]
    outputs: Sequence[int] = ()
    if draws and team.count > 1:
        device = next(view.model.parameters()).device
        with torch.no_grad():
            outputs = outputs_of(view, batches[0][:1].to(device), False).shape[1:]
        skip_draws(generator, before, outputs)
    yield batches[mine.start : mine.stop]
    if outputs:
        skip_draws(generator, after, outputs)


def _collect_together(
    view: VitView,
    batches: Sequence[Tensor],
    needs: tuple[Need, ...],
    generator: torch.Generator,
    cache: StatisticsCache,
    work: Work,
) -> Collected:
    """Each process the sums of its own batches, kept in a folder of its own; then all of them."""
    team = work.team
    home = cache.home and cache.home / f"{team.rank + 1}-of-{team.count}"
    draws = bool(GRADIENTS & set(needs))
    with own_batches(view, batches, generator, team, draws=draws) as mine:
        own = _Collecting(view, mine, needs, generator, replace(cache, home=home, images=""), work)
        found = own.run() if mine else Collected(Statistics(needs), 0.0, {})
    images = sum(map(len, batches))
    whole = Statistics(needs, images)
    with contextlib.ExitStack() as held:
        spilled = None
        if not own.fits:
            folder = held.enter_context(scratch())
            spilled = StatisticsStore(folder, {}, images=images, batches=len(batches))
        for l in own.blocks:
            named: dict[str, Tensor] = {}
            if mine:
                named = Statistics(needs, 0, {l: found.statistics.block(l)}).to_tensors()
                del named["header"]
                found.statistics.blocks.pop(l, None)
            named = team.total(named)
            header = Statistics(needs, images).to_tensors()["header"]
            if spilled is None:
                whole.blocks[l] = _placed({"header": header, **named}, own.device)
            else:
                spilled.save([(l, {"header": header, **named})], images, len(batches))
        if spilled is not None:
            files = {l: spilled.file(l) for l in own.blocks}
            whole = SavedStatistics(needs, images, files, own.device)
            weakref.finalize(whole, held.pop_all().close)
    record = {**found.record, "images": images, "processes": team.count}
    return Collected(whole, found.seconds, record)


class SavedStatistics(Statistics):
    """Statistics that stay on disk: one block at a time is in memory."""

    def __init__(
        self, needs: tuple[Need, ...], images: int, files: dict[int, Any], device: torch.device
    ) -> None:
        super().__init__(needs, images)
        self._files, self._device = files, device
        self._last: tuple[int, BlockSums] | None = None

    def block(self, l: int) -> BlockSums:
        """The sums of block l, read when they are asked for."""
        if self._last is None or self._last[0] != l:
            self._last = None  # gone before the next one comes
            self._last = l, _read(self._files[l], self._device)
        return self._last[1]

    def position_weights(self, l: int, salience: float) -> Tensor:
        """As in `Statistics`, without reading the block's matrices."""
        sums = _read(self._files[l], self._device, ("position",))
        return Statistics(self.needs, self.images, {l: sums}).position_weights(l, salience)


class _Collecting:
    """One call of `collect`."""

    def __init__(
        self,
        view: VitView,
        batches: Sequence[Tensor],
        needs: tuple[Need, ...],
        generator: torch.Generator,
        cache: StatisticsCache,
        work: Work,
    ) -> None:
        self.view, self.batches, self.needs = view, batches, needs
        self.generator, self.cache, self.work = generator, cache, work.on(STAGE)
        self.draws = needs != ("moments",)
        self.blocks = range(len(view.widths))
        self.images = sum(map(len, batches))
        self.device = next(view.model.parameters()).device
        self.sizes = [self._bytes(l) for l in self.blocks]
        self.allowed = allowed_bytes(cache.memory, self.device, processes=work.team.local_count)
        self.room = self.allowed - WORK * 8 * max(view.widths) ** 2
        self.fits = sum(self.sizes) <= self.room
        self.first_draw = generator.get_state()
        self.sums: dict[int, BlockSums] = {}
        self.seconds = 0.0  # earlier commands'
        self.passes = 0
        self.found = 0.0  # share of the work

    def run(self) -> Collected:
        store = self._store() if self.cache.home is not None else None
        if store is not None:
            self._open(store)
            whole = all(store.done(l) for l in self.blocks)
            if not whole and (not self.cache.write or not self._disk_has_room(store)):
                store = None
        if store is not None:
            if not whole:
                with store.lock(self._say_waiting):
                    self._open(store)  # another process may have been at it
                    self._compute(store)
                    store.remove_older()
            else:
                self._say_found(store)
            return self._result(store)
        if self.fits:
            self._compute(None)
            return self._result(None)
        with contextlib.ExitStack() as held:
            folder = held.enter_context(scratch())
            spilled = StatisticsStore(folder, {}, images=self.images, batches=len(self.batches))
            self._compute(spilled)
            result = self._result(spilled)
            weakref.finalize(result.statistics, held.pop_all().close)
        return result

    # ------------------------------------------------------------ parts

    def _store(self) -> StatisticsStore:
        assert self.cache.home is not None
        return StatisticsStore(
            self.cache.home, self._settings(), images=self.images, batches=len(self.batches)
        )

    def _settings(self) -> dict[str, Any]:
        """Everything that decides the bits of the sums."""
        if not self.cache.images:
            self.cache.images = images_sha256(self.batches)
        settings = {
            "version": VERSION,
            "network": self.cache.network,
            "images": self.cache.images,
            "needs": list(self.needs),
            "torch": torch.__version__,
            "hardware": hardware(self.device),
        }
        if self.draws:
            start = hashlib.sha256(self.first_draw.numpy().tobytes()).hexdigest()
            settings |= {"target": TARGET, "draws": DRAWS, "generator": start}
        return settings

    def _open(self, store: StatisticsStore) -> None:
        bad = store.open()
        if bad:
            self.work.warn(
                f"`{store.path}`: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''} "
                "cannot be used (damaged or changed): computed again"
            )
        self.seconds = store.info.seconds

    def _disk_has_room(self, store: StatisticsStore) -> bool:
        """Whether two states of the sums fit on the disk: the old one is there meanwhile."""
        needed = 2 * sum(self.sizes)
        free = store.free()
        if free >= needed:
            return True
        self.work.warn(
            f"statistics are not kept: they take {needed / 2**30:.1f} GiB while they are "
            f"written, and `{store.home}` has {free / 2**30:.1f} GiB left"
        )
        return False

    def _compute(self, store: StatisticsStore | None) -> None:
        """What is missing, in as few passes as the memory allows."""
        if store is not None and store.info.blocks:
            self._say_found(store)
        passes = self._passes(store)
        if passes and not self.fits:
            self.work.say(
                f"the sums of {plural(len(self.blocks), 'block')} take "
                f"{sum(self.sizes) / 2**30:.2g} GiB "
                f"and {self.allowed / 2**30:.2g} are allowed (`--memory`): "
                f"{plural(len(passes), 'pass', 'passes')} over the images, kept on disk"
            )
        self.passes = len(passes)
        for i, (begun, group) in enumerate(passes):
            self._pass(store, begun, group, i)

    def _passes(self, store: StatisticsStore | None) -> list[tuple[int, list[int]]]:
        """(batches done before, blocks) of every pass."""
        at = {l: part.batches for l, part in store.info.blocks.items()} if store else {}
        out: list[tuple[int, list[int]]] = []
        taken = 0
        for l in self.blocks:
            begun = at.get(l, 0)
            if begun == len(self.batches):
                continue
            taken += self.sizes[l]
            if not out or out[-1][0] != begun or (not self.fits and taken > self.room):
                out.append((begun, []))
                taken = self.sizes[l]
            out[-1][1].append(l)
        return out

    def _pass(
        self, store: StatisticsStore | None, begun: int, group: list[int], number: int
    ) -> None:
        """One pass over the batches from `begun` on, for some blocks."""
        state = Statistics(self.needs)
        self.generator.set_state(self.first_draw)
        if begun and store is not None:
            files = {l: store.file(l) for l in group}
            state.images = store.info.blocks[group[0]].images
            state.blocks = {l: _read(file, self.device) for l, file in files.items()}
            if self.draws:
                self.generator.set_state(files[group[0]].get_tensor(_GENERATOR).clone())
            del files
        done, start = begun, time.perf_counter()
        pause, saved = SAVE_SECONDS, start

        def save() -> None:
            nonlocal pause, saved
            if store is None:
                return
            now = time.perf_counter()
            store.info.seconds = self.seconds + now - start
            store.save(self._tensors(state, group), state.images, done)
            saved = time.perf_counter()
            pause = max(SAVE_SECONDS, SAVE_SHARE * (saved - now))

        def after(stats: Statistics) -> None:
            nonlocal done
            done += 1
            if done < len(self.batches) and time.perf_counter() - saved >= pause:
                save()
            self.work.progress(number * self.images + stats.images, self.passes * self.images)

        collect_statistics(
            self.view,
            (x.to(self.device) for x in self.batches[begun:]),
            blocks=group,
            draws=DRAWS,
            generator=self.generator,
            state=state,
            on_batch=after,
        )
        spent = time.perf_counter() - start
        save()
        self.seconds += spent
        if self.fits:
            self.sums |= state.blocks

    def _tensors(
        self, state: Statistics, group: Sequence[int]
    ) -> Iterable[tuple[int, dict[str, Tensor]]]:
        """One block's at a time: a copy of all of them would take as much memory again."""
        for l in group:
            one = Statistics(self.needs, state.images, {l: state.blocks[l]})
            named = one.to_tensors()
            if self.draws:
                named[_GENERATOR] = self.generator.get_state()
            yield l, named

    def _result(self, store: StatisticsStore | None) -> Collected:
        record: dict[str, Any] = {
            "images": self.images, "found": round(self.found, 3), "passes": self.passes,
        }  # fmt: skip
        stats = Statistics(self.needs, self.images, self.sums)
        if store is not None:
            record["settings_sha256"] = store.info.settings_sha256
            files = {l: store.file(l) for l in self.blocks if l not in self.sums}
            if self.draws and not self.passes:
                self.generator.set_state(files[0].get_tensor(_GENERATOR).clone())
            if self.fits:
                found = {l: _read(file, self.device) for l, file in files.items()}
                stats.blocks = {l: found[l] if l in found else self.sums[l] for l in self.blocks}
            else:
                stats = SavedStatistics(self.needs, self.images, files, self.device)
        return Collected(stats, round(self.seconds, 3), record)

    def _bytes(self, l: int) -> int:
        """What the sums of block l take."""
        return sums_bytes(self.view.widths[l], self.view.fc2(l).out_features, self.needs)

    def _say_found(self, store: StatisticsStore) -> None:
        there = sum(part.images for part in store.info.blocks.values())
        self.found = there / (len(self.blocks) * self.images)
        words = f"statistics of {plural(self.images, 'image')} found in {store.path}"
        if self.found < 1:
            words = f"{self.found:.0%} of the statistics found in {store.path}: resumes from there"
        self.work.say(words)

    def _say_waiting(self) -> None:
        self.work.say("another process computes the same statistics: waiting for them")


def sums_bytes(hidden: int, width: int, needs: Sequence[Need]) -> int:
    """What the sums of a block of so many hidden units take, in a network of this width."""
    matrices = hidden * hidden * (("moments" in needs) + ("salience" in needs))
    sums = 8 * (matrices + width * width * ("curvature" in needs) + 6 * hidden)
    return 2 * sums if "read" in needs else sums


def images_sha256(batches: Sequence[Tensor]) -> str:
    """Of the decoded images, batch by batch: what was read, chosen and prepared, and how."""
    total = hashlib.sha256()
    for x in batches:
        total.update(f"{x.dtype} {list(x.shape)}".encode())
        total.update(x.contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def hardware(device: torch.device) -> list[Any]:
    """What computes, as far as it decides the last bits."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), torch.get_float32_matmul_precision()]
    return [device.type, torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]


def _read(file: Any, device: torch.device, names: Sequence[str] | None = None) -> BlockSums:
    """The sums in a block's file, where the pass would have left them."""
    wanted = [n for n in list(file.keys()) if n != _GENERATOR]
    if names is not None:
        wanted = [n for n in wanted if n == "header" or n.partition(".")[2] in names]
    return _placed({n: file.get_tensor(n) for n in wanted}, device)


def _placed(tensors: dict[str, Tensor], device: torch.device) -> BlockSums:
    """The sums of one block from named tensors."""
    where = torch.device("cpu") if device.type == "mps" else device  # it has no float64
    read = Statistics.from_tensors(tensors)
    (sums,) = read.blocks.values()
    for name, value in vars(sums).items():
        if isinstance(value, Tensor):
            setattr(sums, name, value.to(where))
    return sums
