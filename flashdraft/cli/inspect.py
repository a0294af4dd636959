"""The command that says what a folder is. The facts come from `flashdraft.formats`, what engines
can have from `flashdraft.export`."""

import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from flashdraft import hub
from flashdraft.cli.options import TARGET_HELP
from flashdraft.errors import CheckpointError, DraftMismatch, FlashDraftError
from flashdraft.export.order import Order, TargetShape, read_target
from flashdraft.export.run import BUILTIN, ENGINES, told
from flashdraft.formats.foreign import is_draft
from flashdraft.formats.match import check_target
from flashdraft.formats.read import read_draft
from flashdraft.formats.recognise import describe
from flashdraft.formats.sheet import Line, sheet, summary
from flashdraft.loading import open_network, shipped, vocabulary_of

_LABEL = 11  # columns, and the text behind them
_WIDTH = 100


def inspect(
    draft: Annotated[
        str,
        Argument(metavar="FOLDER", help="a drafter's folder or hub id, or a shipped method"),
    ],
    target: Annotated[str | None, Option(help=f"that it may fit: {TARGET_HELP}")] = None,
) -> None:
    """What a drafter's folder is, what it fits, and who runs it.

    Examples:
        flashdraft inspect z-lab/Qwen3-4B-DFlash-b16 --target Qwen/Qwen3-4B
        flashdraft inspect run/best
    """
    name = shipped(draft, target or BUILTIN)
    folder = hub.resolve(name)
    if not isinstance(folder, Path):
        got = f"`{draft}` is a GGUF file, not a drafter's folder"
        raise CheckpointError(got, hint="give the folder that it was made from")
    written = hub.read_config(folder)
    if not is_draft(written):
        got = f"`{draft}` is no drafter but a language model: {summary(written)}"
        raise CheckpointError(got, hint="it may be a --target; name the folder of a drafter")

    form = describe(folder)
    config, tensors = read_draft(folder, vocabulary_of(target))
    open_network(name, target or "")  # it loads, or says what is wrong
    order = Order(name, config, tensors, None, Path("OUT"), config.dtype)
    shape = None if target is None else replace(read_target(target), name=target)

    print(name)
    for line in sheet(form, config, tensors):
        _tell(line)
    _tell(_fit(order, shape))
    for line in _engines(order, shape):
        _tell(line)


def _tell(line: Line) -> None:
    indent = " " * (_LABEL + 2)
    wrapped = textwrap.wrap(line.text, _WIDTH - len(indent), break_on_hyphens=False)
    print(f"  {line.label:<{_LABEL}}" + f"\n{indent}".join(wrapped))


def _fit(order: Order, target: TargetShape | None) -> Line:
    """Whether it fits the target; without one, which it would fit."""
    config = order.config
    if target is None:
        depth = f"{config.num_target_layers} layers" if config.num_target_layers else "any depth"
        wanted = (
            f"a target of size {config.hidden_size} with {depth} and {config.vocab_size} tokens"
        )
        return Line("fits", f"{wanted} (--target asks one)")

    embedding = order.tensors.get("embed_tokens.weight")
    num_embeddings = None if embedding is None else len(embedding)
    try:
        check_target(config, target, num_embeddings=num_embeddings)
    except DraftMismatch as error:
        return Line("fits", f"not `{target.name}`: {error.args[0]}")
    return Line("fits", f"`{target.name}`: {target.num_layers} layers of {target.hidden_size}")


def _engines(order: Order, target: TargetShape | None) -> Iterator[Line]:
    """Where it runs. An engine's own conversion says what it cannot have, or loses; engines of one
    answer are told together."""
    yield Line("runs in", "FlashDraft: yes")
    order = replace(order, target=target)
    answers: dict[str, list[str]] = {}
    for engine in ENGINES:
        answers.setdefault(_answer(order, engine), []).append(engine)
    for answer, engines in answers.items():
        yield Line("", f"{', '.join(engines)}: {answer}")


def _answer(order: Order, engine: str) -> str:
    try:
        exported = told(order, engine)
    except FlashDraftError as error:
        _, _, why = str(error.args[0]).rpartition(f"`{order.draft}`: ")
        return f"no, {why}"
    answer = "yes, by `flashdraft export`"
    if exported.losses:
        answer += f", but for {'; '.join(exported.losses)}"
    for note in exported.notes:
        answer += f"; {note}"
    return answer
