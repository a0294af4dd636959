"""recipes/gpu.sh on the CPU, where it must at least begin: its checks run, a failed one is told."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def checks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_checks", RECIPES / "gpu_checks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_check_of_the_script_exists(checks: ModuleType) -> None:
    script = (RECIPES / "gpu.sh").read_text(encoding="utf-8")
    called = [line.split()[1] for line in script.splitlines() if line.startswith("check ")]
    assert called == list(checks.CHECKS)


def test_the_machine_is_described_without_a_gpu() -> None:
    command = [sys.executable, str(RECIPES / "gpu_checks.py"), "machine", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"torch {torch.__version__}")


@pytest.mark.real_model
def test_texts_on_the_cpu_are_equal(checks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PROMPTS", checks.PROMPTS[-1:])
    options = Namespace(
        device="cpu", target="smollm2-135m", draft="auto", kernels=["torch"], tokens=4
    )
    assert checks.texts(options)


@pytest.mark.parametrize(("gap", "passes"), [(0.0005, True), (0.3, False)])
def test_a_fork_passes_only_at_a_tie(
    checks: ModuleType, monkeypatch: pytest.MonkeyPatch, gap: float, passes: bool
) -> None:
    result = SimpleNamespace(tokens=(1,), stats=SimpleNamespace(tau=1.0))
    model = SimpleNamespace(generate=lambda prompt, **options: result)
    monkeypatch.setattr(checks, "load", lambda *_: model)
    monkeypatch.setattr(checks, "plain", lambda model: model)
    monkeypatch.setattr(checks, "fork_gap", lambda *_: gap)
    assert checks.texts(Namespace(kernels=["torch"], tokens=8)) is passes
