"""The house rules, checked on the source: imports point down only, and a function takes few
parameters.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flashdraft"
MAX_PARAMETERS = 7
# a module imports only its own level and those below; `.*` stands for every file of a folder
LEVELS = {
    name: level
    for level, names in enumerate(
        (
            "types errors files growing process provenance",
            "decoding.* hub pretrained wrappers diffusion.coupling",
            "models.*",
            "formats.* methods.*",
            "engine scheduler request",
            "loading generate feed __init__",
            "train.* bench.* export.* offline serve.* diffusion.*",
            "cli.* __main__",
        )
    )
    for name in names.split()
}
ONLY_IN = {
    "accelerate": "train.",
    "fastapi": "serve.",
    "starlette": "serve.",
    "uvicorn": "serve.",
    "pydantic": "serve.",
    "pydantic_core": "serve.",
    "prometheus_client": "serve.",
    "matplotlib": "bench.plot",
    "diffusers": "diffusion.",
    "torchmetrics": "bench.image_judges",
    "llguidance": "decoding.grammar",
}


def level_of(name: str) -> int:
    """The level of a module or of a name in it; what no module carries is a name of the package
    itself.
    """
    first, *rest = name.split(".")
    if name == "__version__":
        return 0
    keys = (".".join([first, *rest[:1]]), first, f"{first}.*")
    return next((LEVELS[key] for key in keys if key in LEVELS), LEVELS["__init__"])


def runtime_imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all imports, also inside functions; `if TYPE_CHECKING:` blocks do not run and
    do not count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names
            )


def check(name: str, source: str) -> Iterator[str]:
    """What the module `name` (dotted, below flashdraft) breaks."""
    tree = ast.parse(source)
    folder = name.split(".")[0]
    if not {name, f"{folder}.*"} & LEVELS.keys():
        yield f"{name}: not in the table LEVELS of tests/test_layout.py; give it a level"
    knows_no_method = name == "engine" or folder == "methods"
    for imported in runtime_imports(tree):
        top, _, below = imported.partition(".")
        if not top:
            yield f"{name}: relative import {imported}; write flashdraft.<module>"
        if top == "flashdraft" and level_of(below) > level_of(name):
            yield (
                f"{name}: imports {imported} of level {level_of(below)} from level {level_of(name)}"
            )
        is_method = f"{imported}.".startswith("flashdraft.methods.") and not below.startswith(
            ("methods.network", "methods.sequential")
        )
        if is_method and knows_no_method:
            yield f"{name}: imports a method, {imported}"
        if not name.startswith(ONLY_IN.get(top, "")) or (name == "scheduler" and top == "torch"):
            yield f"{name}: may not import {top}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [
                a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            ]
            count = len(parameters) - (parameters[:1] in (["self"], ["cls"]))
            if count > MAX_PARAMETERS:
                yield f"{name}.{node.name}: {count} parameters; {MAX_PARAMETERS} are allowed"


def check_package(sources: dict[str, str]) -> list[str]:
    """What the package as a whole breaks, and each of its modules."""
    problems = [problem for name, source in sources.items() for problem in check(name, source)]
    users = [
        n
        for n, s in sources.items()
        if any(i.split(".")[0] == "accelerate" for i in runtime_imports(ast.parse(s)))
    ]
    return problems + (
        [f"accelerate is imported in {users}, one file is allowed"] if len(users) > 1 else []
    )


def test_package_keeps_the_house_rules() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert paths
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]
    assert (
        check_package({n: p.read_text(encoding="utf-8") for n, p in zip(names, paths, strict=True)})
        == []
    )


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("decoding.verify", "from flashdraft.engine import Engine", "level 4 from level 1"),
        ("models.cache", "def f():\n    import flashdraft.generate", "level 5 from level 2"),
        ("models.target", "from flashdraft import engine", "level 4 from level 2"),
        ("decoding.tree", "from flashdraft import load", "level 5 from level 1"),
        ("decoding.tree", "from .types import Proposal", "relative import"),
        ("methods.dflash", "from flashdraft.methods.eagle3 import Eagle3", "imports a method"),
        ("methods.dflash", "from flashdraft.methods import eagle3", "imports a method"),
        ("methods.dflash", "from flashdraft.engine import Engine", "level 4 from level 3"),
        ("engine", "from flashdraft.methods.dflash import DFlash", "imports a method"),
        ("scheduler", "import torch.nn", "may not import torch"),
        ("train.trainer", "import fastapi", "may not import fastapi"),
        ("bench.run", "from matplotlib import pyplot", "may not import matplotlib"),
        ("cli.serve", "import uvicorn", "may not import uvicorn"),
        ("generate", "from pydantic import BaseModel", "may not import pydantic"),
        ("surprise", "", "give it a level"),
        (
            "decoding.tree",
            "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ...",
            "8 parameters",
        ),
    ],
)
def test_planted_fault_is_reported(name: str, source: str, problem: str) -> None:
    problems = list(check(name, source))
    assert len(problems) == 1
    assert problem in problems[0]


def test_planted_fault_across_files_is_reported() -> None:
    twice = check_package(
        {"train.a": "import accelerate", "train.b": "from accelerate import Accelerator"}
    )
    assert twice == ["accelerate is imported in ['train.a', 'train.b'], one file is allowed"]


def test_allowed_imports_pass() -> None:
    type_only = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from flashdraft.engine import Engine\n"
    )
    assert list(check("types", type_only)) == []
    assert (
        list(
            check(
                "methods.dflash",
                "from flashdraft.methods.network import DraftNetwork\n"
                "from flashdraft.types import Drafter",
            )
        )
        == []
    )
    assert (
        list(
            check(
                "serve.app",
                "import fastapi\nfrom flashdraft import load\nfrom flashdraft.serve import worker",
            )
        )
        == []
    )
