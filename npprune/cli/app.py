"""Wiring: which command is which function, and how an exception becomes an exit code.

Exit codes: 0 done; 1 ran, and a gate failed; 2 could not start; 70 a bug of ours;
130 interrupted and 143 terminated, both resumable.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from functools import partial
from typing import Annotated, Any

import typer

import npprune
from npprune.cli import (
    analyze,
    bench,
    demo,
    discover,
    endings,
    env,
    evaluate,
    explore,
    export,
    heal,
    paths,
    predict,
    prune,
    report,
    run,
    specialise,
    streams,
    study,
    verify,
)
from npprune.cli.console import drop, say, show_error
from npprune.cli.options import flag_name
from npprune.errors import NpPruneError, PeerError, UsageError
from npprune.untrusted import first_line, out_of_memory
from npprune.words import did_you_mean

BUG = 70
USAGE = 2
PARSER_ERROR = typer.BadParameter.__mro__[1]  # the base of the parser's usage errors

IN_ONE_PROCESS = ("export", "bench", "analyze", "explore")
"""Of several processes, each would do all of the work and write the same files."""

app = typer.Typer(
    name="npprune",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"npprune {npprune.__version__}")
        raise typer.Exit


EXAMPLES = """\
Start here: npprune demo
"""


@app.callback(epilog=EXAMPLES)
def _root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="the version", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Find the neurons that carry each class through a vision transformer, keep them, remove the
    rest for real: discover, prune, eval, export, report.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if context.invoked_subcommand in IN_ONE_PROCESS and count != "1":
        raise UsageError(
            f"`npprune {context.invoked_subcommand}` runs in one process, and WORLD_SIZE says "
            f"`{count}`",
            hint="start it without `torchrun`, or unset WORLD_SIZE",
        )


for _name, _module in (
    ("discover", discover),
    ("prune", prune),
    ("heal", heal),
    ("eval", evaluate),
    ("export", export),
    ("bench", bench),
    ("predict", predict),
    ("analyze", analyze),
    ("explore", explore),
    ("study", study),
    ("report", report),
    ("specialise", specialise),
    ("verify", verify),
    ("run", run),
    ("demo", demo),
    ("env", env),
):
    app.command(_name, epilog=_module.EXAMPLES)(_module.command)
app.add_typer(paths.app, name="paths")


def main() -> None:
    """The program: runs the command of `sys.argv` and exits."""
    endings.listen()
    endings.leave(endings.guarded(program))


def program() -> int:
    """Run the command of `sys.argv` and return its exit code."""
    if not sys.warnoptions:  # what libraries say to each other's authors; `python -W` shows it
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
    return run_app()


def run_app(args: list[str] | None = None) -> int:
    """Run one command line and return its exit code; nothing escapes but text."""
    args = sys.argv[1:] if args is None else args
    streams.prepare()
    try:
        code = app(args=args, obj=args, prog_name="npprune", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
        return 0
    except _ends():
        return endings.told()
    except SystemExit as exit_:  # shell completion ends this way
        return exit_.code if isinstance(exit_.code, int) else USAGE
    except PeerError as error:
        if error.hint:
            say("ended", f"{error.message}; {error.hint}")
        return error.exit_code
    except NpPruneError as error:
        return _refused(error.exit_code, *error.said(error.name_of or partial(flag_name, {})))
    except OSError as error:
        return _os_error(error)
    except Exception as error:
        if isinstance(error, PARSER_ERROR):  # the parser's usage errors
            return _usage_error(error, args)
        if type(error).__name__.endswith("LinAlgError"):
            return _no_solution(error)
        if out_of_memory(error):
            return _out_of_memory(error)
        return _bug(error)
    if code in endings.WORDS:  # newer versions of Typer catch the interrupt themselves
        return endings.told()
    return code if isinstance(code, int) else 0


def _ends() -> tuple[type[BaseException], ...]:
    """What ends the program early: an interrupt, and whatever a library made of a signal."""
    early: tuple[type[BaseException], ...] = (typer.Abort, KeyboardInterrupt)
    return (*early, Exception) if endings.came() else early


def _refused(code: int, message: str, hint: str | None) -> int:
    """Say what is wrong with the command, unless another process of this machine says the same:
    until torchrun's processes have met, each finds what the others find."""
    dist = sys.modules.get("torch.distributed")
    met = dist is not None and dist.is_available() and dist.is_initialized()
    if met or os.environ.get("LOCAL_RANK", "0") == "0":
        show_error(message, hint)
    else:
        endings.let_first_speak(code)
    return code


def _usage_error(error: Exception, args: list[str]) -> int:
    """A command line that the parser refuses, in our words."""
    context = getattr(error, "ctx", None)
    parameter = getattr(error, "param", None)
    message = str(getattr(error, "message", "") or "")
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        return USAGE
    if message and parameter is not None:
        name = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
        message = f"`{name}` {_rule(message)}{_given(args, parameter.opts)}"
    elif not message:
        message = error.format_message()  # type: ignore[attr-defined]
    message = message.rstrip(".")
    shown = f"`{context.command_path if context else 'npprune'} --help` shows what there is"
    near = _nearest(error) if context is not None else None
    return _refused(USAGE, message[:1].lower() + message[1:], f"{near} {shown}" if near else shown)


def _nearest(error: Any) -> str | None:
    """The option that may have been meant."""
    wrong = getattr(error, "option_name", None)
    known = [flag for p in error.ctx.command.params for flag in (*p.opts, *p.secondary_opts)]
    return did_you_mean(wrong, known) if wrong and wrong not in known else None


def _rule(message: str) -> str:
    """What the parser says of a value, as a rule; its words differ between versions."""
    if "integer" in message:
        return "must be a whole number"
    if "number" in message or "float" in message:
        return "must be a number"
    return f"is not right: {message}"


def _given(args: list[str], names: list[str]) -> str:
    """`, got VALUE` for an option, from the command line itself."""
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name in names:
            return f", got `{value if equals else following}`"
    return ""


def _os_error(error: OSError) -> int:
    """A file or the disk: the user's world, not our bug."""
    where = f": {error.filename}" if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    show_error(f"{reason[:1].lower()}{reason[1:]}{where}")
    return _debug(error, USAGE)


def _no_solution(error: Exception) -> int:
    """Statistics on which a factorisation of the linear algebra library does not converge."""
    show_error(
        f"the calibration statistics cannot be factorised: {first_line(error)}",
        "more calibration images, or a larger `--shrinkage`",
    )
    return _debug(error, USAGE)


def _out_of_memory(error: Exception) -> int:
    said = first_line(error) if str(error) else "the machine has none left"
    show_error(
        f"out of memory: {said}",
        "a smaller `--batch-size`, fewer `--workers` and smaller images take less",
    )
    return _debug(error, USAGE)


def _bug(error: Exception) -> int:
    first = (str(error).splitlines() or [""])[0]
    show_error(
        f"npprune met a bug of its own: {type(error).__name__}: {first}".rstrip(": "),
        "run again with NPPRUNE_DEBUG=1 for the traceback, and report it",
    )
    return _debug(error, BUG)


def _debug(error: Exception, code: int) -> int:
    if os.environ.get("NPPRUNE_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    return code
