"""What a run's figures depend on: command, commit, versions, device, threads."""

import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from flashdraft import __version__

__all__ = ["provenance"]


def provenance() -> dict[str, Any]:
    """A JSON object for run.json and the header of results."""
    versions = {
        "flashdraft": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    program, *arguments = sys.argv or [""]
    command = " ".join([Path(program).name, *arguments])
    facts = {
        "command": command,
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    versions |= {"python": platform.python_version()}
    return facts | {"versions": versions, "device": _device(), "threads": torch.get_num_threads()}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    facts = Path("/proc/cpuinfo")
    name = (
        re.search(
            r"^model name\s*: (.*)",
            facts.read_text(encoding="utf-8", errors="replace"),
            re.MULTILINE,
        )
        if os.access(facts, os.R_OK)
        else None
    )
    return f"{name[1] if name else platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, or None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        how: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "encoding": "utf-8",
            "errors": "replace",
        }
        return subprocess.run(command, check=False, **how).stdout.strip() or None
    except OSError:
        return None
