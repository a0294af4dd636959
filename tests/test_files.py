"""What may be written over, and what made it: every command, its outputs, and the files that were
there before.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from toy_folders import CHAT, save_target, save_zlab
from toy_training import write_lines

from flashdraft import files
from flashdraft.cli import main
from flashdraft.errors import DataError, InvalidParameter
from flashdraft.files import check_facts, locked, output_file, read_note, write_file
from flashdraft.methods.dflash import DFlashDraftModel

Run = Callable[..., tuple[int, str, str]]
FOREIGN = {
    "notes": "my notes\nand their end",
    "list": '[{"a": 1}]',
    "object": '{"a": 1}\n',
    "half": '{"sour',
}
TINY = (
    "--sequences 2 --anchors 4 --steps 2 --num-layers 1 --block-size 3 "
    "--num-features 1 --mask-token-id 60 --vocab 20"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets of one shape, prompts, and answers made by hand."""
    folder = tmp_path_factory.mktemp("shop")
    save_target(folder / "t")
    save_target(folder / "other", model=tiny_model("llama", seed=5, dtype=torch.float32))
    write_lines(folder / "set.jsonl", [{"prompt": text} for text in ("hi", "you", "she")])
    write_lines(
        folder / "p.jsonl",
        [{"source": "s", "row": n, "prompt": text} for n, text in enumerate(("hi", "you"))],
    )
    tokens = [[5 + (n * 7 + k) % 40 for k in range(12)] for n in range(4)]
    rows = [
        {"source": "s", "row": n, "prompt": "hi" * (n + 1), "response": "", "tokens": tokens[n]}
        for n in range(4)
    ]
    write_lines(folder / "hand.jsonl", rows)
    write_lines(folder / "held.jsonl", [{"prompt": "ab"}])
    return folder


