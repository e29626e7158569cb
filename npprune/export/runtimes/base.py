"""What every runtime has in common: it opens a network, and runs it on batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


@dataclass(frozen=True)
class Served:
    """A network to run: as a module for PyTorch, as an ONNX file for others. `file` gives the file
    in a precision, making it where it has to."""

    model: nn.Module | None = None
    file: Callable[[str], Path] | None = None

    def path(self, precision: str) -> Path:
        """The ONNX file in a precision."""
        assert self.file is not None, "a runtime that takes files was given a module alone"
        return self.file(precision)


@dataclass(frozen=True)
class Opened:
    """A network that is ready to run on batches of one shape.

    bind: puts a batch in place; each call of what it gives runs the network once, to its end.
    read: what such a call gave, as logits float32 [b, c].
    """

    bind: Callable[[np.ndarray], Callable[[], object]]
    read: Callable[[object], np.ndarray]
    provider: str  # what runs, e.g. "CPUExecutionProvider" or "cpu"
    threads: int  # 0: the runtime's own choice

    def run(self, batch: np.ndarray) -> np.ndarray:
        """Logits float32 [b, c] of one batch."""
        return self.read(self.bind(batch)())


class Runtime(ABC):
    """One way to run a network."""

    name: ClassVar[str]  # a word of `words.RUNTIMES`
    precisions: ClassVar[tuple[str, ...]]
    takes_files: ClassVar[bool]  # ONNX files; otherwise it runs modules
    places: ClassVar[tuple[str, ...]]  # words of `--provider` that it may know

    @abstractmethod
    def open(
        self,
        served: Served,
        batch: np.ndarray,
        *,
        precision: str = "fp32",
        place: str = "auto",
        threads: int | None = None,
        timed: bool = True,
    ) -> Opened:
        """`served`, ready for batches of the shape of `batch`.

        place: a word of `--provider`; for PyTorch a device. timed: False where several networks
        are open at once, and idle threads must leave the cores to others.

        Raises:
            DeviceError: the runtime, the place or the precision is not there; it says why, and
            what to install.
        """
