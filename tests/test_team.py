"""The kernels' team of threads by a program of its own, under ThreadSanitizer where the compiler
has it.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from flashdraft.models import native

pytestmark = pytest.mark.alone

CSRC = Path(native.__file__).parent / "csrc"
PARTS = ("interface.h", "ranges.h", "team.cpp", "team.h", "waiting.h")
STRESS = Path(__file__).with_name("team_stress.cpp")
Change = tuple[str, str]  # what stands once in the sources, and what instead
FAULTS: dict[str, Change] = {
    "a phase is over when its pieces are taken": (
        "return done.load(std::memory_order_acquire) >= count.load(std::memory_order_relaxed);",
        "return true;",
    ),
    "two threads take one piece": (
        "next.compare_exchange_weak(seen, taken, std::memory_order_acq_rel)",
        "(next.store(taken), true)",
    ),
}


def built(folder: Path, *changes: Change, flags: tuple[str, ...] = ()) -> Path:
    texts = {name: (CSRC / name).read_text(encoding="utf-8") for name in PARTS}
    for right, wrong in changes:
        assert sum(text.count(right) for text in texts.values()) == 1
        texts = {name: text.replace(right, wrong) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    shutil.copy(STRESS, folder)

    program = folder / "stress"
    sources = [str(folder / STRESS.name), str(folder / "team.cpp")]
    call = ["g++", "-std=c++17", "-O1", "-g", "-pthread", *flags, *sources, "-o", str(program)]
    subprocess.run(call, check=True, capture_output=True)
    return program


def run(program: Path, *arguments: int) -> subprocess.CompletedProcess[str]:
    call = [str(program), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        program = built(tmp_path_factory.mktemp("tsan"), flags=("-fsanitize=thread",))
        run(program, 1, 1, 1).check_returncode()
    except subprocess.CalledProcessError:
        # no runtime of the sanitizer, or a system that it does not know
        program = built(tmp_path_factory.mktemp("plain"))
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
    refusal = "std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again))"
    changes = [(hired, f"if (index > 1) throw {refusal}; {hired}")]
    if not caught:  # a planted fault
        changes.append(("catch (const std::system_error&)", "catch (const std::bad_alloc&)"))
    done = run(built(tmp_path, *changes), 400, 8, 2)
    assert (done.returncode == 0) == caught


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(fault: str, tmp_path: Path) -> None:
    program = built(tmp_path, FAULTS[fault])
    assert any(run(program, 20_000, threads, 1).returncode for threads in (2, 4, 8))
