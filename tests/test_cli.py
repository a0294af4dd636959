"""The command line: what it prints, its exit statuses, and that a slip shows two lines, no
traceback, and leaves no file.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_folders import ZLAB, save_target, save_zlab

import flashdraft
from flashdraft.cli import app, bench, decode, main
from flashdraft.cli import options as cli_options
from flashdraft.cli.table import COMMANDS
from flashdraft.formats.written import config_of
from flashdraft.generate import Session
from flashdraft.methods.dflash import DFlashDraftModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, drafters that fit it and that do not, and damaged files."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_target(folder / "target")
    save_zlab(folder / "draft")
    config = config_of(ZLAB, "toy")
    wrong = {
        "wide": replace(config, hidden_size=64),
        "deep": replace(config, target_layer_ids=(1, 9)),
        "many-words": replace(config, vocab_size=62),
        "other-mask": replace(config, mask_token_id=61),
    }
    for name, other in wrong.items():
        DFlashDraftModel(other).save_pretrained(folder / name)
    for name, whole in (("cut-draft", "draft"), ("cut-target", "target")):
        (folder / name).mkdir()
        for path in (folder / whole).iterdir():
            content = path.read_bytes()
            (folder / name / path.name).write_bytes(
                content[:-1000] if path.suffix == ".safetensors" else content
            )
    return folder


@pytest.fixture
def run(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Any:
    """Run a command line in an empty folder; `T` is the toy target, `D/x` the drafter x beside it.
    Returns status, out, err.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(line: str) -> tuple[int, str, str]:
        words = [
            re.sub(r"^D/", f"{folders}/", re.sub(r"^T$", f"{folders}/target", word))
            for word in shlex.split(line)
        ]
        status = main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


Run = Callable[[str], tuple[int, str, str]]


def give_input(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode("utf-8", "surrogateescape")))
    )


# --- slips
#

