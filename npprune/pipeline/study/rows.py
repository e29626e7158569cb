"""The rows of a study: which there are, what each one found, and the files they are kept in."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from npprune import words
from npprune.budget import Unit
from npprune.criteria import CRITERIA
from npprune.errors import DamagedError, UsageError, setting
from npprune.pipeline.prune.measuring import check_criterion, draws, needs_of
from npprune.recipe import StudySection
from npprune.records import Document, Latency, Mean, Rate
from npprune.store import atomic
from npprune.store.runs import RunFolder


@dataclass(frozen=True)
class Setting:
    """One row: what is done, and with which seed."""

    criterion: str
    selection: str
    compensation: str
    keep: float  # share of the hidden units that stay; of the MACs, where `unit` says so
    protect: bool  # path neurons first
    seed: int
    unit: Unit = "neurons"
    axes: str = "mlp"  # joined by +

    @property
    def kept(self) -> str:
        """The budget, for people."""
        return f"{100 * self.keep:g} %" + (" MACs" if self.unit == "macs" else "")

    @property
    def how(self) -> str:
        """Everything but budget and seed."""
        axes = [] if self.axes == "mlp" else [self.axes]
        return ", ".join([self.label, *axes, self.selection, self.compensation])

    @property
    def label(self) -> str:
        """The criterion, and whether paths are kept first."""
        return self.criterion + (" + paths" if self.protect else "")

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.how}, {self.kept} kept, seed {self.seed}"

    @property
    def file_name(self) -> str:
        """For the file of the row, without suffix."""
        paths = "_paths" if self.protect else ""
        budget = "keep" if self.unit == "neurons" else f"{self.unit}_{self.axes}_"
        return (
            f"{budget}{self.keep!r}_{self.criterion}{paths}_{self.selection}_{self.compensation}"
            f"_seed{self.seed}"
        )

    @property
    def scores(self) -> tuple[str, bool, int, Unit, str]:
        """Equal for rows that measure alike: the same ranking of neurons, the same axes."""
        return self.criterion, self.protect, self.seed, self.unit, self.axes

    @property
    def group(self) -> Setting:
        """Equal for rows that differ in the seed alone."""
        return replace(self, seed=0)


@dataclass
class StudyRow(Document):
    """A finished row. `refused`: why there is no such network; then nothing was measured."""

    kind: ClassVar[str] = "study-row"

    setting: Setting
    top1: Rate | None = None
    top5: Rate | None = None
    change: Mean | None = None  # paired, against dense
    divergence: Mean | None = None  # KL from the dense network's predictions, nats
    agreement: Rate | None = None
    correct: str = ""  # one digit an image, 1: right
    params: int = 0
    macs: int = 0
    widths: list[int] = field(default_factory=list)
    protected: list[int] = field(default_factory=list)
    seconds: float = 0.0  # as a run of its own, without decoding and measuring
    parts: dict[str, float] = field(default_factory=dict)
    latency: Latency | None = None
    healed: Rate | None = None  # top-1 after a short training
    healed_correct: str = ""
    healed_divergence: Mean | None = None
    healing_seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    refused: str = ""
    settings_sha256: str = ""  # of what all rows of the folder share


@dataclass
class StudyDense(Document):
    """The dense network on the same images."""

    kind: ClassVar[str] = "study-dense"

    top1: Rate  # among the chosen classes, if any were chosen
    top1_all: Rate  # over all classes
    correct: str
    params: int
    macs: int
    calibration: int  # images that every row was fitted on
    label_doubt: str = ""  # why the labels are probably wrong


def bits(right: Tensor) -> str:
    """A boolean [n] as digits."""
    return "".join("1" if r else "0" for r in right.tolist())


# ---------------------------------------------------------------- which


def settings_of(study: StudySection, with_paths: bool) -> list[Setting]:
    """The rows of a study, in the order of its lists, each once.

    Where the seed changes nothing (no draw in it), only the first is taken.

    Raises:
        UsageError: a criterion or a protection that reads paths, where there are none.
    """
    if not with_paths and (study.topk is not None or "on" in (study.protect or [])):
        raise UsageError(
            f"{setting('study.topk') if study.topk is not None else setting('study.protect', 'on')}"
            " reads paths, and no run folder was given",
            hint="`npprune discover` makes one; give it in place of the model's name",
        )
    names: list[str] = list(study.criteria or ()) or [
        n for n, c in CRITERIA.items() if with_paths or not c.paths
    ]
    for name in names:
        check_criterion(name, with_paths)
    protect = study.protect or (["off", "on"] if with_paths else ["off"])
    neurons = study.keep or ([] if study.target_macs else [0.5])
    budgets: list[tuple[Unit, float, str]] = [("neurons", keep, "mlp") for keep in neurons]
    for macs, axes in itertools.product(study.target_macs or [], study.axes):
        budgets.append(("macs", macs, _axes(axes)))
    rows = [
        Setting(criterion, selection, compensation, keep, word == "on", seed, unit, axes)
        for (unit, keep, axes), criterion, word, selection, compensation in itertools.product(
            budgets, names, protect, study.selections, study.compensations
        )
        if axes == "mlp" or selection == "measured"
        for seed in (study.seeds if draws(criterion) else study.seeds[:1])
    ]
    if not rows:
        raise UsageError(
            f"{setting('study.axes')} other than `mlp` need {setting('study.selections')} "
            f"`measured`, got {', '.join(f'`{s}`' for s in study.selections)}"
        )
    return list(dict.fromkeys(rows))


def _axes(named: str) -> str:
    """Axes joined by +, in their order; `all` stands for those of `words.ALL_AXES`."""
    each = list(words.ALL_AXES) if named == "all" else named.split("+")
    for word in each:
        words.check_word("study.axes", word, [*words.AXES, "all"])
    words.check_axes(each)
    return "+".join(axis for axis in words.AXES if axis in each)


def grouped(rows: Iterable[Setting]) -> list[Setting]:
    """In an order in which neighbours share statistics, then scores, then the harm's table."""
    ordered = list(rows)
    names = list(dict.fromkeys(row.criterion for row in ordered))
    needs = list(dict.fromkeys(tuple(sorted(needs_of(n))) for n in names))

    def place(row: Setting) -> tuple[int, ...]:
        group = needs.index(tuple(sorted(needs_of(row.criterion))))
        return group, row.seed, names.index(row.criterion), row.protect, ordered.index(row)

    return sorted(ordered, key=place)


