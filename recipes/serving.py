"""Servers for the recipes beside this file: started, waited for, and ended with them."""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from flashdraft.bench.client import Api, ServerError


class Served(NamedTuple):
    url: str
    pid: int


@contextmanager
def ours(*options, log):
    """`flashdraft serve` with these options at a free port; `log` takes its lines."""
    command = [sys.executable, "-m", "flashdraft", "serve", "--port", "0", *map(str, options)]
    with open(log, "w") as lines, _ended(command, stdout=subprocess.PIPE, stderr=lines) as process:
        for raw in process.stdout:
            ready = re.search(rb"is served at (http\S+)", raw)
            if ready:
                url = ready[1].decode()
                yield Served(url, process.pid)
                return
        sys.exit(f"the server ended before it was ready: see {log}")


@contextmanager
def another(command, url, log, *, seconds=600):
    """Any server that lists its models when it is ready, at an address that is known."""
    with open(log, "w") as lines, _ended(command, stdout=lines, stderr=lines) as process:
        deadline = time.monotonic() + seconds
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"`{command[0]}` is not ready: see {log}")
            time.sleep(0.5)
        yield Served(url, process.pid)


def _is_ready(url):
    api = Api(url, 5.0)
    try:
        api.get("/models")
        return True
    except ServerError:
        return False
    finally:
        api.close()


@contextmanager
def _ended(command, **streams):
    """A process that has ended when the block is left, by its own will or not."""
    process = subprocess.Popen(command, **streams)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def resident_bytes(pid):
    """Of a process: memory that it holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