@pytest.fixture
def run(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """One command line in a folder with links to the shop's files;
    its status, output and errors.
    """
    for path in shop.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(line.split()), *capsys.readouterr()

    return call


def refused(said: tuple[int, str, str]) -> str:
    """The error's line, after checking that there is one and a hint, and nothing else."""
    status, out, err = said
    assert (status, out) == (1, "")
    assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"], err
    return err.splitlines()[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


WRITERS = {
    "prompts": "prompts set.jsonl --out",
    "regenerate": "regenerate p.jsonl --target t --max-new-tokens 4 --out",
    "bench": (
        "bench --prompts held.jsonl --target t --methods autoregressive --max-new-tokens 4 --out"
    ),
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS.keys())
def test_a_file_of_another_is_named_and_stays(
    run: Run, tmp_path: Path, command: str, content: str
) -> None:
    (tmp_path / "mine.txt").write_text(content)
    before = contents(tmp_path)
    assert "mine.txt`" in refused(run(f"{command} mine.txt"))
    assert contents(tmp_path) == before


def test_planted_writer_that_does_not_ask_is_caught(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_check_first_line", lambda *_: None)
    monkeypatch.setattr(files, "_foreign", lambda *_: None)
    (tmp_path / "mine.txt").write_text("my notes")
    with pytest.raises(TypeError):  # None is no error to raise
        run("prompts set.jsonl --out mine.txt")


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS.keys())
def test_a_folder_a_device_and_a_packed_name_are_refused(
    run: Run, tmp_path: Path, command: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for out, why in (
        ("folder", "is a folder"),
        ("/dev/null", "is a device or a pipe"),
        ("fifo", "is a device or a pipe"),
        ("out.jsonl.gz", "not gzip"),
        ("file/out.jsonl", "is no folder"),
        ("~/out.jsonl", "would make a folder called ~"),
        ("-", "is standard output"),
    ):
        assert why in refused(run(f"{command} {out}"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not (tmp_path / "out.jsonl.gz").exists()


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS.keys())
def test_the_commands_own_input_is_refused_by_any_path(
    run: Run, tmp_path: Path, command: str
) -> None:
    source = command.split()[1 if "bench" not in command else 2]
    (tmp_path / "link").symlink_to(source)
    os.link(os.path.realpath(source), tmp_path / "hard")
    before = contents(tmp_path)
    for out in (source, f"./{source}", "link", "hard"):
        refused(run(f"{command} {out}"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS.keys())
def test_an_empty_file_is_a_new_one_and_links_are_written_through(
    run: Run, tmp_path: Path, command: str
) -> None:
    real = tmp_path / "real.jsonl"
    real.touch(mode=0o600)
    (tmp_path / "link.jsonl").symlink_to(real)
    assert run(f"{command} link.jsonl")[0] == 0
    assert (tmp_path / "link.jsonl").is_symlink()
    assert real.read_text().startswith("{")
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


def test_prompts_are_made_again_but_not_over_what_was_changed_or_is_anothers(
    run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    assert run("prompts set.jsonl --out out.jsonl")[0] == 0
    first = out.read_bytes()
    assert read_note(out) is not None
    assert run("prompts set.jsonl --out out.jsonl")[0] == 0
    assert out.read_bytes() == first
    assert run("prompts set.jsonl --seed 5 --out out.jsonl")[0] == 0
    assert out.read_bytes() != first
    out.write_bytes(out.read_bytes() + b'{"source": "me", "row": 0, "prompt": "mine"}\n')
    changed = out.read_bytes()
    assert "was changed since" in refused(run("prompts set.jsonl --out out.jsonl"))
    assert out.read_bytes() == changed
    assert run(f"{WRITERS['regenerate']} answers.jsonl")[0] == 0
    assert "written by `flashdraft regenerate`" in refused(
        run("prompts set.jsonl --out answers.jsonl")
    )


def test_prompts_of_an_earlier_version_may_be_made_again_alike(run: Run, tmp_path: Path) -> None:
    assert run("prompts set.jsonl --out out.jsonl")[0] == 0
    first = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl.run.json").unlink()
    assert run("prompts set.jsonl --out out.jsonl")[0] == 0
    (tmp_path / "out.jsonl.run.json").unlink()
    assert "not written by `flashdraft prompts`" in refused(
        run("prompts set.jsonl --seed 5 --out out.jsonl")
    )
    assert (tmp_path / "out.jsonl").read_bytes() == first


@pytest.mark.parametrize("command", ["prompts", "regenerate"])
def test_a_foreign_file_in_the_place_of_the_note_stays(
    run: Run, tmp_path: Path, command: str
) -> None:
    (tmp_path / "out.jsonl.run.json").write_text('{"mine": true}')
    assert "out.jsonl.run.json`" in refused(run(f"{WRITERS[command]} out.jsonl"))
    assert (tmp_path / "out.jsonl.run.json").read_text() == '{"mine": true}'
    assert not (tmp_path / "out.jsonl").exists()


def test_two_processes_do_not_write_one_output(run: Run, tmp_path: Path) -> None:
    with locked(tmp_path / "a.jsonl"):
        assert "another process is writing" in refused(run(f"{WRITERS['regenerate']} a.jsonl"))
    assert run(f"{WRITERS['regenerate']} a.jsonl")[0] == 0
    assert not list(tmp_path.glob(".*lock"))


def test_a_pipe_is_refused_by_its_name_among_the_open_files(run: Run) -> None:
    read, write = os.pipe()
    assert "is a device or a pipe" in refused(run(f"prompts set.jsonl --out /dev/fd/{write}"))
    for end in (read, write):
        os.close(end)


def test_what_a_failed_command_had_begun_is_gone(run: Run, tmp_path: Path) -> None:
    before = contents(tmp_path)
    for line in (
        "regenerate p.jsonl --out deep/er/out.jsonl --url http://localhost:1/v1 --model m",
        "regenerate p.jsonl --out deep/er/out.jsonl --target nowhere",
        "features hand.jsonl --out deep/f --target t --num-features 7",
        "features nowhere.jsonl --out deep/f --target t",
        f"train nowhere --out deep/run --eval-prompts held.jsonl --target t {TINY}",
    ):
        refused(run(line) if "url" not in line else _impatient(run, line))
    assert contents(tmp_path) == before
    assert not (tmp_path / "deep").exists()


def _impatient(run: Run, line: str) -> tuple[int, str, str]:
    from flashdraft.train import regenerate as stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_AGAIN", stage._AGAIN.new(total=0))
        return run(line)


# Answers: what they are of, and how their file may look.


@pytest.fixture
def answered(run: Run, tmp_path: Path) -> Path:
    """Answers to the first of the prompts; the second one is missing."""
    assert run(f"{WRITERS['regenerate']} a.jsonl --limit 1")[0] == 0
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("look", ["crlf", "no last end", "cr", "mark", "crlf and no last end"])
def test_answers_with_other_endings_are_gone_on_with(
    run: Run, answered: Path, tmp_path: Path, look: str
) -> None:
    assert run(f"{WRITERS['regenerate']} whole.jsonl")[0] == 0
    content = answered.read_bytes()
    answered.write_bytes(
        {
            "crlf": content.replace(b"\n", b"\r\n"),
            "no last end": content.rstrip(b"\n"),
            "cr": content.replace(b"\n", b"\r"),
            "mark": b"\xef\xbb\xbf" + content,
            "crlf and no last end": content.rstrip(b"\n"),
        }[look]
    )
    assert run(f"{WRITERS['regenerate']} a.jsonl")[1] == "1 new answers in a.jsonl\n"
    rows = [json.loads(line) for line in answered.read_text(encoding="utf-8-sig").splitlines()]
    assert rows == [
        json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--target other", "made with target `t`"),
        ("--temperature 1", "temperature 0.0, not 1.0"),
        ("--max-new-tokens 5", "max_new_tokens 4, not 5"),
        ("--stop e", 'stop [], not ["e"]'),
        ("--dtype bfloat16", 'dtype "float32", not "bfloat16"'),
    ],
)
def test_other_answers_are_not_mixed_with_these(
    run: Run, answered: Path, options: str, why: str
) -> None:
    before = answered.read_bytes()
    assert why in refused(run(f"{WRITERS['regenerate']} a.jsonl {options}"))
    assert answered.read_bytes() == before


@pytest.mark.parametrize(
    "options", ["--seed 3", "--top-k 5", "--draft prompt_lookup", "--max-rows 1"]
)
def test_what_changes_no_text_is_no_difference(run: Run, answered: Path, options: str) -> None:
    assert run(f"{WRITERS['regenerate']} a.jsonl {options}")[0] == 0


def test_the_same_target_in_another_place_goes_on_and_another_template_does_not(
    run: Run, answered: Path, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "t", tmp_path / "moved")
    call = WRITERS["regenerate"].replace("--target t", "--target moved")
    assert run(f"{call} a.jsonl --limit 1")[0] == 0
    template = tmp_path / "moved/chat_template.jinja"
    template.write_text(CHAT.replace("a {%", "b {%"))
    assert "made with template" in refused(run(f"{call} a.jsonl"))


def test_one_changed_weight_is_another_target(run: Run, answered: Path, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    save_target(tmp_path / "tuned", model=model)
    assert "target `t`" in refused(
        run(f"{WRITERS['regenerate'].replace('--target t', '--target tuned')} a.jsonl")
    )


def test_a_changed_set_is_refused_and_a_grown_one_goes_on(
    run: Run, answered: Path, tmp_path: Path
) -> None:
    before = answered.read_bytes()
    call = WRITERS["regenerate"].replace("p.jsonl", "q.jsonl")
    for row, why in (
        ({"source": "s", "row": 0, "prompt": "me"}, "the prompt 'hi' became 'me'"),
        ({"source": "s", "row": 0, "prompt": "hi", "thinking": True}, "thinking None became True"),
        ({"source": "z", "row": 0, "prompt": "hi"}, "not among the prompts"),
    ):
        write_lines(tmp_path / "q.jsonl", [row])
        assert why in refused(run(f"{call} a.jsonl"))
        assert answered.read_bytes() == before
    texts = ["so", "hi", "no"]
    write_lines(
        tmp_path / "q.jsonl",
        [{"source": "s", "row": 5 - 5 * (text == "hi"), "prompt": text} for text in texts],
    )
    assert run(f"{call} a.jsonl")[1] == "2 new answers in a.jsonl\n"


def test_answers_without_a_note_are_taken_with_one_line_unless_a_line_contradicts(
    run: Run, answered: Path
) -> None:
    (answered.parent / "a.jsonl.run.json").unlink()
    whole = json.loads(answered.read_text())
    for change, why in (
        ({"num_tokens": 900}, "an answer of 900 tokens"),
        ({"tokens": [3, 61]}, "token 61 is none"),
        ({"prompt": "no"}, "the prompt 'no' became 'hi'"),
    ):
        write_lines(answered, [whole | change])
        assert why in refused(run(f"{WRITERS['regenerate']} a.jsonl"))
    write_lines(answered, [whole])
    status, out, err = run(f"{WRITERS['regenerate']} a.jsonl --temperature 1")
    assert (status, out) == (0, "1 new answers in a.jsonl\n")
    assert err.startswith(f"{answered}: nothing says what wrote its 1 answers")
    assert err.count("\n") == 1
    note = read_note(answered)
    assert note is not None
    assert note["taken"] == 1


def test_half_a_line_is_cut_only_where_it_is_ours(run: Run, answered: Path) -> None:
    whole = answered.read_bytes()
    answered.write_bytes(whole + b"my notes")
    assert "line 2" in refused(run(f"{WRITERS['regenerate']} a.jsonl"))
    assert answered.read_bytes() == whole + b"my notes"
    answered.write_bytes(whole + whole[:20])
    assert run(f"{WRITERS['regenerate']} a.jsonl")[0] == 0
    assert answered.read_bytes().startswith(whole)


# Features, training, drafters.


def test_features_and_answers_of_another_target_are_refused(
    run: Run, answered: Path, tmp_path: Path
) -> None:
    assert "target `t`" in refused(run("features a.jsonl --out f --target other --num-features 1"))
    assert not (tmp_path / "f").exists()
    assert run("features a.jsonl --out f --target t --num-features 1") == (0, "1 shards in f\n", "")
    before = contents(tmp_path / "f")
    assert "target `t`" in refused(
        run("features hand.jsonl --out f --target other --num-features 1")
    )
    assert contents(tmp_path / "f") == before
    held = f"--eval-prompts held.jsonl {TINY}"
    assert "target `t`" in refused(run(f"train f --out run --target other {held}"))
    assert "target `t`" in refused(run(f"train a.jsonl --online --out run --target other {held}"))
    assert not (tmp_path / "run").exists()


def test_features_of_an_earlier_version_are_taken_with_one_line(run: Run, tmp_path: Path) -> None:
    assert run("features hand.jsonl --out f --target t --num-features 1")[0] == 0
    manifest = json.loads((tmp_path / "f/manifest.json").read_text())
    for name in ("weights", "template", "kernel"):
        del manifest[name]
    (tmp_path / "f/manifest.json").write_text(json.dumps(manifest))
    train = f"--eval-prompts held.jsonl {TINY}"
    assert "target `t`" in refused(
        run(f"train f --out run --target other {train}")
    )  # `t` lies there and is another
    status, _, err = run(f"train f --out run --target t {train}")
    assert status == 0
    assert err.count("only the name `t` says what made these features") == 1


def test_a_models_folder_and_a_foreign_manifest_are_no_folder_of_features(
    run: Run, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / "t", tmp_path / "model")
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "app"}')
    before = contents(tmp_path)
    for out in ("model", "web", "held.jsonl"):
        refused(run(f"features hand.jsonl --out {out} --target t --num-features 1"))
        refused(
            run(
                "regenerate p.jsonl --target t --max-new-tokens 4 --out a.jsonl "
                f"--num-features 1 --keep-features {out}"
            )
        )
    assert contents(tmp_path) == before


@pytest.fixture(scope="module")
def features(shop: Path) -> Path:
    line = f"features {shop}/hand.jsonl --out {shop}/feats --target {shop}/t --num-features 1"
    assert main(line.split()) == 0
    return shop / "feats"


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "metrics.jsonl",
        "best/config.json",
        "checkpoints/step-100/x",
        "vocabulary.safetensors",
        "tensorboard/x",
    ],
)
def test_a_folder_of_another_is_not_trained_into(
    features: Path, run: Run, tmp_path: Path, name: str
) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("{}")
    before = contents(tmp_path / "run")
    train = f"train {features} --eval-prompts held.jsonl --target t {TINY}"
    assert name.split("/")[0] in refused(run(f"{train} --out run"))
    assert contents(tmp_path / "run") == before
    refused(run(f"{train} --out {features}"))


def test_a_run_goes_on_with_what_it_was_begun_with(
    features: Path, run: Run, tmp_path: Path
) -> None:
    train = f"train {features} --out run --target t {TINY}"
    assert run(f"{train} --eval-prompts held.jsonl --profile 1")[0] == 0
    assert not (tmp_path / "run").exists()  # what is only measured leaves nothing
    assert run(f"{train} --eval-prompts held.jsonl")[0] == 0
    assert run(f"{train} --eval-prompts held.jsonl")[0] == 0
    write_lines(tmp_path / "held2.jsonl", [{"prompt": "other"}])
    before = contents(tmp_path / "run")
    assert "held_out" in refused(run(f"{train} --eval-prompts held2.jsonl"))
    assert run("features a2.jsonl --out f2 --target t --num-features 1")[0] == 1
    write_lines(
        tmp_path / "a2.jsonl",
        [json.loads(line) for line in (tmp_path / "hand.jsonl").read_text().splitlines()[:3]],
    )
    assert run("features a2.jsonl --out f2 --target t --num-features 1")[0] == 0
    said = run(f"{train.replace(str(features), 'f2')} --eval-prompts held.jsonl")
    assert "made with data" in refused(said)
    assert contents(tmp_path / "run") == before
    begun = json.loads((tmp_path / "run/run.json").read_text())
    del begun["inputs"]
    (tmp_path / "run/run.json").write_text(json.dumps(begun))  # as an earlier version left it
    status, _, err = run(f"{train} --eval-prompts held.jsonl --steps 3")
    assert status == 0
    assert err.count("says nothing of its target and data") == 1


def test_a_vocabulary_that_a_stopped_start_left_is_not_the_next_ones_and_eval_tells_the_target(
    features: Path, run: Run, tmp_path: Path
) -> None:
    train = f"train {features} --out run --target t --eval-prompts held.jsonl {TINY}"
    assert run(train)[0] == 0
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert run(train.replace("--vocab 20", "--vocab 9"))[0] == 0
    assert DFlashDraftModel.from_pretrained(tmp_path / "run/best").config.draft_vocab_size == 9
    for target, lines in (("t", 0), ("other", 1)):
        status, _, err = run(
            f"eval held.jsonl --draft run/best --target {target} --max-new-tokens 4"
        )
        assert (status, err.count("was made with target `t`")) == (0, lines)


def test_a_drafter_is_saved_over_nothing_but_drafters(tmp_path: Path, shop: Path) -> None:
    model = DFlashDraftModel.from_pretrained(save_zlab(tmp_path / "draft"))
    model.save_pretrained(tmp_path / "draft")
    model.save_pretrained(tmp_path / "new", readme="---\nlibrary_name: flashdraft\n---\n")
    (tmp_path / "new/config.json").unlink()  # as a kill before the last file leaves it
    model.save_pretrained(tmp_path / "new", readme="---\nlibrary_name: flashdraft\n---\nagain")
    shutil.copytree(shop / "t", tmp_path / "target")
    for name, content in (
        ("project/README.md", "# Mine"),
        ("bert/config.json", '{"architectures": ["BertModel"]}'),
        ("w/model.safetensors", "x"),
    ):
        write = tmp_path / name
        write.parent.mkdir()
        write.write_text(content)
    before = contents(tmp_path)
    for folder in ("target", "project", "bert", "w"):
        with pytest.raises(InvalidParameter, match="would be written over"):
            model.save_pretrained(tmp_path / folder, readme="card")
    with pytest.raises(InvalidParameter, match="is a file"):
        model.save_pretrained(tmp_path / "project/README.md")
    assert contents(tmp_path) == before


# Results and pictures.


def test_results_that_hold_no_answer_are_gone(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashdraft.bench import run as stage

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    (tmp_path / "empty.jsonl").touch()
    monkeypatch.setattr(stage, "_ask", broken)
    for out in ("r.jsonl", "empty.jsonl"):
        assert run(f"{WRITERS['bench']} {out}")[0] == 130
    assert not (tmp_path / "r.jsonl").exists()
    assert (tmp_path / "empty.jsonl").read_bytes() == b""


def test_results_of_other_settings_are_refused_and_half_ones_are_measured_again(
    run: Run, tmp_path: Path
) -> None:
    from flashdraft.bench.compare import _is_measured
    from flashdraft.bench.config import BenchConfig

    paths = {"prompts": Path("held.jsonl"), "out": Path("r.jsonl")}
    config = BenchConfig(**paths, target="t", methods="autoregressive", max_new_tokens=4)
    assert not _is_measured(config)
    assert run(f"{WRITERS['bench']} r.jsonl")[0] == 0
    assert _is_measured(config)
    with pytest.raises(InvalidParameter, match="measured with max_new_tokens 4, not 5"):
        _is_measured(replace(config, max_new_tokens=5))
    lines = (tmp_path / "r.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text("".join(lines[:-1]))
    assert not _is_measured(config)
    assert not (tmp_path / "r.jsonl").exists()
    (tmp_path / "r.jsonl").write_text("my notes")
    with pytest.raises(DataError):
        _is_measured(config)
    assert (tmp_path / "r.jsonl").read_text() == "my notes"


def test_pictures_are_drawn_again_but_not_over_a_file_of_another(run: Run, tmp_path: Path) -> None:
    assert run(f"{WRITERS['bench']} r.jsonl")[0] == 0
    for _ in range(2):
        assert run("plot r.jsonl --out plots")[0] == 0
    report = tmp_path / "plots/report.md"
    report.write_text(report.read_text() + "my remarks")
    assert "was changed since" in refused(run("plot r.jsonl --out plots"))
    for name in ("report.md", "report.html", "r-tau.svg", "report.run.json"):
        (tmp_path / name).write_text("mine")
        assert name in refused(run("plot r.jsonl --out ."))
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "r.jsonl", tmp_path / "b/r.jsonl")
    assert "two results files are called `r`" in refused(run("plot r.jsonl b/r.jsonl --out both"))


# The helper itself.


def test_a_new_file_has_the_modes_that_the_process_gives(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_file(tmp_path / "made", b"x")
    assert (tmp_path / "made").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "made").chmod(0o640)
    write_file(tmp_path / "made", b"y")
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o640


def test_facts_that_are_not_known_on_both_sides_do_not_differ(tmp_path: Path) -> None:
    noted = {"target": {"name": "t", "id": "a"}, "template": None, "sampling": {"seed": 1}}
    for now in (
        {"target": {"name": "moved", "id": "a"}},
        {"template": "x"},
        {"sampling": {"stop": []}},
        {"more": 1},
    ):
        check_facts(tmp_path, noted, now)
    for now in (
        {"target": {"name": "t", "id": "b"}},
        {"sampling": {"seed": 2}},
        {"target": {"name": "u", "id": None}},
    ):
        with pytest.raises(DataError, match="was made with"):
            check_facts(tmp_path, noted, now)


def test_a_link_that_leads_nowhere_is_named_and_one_to_a_new_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "new").symlink_to(tmp_path / "a/b.jsonl")
    assert output_file(tmp_path / "new") == tmp_path / "a/b.jsonl"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(InvalidParameter, match="leads nowhere"):
        output_file(tmp_path / "loop")
