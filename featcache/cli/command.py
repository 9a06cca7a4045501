"""What every command shares: errors become messages, warnings one line, results text or JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

import click

from featcache.errors import FeatcacheError
from featcache.system.console import sigterm_as_ctrl_c

__all__ = ["Command", "Commands", "Message", "print_json"]


class Message(click.ClickException):
    """A `FeatcacheError` as the command line shows it: one message, no traceback."""

    def __init__(self, error: FeatcacheError) -> None:
        super().__init__(str(error))
        self.kind = type(error).__name__
        self.exit_code = error.exit_status  # type: ignore[misc]

    def show(self, file: Any = None) -> None:
        """Print ``Kind: message`` on standard error."""
        kind = click.style(f"{self.kind}:", fg="red", bold=True)
        click.echo(f"{kind} {self.format_message()}", err=True, color=_colour(sys.stderr))


class Command(click.Command):
    """A command that turns what featcache raises into messages."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a `FeatcacheError` becomes a `Message`, SIGTERM click's "Aborted!"."""
        try:
            with sigterm_as_ctrl_c():
                return super().invoke(ctx)
        except FeatcacheError as error:
            raise Message(error) from error


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


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    title = click.style("Warning:", fg="yellow", bold=True)
    click.echo(f"{title} {message}", err=True, color=_colour(sys.stderr))


def _colour(stream: Any) -> bool:
    return "NO_COLOR" not in os.environ and stream.isatty()


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))
