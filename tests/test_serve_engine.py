"""`serve --engine`: what the other engine is told, what is refused, and that the process becomes
it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_folders import save_target, save_zlab

from flashdraft.cli import main
from flashdraft.serve.options import KEY

STUB = f"""#!{sys.executable}
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(json.dumps([sys.argv[1:], os.environ.get("VLLM_API_KEY")]), flush=True)
time.sleep(60)
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A target and its drafter."""
    monkeypatch.setenv("FLASHDRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flashdraft.hub.cache_dir", lambda: tmp_path / "cache")
    monkeypatch.delenv(KEY, raising=False)
    target = save_target(tmp_path / "target")
    return str(target), str(save_zlab(tmp_path / "draft"))


def words_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return shlex.split(capsys.readouterr().out)


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_vllm_is_told_our_options_in_its_words(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = folders
    given = ["serve", target, "--draft", draft, "--engine", "vllm", "--dry-run"]
    given += ["--port", "9000", "--max-rows", "3", "--dtype", "bfloat16", "--tensor-parallel", "2"]
    given += ["--context-length", "512", "--block-size", "3", "--cors-origin", "https://a.b"]
    assert main([*given, "--", "--enforce-eager", "--seed", "1"]) == 0
    words = words_of(capsys)
    assert words[:3] == ["vllm", "serve", target]
    told = json.loads(after(words, "--speculative-config"))
    assert (told["method"], told["num_speculative_tokens"]) == ("dflash", 2)
    assert (Path(told["model"]) / "config.json").exists()
    wanted = {
        "--host": "127.0.0.1",
        "--port": "9000",
        "--max-num-seqs": "3",
        "--dtype": "bfloat16",
        "--tensor-parallel-size": "2",
        "--max-model-len": "512",
        "--allowed-origins": '["https://a.b"]',
    }
    assert {flag: after(words, flag) for flag in wanted} == wanted
    assert words[-3:] == ["--enforce-eager", "--seed", "1"]


def test_sglang_is_told_the_same_in_its_words(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = folders
    given = ["serve", "--target", target, "--draft", draft, "--engine", "sglang", "--dry-run"]
    given += ["--queue", "9", "--tensor-parallel", "4", "--served-model-name", "toy"]
    assert main([*given, "--", "--mem-fraction-static", "0.8"]) == 0
    words = words_of(capsys)
    assert words[:4] == ["sglang", "serve", "--model-path", target]
    wanted = {
        "--speculative-algorithm": "DFLASH",
        "--speculative-num-draft-tokens": "4",
        "--max-queued-requests": "9",
        "--tp-size": "4",
        "--served-model-name": "toy",
    }
    assert {flag: after(words, flag) for flag in wanted} == wanted
    assert words[-2:] == ["--mem-fraction-static", "0.8"]


def test_without_a_drafter_the_engine_serves_the_target_alone(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folders[0], "--engine", "vllm", "--dry-run"]) == 0
    assert words_of(capsys)[:3] == ["vllm", "serve", folders[0]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--kernel", "int8"], "kernel is int8, for which vllm has no counterpart"),
        (["--tree-nodes", "8"], "tree_nodes is 8"),
        (["--queue", "3"], "queue is 3"),
        (["--request-timeout", "9"], "request_timeout is 9"),
        (["--device", "cuda"], "device is cuda"),
        (["--dtype", "float64"], "dtype is float64"),
        (["--port", "0"], "port is 0"),
        (["--draft", "prompt_lookup"], "draft is 'prompt_lookup'"),
        (["--block-size", "3"], "nothing drafts"),
        (["--host", "0.0.0.0"], "no API key is set"),
    ],
)
def test_option_without_counterpart_is_refused_by_name(
    given: list[str], told: str, folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folders[0], "--engine", "vllm", "--dry-run", *given]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--tensor-parallel", "2"], ["--dry-run"], ["--", "--seed"]])
def test_engines_options_need_an_engine(
    given: list[str], folders: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", folders[0], *given]) == 1
    assert "--engine is not given" in capsys.readouterr().err


def test_keys_are_handed_over_and_never_shown(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY, "secret")
    for engine in ("vllm", "sglang"):
        assert main(["serve", folders[0], "--engine", engine, "--dry-run"]) == 0
        assert "secret" not in capsys.readouterr().out
    monkeypatch.setenv(KEY, "one\ntwo")
    assert main(["serve", folders[0], "--engine", "vllm", "--dry-run"]) == 1
    assert "2 API keys" in capsys.readouterr().err


def test_missing_engine_is_one_line(
    folders: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert main(["serve", folders[0], "--engine", "vllm"]) == 1
    assert "vllm is not installed" in capsys.readouterr().err


def test_process_becomes_the_engine(folders: tuple[str, str], tmp_path: Path) -> None:
    stub = tmp_path / "bin" / "vllm"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "flashdraft", "serve", folders[0], "--engine", "vllm"]
    process = subprocess.Popen(
        [*command, "--", "--seed", "1"],
        env={**os.environ, "PATH": path, KEY: "secret"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        shown, told = process.stdout.readline(), json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 7
    assert "vllm serve" in shown
    assert told[0][:2] == ["serve", folders[0]]
    assert told[0][-2:] == ["--seed", "1"]
    assert told[1] == "secret"
