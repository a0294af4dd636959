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
from typing import Annotated, Any, get_type_hints

import typer
from typer.exceptions import TyperException

from flashdraft import __version__
from flashdraft.errors import FlashDraftError
from flashdraft.types import check_options

__all__ = ["COMMANDS", "flat", "main"]

_TEXT = """\
demo: Answer a prompt with and without drafting, and compare.
    flashdraft demo
    flashdraft demo 'Write a haiku about rain.' --temperature 0.7 --seed 1
generate: Print the answers to one or more prompts.
    flashdraft generate 'Why is the sky blue?'
    flashdraft generate - --json --temperature 0.8 < question.txt
chat: Talk to a model; /reset forgets the talk, /exit ends it.
    flashdraft chat
    flashdraft chat --target Qwen/Qwen3-8B --draft z-lab/Qwen3-8B-DFlash-b16
bench: Measure methods side by side; write results, show a table.
    flashdraft bench --prompts speed.jsonl --out results.jsonl --repeats 3
    flashdraft bench --prompts tau.jsonl --out tau-results.jsonl --methods autoregressive,dflash --max-new-tokens 256
report: Print the tables of results files again.
    flashdraft report results.jsonl
    flashdraft report monday.jsonl tuesday.jsonl
tasks: Write the benchmark's prompts: GSM8K, HumanEval, MT-Bench.
    flashdraft tasks --data data --out tau.jsonl
    flashdraft tasks --data data --out speed.jsonl --first 8
profile: Show a decoding step's time by part, and the memory.
    flashdraft profile
    flashdraft profile --nodes 1 --nodes 4 --nodes 16 --context 1024
prompts: Training 1: prompts of any data sets, shuffled once.
    flashdraft prompts --data data --out prompts.jsonl
    flashdraft prompts chats.jsonl tatsu-lab/alpaca:train --out prompts.jsonl --thinking 0.5
regenerate: Training 2: the target's own answers; run again to resume.
    flashdraft regenerate prompts.jsonl --out answers.jsonl --max-rows 32
    flashdraft regenerate prompts.jsonl --out answers.jsonl --url http://localhost:8000/v1 --model Qwen/Qwen3-8B
features: Training 3: the target's hidden states; run again to resume.
    flashdraft features answers.jsonl --out features
    flashdraft features a.jsonl b.jsonl --out features --max-length 1024
train: Training 4: a drafter; run again to resume.
    flashdraft train features --out run --eval-prompts held_out.jsonl
    flashdraft train features --out run2 --eval-prompts held_out.jsonl --init-from run/best --steps 500 --lr 1e-4
eval: Training 5: the real accepted length on held-out prompts.
    flashdraft eval held_out.jsonl --draft run/best
    flashdraft eval held_out.jsonl --target Qwen/Qwen3-8B --draft org/drafter --max-new-tokens 512
doctor: Find out why a drafter is accepted too little.
    flashdraft doctor run/best smollm2-135m features
    flashdraft doctor org/drafter Qwen/Qwen3-8B features --num-samples 32
push: Upload a drafter's folder to the hub.
    flashdraft push run/best my-name/my-drafter
    flashdraft push run/best my-name/my-drafter --private
"""
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

    A field's metadata has its `help` and range; a tuple of strings becomes an option that may be given several times.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation
            parameters += _fields(parameter.annotation)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            check_options(values[name])
        function(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _fields(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        hint = list[str] if hints[field.name] == tuple[str, ...] else hints[field.name]
        option = typer.Option(f"--{field.name.replace('_', '-')}", help=field.metadata["help"])
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        default = list(default) if isinstance(default, tuple) else default
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])
