"""Lazily loaded verbs, and the one place where errors and warnings become lines on stderr."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TextIO, TypeVar

import click

from perfmodel.errors import PerfmodelError, did_you_mean

F = TypeVar("F", bound=Callable[..., Any])
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Verbs(click.Group):
    """A group whose members are named `module:attribute` and imported on first use."""

    def __init__(self, *args: Any, verbs: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **{"invoke_without_command": True, **kwargs})
        self.verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.verbs:
            return None
        module, attribute = self.verbs[cmd_name].split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in self.verbs and not word.startswith("-"):
            hint = did_you_mean(word, self.verbs) or f"; there are: {', '.join(self.verbs)}"
            raise click.UsageError(f"unknown command {word!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


def help_if_alone(context: click.Context) -> None:
    """The body of a group: without a verb it shows its help."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


class Program(Verbs):
    """The whole program: every error is one message on stderr and an exit code, never a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs |= {"prog_name": "perfmodel", "standalone_mode": False}
        with _warnings_as_lines():
            try:
                code = super().main(*args, **kwargs)
            except PerfmodelError as error:
                code = _fail(str(error), error.exit_code)
            except click.ClickException as error:
                code = _fail(_describe(error), 2)
            except OSError as error:
                # A report that cannot be written, a file that vanished. Closed pipes never get here: click ends them.
                code = _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
            except click.Abort:
                code = _fail("interrupted", _INTERRUPTED)
        # Without standalone mode --help and --version return their code, and a verb returns None.
        sys.exit(code or 0)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {message}", err=True)
    return code


def _describe(error: click.ClickException) -> str:
    """Click's message in our spelling: the option first, the nearest known one last."""
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption):
        known = [o for p in context.command.params for o in p.opts] if context else []
        hint = did_you_mean(error.option_name, known)
        return f"unknown option {error.option_name!r}{hint}; see `{_path(context)} --help`"
    if isinstance(error, click.MissingParameter):
        name = error.param.get_error_hint(context) if error.param and context else error.format_message()
        return f"{name} is missing; see `{_path(context)} --help`".replace("'", "")
    if isinstance(error, click.BadParameter) and error.param:
        option = error.param.opts[0] if isinstance(error.param, click.Option) else error.param.human_readable_name
        return f"{option}: {error.message.rstrip('.')}"
    text = error.format_message().rstrip(".")
    return text[:1].lower() + text[1:]


def _path(context: click.Context | None) -> str:
    return context.command_path if context else "perfmodel"


@contextmanager
def _warnings_as_lines() -> Any:
    """Show each of our own warnings once, as one line without a source position; leave other people's alone."""
    seen: set[str] = set()
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not category.__module__.startswith("perfmodel"):
            others(message, category, filename, lineno, file, line)
        elif str(message) not in seen:
            seen.add(str(message))
            click.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning, module=r"perfmodel\.")
        warnings.showwarning = show
        yield


def _use_specs(context: click.Context, parameter: click.Parameter, folder: str | None) -> None:
    if folder is not None:
        from perfmodel import catalog

        catalog.use_specs(folder)


def specs_option(function: F) -> F:
    """--specs, before or after the verb."""
    add = click.option(
        "--specs",
        metavar="DIR",
        is_eager=True,
        expose_value=False,
        callback=_use_specs,
        help="A folder of your own models, hardware and prices, searched first.",
    )
    return add(function)


def _use_calibration(context: click.Context, parameter: click.Parameter, files: tuple[str, ...]) -> None:
    if files:
        from perfmodel import calibration

        for file in files:
            calibration.use_file(file)


def common_options(function: F) -> F:
    """What every verb takes."""
    add = click.option("--json", "as_json", is_flag=True, help="Print JSON in base SI units instead of text.")
    calibrated = click.option(
        "--calibration-file",
        multiple=True,
        metavar="FILE",
        expose_value=False,
        callback=_use_calibration,
        type=click.Path(exists=True, dir_okay=False),
        help="A calibration file for its device, as `calibrate --out` writes it.",
    )
    return specs_option(calibrated(add(function)))
