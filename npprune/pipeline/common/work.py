"""What every stage needs besides its settings: where it runs, the seed, a way to say things."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from npprune.pipeline.common.device import environment, resolve_device
from npprune.pipeline.common.events import Emit, Event, ignore
from npprune.pipeline.common.processes import Processes, processes
from npprune.records import Environment

if TYPE_CHECKING:
    from npprune.data.given import Given
    from npprune.pipeline.common.inputs import Network

MEMORY = "memory:"
"""How the names begin of what a caller holds in Python: no file has such a name."""


@dataclass
class Held:
    """What a caller holds in Python, by the names that sections call it."""

    networks: dict[str, Network] = field(default_factory=dict)
    images: dict[str, Given] = field(default_factory=dict)


@dataclass
class Work:
    """One piece of work, handed down from stage to function.

    Args:
        device: as asked for: auto, cpu, cuda, cuda:N or mps.
        seed: of everything random.
        emit: gets the events: progress, remarks, warnings.
        command: the command line that asked for it, remembered by results.
        stage: who speaks.
        held: networks and images that are in memory, not in files.
    """

    device: str = "auto"
    seed: int = 0
    emit: Emit = ignore
    command: str = ""
    stage: str = ""
    held: Held = field(default_factory=Held)

    def on(self, stage: str) -> Work:
        """The same work in the words of a stage; what was resolved stays resolved."""
        other = replace(self, stage=stage)
        for name in ("team", "_place"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def on_cpu(self) -> Work:
        """The same work on the CPU, wherever it was asked for."""
        return replace(self, device="cpu")

    @cached_property
    def team(self) -> Processes:
        """This process among its peers."""
        return processes()

    @cached_property
    def _place(self) -> tuple[torch.device, str]:
        return resolve_device(self.team.device(self.device))

    @property
    def where(self) -> torch.device:
        """The device. DeviceError where it is not there."""
        return self._place[0]

    @property
    def reason(self) -> str:
        """Why this device."""
        return self._place[1]

    def environment(self) -> Environment:
        """What the numbers of this work are made with."""
        return environment(self.where, self.reason, self.seed)

    def generator(self) -> torch.Generator:
        """A fresh generator on the CPU, seeded."""
        return torch.Generator().manual_seed(self.seed)

    def say(self, message: str, **data: Any) -> None:
        """A remark."""
        self.emit(Event(self.stage, message, data=data))

    def warn(self, message: str) -> None:
        """A warning."""
        self.emit(Event(self.stage, message, level="warning"))

    def progress(
        self,
        done: int,
        total: int | None,
        unit: str = "images",
        message: str = "",
        stage: str | None = None,
        **data: Any,
    ) -> None:
        """How far it is; `stage` names a part of it, `message` what is done."""
        self.emit(
            Event(
                stage or self.stage,
                message,
                "progress",
                done=done,
                total=total,
                unit=unit,
                data=data,
            )
        )
