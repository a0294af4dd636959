"""The command line as a process sees it: arguments in, text and an exit status out.

Every error is one line, and what helps against it another.
What a command does stands in `decode`, `serve`, `bench` and `train`; which there are, in `table`.
"""

import difflib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from types import FrameType
from typing import Annotated

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from flashdraft import __version__
from flashdraft.cli.flat import flat
from flashdraft.cli.table import COMMANDS, Command, function_of
from flashdraft.errors import FlashDraftError, InvalidParameter

__all__ = ["main"]

_STREAMS = ("stdin", "stdout", "stderr")  # by descriptor


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit status: 0, 1 for an error, 2 for a slip of usage, 130 after Ctrl-C.
    """
    is_own_process = arguments is None
    given = _joined(list(sys.argv[1:] if arguments is None else arguments))
    with _open_streams():
        _set_encodings()
        if is_own_process and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminated)
        return _run(given)


def _run(given: list[str]) -> int:
    try:
        app = _app(given)
        with _without_advice():
            status = app.main(given or ["--help"], prog_name="flashdraft", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except FlashDraftError as error:
        return _complain(error.args[0], _as_written(error, given), status=1)
    except TyperException as error:
        return _complain(error.format_message().rstrip("."), _usage_hint(error, given), status=2)
    except UnicodeDecodeError as error:
        got = f"got text that is not UTF-8 ({error.reason})"
        return _complain(got, "send UTF-8, on standard input as well", status=1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(io.UnsupportedOperation):  # a stream of somebody's own
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 1
    except OSError as error:
        name = f" `{error.filename}`" if error.filename else ""
        got = f"cannot use{name}: {error.strerror or error}"
        return _complain(got, "check the path, its permissions and the disk", status=1)


def _joined(words: list[str]) -> list[str]:
    """The two words of such a command as one: `bench`, `serve` is the command `bench serve`."""
    for place, pair in enumerate(pairwise(words)):
        name = " ".join(pair)
        if name in COMMANDS:
            return [*words[:place], name, *words[place + 2 :]]
        if pair[0] in COMMANDS:
            break  # what comes later is what that command is given
    return words


def _terminated(number: int, _frame: FrameType | None) -> None:
    """Leave by way of every `finally`, so that nothing half-written stays."""
    raise SystemExit(128 + number)


# --- streams --------------------------------------------------------------------------------------


def _set_encodings() -> None:
    """UTF-8 in; a terminal that cannot show a character is no reason to stop."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def _open_streams() -> Iterator[None]:
    """While a command runs, a standard stream that is closed reads nothing and writes to nowhere.

    Its descriptor, if that is free, is taken as well: the next file that a command opened would get
    it, and with it whatever a library prints.
    """
    closed = []
    for name in _STREAMS:
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            closed.append(name)
    for name in closed:
        try:
            os.fstat(_STREAMS.index(name))
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest one that is free

    with ExitStack() as files:
        for name in closed:
            mode = "r" if name == "stdin" else "w"
            nothing = files.enter_context(open(os.devnull, mode, encoding="utf-8"))
            files.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, nothing)
        yield


@contextmanager
def _without_advice() -> Iterator[None]:
    """Transformers' warnings are for those who call it.

    Its level comes back afterwards for whoever calls `main` from a program.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:
        yield
        return
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


# --- errors and hints -----------------------------------------------------------------------------


def _complain(message: str, hint: str | None, *, status: int) -> int:
    if sys.stderr is None:  # print would take standard output
        return status
    for label, text in (("error", message), ("hint", hint)):
        if text:
            in_one_line = " ".join(str(text).split())
            print(f"{label}: {in_one_line}", file=sys.stderr)
    return status


def _usage_hint(error: TyperException, given: Sequence[str]) -> str:
    """What was meant, if that can be guessed.

    A text that begins with a dash, or a name that is nearly right.
    """
    command = next((word for word in given if word in COMMANDS), None)
    option = getattr(error, "option_name", None)
    if command is None:
        name = option or next((word for word in given if not word.startswith("-")), "")
        return f"{_nearest(name, list(COMMANDS))}see flashdraft --help"

    if option is not None and _is_text(given):
        form = f"flashdraft {command} [OPTIONS] -- TEXT"
        return f"a text that begins with - goes behind --, as in: {form}"
    meant = ""
    if option is not None:
        meant = _nearest(option, _option_names(command))
    is_of_no_parameter = isinstance(error, typer.BadParameter) and error.param is None
    if type(error).__name__ == "MissingParameter" or is_of_no_parameter:
        meant = f"as in: {COMMANDS[command].examples[0]}; "
    return f"{meant}see flashdraft {command} --help"


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    if not near or near[0] == name:
        return ""
    return f"did you mean {near[0]}? "


def _is_text(given: Sequence[str]) -> bool:
    """Whether a word begins like an option and goes on like a sentence or a number."""
    words = [word for word in given if not word.startswith("--")]
    return any(re.match(r"-(\d|.*\s)", word) for word in words)


def _option_names(command: str) -> list[str]:
    names = []
    for parameter in _app([command]).commands[command].params:
        names += [name for name in parameter.opts if name.startswith("--")]
    return names


def _as_written(error: FlashDraftError, given: Sequence[str]) -> str | None:
    """The error's hint; an option that was given is called there as on the command line."""
    name = error.option if isinstance(error, InvalidParameter) else None
    if name is None or error.hint is None:
        return error.hint

    written = f"--{name.replace('_', '-')}"
    was_given = any(word.partition("=")[0] == written for word in given)
    if not was_given:
        return error.hint
    return re.sub(rf"^{re.escape(name)}\b", written, error.hint)


# --- the app --------------------------------------------------------------------------------------


def _app(given: Sequence[str]) -> TyperGroup:
    """All commands by name; only the one that was asked for has its options.

    The overview has a panel a group of commands; a command's own help is plain text, so that its
    examples can be copied.
    """
    asked = next((word for word in given if not word.startswith("-")), None)
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None if asked in COMMANDS else "rich",
        help="DFlash speculative decoding: the same text, sooner.",
    )
    app.callback()(_options)
    for name, command in COMMANDS.items():
        function = flat(function_of(name)) if name == asked else _nothing
        register = app.command(
            name, help=command.help, epilog=_epilog(command), rich_help_panel=command.panel
        )
        register(function)
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def _epilog(command: Command) -> str:
    """The examples, under a mark (\\b) that keeps typer from filling their lines."""
    examples = [f"  {example}" for example in command.examples]
    return "\n".join(["\b", "Examples:", *examples])


def _nothing() -> None:
    """Stands for a command that was not asked for."""


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flashdraft {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Those of `flashdraft` itself."""
