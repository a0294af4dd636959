"""The options that several commands share; a default and its help exist once."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from flashdraft.errors import InvalidParameter
from flashdraft.generate import Model
from flashdraft.loading import DTYPES, KERNELS, MOST_NODES, NETWORKS, load
from flashdraft.types import check_options, option

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "DTYPE_HELP",
    "KERNEL_HELP",
    "TARGET_HELP",
    "Folder",
    "ModelOptions",
    "Out",
    "TargetOptions",
    "refuse_given",
]

TARGET_HELP = "built-in name, hub id, folder or GGUF file"
DTYPE_HELP = f"{', '.join(name for name in DTYPES if name != 'auto')}, or auto: as stored"
KERNEL_HELP = (
    f"what runs the weights: {', '.join(KERNELS)}; "
    "auto is the fastest exact one, compiled: CUDA graphs"
)
_DRAFT_HELP = (
    "drafter's folder or hub id, or a smaller causal LM's with the same tokenizer; "
    f"a method, whose shipped drafter is taken ({', '.join(NETWORKS)}) "
    "or that has none (prompt_lookup, autoregressive); two of these joined by +; "
    "or auto: the shipped one with prompt_lookup, or none"
)
_BLOCK_HELP = (
    "nodes per proposal, the anchor included, from 1 (nothing is drafted) "
    f"to {MOST_NODES}; by default as many of what the drafter was trained for as pay"
)
_TREE_HELP = "nodes of a tree of likely tokens, the anchor included; by default a chain is drafted"

Out = Annotated[Path, Option(help="file to write")]
Folder = Annotated[Path, Option(help="folder to write")]


@dataclass(frozen=True)
class TargetOptions:
    """What `load` takes from the command line; without a drafter."""

    target: str = option("smollm2-135m", TARGET_HELP)
    dtype: str = option("auto", DTYPE_HELP, choices=DTYPES)
    device: str = option("cpu", "where the target runs: cpu, cuda, cuda:1, mps")
    kernel: str = option("auto", KERNEL_HELP, choices=KERNELS)

    def __post_init__(self) -> None:
        check_options(self)

    def load(self, *, max_rows: int = 8) -> Model:
        given = {"draft": "autoregressive"} | asdict(self)
        return load(**given, max_rows=max_rows)


@dataclass(frozen=True)
class ModelOptions(TargetOptions):
    """The same with a drafter."""

    draft: str = option("auto", _DRAFT_HELP)
    block_size: int | None = option(None, _BLOCK_HELP, least=1, most=MOST_NODES)
    tree_nodes: int | None = option(None, _TREE_HELP, least=2, most=MOST_NODES)


def refuse_given(options: "DataclassInstance", reason: str, *names: str) -> None:
    """Raises InvalidParameter for an option (of these, or of all) that would have no effect."""
    for field in fields(options):
        if names and field.name not in names:
            continue
        value = getattr(options, field.name)
        if value != field.default:
            got = f"{field.name} is {value}, but {reason}"
            raise InvalidParameter(got, hint="leave out one of the two")
