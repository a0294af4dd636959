"""Which commands there are, and their help.

Every public function of the files below is a command, and its docstring is its help; `bench_serve`
is the command of two words, `bench serve`, and `image_train` is `image-train`: what follows `image`
is a text. Those files import torch, and `flashdraft --help` shall answer at once: docstrings are
read from the source, and a file is imported when one of its commands was asked for.
"""

import ast
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

__all__ = ["COMMANDS", "Command", "function_of"]

# each with its panel's title
_FILES = {
    "decode": "Use",
    "serve": "Use",
    "image": "Use",
    "bench": "Measure",
    "train": "Train",
    "export": "Train",
    "image_train": "Train",
    "inspect": "Use",
}
_TWO_WORDS = "bench_"  # begins the functions whose commands are two words


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
            joint = " " if node.name.startswith(_TWO_WORDS) else "-"
            name = node.name.replace("_", joint)
            commands[name] = Command(file, panel, " ".join(text.split()), tuple(lines))
    return commands


COMMANDS = _read_commands()


def function_of(name: str) -> Callable[..., None]:
    """A command's function; imports its file, and what is heavy with it."""
    module = import_module(f"flashdraft.cli.{COMMANDS[name].file}")
    function: Callable[..., None] = getattr(module, re.sub("[ -]", "_", name))
    return function
