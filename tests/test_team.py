"""The kernels' team of threads by a program of its own, under ThreadSanitizer where the compiler has it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flashdraft.models import native

HEADER = Path(native.__file__).parent / "csrc" / "team.h"
SOURCE = Path(__file__).with_name("team_stress.cpp")
FAULTS = {
    "a phase is over when its pieces are taken": (
        "counter.done.load(std::memory_order_acquire) < counter.count.load(std::memory_order_relaxed)",
        "false",
    ),
    "two threads take one piece": (
        "range.next.compare_exchange_weak(seen, taken, std::memory_order_acq_rel, std::memory_order_acquire)",
        "(range.next.store(taken), true)",
    ),
}


def built(folder: Path, header: str, *flags: str) -> Path:
    (folder / "team.h").write_text(header, encoding="utf-8")
    shutil.copy(SOURCE, folder)
    shutil.copy(HEADER.with_name("team.cpp"), folder)
    program = folder / "stress"
    call = [
        "g++",
        "-std=c++17",
        "-O1",
        "-g",
        "-pthread",
        *flags,
        str(folder / SOURCE.name),
        str(folder / "team.cpp"),
        "-o",
        str(program),
    ]
    subprocess.run(call, check=True, capture_output=True)
    return program


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    call = [str(program), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    header = HEADER.read_text(encoding="utf-8")
    try:
        program = built(tmp_path_factory.mktemp("tsan"), header, "-fsanitize=thread")
        run(program, 1, 1, 1).check_returncode()
    except (
        subprocess.CalledProcessError
    ):  # no runtime of the sanitizer, or a system that it does not know
        program = built(tmp_path_factory.mktemp("plain"), header)
    return program


@pytest.mark.parametrize(("threads", "callers"), [(1, 1), (2, 1), (3, 2), (8, 3)])
def test_every_piece_is_done_once_and_no_phase_begins_early(
    stress: Path, threads: int, callers: int
) -> None:
    done = run(stress, 400, threads, callers)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


@pytest.mark.parametrize("caught", [True, False])
def test_a_system_that_allows_no_more_threads_costs_time_and_no_more(
    caught: bool, tmp_path: Path
) -> None:
    hired = "std::thread([this, index] { serve(index); }).detach();"
    refused = f"if (index > 1) throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again)); {hired}"
    header = HEADER.read_text(encoding="utf-8")
    assert header.count(hired) == 1
    header = header.replace(hired, refused)
    if not caught:  # a planted fault
        header = header.replace("catch (const std::system_error&)", "catch (const std::bad_alloc&)")
    done = run(built(tmp_path, header), 400, 8, 2)
    assert (done.returncode == 0) == caught


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    right, wrong = FAULTS[fault]
    header = HEADER.read_text(encoding="utf-8")
    assert header.count(right) == 1
    program = built(tmp_path, header.replace(right, wrong))
    assert any(run(program, 20_000, threads, 1).returncode for threads in (2, 4, 8))
