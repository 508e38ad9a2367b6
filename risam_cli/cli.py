"""The root command: lazy subcommands, and the one place that turns an error into an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from risam_cli.commands.options import option_names, suggest_option, verbosity_options
from risam_cli.console.console import Console, get_console, set_console
from risam_cli.console.streams import open_standard_streams
from risam_cli.errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_OK,
    Interrupted,
    OutputError,
    RisamError,
    machine_error,
    reason_of,
    use_front_end,
)
from risam_cli.interrupts import requests_to_end
from risam_cli.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "predict": ("predict", "Masks for images and expressions, in batches."),
    "explain": ("explain", "Show what the network looked at, word by word."),
    "eval": ("eval", "Score a model or anyone's masks on a benchmark."),
    "compare-models": ("compare_models", "Draw several models' masks side by side."),
    "compare": ("compare", "Put eval reports side by side, with paired intervals."),
    "init": ("init", "Write a YAML file that trains on your own data."),
    "train": ("train", "Train a model from a YAML file."),
    "export-masks": ("export_masks", "Turn predictions into other annotation formats."),
    "merge": ("merge", "Merge the output folders of shards."),
    "models": ("models", "List, inspect, verify and fetch models."),
    "refshapes": ("refshapes", "Make the procedural data set RefShapes."),
    "doctor": ("doctor", "Show what this machine can do and what is missing."),
    "completion": ("completion", "Print the script that completes risam in a shell."),
}
"""Name -> (module in ``risam_cli.commands`` that defines ``command``, its line in ``--help``).

The line stands here, so that ``risam --help`` imports no command.
"""


class _PipeBroken(Exception):
    """A BrokenPipeError on its way to :func:`main`."""


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is called, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of ``cmd_name`` and take its ``command``."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"risam_cli.commands.{COMMANDS[cmd_name][0]}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The subcommand that is meant; an unknown one is told with the name nearest to it."""
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if near and args[0] not in COMMANDS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand, past click's own answers to Ctrl-C and to a broken pipe.

        Raises:
            OutputError: the working folder is gone; libraries that look for it would crash.
        """
        try:
            os.getcwd()
        except FileNotFoundError:
            raise OutputError(
                "the working folder no longer exists", "change to another (cd)"
            ) from None
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort) as error:
            raise Interrupted("interrupted") from error
        except BrokenPipeError as error:
            raise _PipeBroken from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.command(
    cls=LazyGroup,
    name="risam",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="risam")
@verbosity_options
def root() -> None:
    """Referring image segmentation: from images and phrases to masks.

    Data goes to stdout, messages and progress go to stderr.

    \b
    Exit codes: 0 all done; 1 could not start or go on; 2 wrong usage;
    3 finished, but some items failed; 130 interrupted, finished work kept.

    \b
    Examples:
      risam predict photos/ -e "the dog" --save png,html -o out
      risam doctor
    """


_main_pid = os.getpid()


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and give its exit code; errors are told on stderr in one line.

    A command gives its exit code as its return value; None means 0.

    Args:
        args: the arguments without the program's name; by default those of the process.
    """
    before = use_front_end(option_names(root))
    try:
        return _run(args)
    finally:
        use_front_end(before)


def _run(args: Sequence[str] | None) -> int:
    try:
        open_standard_streams()
        set_console(Console())
        for number in requests_to_end():
            signal.signal(number, _on_request_to_end)
        code = root.main(args=args, prog_name="risam", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _debug_traceback()
        told = suggest_option(error) if isinstance(error, click.NoSuchOption) else error
        told.show(file=sys.stderr)
        return error.exit_code
    except RisamError as error:
        _debug_traceback()
        get_console().error(str(error))
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):  # before or after the command's own time
        _debug_traceback()
        get_console().error("interrupted")
        return EXIT_INTERRUPTED
    except (_PipeBroken, BrokenPipeError):
        return _broken_pipe()
    except Exception as error:
        _debug_traceback()
        get_console().error(_told(error))
        return EXIT_ERROR
    return code if isinstance(code, int) else EXIT_OK


def _told(error: Exception) -> str:
    """What is said of an error outside of the family."""
    machine = machine_error(error)
    if machine is not None:
        return str(machine)
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or use a smaller model or batch"
    library = _library_of(error)
    if library:
        return f"{library} cannot be loaded: {reason_of(error)}; install it again"
    if isinstance(error, OSError):
        # Whatever writes files names them, so a full disk without a name is what stdout goes to.
        unnamed = "stdout: " if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
        place = f"{os.fsdecode(error.filename)}: " if error.filename else unnamed
        return f"{place}{reason_of(error)}"
    again = "" if get_console().tracebacks else "; run again with --debug for the traceback"
    return f"internal error: {type(error).__name__}: {error}{again}"


def _library_of(error: Exception) -> str:
    """The library whose import failed, by the innermost import statement on the way; or ""."""
    name = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        if code.co_name == "<module>":
            name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if isinstance(error, ImportError) and error.name and not name.startswith("risam"):
        return name
    return "" if name.startswith(("risam", "__main__")) else name


def _broken_pipe() -> int:
    """End without a word where stdout's reader left, as in ``risam predict … | head -1``."""
    if _reader_left():
        # Python flushes stdout once more at exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        _debug_traceback()
        get_console().error("internal error: a pipe to another process broke")
    return EXIT_ERROR


def _debug_traceback() -> None:
    if get_console().tracebacks:
        get_console().block(traceback.format_exc())


def _reader_left() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows
        return True
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (OSError, ValueError):
        return False


def _on_request_to_end(signum: int, frame: FrameType | None) -> None:
    """Stop as Ctrl-C does: an exception that no ``except Exception`` on the way can swallow."""
    if os.getpid() != _main_pid:  # a forked loader inherits the handler and is stopped on purpose
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    raise KeyboardInterrupt
