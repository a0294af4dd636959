"""Every option has its range, in one place: NaN, infinity, a bool, a string and what lies outside
are refused by name.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from conftest import tiny_target
from toy_training import language_model

import flashdraft
from flashdraft.bench.config import BenchConfig
from flashdraft.bench.load import LoadConfig
from flashdraft.bench.roofline import RooflineConfig
from flashdraft.cli import app, main, train
from flashdraft.cli import options as cli_options
from flashdraft.cli.table import COMMANDS, function_of
from flashdraft.engine import check
from flashdraft.errors import ContextLengthError, InvalidParameter
from flashdraft.loading import drafters
from flashdraft.serve.options import ServeOptions
from flashdraft.train.config import TrainConfig
from flashdraft.train.regenerate import mixed
from flashdraft.types import HIGHEST, SEEDS, Allowed, SamplingParams, counted_on, kind_of, option

NEEDED: dict[type, dict[str, Any]] = {
    BenchConfig: {"prompts": Path("p.jsonl"), "out": Path("o.jsonl"), "methods": "dflash"},
    LoadConfig: {"prompts": Path("p.jsonl"), "out": Path("o.jsonl"), "concurrency": "1"},
}
GROUPS = (
    SamplingParams,
    TrainConfig,
    BenchConfig,
    LoadConfig,
    RooflineConfig,
    cli_options.TargetOptions,
    cli_options.ModelOptions,
    train.DraftOptions,
    train.SourceOptions,
    train.FeatureOptions,
    train.AnswerOptions,
    ServeOptions,
)
Option = tuple[str, type | None, Allowed]  # name, kind, range


def options_of(group: type) -> Iterator[Option]:
    hints = get_type_hints(group)
    for field in dataclasses.fields(group):
        if "allowed" in field.metadata:
            yield field.name, kind_of(hints[field.name]), field.metadata["allowed"]


def options_of_command(name: str) -> Iterator[Option]:
    """Also those of its dataclasses."""
    for parameter in inspect.signature(function_of(name)).parameters.values():
        hint = parameter.annotation
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from options_of(hint)
        elif get_origin(hint) is Annotated:
            kind, *extras = get_args(hint)
            found = [extra for extra in extras if isinstance(extra, Allowed)]
            yield parameter.name, kind_of(kind), found[0] if found else Allowed()


def unranged(options: Iterator[Option]) -> list[str]:
    """Whole numbers need two ends, since tensors hold no larger ones; others one."""
    names = []
    for name, kind, allowed in options:
        lower = allowed.least is not None or allowed.above is not None
        upper = allowed.most is not None or allowed.below is not None
        if (kind is int and not (lower and upper)) or (kind is float and not lower):
            names.append(name)
    return names


def outside(kind: type | None, allowed: Allowed) -> list[Any]:
    """Values of every sort that no such option takes."""
    bad: list[Any] = [math.nan, math.inf, -math.inf, True, "5", {}, 10**400]
    bad += [allowed.least - 1] if allowed.least is not None else []
    bad += [allowed.above] if allowed.above is not None else []
    bad += [allowed.most + 1] if allowed.most is not None else []
    bad += [allowed.below] if allowed.below is not None else []
    bad += [2.0] if kind is int else []
    return bad


NUMBERS = [
    (group, *each) for group in GROUPS for each in options_of(group) if each[1] in (int, float)
]


@pytest.mark.parametrize("origin", ["*", "https://example.org", "http://[::1]:8000"])
def test_an_origin_is_taken_as_browsers_send_it(origin: str) -> None:
    assert ServeOptions(cors_origin=(origin,)).cors_origin == (origin,)


@pytest.mark.parametrize(
    "origin", ["", "example.org", "https://example.org/", "https://Example.org", "https://a b"]
)
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(InvalidParameter, match="cors_origin"):
        ServeOptions(cors_origin=(origin,))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_of_every_command_has_a_range(name: str) -> None:
    assert unranged(options_of_command(name)) == []


def test_planted_number_without_a_range_is_found() -> None:
    @dataclass(frozen=True)
    class Careless:
        steps: int = option(1, "no upper end", least=1)
        share: float = option(0.5, "no range")
        good: int = option(1, "a range", least=1, most=2)

    hints = {"steps": int, "share": float, "good": int}
    options = (
        (field.name, hints[field.name], field.metadata["allowed"])
        for field in dataclasses.fields(Careless)
    )
    assert unranged(options) == ["steps", "share"]


@pytest.mark.parametrize(
    ("group", "name", "kind", "allowed"), NUMBERS, ids=[f"{g.__name__}.{n}" for g, n, *_ in NUMBERS]
)
def test_what_lies_outside_is_refused_by_name(
    group: type, name: str, kind: type, allowed: Allowed
) -> None:
    for value in outside(kind, allowed):
        with pytest.raises(InvalidParameter, match=rf"^{name} is ") as error:
            group(**NEEDED.get(group, {}) | {name: value})
        assert error.value.option == name
        assert str(error.value.hint).startswith(f"{name} must be ")


@pytest.mark.parametrize(
    ("group", "name", "kind", "allowed"), NUMBERS, ids=[f"{g.__name__}.{n}" for g, n, *_ in NUMBERS]
)
def test_the_ends_of_a_range_are_inside(
    group: type, name: str, kind: type, allowed: Allowed
) -> None:
    for end in (allowed.least, allowed.most):
        if end is not None:
            assert allowed.holds(end)


def test_flags_and_words_are_checked_too() -> None:
    for given in (
        {"ignore_eos": "no"},
        {"ignore_eos": 1},
        {"logprobs": 0},
        {"stop": None},
        {"stop": [""]},
        {"stop": [1]},
    ):
        with pytest.raises(InvalidParameter, match=f"^{next(iter(given))} is "):
            SamplingParams(**given)
    for group, given in (
        (cli_options.ModelOptions, {"dtype": "int4"}),
        (cli_options.ModelOptions, {"kernel": "fast"}),
        (cli_options.ModelOptions, {"draft": 3}),
        (train.DraftOptions, {"method": "dspark"}),
        (train.FeatureOptions, {"soft_labels": "yes"}),
        (TrainConfig, {"precision": "int8"}),
    ):
        with pytest.raises(InvalidParameter, match=f"^{next(iter(given))} is "):
            group(**given)


def test_numbers_of_numpy_and_torch_are_checked_as_numbers() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5),
        max_new_tokens=np.int64(3),
        seed=torch.tensor(7),
        ignore_eos=np.True_,
    )
    assert (params.temperature, params.max_new_tokens, params.seed, params.ignore_eos) == (
        0.5,
        3,
        7,
        True,
    )
    with pytest.raises(InvalidParameter, match=r"^temperature is nan"):
        SamplingParams(temperature=np.float32("nan"))
    with pytest.raises(InvalidParameter, match=r"^sequences is array"):
        TrainConfig(sequences=np.array([1, 2]))  # type: ignore[arg-type]


def test_number_of_thousands_of_digits_is_named_shortly() -> None:
    for value in (10**5000, 10**1000):
        with pytest.raises(InvalidParameter, match=r"^seed is ") as error:
            SamplingParams(seed=value)
        assert len(error.value.args[0]) < 250


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "4", math.nan, 10**9])
def test_sizes_of_proposals_are_checked_before_anything_is_loaded(wrong: Any) -> None:
    for name in ("max_rows", "block_size", "tree_nodes"):
        if (name, wrong) == ("max_rows", 10**9):
            continue  # as many rows as there are prompts are made

        with pytest.raises(InvalidParameter, match=f"^{name} is "):
            flashdraft.load("nowhere", **{name: wrong})
    with pytest.raises(InvalidParameter, match=r"^block_size is "):
        drafters("prompt_lookup", tiny_target("llama"), "toy", wrong)


# --- the command line
#


def numbers_of(name: str) -> list[tuple[str, str]]:
    """(option, a value that it does not take)"""
    found = []
    for option_name, kind, allowed in options_of_command(name):
        if kind is int:
            assert allowed.least is not None
            found.append((option_name, str(allowed.least - 1)))
        if kind is float:
            found.append((option_name, "nan"))
    return found


CALLS = [(name, *each) for name in COMMANDS for each in numbers_of(name)]


@pytest.mark.parametrize(("command", "name", "value"), CALLS, ids=[f"{c} {n}" for c, n, _ in CALLS])
def test_command_names_the_option_as_it_was_written_before_anything_is_loaded(
    command: str,
    name: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [command]
    for parameter in app._app([command]).commands[command].params:
        if parameter.required:
            words += ["x"] if parameter.param_type_name == "argument" else [parameter.opts[0], "x"]
    written = f"--{name.rstrip('_').replace('_', '-')}"
    assert main([*words, f"{written}={value}"]) == 1
    captured = capsys.readouterr()
    error, hint = captured.err.splitlines()
    assert error.startswith(f"error: {name.rstrip('_')} is ")
    assert hint.startswith(f"hint: {written} must be ")
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_python_names_the_option_as_python_writes_it() -> None:
    with pytest.raises(InvalidParameter) as error:
        SamplingParams(top_p=1.5)
    assert str(error.value) == "top_p is 1.5\nhint: top_p must be above 0 and at most 1"


def test_ranges_are_written_in_words() -> None:
    assert str(Allowed(least=1)) == "1 or more"
    assert str(Allowed(least=0, most=1)) == "from 0 to 1"
    assert str(Allowed(least=0, below=1)) == "at least 0 and below 1"
    assert str(SEEDS) == "from 0 to 2**63 - 1"
    assert str(Allowed()) == "finite"
    assert str(Allowed(choices=("a", "b"))) == "one of a, b"


# --- seeds
#


def test_seeds_count_on_and_begin_again_behind_the_largest() -> None:
    assert counted_on(5, 3) == 8
    assert counted_on(HIGHEST, 1) == 0
    law = mixed(SamplingParams(temperature=1.0, seed=HIGHEST), 0.5)
    assert [law(number).seed for number in range(3)] == [HIGHEST, 0, 1]
    config = BenchConfig(**NEEDED[BenchConfig], seed=HIGHEST)
    assert [config.params(number, 1.0).seed for number in range(2)] == [HIGHEST, 0]


def test_largest_seeds_draw_different_texts() -> None:
    lm = language_model()
    first, second = (
        lm.generate("hi", temperature=1.0, seed=seed, max_new_tokens=8)
        for seed in (HIGHEST, HIGHEST - 1)
    )
    assert first.tokens != second.tokens


# --- the context
#


def test_hint_of_a_full_context_asks_for_nothing_that_cannot_be_done() -> None:
    lm = language_model()
    limit = lm.target.context_length
    for length, asked, wanted in (
        (limit, 1, "by 1 tokens"),
        (limit + 4, 1, "by 5 tokens"),
        (limit - 3, 4, "at most 3 new"),
    ):
        with pytest.raises(ContextLengthError) as error:
            check(lm.target, lm.request([5] * length, SamplingParams(max_new_tokens=asked)))
        assert wanted in str(error.value.hint)


@pytest.mark.parametrize("given", [(), (0.5,), [0.5]])
def test_several_values_for_one_option_are_refused(given: Any) -> None:
    for name in ("temperature", "repetition_penalty"):
        with pytest.raises(InvalidParameter, match=f"{name} is "):
            SamplingParams(**{name: given})
    with pytest.raises(InvalidParameter, match="seed is "):
        SamplingParams(seed=(1,))
    assert SamplingParams(stop=("a", "b")).stop == ("a", "b")
