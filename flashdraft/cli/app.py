"""The command line: names, help, options and errors. What a command does stands in `function_of`'s files.

They, and torch with them, are imported when one of its commands was asked for, so that `flashdraft --help` answers at
once. A parameter that is a dataclass stands for its fields: every default and help text exists once, beside its field.
"""

import dataclasses
import difflib
import inspect
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.exceptions import TyperException

from flashdraft import __version__
from flashdraft.errors import FlashDraftError, InvalidParameter
from flashdraft.types import Allowed, check_option, check_options, kind_of

__all__ = ["COMMANDS", "flat", "main"]

_TEXT = (
    Path(__file__)
    .parents[1]
    .joinpath("assets")
    .joinpath("commands.txt")
    .read_text(encoding="utf-8")
)
# name of a command's function -> its help and two examples
COMMANDS = {
    name: facts
    for name, *facts in re.findall(r"^(\w+): (.+)\n +(.+)\n +(.+)$", _TEXT, re.MULTILINE)
}
_STREAMS = ("stdin", "stdout", "stderr")  # by descriptor
_MEASURING = ("bench", "report", "plot", "peers", "tasks", "profile", "roofline")
_TRAINING = ("prompts", "regenerate", "features", "train", "eval", "doctor", "push")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error, 2 for a slip of usage, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _open_streams():
        return _run(given, own=arguments is None)


def _run(given: list[str], *, own: bool) -> int:
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a terminal that cannot show a character is no reason to stop
            stream.reconfigure(encoding="utf-8-sig" if stream is sys.stdin else None, errors=errors)
    if own and threading.current_thread() is threading.main_thread():  # a process of its own
        signal.signal(signal.SIGTERM, _terminated)
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
        return _complain(
            f"got text that is not UTF-8 ({error.reason})",
            "send UTF-8, on standard input as well",
            status=1,
        )
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        with suppress(io.UnsupportedOperation):  # a stream of somebody's own
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # the interpreter flushes once more on its way out
        return 1
    except OSError as error:
        message = f"cannot use{f' `{error.filename}`' if error.filename else ''}: {error.strerror or error}"
        return _complain(message, "check the path, its permissions and the disk", status=1)


def _terminated(number: int, _frame: Any) -> None:
    """Leave by way of every `finally`, so that nothing half-written stays."""
    raise SystemExit(128 + number)


@contextmanager
def _open_streams() -> Iterator[None]:
    """While a command runs, a standard stream that is closed reads nothing and writes to nowhere.

    Its descriptor, if that is free, is taken as well: the next file that a command opened would get it, and with it whatever a
    library prints.
    """
    closed = [name for name in _STREAMS if getattr(sys, name) is None or getattr(sys, name).closed]
    for name in closed:
        try:
            os.fstat(_STREAMS.index(name))
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest one that is free

    with ExitStack() as files:
        for name in closed:
            nothing = files.enter_context(
                open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8")
            )
            files.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, nothing)
        yield


@contextmanager
def _without_advice() -> Iterator[None]:
    """Transformers' warnings are for those who call it; its level comes back for whoever calls `main` from a program."""
    if (transformers := sys.modules.get("transformers")) is None:
        yield
        return
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _complain(message: str, hint: str | None, *, status: int) -> int:
    for label, text in (("error", message), ("hint", hint)):
        if text and sys.stderr is not None:  # print would take standard output
            print(f"{label}: {' '.join(str(text).split())}", file=sys.stderr)
    return status


def _usage_hint(error: TyperException, given: Sequence[str]) -> str:
    """What was meant, if that can be guessed: a text that begins with a dash, or a name that is nearly right."""
    command = next((word for word in given if word in COMMANDS), None)
    name = getattr(error, "option_name", None)
    if command is not None and name is not None and _is_text(given):
        return f"a text that begins with - goes behind --, as in: flashdraft {command} [OPTIONS] -- TEXT"

    known = [*COMMANDS] if command is None else list(_option_names(command))
    wrong = name or next((word for word in given if not word.startswith("-")), "")
    near = difflib.get_close_matches(wrong, known, n=1) if name or command is None else []
    meant = f"did you mean {near[0]}? " if near and near[0] != wrong else ""
    asked = ["flashdraft", *([] if command is None else [command]), "--help"]
    if command is not None and type(error).__name__ == "MissingParameter":
        meant = f"as in: {COMMANDS[command][1]}; "
    return f"{meant}see {' '.join(asked)}"


