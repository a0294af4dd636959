"""The house rules, checked on the source: imports point down only; files, functions and the package stay small."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flashdraft"
MAX_LINES_NOW = 7697  # the budget is 6,000 of all lines: what is above it is a debt, and this number may only fall
MAX_PACKAGE_LINES, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 6000, 400, 60, 7
LEVELS = {  # a module imports only its own level and those below; `.*` stands for every file of a folder
    name: level
    for level, names in enumerate(
        (
            "types errors",
            "text verify tree sampling control diffusion.coupling",
            "target lean cache layers decoder native checkpoint network hub",
            "methods.*",
            "engine scheduler",
            "generate __init__",
            "train.* bench.* provenance export server.* diffusion.*",
            "cli commands train_commands __main__",
        )
    )
    for name in names.split()
}
ONLY_IN = {"accelerate": "train.", "fastapi": "server.", "matplotlib": "bench.plot", "diffusers": "diffusion."}


def level_of(name: str) -> int:
    """The level of a module or of a name in it; what no module carries is a name of the package itself."""
    first, *rest = name.split(".")
    keys = (".".join([first, *rest[:1]]), first, f"{first}.*")
    return next((LEVELS[key] for key in keys if key in LEVELS), LEVELS["__init__"])


def runtime_imports(tree: ast.Module) -> Iterator[str]:
    """Dotted names of all imports, also inside functions; `if TYPE_CHECKING:` blocks do not run and do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def check(name: str, source: str) -> Iterator[str]:
    """What the module `name` (dotted, below flashdraft) breaks."""
    tree = ast.parse(source)
    folder = name.split(".")[0]
    if not {name, f"{folder}.*"} & LEVELS.keys():
        yield f"{name}: not in the table LEVELS of tests/test_layout.py; give it a level"
    knows_no_method = name == "engine" or (folder == "methods" and name != "methods.__init__")
    for imported in runtime_imports(tree):
        top, _, below = imported.partition(".")
        if not top:
            yield f"{name}: relative import {imported}; write flashdraft.<module>"
        if top == "flashdraft" and level_of(below) > level_of(name):
            yield f"{name}: imports {imported} of level {level_of(below)} from level {level_of(name)}"
        if f"{imported}.".startswith("flashdraft.methods.") and knows_no_method:
            yield f"{name}: imports a method, {imported}"
        if not name.startswith(ONLY_IN.get(top, "")) or (name == "scheduler" and top == "torch"):
            yield f"{name}: may not import {top}"
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"{name}: {lines} lines, the limit is {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            count = len(parameters) - (parameters[:1] in (["self"], ["cls"]))
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > MAX_PARAMETERS or length > MAX_FUNCTION_LINES:
                limits = f"{MAX_PARAMETERS} and {MAX_FUNCTION_LINES} are allowed"
                yield f"{name}.{node.name}: {count} parameters and {length} lines; {limits}"


SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def source_lines(source: str) -> int:
    """Lines that hold code, as line counters count them: not blank, no comment, no docstring."""
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in SILENT]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            lines -= set(range(body[0].lineno, (body[0].end_lineno or 0) + 1))
    return len(lines)


def check_package(sources: dict[str, str]) -> list[str]:
    """What the package as a whole breaks, and each of its modules."""
    problems = [problem for name, source in sources.items() for problem in check(name, source)]
    if (lines := sum(map(source_lines, sources.values()))) > MAX_PACKAGE_LINES:
        problems.append(f"the package has {lines} lines of code, the limit is {MAX_PACKAGE_LINES}")
    if (lines := sum(len(source.splitlines()) for source in sources.values())) > MAX_LINES_NOW:
        problems.append(f"the package has grown to {lines} lines in all; take as many away as you add")
    users = [n for n, s in sources.items() if any(i.split(".")[0] == "accelerate" for i in runtime_imports(ast.parse(s)))]
    return problems + ([f"accelerate is imported in {users}, one file is allowed"] if len(users) > 1 else [])


def test_package_keeps_the_house_rules() -> None:
    paths = sorted(PACKAGE.rglob("*.py"))
    assert paths
    names = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]
    assert check_package({n: p.read_text(encoding="utf-8") for n, p in zip(names, paths, strict=True)}) == []


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("verify", "from flashdraft.engine import Engine", "level 4 from level 1"),
        ("cache", "def f():\n    import flashdraft.generate", "level 5 from level 2"),
        ("target", "from flashdraft import engine", "level 4 from level 2"),
        ("tree", "from flashdraft import load", "level 5 from level 1"),
        ("tree", "from .types import Proposal", "relative import"),
        ("methods.dflash", "from flashdraft.methods.eagle3 import Eagle3", "imports a method"),
        ("methods.dflash", "from flashdraft.methods import eagle3", "imports a method"),
        ("methods.dflash", "from flashdraft.engine import Engine", "level 4 from level 3"),
        ("engine", "from flashdraft.methods.dflash import DFlash", "imports a method"),
        ("scheduler", "import torch.nn", "may not import torch"),
        ("train.trainer", "import fastapi", "may not import fastapi"),
        ("bench.run", "from matplotlib import pyplot", "may not import matplotlib"),
        ("surprise", "", "give it a level"),
        ("tree", "\n" * 401, "401 lines"),
        ("tree", "def f():\n" + "    x = 1\n" * 60, "61 lines"),
        ("tree", "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ...", "8 parameters"),
    ],
)
def test_planted_fault_is_reported(name: str, source: str, problem: str) -> None:
    problems = list(check(name, source))
    assert len(problems) == 1
    assert problem in problems[0]


def test_planted_faults_across_files_are_reported() -> None:
    long = {f"train.file{i}": "x = 1\n" * 400 for i in range(16)}
    assert check_package(long) == ["the package has 6400 lines of code, the limit is 6000"]
    twice = check_package({"train.a": "import accelerate", "train.b": "from accelerate import Accelerator"})
    assert twice == ["accelerate is imported in ['train.a', 'train.b'], one file is allowed"]


def test_more_lines_of_any_kind_are_reported() -> None:
    blank = {f"train.file{i}": "\n" * 400 for i in range(20)}
    assert check_package(blank) == ["the package has grown to 8000 lines in all; take as many away as you add"]


def test_lines_of_code_are_neither_blank_nor_comment_nor_docstring() -> None:
    text = "multi\n    line"
    assert source_lines(f'"""{text}"""\n\n# why\nx = 1  # why\n\n\ndef f():\n    """{text}"""\n    return """{text}"""\n') == 4


def test_allowed_imports_pass() -> None:
    type_only = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from flashdraft.engine import Engine\n"
    assert list(check("types", type_only)) == []
    assert list(check("methods.__init__", "from flashdraft.methods import dflash\nfrom flashdraft.types import Drafter")) == []
    assert list(check("server.app", "import fastapi\nfrom flashdraft import load\nfrom flashdraft.server import worker")) == []
