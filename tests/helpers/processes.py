"""Several processes of the command line, as torchrun starts them."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.helpers.discovering import FORK, run_rank

PATIENCE = 180.0  # seconds; what hangs is a failure


class Team:
    """Processes as torchrun starts them, without its start-up time; texts go to files."""

    def __init__(
        self,
        root: Path,
        args: list[str],
        count: int = 2,
        pause: float = 0.0,
        dies: str = "",
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.root = root
        self.ranks = [
            FORK.Process(target=run_rank, args=(root, args, rank, count, port, pause, dies))
            for rank in range(count)
        ]
        for process in self.ranks:
            process.start()

    def end(self) -> list[int | None]:
        """The exit codes; a rank that hangs is a failure."""
        for process in self.ranks:
            process.join(PATIENCE)
        hung = [process for process in self.ranks if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung
        return [process.exitcode for process in self.ranks]

    def text(self, name: str) -> str:
        return (self.root / name).read_text()
