"""The load test against our own server, with a tiny random model behind it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_server import NAME, Toy, running, until

from flashdraft.bench.client import ServerError
from flashdraft.bench.load import LoadConfig, run_load
from flashdraft.bench.load_report import read_load, summarise_load
from flashdraft.serve.app import Options
from flashdraft.serve.worker import Limits

TOKENS = 12


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    with running(Limits(max_rows=2, queue=64)) as made:
        yield made


@pytest.fixture
def config(tmp_path: Path) -> LoadConfig:
    prompts = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": letters}) for letters in ("hello", "abcabcabc", "XYZ", "9876")]
    prompts.write_text("\n".join(lines))
    return LoadConfig(
        prompts,
        tmp_path / "load.jsonl",
        concurrency="1,3",
        repeats=2,
        max_new_tokens=TOKENS,
        ignore_eos=True,
    )


def test_our_server_answers_every_request_in_every_mode(toy: Toy, config: LoadConfig) -> None:
    run_load(toy.url, config)
    header, lines = read_load(config.out)
    assert header["model"] == NAME
    assert len(lines) == header["answers"] == 48
    for line in lines:
        assert line["error"] is None
        assert line["num_tokens"] == TOKENS
        assert line["finish"] == "length"
        assert line["num_cached"] == 0
        assert line["arrivals"]

    rows = summarise_load(lines)
    assert [(row.streams, row.drafting) for row in rows] == [
        (streams, mode) for streams in (1, 3) for mode in ("off", "auto", "on")
    ]
    for row in rows:
        assert row.same == (None if row.drafting == "off" else 1.0)  # of a greedy text
        if row.drafting == "on":
            assert row.tau is not None
            assert row.tau >= 1
    until(lambda: toy.worker.is_idle)


def test_a_key_is_asked_for_and_taken_from_the_environment(
    config: LoadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = Options(model_name=NAME, keys=(b"s3cret",))
    with running(options=options) as toy:
        with pytest.raises(ServerError, match="401") as error:
            run_load(toy.url, config)
        assert "OPENAI_API_KEY" in str(error.value.hint)
        monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
        assert run_load(toy.url, config) == 48


def test_a_full_server_refuses_and_the_test_goes_on(
    config: LoadConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crowd = LoadConfig(
        config.prompts,
        tmp_path / "crowd.jsonl",
        concurrency="8",
        drafting="auto",
        repeats=1,
        max_new_tokens=8,
    )
    with running(Limits(max_rows=1, queue=1)) as toy, toy.knobs.slow(0.01):
        run_load(toy.url, crowd)
        until(lambda: toy.worker.is_idle)
    _, lines = read_load(crowd.out)
    failed = [line for line in lines if line["error"]]
    assert 0 < len(failed) < len(lines)
    assert all("429" in line["error"] for line in failed)
    assert "requests failed" in capsys.readouterr().err
