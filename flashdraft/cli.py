"""The command line: names, help, options and errors. What a command does stands in commands.py.

That file, and torch with it, is imported when one of its commands was asked for, so that `flashdraft --help` answers at
once. A parameter that is a dataclass stands for its fields: every default and help text exists once, beside its field.
"""

import dataclasses
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.exceptions import TyperException

from flashdraft import __version__
from flashdraft.errors import FlashDraftError
from flashdraft.types import check_options

__all__ = ["COMMANDS", "flat", "main"]

_TEXT = Path(__file__).with_name("assets").joinpath("commands.txt").read_text(encoding="utf-8")
# name of a function in commands.py or train_commands.py -> its help and two examples
COMMANDS = {name: facts for name, *facts in re.findall(r"^(\w+): (.+)\n +(.+)\n +(.+)$", _TEXT, re.MULTILINE)}
TRAINING = ("prompts", "regenerate", "features", "train", "eval", "doctor", "push")  # in train_commands.py


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error, 2 for a slip of usage, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character is no reason to stop
            stream.reconfigure(encoding="utf-8" if stream is sys.stdin else None, errors=errors)
    try:
        status = _app(given).main(given or ["--help"], prog_name="flashdraft", standalone_mode=False)
        sys.stdout.flush()
        return int(status or 0)
    except FlashDraftError as error:
        return _complain(error.args[0], error.hint, status=1)
    except TyperException as error:
        asked = ["flashdraft", *[word for word in given if word in COMMANDS][:1], "--help"]
        return _complain(error.format_message().rstrip("."), f"see {' '.join(asked)}", status=2)
    except UnicodeDecodeError as error:
        return _complain(f"got text that is not UTF-8 ({error.reason})", "send UTF-8, on standard input as well", status=1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more on its way out
        return 1
    except OSError as error:
        message = f"cannot use{f' `{error.filename}`' if error.filename else ''}: {error.strerror or error}"
        return _complain(message, "check the path, its permissions and the disk", status=1)


def _complain(message: str, hint: str | None, *, status: int) -> int:
    for label, text in (("error", message), ("hint", hint)):
        if text:
            print(f"{label}: {' '.join(str(text).split())}", file=sys.stderr)
    return status


def _app(given: Sequence[str]) -> Any:
    """All commands by name; only the one that was asked for has its options."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, help="DFlash speculative decoding: the same text, sooner.")
    app.callback()(_options)
    asked = next((word for word in given if not word.startswith("-")), None)
    for name, (text, *examples) in COMMANDS.items():
        module = "flashdraft.train_commands" if name in TRAINING else "flashdraft.commands"
        function = flat(getattr(import_module(module), name)) if name == asked else lambda: None
        epilog = "\n".join(("\b", "Examples:", *(f"  {example}" for example in examples)))
        app.command(name, help=text, epilog=epilog)(function)
    return typer.main.get_command(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"flashdraft {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    pass


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of its dataclass parameters in their place, as typer wants to see it.

    A field without metadata stays at its default; a tuple becomes an option that may be given several times.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
        parameters += _fields(parameter.annotation) if parameter.name in groups else [parameter]

    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group) if field.metadata})
            check_options(values[name])
        function(**values)

    signature = inspect.Signature([parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters])
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _fields(group: Any) -> Iterator[inspect.Parameter]:
    parameters = inspect.signature(group, eval_str=True).parameters
    for field in dataclasses.fields(group):
        if field.metadata:
            hint, default = parameters[field.name].annotation, parameters[field.name].default
            if get_origin(hint) is tuple:
                hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
            option = typer.Option(f"--{field.name.replace('_', '-')}", help=field.metadata["help"])
            yield parameters[field.name].replace(default=default, annotation=Annotated[hint, option])
