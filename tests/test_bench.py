"""The benchmark: complete lines, methods in turn, honest comparisons, and tables that follow from
the file alone.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from toy_folders import save_target, save_zlab

import flashdraft
from flashdraft.bench import methods as bench_methods
from flashdraft.bench.config import OURS, THEIRS
from flashdraft.bench.profile import PARTS, profile
from flashdraft.bench.report import read_results, settings, show, summarise
from flashdraft.bench.run import BenchConfig, acceptance, run_bench
from flashdraft.cli import main
from flashdraft.errors import ContextLengthError, InvalidParameter
from flashdraft.loading import NETWORKS, load
from flashdraft.train.initialise import draft_config, random_weights
from flashdraft.types import SamplingParams

IDS = Path(__file__).parent.parent / "recipes" / "bench_ids.json"
KEYS = {
    "task",
    "prompt",
    "method",
    "repeat",
    "num_prompt_tokens",
    "num_tokens",
    "seconds",
    "tokens_per_second",
    "tau",
}
KEYS |= {
    "decode_seconds",
    "decode_tokens_per_second",
    "identical",
    "first_difference",
    "temperature",
    "max_rows",
    "threads",
}
KEYS |= {
    "turns",
    "time_to_first_token",
    "batch_tokens_per_second",
    "accepted_lengths",
    "acceptance",
    "peak_memory",
    "shares",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_target(folder / "target")
    save_zlab(folder / "draft")
    return folder


@pytest.fixture
def config(models: Path, tmp_path: Path) -> dict[str, Any]:
    """What every run here shares; three prompts of two tasks."""
    lines = [
        {"task": "a", "prompt": "abcabcabc"},
        {"task": "a", "prompt": "why"},
        {"task": "b", "turns": ["hi", "and you"]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {"prompts": tmp_path / "prompts.jsonl", "out": tmp_path / "out.jsonl"}
    return {
        **paths,
        "target": str(models / "target"),
        "draft": str(models / "draft"),
        "max_new_tokens": 24,
    }


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    return header["header"], lines


def test_every_method_answers_every_prompt_in_every_repeat(config: dict[str, Any]) -> None:
    ours = [
        "autoregressive",
        "dflash",
        "dflash_tree",
        "dflash_tree9",
        "prompt_lookup",
        "dflash+prompt_lookup",
    ]
    target = load(config["target"], draft="autoregressive").target
    folders = {method: config["out"].parent / method for method in NETWORKS if method != "dflash"}
    for method, folder in folders.items():  # none is shipped for a toy
        random_weights(draft_config(target, method=method), 0).save_pretrained(folder)
    methods = [*ours, *(f"{method}={folder}" for method, folder in folders.items()), *THEIRS]
    ours += folders
    assert {*OURS} < {*ours}
    options = {
        "methods": ",".join(methods),
        "repeats": 2,
        "transformers_prompts": 1,
        "assistant": config["target"],
    }
    assert run_bench(BenchConfig(**config, **options), quiet=True) == 6 * len(ours) + 16
    header, lines = read(config["out"])
    assert header["config"]["max_new_tokens"] == 24
    assert {
        "command",
        "commit",
        "versions",
        "device",
        "threads",
        "kernel",
        "row_exact",
        "transformers_threads",
    } <= set(header)
    assert all(line.keys() >= KEYS for line in lines)
    asked = Counter((line["prompt"], line["method"]) for line in lines)
    everywhere = {(prompt, method): 2 for prompt in range(3) for method in ours}
    assert asked == everywhere | {(prompt, method): 2 for prompt in (0, 2) for method in THEIRS}
    assert {line["prompt"]: line["task"] for line in lines} == {0: "a", 1: "a", 2: "b"}
    for line in lines:
        assert line["identical"] is True
        assert 0 < line["decode_seconds"] < line["seconds"]
        assert line["tokens_per_second"] == pytest.approx(line["num_tokens"] / line["seconds"])
        assert line["decode_tokens_per_second"] == pytest.approx(
            sum(line["accepted_lengths"]) / line["decode_seconds"]
        )
        assert line["time_to_first_token"] == pytest.approx(
            line["seconds"] - line["decode_seconds"]
        )
        assert line["tau"] == pytest.approx(sum(line["accepted_lengths"]) / line["target_passes"])
        assert line["acceptance"] == acceptance(line["accepted_lengths"])
        assert line["batch_tokens_per_second"] == pytest.approx(
            line["tokens_per_second"], rel=0.2
        )  # a batch of one
        assert line["peak_memory"] > 2**26
        if line["method"] in ours:
            assert {"prefill", "draft", "target", "host"} == set(line["parts"])
            assert sum(line["parts"].values()) <= line["seconds"]
            assert sum(line["accepted_lengths"]) == line["num_tokens"] - 1
            assert sum(line["shares"].values()) == pytest.approx(1)
            steps = sum(line["parts"].values()) - line["parts"]["prefill"]
            assert line["shares"]["target"] == pytest.approx(line["parts"]["target"] / steps)


def test_methods_take_turns_at_going_first(config: dict[str, Any]) -> None:
    methods = "autoregressive,dflash,prompt_lookup"
    run_bench(BenchConfig(**config, methods=methods, repeats=2), quiet=True)
    _, lines = read(config["out"])
    firsts = [line["method"] for line in lines[::3]]
    assert firsts == [
        "autoregressive",
        "dflash",
        "prompt_lookup",
        "dflash",
        "prompt_lookup",
        "autoregressive",
    ]


def test_sampled_text_is_compared_except_with_draws_of_another_kind(config: dict[str, Any]) -> None:
    """transformers draws by its own generator; a draft model draws its drafts, which keep the law,
    and not beside another.
    """
    mine = f"mine={config['target']},joined=prompt_lookup+{config['target']}"
    methods = f"autoregressive,dflash,prompt_lookup,transformers,{mine}"
    run_bench(BenchConfig(**config, temperature=0.8, methods=methods), quiet=True)
    header, lines = read(config["out"])
    assert header["drawn"] == ["mine"]
    compared = dict.fromkeys(("autoregressive", "dflash", "prompt_lookup", "joined"), True) | {
        "transformers": None,
        "mine": None,
    }
    assert {(line["method"], line["identical"]) for line in lines} == {*compared.items()}


def test_without_plain_decoding_nothing_is_called_identical(config: dict[str, Any]) -> None:
    run_bench(BenchConfig(**config, methods="dflash"), quiet=True)
    assert {line["identical"] for line in read(config["out"])[1]} == {None}
    assert [row.ratio for row in summarise(read_results(config["out"])[1])] == [None] * 3


@pytest.mark.parametrize("fault", ["other token", "cut short"])
def test_planted_other_text_is_not_identical(
    fault: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = bench_methods._timed

    def faulty(model: Any) -> Any:
        method = timed(model)

        def altered(true: Any) -> Any:
            tokens = true.tokens[:5] + (
                (true.tokens[5] + 1, *true.tokens[6:]) if fault == "other token" else ()
            )
            return bench_methods.replace(true, tokens=tokens)

        def answer(prompts: list[list[int]], params: Any) -> Any:
            return [altered(true) for true in method(prompts, params)]

        return answer if model.new_drafter().name == "prompt_lookup" else method

    monkeypatch.setattr(bench_methods, "_timed", faulty)
    run_bench(BenchConfig(**config, methods="autoregressive,dflash,prompt_lookup"), quiet=True)
    found = {
        (line["method"], line["identical"], line["first_difference"])
        for line in read(config["out"])[1]
    }
    assert found == {
        ("autoregressive", True, None),
        ("dflash", True, None),
        ("prompt_lookup", False, 5),
    }
    assert {row.method: row.identical for row in summarise(read_results(config["out"])[1])} == {
        "autoregressive": 1.0,
        "dflash": 1.0,
        "prompt_lookup": 0.0,
    }


def test_prompts_decoded_together_get_the_same_answers(config: dict[str, Any]) -> None:
    methods = "autoregressive,dflash,prompt_lookup"
    together = config["out"].with_name("together.jsonl")
    run_bench(BenchConfig(**config, methods=methods), quiet=True)
    run_bench(BenchConfig(**config | {"out": together}, methods=methods, max_rows=3), quiet=True)
    found = [
        {
            (line["prompt"], line["method"], line["num_tokens"], line["tau"], line["identical"])
            for line in read(path)[1]
        }
        for path in (config["out"], together)
    ]
    assert found[0] == found[1]


def test_acceptance_by_position_is_the_share_of_steps_that_committed_it() -> None:
    assert acceptance([1, 3, 2, 3]) == [0.75, 0.5]  # 3 tokens: two drafts and the target's own
    assert acceptance([1, 1]) == acceptance([]) == []


# --- several settings, several turns
# -----------------------------------------------------------------------------------------


def test_settings_are_taken_in_turn_and_never_compared_with_each_other(
    config: dict[str, Any],
) -> None:
    config |= {
        "methods": "autoregressive,dflash",
        "temperature": (0.0, 0.9),
        "max_rows": (1, 2),
        "threads": [1],
    }
    assert run_bench(BenchConfig(**config), quiet=True) == 24
    header, lines = read(config["out"])
    assert (header["config"]["temperature"], header["config"]["max_rows"]) == ([0.0, 0.9], [1, 2])
    units = [
        (line["prompt"], line["temperature"], line["max_rows"])
        for line in lines
        if line["method"] == "dflash"
    ]
    # prompts 0 and 1 are of one task: where two are decoded together, they come first
    assert units[:8] == [
        (0, 0.0, 1), (0, 0.0, 2), (1, 0.0, 2), (0, 0.9, 1),
        (0, 0.9, 2), (1, 0.9, 2), (1, 0.0, 1), (1, 0.9, 1),
    ]  # fmt: skip
    firsts = {}
    for line in lines:
        firsts.setdefault((line["temperature"], line["max_rows"], line["prompt"]), line["method"])
    for temperature in (0.0, 0.9):  # every method goes first in every setting
        assert [firsts[temperature, 1, prompt] for prompt in range(3)] == [
            "autoregressive",
            "dflash",
            "autoregressive",
        ]
        assert [firsts[temperature, 2, prompt] for prompt in (0, 2)] == ["autoregressive", "dflash"]
    assert {line["identical"] for line in lines} == {True}
    _, paired = read_results(config["out"])
    assert all(
        line["pair"][key] == line[key]
        for line in paired
        for key in ("temperature", "max_rows", "threads", "prompt")
    )
    assert list(settings(paired)) == [
        f"T = {t}, batch {n}, threads 1" for t, n in (("0", 1), ("0", 2), ("0.9", 1), ("0.9", 2))
    ]


def test_a_later_turn_follows_the_methods_own_answer(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "talk.jsonl").write_text(
        '{"task": "b", "turns": ["hi", "and you", "so"]}\n{"task": "b", "prompt": "why"}\n'
    )
    config |= {"prompts": tmp_path / "talk.jsonl", "turns": 2, "max_rows": 2}
    config |= {"methods": "autoregressive,prompt_lookup", "draft": "auto"}
    run_bench(BenchConfig(**config), quiet=True)
    lines = {(line["prompt"], line["method"]): line for line in read(config["out"])[1]}
    model = flashdraft.load(config["target"], draft="autoregressive")
    first = model.generate("hi", max_new_tokens=24, seed=0)
    talk = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and you"},
    ]
    second = model.generate(talk, max_new_tokens=24, seed=0)
    for method in ("autoregressive", "prompt_lookup"):
        line = lines[0, method]
        assert (line["turns"], line["identical"]) == (2, True)
        assert line["num_tokens"] == len(first.tokens) + len(second.tokens)
        assert (
            line["num_prompt_tokens"]
            == first.stats.num_prompt_tokens + second.stats.num_prompt_tokens
        )
        assert sum(line["accepted_lengths"]) == line["num_tokens"] - 2
        assert line["time_to_first_token"] == pytest.approx(
            (line["seconds"] - line["decode_seconds"]) / 2
        )
        assert lines[1, method]["turns"] == 1
    one = config | {"turns": 1, "out": tmp_path / "one.jsonl"}
    run_bench(BenchConfig(**one), quiet=True)
    assert {line["turns"] for line in read(one["out"])[1]} == {1}


def test_planted_difference_in_the_second_turn_is_found(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = bench_methods._timed

    def faulty(model: Any) -> Any:
        method = timed(model)

        def answer(prompts: list[list[int]], params: Any) -> Any:
            second = any(len(prompt) > 20 for prompt in prompts)
            return [
                bench_methods.replace(a, tokens=(*a.tokens[:-1], 3 + a.tokens[-1] % 5))
                if second
                else a
                for a in method(prompts, params)
            ]

        return answer if model.new_drafter().name == "prompt_lookup" else method

    monkeypatch.setattr(bench_methods, "_timed", faulty)
    run_bench(
        BenchConfig(
            **config | {"methods": "autoregressive,prompt_lookup", "draft": "auto", "turns": 2}
        ),
        quiet=True,
    )
    found = {(line["method"], line["turns"], line["identical"]) for line in read(config["out"])[1]}
    assert found == {
        ("autoregressive", 1, True),
        ("autoregressive", 2, True),
        ("prompt_lookup", 1, True),
        ("prompt_lookup", 2, False),
    }


def test_a_talk_that_would_outgrow_the_context_is_refused_before_the_file_appears(
    config: dict[str, Any],
) -> None:
    run = BenchConfig(
        **config | {"max_new_tokens": 130, "methods": "autoregressive", "draft": "auto"}, turns=2
    )
    with pytest.raises(ContextLengthError):
        run_bench(run, quiet=True)
    assert not config["out"].exists()


def test_results_are_not_overwritten(config: dict[str, Any]) -> None:
    config["out"].write_text("mine")
    with pytest.raises(InvalidParameter, match="exists"):
        run_bench(BenchConfig(**config), quiet=True)
    assert config["out"].read_text() == "mine"


def write_results(
    path: Path, lines: list[tuple[str, int, str, int, float, float, bool | None]]
) -> Path:
    header = {
        "command": "by hand",
        "device": "none",
        "threads": 1,
        "kernel": "none",
        "versions": {"x": "1"},
        "commit": None,
    }
    rows: list[dict[str, Any]] = [{"header": header}]
    for task, prompt, method, repeat, speed, tau, identical in lines:
        key = {"task": task, "prompt": prompt, "method": method, "repeat": repeat}
        speeds = {"tokens_per_second": speed, "decode_tokens_per_second": 2 * speed}
        rows.append(key | speeds | {"tau": tau, "identical": identical})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ratio_is_the_median_of_pairs_not_the_ratio_of_medians(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_results(
        tmp_path / "results.jsonl",
        [
            ("a", 0, "autoregressive", 0, 10.0, 1.0, True),
            ("a", 0, "dflash", 0, 20.0, 2.0, True),  # 2.0
            ("a", 0, "autoregressive", 1, 30.0, 1.0, True),
            ("a", 0, "dflash", 1, 30.0, 3.0, True),  # 1.0
            ("a", 1, "autoregressive", 0, 40.0, 1.0, True),
            ("a", 1, "dflash", 0, 60.0, 4.0, False),  # 1.5
            ("b", 2, "autoregressive", 0, 10.0, 1.0, True),
            ("b", 2, "dflash", 0, 50.0, 1.0, True),  # 5.0
            ("b", 2, "transformers", 0, 4.0, 1.0, None),
            ("b", 3, "dflash", 0, 90.0, 2.0, None),  # no pair
        ],
    )
    rows = {(row.task, row.method): row for row in summarise(read_results(path)[1])}
    assert list(rows)[:2] == [("a", "autoregressive"), ("a", "dflash")]
    a, b, both = (rows[task, "dflash"] for task in ("a", "b", "all"))
    assert (a.tokens_per_second, a.ratio, a.decode_tokens_per_second, a.decode_ratio) == (
        30.0,
        1.5,
        60.0,
        1.5,
    )
    assert (a.answers, a.tau, a.identical) == (3, 3.0, pytest.approx(2 / 3))
    assert (b.answers, b.tokens_per_second, b.ratio, b.identical) == (2, 70.0, 5.0, 1.0)
    assert (both.answers, both.ratio, both.identical) == (5, 1.75, 0.75)
    assert (rows["b", "transformers"].ratio, rows["b", "transformers"].identical) == (0.4, None)
    assert rows["all", "autoregressive"].ratio == 1.0
    show(path)
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()]
    assert ["a", "dflash", "3", "30.0", "1.50", "60.0", "1.50", "3.00", "67%", "-"] in table
    assert ["b", "transformers", "1", "4.0", "0.40", "8.0", "0.40", "1.00", "-", "-"] in table


def test_command_writes_results_and_shows_their_table_again(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("prompts", "out", "target", "draft")
    options = [word for name in names for word in (f"--{name}", str(config[name]))]
    assert (
        main(["bench", *options, "--methods", "autoregressive,dflash", "--max-new-tokens", "8"])
        == 0
    )
    first = capsys.readouterr().out
    assert main(["report", str(config["out"])]) == 0
    assert capsys.readouterr().out == first
    assert "100%" in first


# --- profile
#


@pytest.mark.parametrize("draft", ["auto", "draft"])
def test_profile_accounts_for_the_whole_step(models: Path, draft: str) -> None:
    draft = draft if draft == "auto" else str(models / draft)
    plain, drafted = (
        profile(str(models / "target"), draft=draft, nodes=nodes, context=40) for nodes in (1, 4)
    )
    for one in (plain, drafted):
        assert set(one.milliseconds) == set(PARTS)
        assert all(one.milliseconds[part] > 0 for part in PARTS)
        assert one.nbytes["weights"] == plain.nbytes["weights"] > 0
        assert one.nbytes["cache"] > 0
    assert drafted.milliseconds["drafting"] > 5 * plain.milliseconds["drafting"]
    assert plain.nbytes["drafter weights"] == plain.nbytes["drafter cache"] == 0
    assert drafted.nbytes["drafter weights"] > 0
    assert drafted.nbytes["drafter cache"] > 0


def test_profile_prints_shares_that_add_up(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--target",
        str(models / "target"),
        "--draft",
        str(models / "draft"),
        "--context",
        "40",
        "--nodes",
        "1",
        "--nodes",
        "4",
    ]
    assert main(["profile", *options]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for nodes in ("1", "4"):
        cells = {
            row[1]: float(row[2])
            for row in rows
            if row[:1] == [nodes] and len(row) == 4 and row[3].endswith("%")
        }
        assert set(cells) == {*PARTS, "step"}
        assert cells.pop("step") == pytest.approx(sum(cells.values()), abs=0.05)


# --- kernels and other engines
# ---------------------------------------------------------------------------------------------


def test_methods_of_one_kernel_are_compared_with_its_own_plain_decoding(
    config: dict[str, Any], tmp_path: Path
) -> None:
    config |= {"methods": "autoregressive:torch,dflash:torch,dflash", "dtype": "float32"}
    run_bench(BenchConfig(**config), quiet=True)
    header, lines = read(config["out"])
    assert set(header["kernel"]) == {"auto", "torch"}
    assert {line["method"]: line["plain"] for line in lines} == {
        "autoregressive:torch": "autoregressive:torch",
        "dflash:torch": "autoregressive:torch",
        "dflash": "autoregressive",
    }
    assert {line["identical"] for line in lines if line["method"] == "dflash:torch"} == {True}
    assert {line["identical"] for line in lines if line["method"] == "dflash"} == {None}
    by_base = {
        row.method: row.decode_ratio
        for row in summarise(read_results(config["out"], "dflash:torch")[1])
        if row.task != "all"
    }
    assert by_base["dflash:torch"] == 1


def test_a_folder_whose_name_has_dflash_in_it_wants_no_shipped_drafter(
    config: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_zlab(tmp_path / "my-dflash")
    config |= {"draft": "auto", "methods": f"autoregressive,mine={folder}"}
    assert run_bench(BenchConfig(**config), quiet=True) == 6
    assert {line["identical"] for line in read(config["out"])[1]} == {True}


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("transformers:int8", "no kernel 'int8'"),
        ("a=dflash,a=prompt_lookup", "have one name"),
        ("dflash:fast", "no kernel 'fast'"),
        ("llama.cpp", "no method 'llama.cpp'"),
        ("mine=none.py:run", "is 'none.py'"),
    ],
)
def test_an_unknown_kernel_or_file_is_refused(
    config: dict[str, Any], methods: str, message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        BenchConfig(**config | {"methods": methods})


def test_a_temperature_or_kernel_that_nobody_would_use_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.touch()
    with pytest.raises(InvalidParameter, match=r"temperature is 0\.5"):
        BenchConfig(**config | {"methods": f"dflash,mine={file}:run", "temperature": 0.5})
    with pytest.raises(InvalidParameter, match=r"threads is \(1, 2\)"):
        BenchConfig(**config | {"methods": f"dflash,mine={file}:run", "threads": (1, 2)})
    with pytest.raises(InvalidParameter, match="assistant is None"):
        BenchConfig(**config | {"methods": "dflash,transformers_assisted"})
    with pytest.raises(InvalidParameter, match="assistant is here, but no method uses it"):
        BenchConfig(**config | {"assistant": "here"})
    with pytest.raises(InvalidParameter, match="max_rows is 0"):
        BenchConfig(**config | {"max_rows": (1, 0)})
    with pytest.raises(InvalidParameter, match="temperature is -1"):
        BenchConfig(**config | {"temperature": (0, -1)})
    with pytest.raises(InvalidParameter, match="engine is 'run'"):
        run_bench(
            BenchConfig(**config | {"methods": f"mine={file}:run", "draft": "auto"}), quiet=True
        )
    with pytest.raises(InvalidParameter, match="kernel is 'torch', but every method names its own"):
        BenchConfig(**config | {"methods": "dflash:float32,transformers", "kernel": "torch"})


class FakeLlama(ModuleType):
    """Counts up from the last token that it read, and stops at nothing; checks what it is asked."""

    def __init__(self) -> None:
        super().__init__("llama_cpp")
        self.read: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if name == "Llama":
            return lambda path, **options: SimpleNamespace(ctx="ctx", detokenize=lambda tokens: b"")
        if name == "llama_decode":
            return lambda _, batch: self.read.extend(batch) or 0
        if name == "llama_sampler_sample":
            return lambda *_: self.read[-1] + 1
        if name == "llama_memory_clear":
            return lambda *_: self.read.clear()
        return lambda *args: list(args[0]) if name == "llama_batch_get_one" else None


def test_llama_cpp_answers_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeLlama())
    engine = runpy.run_path(str(IDS.with_name("engines.py")))["llama_cpp"]
    method = engine("a.gguf", SimpleNamespace(eos=frozenset({9})))
    params = [SamplingParams(max_new_tokens=5)] * 2
    assert [answer.tokens for answer in method([[1, 2], [4, 5]], params)] == [
        (3, 4, 5, 6, 7),
        (6, 7, 8, 9),
    ]
    with pytest.raises(InvalidParameter, match="length of prompt and answer is 4097"):
        method([[1] * 4092], params[:1])


ENGINE = """
from flashdraft.bench.peers import Answer

def parrot(argument, model):
    token = int(argument)

    def answers(prompts, params):
        return [Answer((token,) * one.max_new_tokens, 1.0, 0.5) for one in params]

    return answers
"""


def test_an_engine_of_a_file_runs_beside_ours_under_its_own_name(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(ENGINE)
    methods = f"autoregressive,my parrot={tmp_path / 'mine.py'}:parrot:5"
    run_bench(BenchConfig(**config | {"methods": methods, "draft": "auto"}), quiet=True)
    lines = [json.loads(line) for line in config["out"].read_text().splitlines()[1:]]
    assert {line["method"] for line in lines} == {"autoregressive", "my parrot"}
    assert {line["identical"] for line in lines if line["method"] == "my parrot"} == {False}
