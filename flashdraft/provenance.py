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

__all__ = ["processor", "provenance"]


def provenance() -> dict[str, Any]:
    """A JSON object for run.json and the header of results."""
    program, *arguments = sys.argv or [""]
    versions = {
        "flashdraft": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {
        "command": " ".join([Path(program).name, *arguments]),
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "device": _device(),
        "threads": torch.get_num_threads(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def processor() -> str:
    """The name that the system has for it."""
    facts = Path("/proc/cpuinfo")
    if os.access(facts, os.R_OK):
        text = facts.read_text(encoding="utf-8", errors="replace")
        name = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
        if name is not None:
            return name[1]
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, or None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError:  # there is no git
        return None
    return done.stdout.strip() or None
