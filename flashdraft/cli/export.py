"""The command that hands a drafter to another engine. What an export is stands in
`flashdraft.export`."""

import shlex
from typing import Annotated

from typer import Argument, Option

from flashdraft.cli.options import TARGET_HELP, Folder
from flashdraft.export.run import DTYPES, ENGINES, export_draft
from flashdraft.types import Allowed


def export(
    draft: Annotated[
        str, Argument(metavar="DRAFT", help="a drafter's folder or hub id, or a shipped method")
    ],
    to: Annotated[str, Option(help=f"the engine: {', '.join(ENGINES)}"), Allowed(choices=ENGINES)],
    out: Folder,
    target: Annotated[str | None, Option(help=f"that it must fit: {TARGET_HELP}")] = None,
    dtype: Annotated[
        str, Option(help="of the weights in llamacpp's file"), Allowed(choices=DTYPES)
    ] = "auto",
) -> None:
    """Write a drafter as another engine reads it.

    Examples:
        flashdraft export run/best --to vllm --out served --target Qwen/Qwen3-8B
        flashdraft export dflash --to zlab --out plain
    """
    exported = export_draft(draft, to, out, target, dtype=dtype)
    for loss in exported.losses:
        print(f"lost: {loss}")
    for note in exported.notes:
        print(f"note: {note}")
    print(shlex.join(exported.command))
