"""Names of methods as bench reads them, and joined drafters: paths may hold every sign that
separates.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flashdraft.bench.specs import names_a_drafter, parts_of, read_specs, tree_of
from flashdraft.errors import InvalidParameter
from flashdraft.loading import union_parts


def read(methods: str) -> list[tuple[str, str, str]]:
    return [(spec.name, spec.kind, spec.variant) for spec in read_specs(methods)]


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        ("dflash", [("dflash", "dflash", "")]),
        (
            "autoregressive, dflash:int8",
            [("autoregressive", "autoregressive", ""), ("dflash:int8", "dflash", "int8")],
        ),
        ("x=dflash:int8", [("x", "dflash", "int8")]),
        ("dflash:fast", [("dflash:fast", "dflash", "fast")]),
        ("mine=my.py:run:a=b,dflash", [("mine", "my.py", "run:a=b"), ("dflash", "dflash", "")]),
        (r"x=C:\runs\best", [("x", r"C:\runs\best", "")]),
        (r"x=C:\runs\best:int8", [("x", r"C:\runs\best", "int8")]),
        (r"x=C:/runs/best", [("x", "C:/runs/best", "")]),
        ("x=org/name:int8", [("x", "org/name", "int8")]),
    ],
)
def test_names_kinds_and_variants(methods: str, expected: list[tuple[str, str, str]]) -> None:
    assert read(methods) == expected


@pytest.mark.parametrize(
    "name", ["lr=1e-3", "a:b", "a,b", "a+b", "x_tree8", "plain", "all=a:b,c+d"]
)
def test_path_that_is_there_is_whole(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "best"
    folder.mkdir(parents=True)
    for variant in ("", "int8"):
        text = f"{folder}:{variant}" if variant else str(folder)
        assert read(f"autoregressive,x={text},medusa")[1:] == [
            ("x", str(folder), variant),
            ("medusa", "medusa", ""),
        ]
        assert read(text) == [(text, str(folder), variant)]
    assert parts_of(str(folder)) == [str(folder)]
    assert parts_of(f"{folder}+prompt_lookup") == [str(folder), "prompt_lookup"]
    assert parts_of(f"prompt_lookup+{folder}_tree4") == ["prompt_lookup", str(folder)]
    assert tree_of(str(folder), 16) is None
    assert tree_of(f"{folder}_tree", 16) == 16
    assert tree_of(f"{folder}_tree4", 16) == 4


def test_joined_drafters_are_told_from_paths(tmp_path: Path) -> None:
    for name in ("a+b", "c"):
        (tmp_path / name).mkdir()
    plus, plain = str(tmp_path / "a+b"), str(tmp_path / "c")
    assert union_parts(plus) == [plus]
    assert union_parts(f"{plus}+{plain}") == [plus, plain]
    assert union_parts(f"{plain}+{plus}") == [plain, plus]
    assert union_parts("dflash+prompt_lookup") == ["dflash", "prompt_lookup"]
    assert union_parts("dflash+") == ["dflash+"]
    assert union_parts("nowhere/a+b") == ["nowhere/a", "b"]


@pytest.mark.parametrize("methods", ["", ",", "dflash,", " "])
def test_nothing_between_commas_is_refused(methods: str) -> None:
    with pytest.raises(InvalidParameter, match=r"^methods is"):
        read_specs(methods)


def test_two_of_one_name_are_refused_and_the_same_twice_is_one() -> None:
    with pytest.raises(InvalidParameter, match="have one name"):
        read_specs("a=dflash,a=medusa")
    assert len(read_specs("dflash,dflash")) == 1


def test_what_may_be_a_drafter(tmp_path: Path) -> None:
    assert names_a_drafter("dflash", ("dflash",))
    assert names_a_drafter(str(tmp_path), ())
    assert names_a_drafter("org/name", ())
    assert not names_a_drafter("llama.cpp", ("dflash",))
