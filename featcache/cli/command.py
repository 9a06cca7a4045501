"""What every command shares: errors become messages, warnings one line, results text or JSON."""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from featcache.errors import FeatcacheError, Interrupted, SystemFault
from featcache.system.console import signals_as_ctrl_c
from featcache.system.files import STDOUT, guarded
from featcache.system.tables import printable


class Message(click.ClickException):
    """A `FeatcacheError` as the command line shows it: one message, no traceback."""

    def __init__(self, error: FeatcacheError) -> None:
        super().__init__(str(error))
        self.kind = type(error).__name__
        self.exit_code = error.exit_status  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print ``Kind: message`` on standard error."""
        kind = click.style(f"{self.kind}:", fg="red", bold=True)
        click.echo(f"{kind} {_safe(self.format_message())}", err=True, color=_colour(sys.stderr))


_STOPPED = Message(Interrupted("Stopped by a signal. Run the same command again."))


class Command(click.Command):
    """A command that turns what featcache raises into messages, and that can be quiet."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        quiet = "Print nothing on standard error but errors: no progress, no warnings."
        self.params.append(click.Option(["-q", "--quiet"], is_flag=True, help=quiet))

    def main(self, *args: Any, **more: Any) -> Any:
        """Run the command line."""
        _open_streams()
        try:
            return super().main(*args, **more)
        except FeatcacheError as error:  # of what click prints itself, such as help
            Message(error).show()
            sys.exit(error.exit_status)
        finally:  # All is done: Ctrl-C while Python takes itself down must not look like a failure.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """Read the command line."""
        try:
            return super().make_context(*args, **more)
        except KeyboardInterrupt:
            raise _STOPPED from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a `FeatcacheError` becomes a `Message`, and so does a signal."""
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(signals_as_ctrl_c())
                if ctx.params.pop("quiet"):  # errors are printed after this
                    nowhere = stack.enter_context(Path(os.devnull).open("w"))
                    stack.enter_context(contextlib.redirect_stderr(nowhere))
                Path.cwd()  # if it is gone, libraries fail in ways of their own
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except FeatcacheError as error:
            raise Message(error) from error
        except BrokenPipeError:  # whoever read standard output wants no more
            raise
        except (OSError, MemoryError) as error:
            raise Message(SystemFault.of(error)) from error
        except KeyboardInterrupt:
            raise _STOPPED from None


class Commands(Command, click.Group):
    """A group of such commands; a warning is one line, without a place in the code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which they were added."""
        return list(self.commands)


def _open_streams() -> None:
    """Open what was closed when the process began: a file would get its number, and its output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # What is printed to a closed standard output fails, and is told.
            os.open(os.devnull, os.O_WRONLY if name == "stderr" else os.O_RDONLY)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, closefd=False))
        stream = getattr(sys, name)
        if number and type(stream) is io.TextIOWrapper:
            setattr(sys, name, guarded(stream))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    title = click.style("Warning:", fg="yellow", bold=True)
    click.echo(f"{title} {_safe(str(message))}", err=True, color=_colour(sys.stderr))


def _safe(text: str, escaped: Callable[[str], str] = ascii) -> str:
    """Return a text of several lines without what else would steer a terminal."""
    return "\n".join(printable(line, escaped) for line in text.split("\n"))


def _colour(stream: Any) -> bool:
    return "NO_COLOR" not in os.environ and stream.isatty()


def show(
    as_json: bool, values: Mapping[str, Any], text: str, *, output: Path | None = None
) -> None:
    """Print a result: one JSON object on standard output, or text.

    Where the command wrote `output`, the text is of that file, and does not mix with it.
    """
    if as_json:
        print_json(values)
    elif output in (None, STDOUT):
        say(text, err=output is not None)
    else:
        say(f"{printable(str(output))}: {text}")


def check_json(as_json: bool, output: Path | None) -> None:
    """Refuse --json where the output itself goes to standard output."""
    if as_json and output == STDOUT:
        raise click.UsageError("--json and -o - both write to standard output; name a file.")


def say(text: object, *, err: bool = False) -> None:
    """Print lines of text for people, on standard output or standard error."""
    click.echo(_safe(str(text)), err=err)


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    click.echo(_safe(text, json.dumps))
