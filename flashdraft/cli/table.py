"""Which commands there are, and their help.

Every public function of `decode`, `serve`, `image`, `bench` and `train` is a command, and its
docstring is its help; `bench_serve` is the command of two words, `bench serve`. Those files import
torch, and `flashdraft --help` shall answer at once: docstrings are read from the source, and a file
is imported when one of its commands was asked for.
"""

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

__all__ = ["COMMANDS", "Command", "function_of"]

# each with its panel's title
_FILES = {"decode": "Use", "serve": "Use", "image": "Use", "bench": "Measure", "train": "Train"}


@dataclass(frozen=True)
class Command:
    file: str
    panel: str
    help: str
    examples: tuple[str, ...]


def _read_commands() -> dict[str, Command]:
    commands = {}
    for file, panel in _FILES.items():
        source = Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            docstring = ast.get_docstring(node) or ""
            text, _, examples = docstring.partition("\n\nExamples:\n")
            lines = inspect.cleandoc(examples).splitlines()
            name = node.name.replace("_", " ")
            commands[name] = Command(file, panel, " ".join(text.split()), tuple(lines))
    return commands


COMMANDS = _read_commands()


def function_of(name: str) -> Callable[..., None]:
    """A command's function; imports its file, and what is heavy with it."""
    module = import_module(f"flashdraft.cli.{COMMANDS[name].file}")
    function: Callable[..., None] = getattr(module, name.replace(" ", "_"))
    return function