def _is_text(given: Sequence[str]) -> bool:
    """Whether one of the words begins like an option and goes on like a sentence or a number."""
    return any(re.match(r"-(\d|.*\s)", word) and not word.startswith("--") for word in given)


def _option_names(command: str) -> Iterator[str]:
    for parameter in _app([command]).commands[command].params:
        yield from (name for name in parameter.opts if name.startswith("--"))


def _as_written(error: FlashDraftError, given: Sequence[str]) -> str | None:
    """The error's hint, in which an option that was given on the command line has the name that it has there."""
    name = error.option if isinstance(error, InvalidParameter) else None
    if name is None or error.hint is None:
        return error.hint

    written = f"--{name.replace('_', '-')}"
    was_given = any(word.partition("=")[0] == written for word in given)
    return re.sub(rf"^{re.escape(name)}\b", written, error.hint) if was_given else error.hint


def function_of(name: str) -> Callable[..., None]:
    """The function of this name, whose file is imported by now, and what is heavy with it."""
    file = "commands"
    if name in _MEASURING:
        file = "bench_commands"
    elif name in _TRAINING:
        file = "train_commands"
    return getattr(import_module(f"flashdraft.cli.{file}"), name)  # type: ignore[no-any-return]


def _app(given: Sequence[str]) -> Any:
    """All commands by name; only the one that was asked for has its options."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        help="DFlash speculative decoding: the same text, sooner.",
    )
    app.callback()(_options)
    asked = next((word for word in given if not word.startswith("-")), None)
    for name, (text, *examples) in COMMANDS.items():
        function = flat(function_of(name)) if name == asked else lambda: None
        epilog = "\n".join(("\b", "Examples:", *(f"  {example}" for example in examples)))
        app.command(name, help=text, epilog=epilog)(function)
    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flashdraft {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of its dataclass parameters in their place, as typer wants to see it.

    A field without metadata stays at its default; a tuple becomes an option that may be given several times.
    """
    groups: dict[str, Any] = {}
    single: list[inspect.Parameter] = []  # that belong to no group
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += _fields(parameter.annotation)
        else:
            single.append(parameter)
            parameters.append(parameter)

    def call(**values: Any) -> None:
        for parameter in single:
            _check_single(parameter, values[parameter.name])
        for name, group in groups.items():
            values[name] = group(
                **{
                    field.name: values.pop(field.name)
                    for field in dataclasses.fields(group)
                    if field.metadata
                }
            )
            check_options(values[name])
        function(**values)

    signature = inspect.Signature(
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _check_single(parameter: inspect.Parameter, value: Any) -> None:
    """An option of a command that is no field of a dataclass has its `Allowed` beside its `Option`."""
    if get_origin(parameter.annotation) is not Annotated or value is None:
        return
    hint, *extras = get_args(parameter.annotation)
    allowed = next((extra for extra in extras if isinstance(extra, Allowed)), None)
    several = value if isinstance(value, list) else [value]
    for one in several:
        check_option(parameter.name, one, kind_of(hint), allowed)


def _fields(group: Any) -> Iterator[inspect.Parameter]:
    parameters = inspect.signature(group, eval_str=True).parameters
    for field in dataclasses.fields(group):
        if field.metadata:
            hint, default = parameters[field.name].annotation, parameters[field.name].default
            if get_origin(hint) is tuple:
                hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
            option = typer.Option(f"--{field.name.replace('_', '-')}", help=field.metadata["help"])
            yield parameters[field.name].replace(
                default=default, annotation=Annotated[hint, option]
            )
