"""The program: `npprune`, `python -m npprune`, and what torchrun starts."""

from npprune.cli import endings


def main() -> None:
    """Mind the signals, then load the program and run it."""
    endings.listen()
    endings.leave(endings.guarded(_program))


def _program() -> int:
    from npprune.cli.app import program

    return program()


if __name__ == "__main__":
    main()