# ---------------------------------------------------------------- files


def _rows_folder(folder: RunFolder) -> Path:
    return folder.path / "rows"


def row_path(folder: RunFolder, row: Setting) -> Path:
    """Where a row lies."""
    return _rows_folder(folder) / f"{row.file_name}.json"


def dense_path(folder: RunFolder) -> Path:
    """Where the dense network's numbers lie."""
    return folder.path / "dense.json"


def read_rows(folder: RunFolder) -> list[StudyRow]:
    """The finished rows, by name. DamagedError where one is not what was written there."""
    return [_read_row(path) for path in row_files(folder)]


def row_files(folder: RunFolder) -> list[Path]:
    """Where the finished rows lie."""
    where = _rows_folder(folder)
    return sorted(p for p in where.glob("*.json") if not p.name.startswith("."))


def _read_row(path: Path) -> StudyRow:
    row = atomic.read_json(StudyRow, path)
    if row.setting.file_name != path.stem:
        raise DamagedError(f"`{path}` holds the row {row.setting.name}")
    return row


def read_dense(folder: RunFolder) -> StudyDense | None:
    """The dense network's numbers, once they are there."""
    path = dense_path(folder)
    return atomic.read_json(StudyDense, path) if path.is_file() else None


def set_damaged_aside(folder: RunFolder, warn: Callable[[str], None]) -> None:
    """Rows, and the dense network's numbers, that are not what was written: computed again."""
    for path in [*row_files(folder), dense_path(folder)]:
        try:
            if path == dense_path(folder):
                read_dense(folder)
            else:
                _read_row(path)
        except DamagedError as err:
            aside = atomic.set_aside(path)
            warn(f"{err.message}: computed again, the damaged one is `{aside}`")
