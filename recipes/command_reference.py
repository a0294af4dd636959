"""The reference of the command line as a page of the documentation, made of the commands.

    python recipes/command_reference.py docs/reference/commands.md

Names, groups, help, examples, options and defaults are those that `flashdraft COMMAND --help`
shows. tests/test_docs.py fails where the page is not what this prints.
"""

import argparse
import contextlib
import io
from pathlib import Path
from typing import get_args, get_origin

import typer.main
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from flashdraft.cli import main as flashdraft

HEAD = """# Command line

`flashdraft COMMAND --help` shows the same. A text that begins with a dash goes behind `--`. Errors
are one line and a `hint:` on standard error; the exit status is 0, 1 for an error, 2 for a slip of
usage, 130 after Ctrl-C.
"""
OTHERS = "Commands"  # the group of commands that name none


def made_for(arguments: list[str]) -> TyperGroup:
    """All commands as the command line makes them: only the one that is asked for has options."""
    made = []
    make = typer.main.get_command

    def kept(app: typer.Typer) -> TyperGroup:
        made.append(make(app))
        return made[-1]

    typer.main.get_command = kept
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            flashdraft([*arguments, "--help"])
    finally:
        typer.main.get_command = make
    return made[-1]


def page() -> str:
    names = list(made_for([]).commands)
    groups: dict[str, list[TyperCommand]] = {}
    for name in names:
        command = made_for([name]).commands[name]
        group = command.rich_help_panel or OTHERS
        groups.setdefault(group, []).append(command)

    lines = [HEAD]
    for group, commands in groups.items():
        lines += [f"## {group}", ""]
        for command in commands:
            lines += section(command)
    return "\n".join(lines)


def section(command: TyperCommand) -> list[str]:
    arguments = []
    options = []
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            arguments.append(argument_row(parameter))
        elif isinstance(parameter, TyperOption) and parameter.name != "help":
            options.append(option_row(parameter))

    lines = [f"### flashdraft {command.name}", "", one_line(command.help), ""]
    examples = examples_of(command)
    if examples:
        lines += ["```sh", *examples, "```", ""]
    if arguments:
        lines += ["| argument | |", "|---|---|", *arguments, ""]
    if options:
        lines += ["| option | takes | by default | |", "|---|---|---|---|", *options, ""]
    return lines


def examples_of(command: TyperCommand) -> list[str]:
    lines = (command.epilog or "").splitlines()
    return [line.strip() for line in lines if line.strip().startswith("flashdraft ")]


def argument_row(parameter: TyperArgument) -> str:
    name = (parameter.metavar or parameter.name).upper()
    needed = "" if parameter.required else "; may be left out"
    return f"| `{name}` | {cell(parameter.help or '')}{needed} |"


def option_row(parameter: TyperOption) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    kind = "" if parameter.is_flag else kind_of(parameter.type_descriptor.annotation)
    return (
        f"| {names} | {cell(kind)} | {cell(default_of(parameter))} | {cell(parameter.help or '')} |"
    )


def kind_of(annotation: type) -> str:
    """What an option takes, in a word; `int | None` is an int that may be left out."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is list:
        return f"{kind_of(parts[0])}, several times"
    if parts:
        return kind_of(parts[0])
    return {"str": "text", "int": "integer", "float": "number"}.get(
        annotation.__name__, annotation.__name__.lower()
    )


def default_of(parameter: TyperOption) -> str:
    if parameter.required:
        return "required"
    if parameter.envvar:
        return f"`${parameter.envvar}`"

    value = parameter.default
    if value is None or parameter.is_flag:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(f"`{one}`" for one in value)
    return f"`{value}`"


def one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def cell(text: str) -> str:
    """A table's cell: bars are escaped, and lines joined."""
    return one_line(text).replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    options.out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