SLIPS = [
    ("generate hi --target nowhere", 1, "nowhere"),
    ("generate hi --target T --draft D/nowhere", 1, "nowhere"),
    ("generate hi --target T --draft D/wide", 1, "hidden size 64"),
    ("generate hi --target T --draft D/deep", 1, "layer 9"),
    ("generate hi --target T --draft D/other-mask", 1, "mask token 61"),
    ("generate hi --target T --draft D/cut-draft", 1, "damaged"),
    ("generate hi --target D/cut-target", 1, "cut-target"),
    ("generate hi --target T --max-new-tokens 1000", 1, "context"),
    ("generate hi --target T --draft D/draft --block-size 0", 1, "block_size is 0"),
    ("generate hi --target T --temperature -1", 1, "temperature is -1"),
    ("generate hi --target T --max-rows 0", 1, "max_rows is 0"),
    ("generate hi --target T --dtype int4", 1, "int4"),
    ("generate '' --target T", 1, "empty"),
    ("generate", 2, "prompts"),
    ("generate hi --temprature 1", 2, "--temprature"),
    ("generate hi --top-k many", 2, "--top-k"),
    ("generate hi --seed", 2, "--seed"),
    ("generates hi", 2, "generates"),
    ("--quiet", 2, "--quiet"),
    ("demo hi --target T --temperature nan", 1, "temperature is nan"),
    ("chat --target nowhere", 1, "nowhere"),
    ("bench --prompts nowhere.jsonl --out out.jsonl --target T", 1, "nowhere.jsonl"),
    ("bench --prompts good.jsonl", 2, "--out"),
    ("bench --prompts broken.jsonl --out out.jsonl --target T", 1, "line 3"),
    ("bench --prompts nothing.jsonl --out out.jsonl --target T", 1, "no prompts"),
    (
        "bench --prompts textless.jsonl --out out.jsonl --target T",
        1,
        "textless.jsonl, line 1: no text to ask",
    ),
    ("bench --prompts good.jsonl --out out.jsonl --target T", 1, "no drafter is shipped"),
    (
        (
            "bench --prompts good.jsonl --out out.jsonl --target T "
            "--draft D/draft --max-new-tokens 999"
        ),
        1,
        "context",
    ),
    ("bench --prompts good.jsonl --out out.jsonl --target T --methods medusa", 1, "medusa"),
    ("bench --prompts good.jsonl --out out.jsonl --draft prompt_lookup", 1, "draft is"),
    (
        "bench --prompts good.jsonl --out out.jsonl --methods autoregressive --block-size 3",
        1,
        "no method uses it",
    ),
    ("bench --prompts good.jsonl --out out.jsonl --repeats 0", 1, "repeats is 0"),
    (
        "bench --prompts good.jsonl --out good.jsonl --target T --methods autoregressive",
        1,
        "exists",
    ),
    ("report nowhere.jsonl", 1, "nowhere.jsonl"),
    ("report good.jsonl", 1, "not a results file"),
    ("tasks --data nowhere --out out.jsonl", 1, "bench_ids.json"),
    ("tasks --data nowhere --out out.jsonl --ids ids.json", 1, "gsm8k"),
    ("tasks --data nowhere --out out.jsonl --ids good.jsonl", 1, "good.jsonl"),
    ("tasks --data nowhere", 2, "--out"),
    ("tasks --data nowhere --out out.jsonl --ids ids.json --task chess", 1, "chess"),
    ("plot good.jsonl --out plots", 1, "not a results file"),
    ("profile --target T --nodes 0", 1, "nodes"),
    ("profile --target T --draft D/wide --context 32", 1, "hidden size 64"),
    ("prompts --data nowhere --out out.jsonl", 1, "nowhere"),
    ("regenerate nowhere.jsonl --out out.jsonl --target T", 1, "nowhere.jsonl"),
    ("regenerate good.jsonl --out out.jsonl --target T --limit 0", 1, "limit is 0"),
    ("features nowhere.jsonl --out out --target T --num-features 1", 1, "nowhere.jsonl"),
    ("features good.jsonl --out out --target T --num-features 3", 1, "num_features is 3"),
    (
        "features good.jsonl --out out --target T --num-features 1 --max-length 1",
        1,
        "max_length is 1",
    ),
    ("train nowhere --out out --eval-prompts good.jsonl --target T", 1, "nowhere"),
    ("train nowhere --out out --eval-prompts nothing.jsonl --target T", 1, "no prompts"),
    ("train nowhere --out out --eval-prompts good.jsonl --target T --steps 0", 1, "steps is 0"),
]


