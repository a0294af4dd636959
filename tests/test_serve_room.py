"""What a server's engine may hold: by bytes that are given, or by what the machine says is free."""

from pathlib import Path

import pytest
from toy_training import language_model

from flashdraft.errors import ContextLengthError, InvalidParameter
from flashdraft.serve import room
from flashdraft.types import SamplingParams


def test_tokens_are_counted_by_measured_bytes_of_target_and_drafter() -> None:
    lm = language_model()
    engine = room.new_engine(lm, 2, 1_000_000)
    assert engine.token_nbytes > 0
    most = 8 * (lm.target.context_length + 576)  # rows in use, and three times as many to keep
    assert engine.scheduler.max_tokens == min(1_000_000 // engine.token_nbytes, most)
    assert engine.scheduler.num_rows == 8
    assert not engine.scheduler.kept


def test_prompts_are_read_in_parts_that_follow_the_clock() -> None:
    scheduler = room.new_engine(language_model(), 1, 1_000_000).scheduler
    assert scheduler.pause == 0.08
    assert 16 <= scheduler.chunk <= 512


def test_a_request_that_the_budget_never_holds_is_refused() -> None:
    lm = language_model()
    engine = room.new_engine(lm, 1, 200 * room.new_engine(lm, 1, 10**6).token_nbytes)
    assert engine.scheduler.max_tokens == 200
    with pytest.raises(ContextLengthError, match=r"may come to 204, but the cache holds 200"):
        engine.submit(lm.request([5] * 100, SamplingParams(max_new_tokens=40)))
    engine.submit(lm.request([5] * 100, SamplingParams(max_new_tokens=36)))


def test_a_budget_without_room_is_refused_by_its_option() -> None:
    with pytest.raises(InvalidParameter, match="cache_bytes is 1000") as caught:
        room.new_engine(language_model(), 1, 1000)
    assert caught.value.option == "cache_bytes"


def test_a_container_has_what_it_may_still_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model()
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   4096 kB\n")
    monkeypatch.setattr(room, "_MEMORY", meminfo)
    monkeypatch.setattr(room, "_CONTAINER", tmp_path)
    assert room.free_bytes(lm) == 4096 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_bytes(lm) == 4096 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert room.free_bytes(lm) == 2_000_000
    meminfo.unlink()
    (tmp_path / "memory.max").unlink()
    assert room.free_bytes(lm) == 4 * 2**30