@pytest.fixture
def data_files(tmp_path: Path) -> set[Path]:
    files = {
        "good.jsonl": '{"prompt": "hi"}\n',
        "broken.jsonl": '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": \n{"prompt": "d"}\n',
        "nothing.jsonl": "",
        "textless.jsonl": '{"answer": "hi"}\n',
        "ids.json": '{"gsm8k": [0], "humaneval": [0], "mt_bench": [0]}',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return set(tmp_path.iterdir())


@pytest.mark.parametrize(("line", "status", "named"), SLIPS, ids=[line for line, _, _ in SLIPS])
def test_slip_prints_an_error_and_a_hint_and_leaves_no_file(
    run: Run, tmp_path: Path, data_files: set[Path], line: str, status: int, named: str
) -> None:
    before = {path: path.read_bytes() for path in data_files}
    got, out, err = run(line)
    lines = err.splitlines()
    assert got == status
    assert [text.split(":")[0] for text in lines] == ["error", "hint"], err
    assert named in lines[0]
    assert out == "" or line.startswith("demo")
    assert not [
        path
        for path in tmp_path.iterdir()
        if path not in data_files and not (path.is_dir() and not any(path.iterdir()))
    ]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_unreachable_hub_id_prints_an_error_and_a_hint(tmp_path: Path) -> None:
    """In a process of its own: the hub client reads its settings when it is imported."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "flashdraft",
        "generate",
        "hi",
        "--target",
        "no-such-org/no-such-model",
    ]
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert [text.split(":")[0] for text in done.stderr.splitlines()] == ["error", "hint"], (
        done.stderr
    )
    assert "no-such-org/no-such-model" in done.stderr


def test_file_that_may_not_be_written_prints_an_error_and_a_hint(
    run: Run, data_files: set[Path]
) -> None:
    status, _, err = run(
        "bench --prompts good.jsonl --out good.jsonl/out.jsonl --target T --methods autoregressive"
    )
    assert status == 1
    assert re.fullmatch(r"error: .*good\.jsonl.*\nhint: .*\n", err)


def test_ctrl_c_ends_quietly(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "report", interrupted)
    assert run("report x") == (130, "", "")


def test_reader_that_went_away_ends_quietly() -> None:
    command = [sys.executable, "-m", "flashdraft", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


# --- help
#


def test_help_imports_nothing_heavy_and_groups_the_commands() -> None:
    code = (
        "import sys; from flashdraft.cli import main; main(['--help']); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, heavy = done.stdout.splitlines()
    assert heavy == "False"

    panel = ""
    found = {}
    for line in text:
        if title := re.match(r"\W+ (Use|Measure|Train) \W+$", line):
            panel = title[1]
        elif command := re.match(r"\W+ (\w+(?:[ -]\w+)?)  +(\w.*\w\S?) +\W$", line):
            found[command[1]] = (panel, command[2])
    assert {name: found[name] for name in COMMANDS} == {
        name: (command.panel, command.help) for name, command in COMMANDS.items()
    }
    assert {command.panel for command in COMMANDS.values()} == {"Use", "Measure", "Train"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_ends_with_two_examples_that_are_well_formed(name: str, run: Run) -> None:
    status, out, err = run(f"{name} --help")
    assert (status, err) == (0, "")
    *_, heading, first, second = out.rstrip().splitlines()
    assert heading.strip() == "Examples:"
    for example in (first, second):
        words = shlex.split(example, comments=True)
        words = words[: words.index("<")] if "<" in words else words
        words = [word for word in words if not word.startswith("FLASHDRAFT_DATA=")]
        count = 1 + len(name.split())
        assert words[:count] == ["flashdraft", *name.split()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FLASHDRAFT_DATA", "data")
            app._app([name]).commands[name].make_context(
                name, words[count:]
            )  # raises for an unknown option or a bad value


def test_every_option_has_its_help(run: Run) -> None:
    for name in COMMANDS:
        options = app._app([name]).commands[name].params
        assert all(option.help for option in options), name


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"flashdraft {flashdraft.__version__}\n", "")


# --- generating
#


def test_generate_prints_what_the_library_writes(run: Run, folders: Path) -> None:
    model = flashdraft.load(folders / "target")
    expected = [
        model.generate(prompt, max_new_tokens=20, temperature=0.9, seed=3)
        for prompt in ("hi", "you there")
    ]
    options = "--target T --draft D/draft --max-new-tokens 20 --temperature 0.9 --seed 3"
    assert run(f"generate hi {options}") == (0, expected[0].text + "\n", "")
    assert (
        run(f"generate hi 'you there' {options}")[1]
        == f"{expected[0].text}\n\n{expected[1].text}\n"
    )
    lines = [
        json.loads(line)
        for line in run(f"generate hi 'you there' {options} --json")[1].splitlines()
    ]
    assert [line["tokens"] for line in lines] == [list(result.tokens) for result in expected]
    assert [line["text"] for line in lines] == [result.text for result in expected]
    assert set(lines[0]) >= {"text", "tokens", "finish_reason", "tau", "tokens_per_second"}
    assert "logprobs" not in lines[0]


def test_generate_takes_penalties_and_shows_logprobs(run: Run, folders: Path) -> None:
    penalties = {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 0.9}
    expected = flashdraft.load(folders / "target").generate(
        "hi", max_new_tokens=20, logprobs=True, **penalties
    )
    options = "hi --target T --draft D/draft --max-new-tokens 20"
    spelled = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in penalties.items())
    line = json.loads(run(f"generate {options} {spelled} --json --logprobs")[1])
    assert line["tokens"] == list(expected.tokens)
    assert line["logprobs"] == pytest.approx(expected.logprobs, abs=1e-5)
    assert line["text"] + "\n" != run(f"generate {options}")[1]


def test_logprobs_without_json_and_penalties_out_of_range_are_refused(run: Run) -> None:
    for words, name in (("--logprobs", "logprobs"), ("--presence-penalty 3", "presence_penalty")):
        status, out, err = run(f"generate hi --target T {words}")
        assert (status, out) == (1, "")
        assert err.startswith(f"error: {name} is ")


def test_what_a_command_line_cannot_express_is_no_option(run: Run) -> None:
    text = run("generate --help")[1]
    assert "--frequency-penalty" in text
    assert "--logit-bias" not in text
    assert "--logits-processor" not in text


def test_generate_reads_standard_input_and_stops(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "hi")
    _, text, _ = run("generate - --target T --max-new-tokens 20 --ignore-eos")
    assert text == run("generate hi --target T --max-new-tokens 20 --ignore-eos")[1]
    stops = text[9:11], text[5:7]
    cut = text[: min(text.index(stop) for stop in stops)]
    line = shlex.join(
        [
            "generate",
            "hi",
            "--max-new-tokens",
            "20",
            "--ignore-eos",
            "--stop",
            stops[0],
            "--stop",
            stops[1],
        ]
    )
    assert run(f"{line} --target T")[1] == cut + "\n"


def test_a_byte_order_mark_is_no_part_of_what_is_piped_in(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []
    for piped in ("hi", "\ufeffhi"):
        give_input(monkeypatch, piped)
        status, out, err = run("generate - --target T --max-new-tokens 8")
        assert status == 0, err
        answers.append(out)
    assert answers[0] == answers[1]


def test_standard_input_that_is_no_text_is_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "\udcff")
    status, out, err = run("generate - --target T")
    assert (status, out) == (1, "")
    assert "UTF-8" in err


def test_demo_tells_drafted_from_own_tokens_and_compares(run: Run, folders: Path) -> None:
    status, out, _ = run(
        "demo abcabcabc --target T --draft prompt_lookup --block-size 8 --max-new-tokens 60"
    )
    assert status == 0
    legend, _, answer, _, *figures = out.splitlines()
    assert legend == "⟨drafted and accepted⟩, the target's own"
    expected = flashdraft.load(folders / "target").generate("abcabcabc", max_new_tokens=60)
    assert re.sub("[⟨⟩]", "", answer) == expected.text
    assert "⟨" in answer
    assert figures[-1] == "texts identical: yes"
    assert [line.split()[0] for line in figures[:-1]] == [
        "prompt_lookup",
        "autoregressive",
        "ratio",
        "tau",
    ]


def test_demo_without_a_shipped_drafter_says_so(run: Run) -> None:
    _, out, _ = run("demo hi --target T --max-new-tokens 8")
    assert out.startswith("no drafter is shipped for ")


def test_terminal_shows_drafted_text_underlined(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stats = flashdraft.Stats()
    result = flashdraft.Result("abc", (1, 2, 3), "length", stats)
    pieces = [
        decode.Chunk(0, (piece,), ())
        for piece in _pieces(("a", False), ("b", True), ("", False), ("c", True))
    ]
    shown = {}
    for no_color in ("", "1"):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("NO_COLOR", no_color)
        assert (
            decode._show([*pieces, replace(pieces[0], pieces=(), result=result)], origin=True)
            is result
        )
        shown[no_color] = terminal.getvalue().split("own\n\n")[1]
    assert shown == {"": "a\033[4;32mbc\033[0m\n\n", "1": "a⟨bc⟩\n\n"}


def _pieces(*parts: tuple[str, bool]) -> list[Any]:
    return [flashdraft.types.Piece(text, drafted) for text, drafted in parts]


def test_chat_keeps_the_conversation_until_reset(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flashdraft.load(folders / "target")
    first = model.generate("hi", max_new_tokens=8).text
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "go"},
    ]
    second = model.generate(turns, max_new_tokens=8).text
    give_input(monkeypatch, "hi\n\ngo\n/reset\nhi\n/exit\nhi\n")
    status, out, err = run("chat --target T --max-new-tokens 8")
    assert status == 0
    assert out.splitlines() == [first, second, first]
    assert len(err.splitlines()) == 3
    assert all(
        re.fullmatch(r"\(tau \d\.\d\d, [\d.]+ tokens/s\)", line) for line in err.splitlines()
    )


def test_chat_at_a_terminal_goes_on_after_a_turn_that_does_not_fit(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, f"{'a' * 300}\nhi\n")
    status, _, err = run("chat --target T --max-new-tokens 8")
    assert status == 1
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
    give_input(monkeypatch, f"{'a' * 300}\nhi\n")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    status, out, err = run("chat --target T --max-new-tokens 8")
    assert status == 0
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
    assert out.count("tau") == 1


def test_ctrl_c_ends_the_answer_and_not_the_talk(
    run: Run, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = flashdraft.load(folders / "target")
    asked: list[Any] = []
    stream_of = flashdraft.Model.stream

    def interrupted(self: Any, prompt: Any, params: Any) -> Any:
        asked.append(prompt)
        chunks = iter(list(stream_of(model, prompt, params)))
        yield next(chunks)
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield from chunks

    first = next(iter(model.stream("hi", max_new_tokens=8))).text
    monkeypatch.setattr(Session, "stream", interrupted)
    give_input(monkeypatch, "hi\ngo\n")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    status, out, err = run("chat --target T --max-new-tokens 8")
    assert status == 0
    assert "stopped" in err
    assert out.count("tau") == 1
    assert [turn["content"] for turn in asked[1]] == ["hi", first, "go"]


def test_ctrl_c_of_a_piped_chat_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, prompt: Any, params: Any) -> Any:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(Session, "stream", interrupted)
    give_input(monkeypatch, "hi\ngo\n")
    assert run("chat --target T")[0] == 130


# --- words
#


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("generate '-5 plus 3'", "goes behind --"),
        ("generate -5", "goes behind --"),
        ("demo '-3 + 4'", "goes behind --"),
        ("generate hi --temprature 1", "did you mean --temperature?"),
        ("generate hi --top_p 1", "did you mean --top-p?"),
        ("generates hi", "did you mean generate?"),
        ("generate", "as in: flashdraft generate 'Why"),
        ("bench --prompts good.jsonl", "as in: flashdraft bench --prompts"),
    ],
)
def test_slip_of_usage_says_what_was_meant(run: Run, line: str, meant: str) -> None:
    status, out, err = run(line)
    assert (status, out) == (2, "")
    assert meant in err.splitlines()[1]


@pytest.mark.parametrize("methods", ["''", "autoregressive,", ",", "dflash,,medusa"])
def test_empty_method_is_refused(run: Run, methods: str) -> None:
    status, _, err = run(
        f"bench --prompts good.jsonl --out out.jsonl --target T --methods {methods}"
    )
    assert status == 1
    assert err.startswith("error: methods is ")


def test_empty_prompt_is_refused_before_anything_is_loaded(run: Run) -> None:
    status, _, err = run("generate hi '' --target nowhere")
    assert status == 1
    assert "empty" in err


def test_errors_are_not_printed_where_standard_error_is_closed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", "hi", "--target", "nowhere"]) == 1
    assert main(["generates"]) == 2
    assert capsys.readouterr().out == ""


def test_sigterm_ends_with_143_and_leaves_nothing_half_written(
    folders: Path, tmp_path: Path
) -> None:
    code = "import os, signal, sys; from flashdraft.cli import bench, main; "
    code += (
        "bench.report = lambda results: os.kill(os.getpid(), signal.SIGTERM); "
        "sys.argv = ['flashdraft', 'report', 'x']; "
    )
    code += "sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "")


def test_help_says_all_that_an_option_takes(run: Run) -> None:
    text = " ".join(run("generate --help")[1].split())
    for word in (
        *cli_options.KERNELS,
        "float64",
        *cli_options.NETWORKS,
        "prompt_lookup",
        "autoregressive",
        "smaller causal LM",
        "1024",
    ):
        assert word in text, word
    text = " ".join(run("bench --help")[1].split())
    for word in (*cli_options.KERNELS, "float64"):
        assert word in text, word


def test_profile_with_a_context_that_is_too_large_says_what_fits(run: Run) -> None:
    status, _, err = run("profile --target T --nodes 1 --context 250 --steps 20")
    assert status == 1
    assert err.splitlines()[0].startswith("error: context is 250, but 20 steps of 1 nodes")
    assert err.splitlines()[1] == "hint: --context must be at most 231 for that"


@pytest.mark.parametrize("draft", ["D/draft", "prompt_lookup", "D/draft+prompt_lookup"])
def test_profile_takes_every_drafter(run: Run, draft: str) -> None:
    words = draft.split("+")
    status, out, err = run(
        f"profile --target T --nodes 2 --context 16 --steps 1 --draft {words[0]}"
    )
    assert (status, err) == (0, "")
    assert "drafter weights" in out


def test_doctor_refuses_other_methods_by_name(run: Run, tmp_path: Path) -> None:
    eagle3 = Path(flashdraft.__file__).parent / "assets/smollm2-135m-eagle3"
    status, _, err = run(f"doctor {eagle3} T feats")
    assert status == 1
    assert "is of eagle3" in err
    assert "flashdraft eval" in err


def test_end_token_is_no_mask(run: Run, tmp_path: Path) -> None:
    rows = [
        {"source": "x", "row": n, "prompt": "hi", "response": "", "tokens": [5 + n] * 12}
        for n in range(2)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text('{"prompt": "hi"}\n')
    assert run("features a.jsonl --out feats --target T --num-features 1")[0] == 0
    train = (
        "train feats --out run --eval-prompts held.jsonl --target T --num-features "
        "1 --num-layers 1 --steps 1 --sequences 1"
    )
    status, _, err = run(f"{train} --mask-token-id 2")
    assert status == 1
    assert err.splitlines()[0].startswith("error: mask_token_id is 2, which ends the texts of ")
    status, _, err = run(f"{train} --mask-token-id 60 --min-context 90")
    assert status == 1
    assert "too early for min_context 90" in err.splitlines()[0]


def test_prompts_of_every_stage_are_prompts_of_eval_and_regenerate(
    run: Run, tmp_path: Path
) -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    tasks = [{"task": "x", "row": 0, "prompt": "hi"}, {"task": "y", "row": 0, "prompt": "go"}]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tasks))
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"source": "s", "row": 3, "prompt": talk}) + "\n"
    )
    assert (
        run("regenerate tasks.jsonl --out a.jsonl --target T --max-new-tokens 4")[1]
        == "2 new answers in a.jsonl\n"
    )
    for name in ("tasks", "prompts", "a"):
        status, out, err = run(f"eval {name}.jsonl --target T --draft D/draft --max-new-tokens 4")
        assert (status, err) == (0, ""), name
        assert out.startswith("tau ")


# --- training
#


UNUSED = (  # options that would have no effect are refused by name
    ("--head none --head-rank 8", "head_rank is 8, but head is none"),
    ("--init-from run/best --head none", "head is none, but `run/best` has a selector head"),
    ("--init-from run/best --head swiglu", "has a selector head of inner size 256 already"),
    ("--init random --init-from run/best", "init is random, but --init-from"),
    ("--max-length 64", "max_length is 64, but the folder of features"),
    ("--weights dpace --gamma 5", "gamma is 5.0"),
)


def test_stages_lead_from_data_to_a_drafter(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in ("gsm8k", "gpteacher", "self_instruct"):
        (data / folder).mkdir(parents=True)
    (data / "gsm8k/train.jsonl").write_text('{"question": "how many"}\n')
    for name in ("codegen-instruct", "roleplay-similarity_0.6-instruct-dataset"):
        (data / f"gpteacher/{name}.json").write_text(
            json.dumps([{"instruction": f"do {name[:4]}", "input": ""}])
        )
    for name in ("seed_tasks", "user_oriented_instructions"):
        (data / f"self_instruct/{name}.jsonl").write_text(
            json.dumps({"instruction": f"say {name[:4]}", "input": "x"}) + "\n"
        )
    assert run("prompts --data data --out prompts.jsonl")[:2] == (0, "5 prompts in prompts.jsonl\n")
    status, out, _ = run(
        "regenerate prompts.jsonl --out answers.jsonl --target T "
        "--max-new-tokens 24 --ignore-eos --limit 4"
    )
    assert (status, out) == (0, "4 new answers in answers.jsonl\n")
    again = "regenerate prompts.jsonl --out answers.jsonl --target T --limit 4"
    assert run(f"{again} --max-new-tokens 24 --ignore-eos")[1].startswith("0 new answers")
    status, out, err = run(f"{again} --max-new-tokens 24")
    assert (status, out) == (1, "")
    assert "made with ignore_eos true, not false" in err
    status, _, err = run("regenerate prompts.jsonl --out answers.jsonl --target T --soft-labels")
    assert status == 1
    assert "soft_labels is True, but nothing is kept" in err
    assert run("features answers.jsonl --out feats --target T --num-features 1")[:2] == (
        0,
        "1 shards in feats\n",
    )
    train = (
        "train feats --eval-prompts prompts.jsonl --target T --steps 2 --anchors "
        "4 --sequences 2 --vocab 0 --precision fp32"
    )
    status, out, err = run(f"{train} --out run --num-features 1 --mask-token-id 60 --num-layers 2")
    assert (status, err) == (0, "")
    assert re.fullmatch(r"best tau [\d.]+; the drafter: run/best\n", out)
    drafter = DFlashDraftModel.from_pretrained("run/best").config
    assert (drafter.num_hidden_layers, drafter.block_size, drafter.target_layer_ids) == (2, 4, (2,))
    assert (drafter.sequential_head, drafter.head_rank) == ("selector", 256)

    assert run(f"{train} --out run2 --init-from run/best --block-size 5")[0] == 0
    drafter = DFlashDraftModel.from_pretrained("run2/best").config
    assert (drafter.num_hidden_layers, drafter.block_size) == (2, 5)
    assert (drafter.sequential_head, drafter.head_rank) == ("selector", 256)

    new = "--num-features 1 --mask-token-id 60 --num-layers 1"
    for head, kind, rank in (
        ("--head swiglu --head-rank 4", "swiglu", 4),
        ("--head none", None, 256),
        ("--layout anchor-first", "markov", 256),
    ):
        assert run(f"{train} --out {kind} {new} {head}")[0] == 0
        drafter = DFlashDraftModel.from_pretrained(f"{kind}/best").config
        assert drafter.sequential_head == kind
        assert kind is None or drafter.head_rank == rank
    for wrong, named in (
        ("--init run/best", "init is 'run/best'"),
        ("--num-layers 9", "num_layers is 9"),
        ("--head tail", "head is"),
    ):
        status, _, err = run(f"{train} --out run3 --num-features 1 --mask-token-id 60 {wrong}")
        assert status == 1
        assert named in err
    status, _, err = run(f"{train} --out run3 --num-features 1")
    assert status == 1
    assert "--mask-token-id" in err
    assert not (tmp_path / "run3").exists()
