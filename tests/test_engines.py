"""llama.cpp's server as an engine of the benchmark, against a server of a few lines that notes what
it is asked.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flashdraft.errors import InvalidParameter
from flashdraft.types import SamplingParams

ENGINES = Path(__file__).parent.parent / "recipes" / "engines.py"
# It counts on from the prompt's last token, ends at token 9, and accepts all but the last draft of
# every whole block.
SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

options = sys.argv[1:]
log = open({log!r}, "a")
drafts = int(options[options.index("--spec-draft-n-max") + 1]) if "-md" in options else 0

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(200, {{"status": "ok"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        print(json.dumps([self.path, options, asked]), file=log, flush=True)
        last = asked["prompt"][-1]
        if last < 0:
            return self.reply(500, {{"error": "no token"}})
        tokens = list(range(last + 1, last + 1 + asked["n_predict"]))
        tokens = tokens[: tokens.index(9) + 1] if 9 in tokens else tokens
        timings = {{"prompt_ms": 100.0, "predicted_ms": 250.0, "predicted_n": len(tokens)}}
        drafted = accepted = 0
        room, rest = asked["n_predict"] - 1, len(tokens) - 1  # behind the first token
        while drafts and rest > 0:
            block = min(drafts, room - 1)
            kept = min(block, drafts - 1)
            drafted += block
            accepted += kept
            room -= kept + 1
            rest -= kept + 1
        if drafted:
            timings |= {{"draft_n": drafted, "draft_n_accepted": accepted}}
        self.reply(200, {{"content": "text", "tokens": tokens, "timings": timings}})

    def reply(self, status, answer):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(options[options.index("--port") + 1])), Handler).serve_forever()
"""
Start = Callable[[str], Any]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """The engine for a text, its server a program of its own that ends with the tests."""
    (tmp_path / "server").write_text(
        SERVER.format(python=sys.executable, log=str(tmp_path / "log"))
    )
    (tmp_path / "server").chmod(0o755)
    monkeypatch.setenv("LLAMA_SERVER", str(tmp_path / "server"))
    return lambda text: runpy.run_path(str(ENGINES))["llama_server"](text, SimpleNamespace())


def asked(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_the_server_answers_token_ids_greedily_and_without_a_cache(
    start: Start, tmp_path: Path
) -> None:
    method = start("f32.gguf")
    answers = method([[1, 2], [1, 5]], [SamplingParams(max_new_tokens=5)] * 2)
    assert [answer.tokens for answer in answers] == [(3, 4, 5, 6, 7), (6, 7, 8, 9)]
    assert [
        (answer.tau, answer.decode_seconds, answer.figures["num_drafted"]) for answer in answers
    ] == [(1.0, 0.25, 0)] * 2
    (path, options, first), (_, _, second) = asked(tmp_path)
    assert (path, first["prompt"], second["prompt"]) == ("/completion", [1, 2], [1, 5])
    wanted = {"n_predict": 5, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    assert wanted.items() <= first.items()
    assert options[:2] == ["-m", "f32.gguf"]
    assert "-md" not in options


@pytest.mark.parametrize(
    ("drafting", "prompt", "length", "passes"),
    [
        ("", 20, 13, 4),  # 3 drafts of which 2 are accepted: 12 tokens after the first, 3 a pass
        ("+5", 20, 12, 3),  # the last token comes without drafts: 5, 5 and 1
        (
            "+5",
            2,
            13,
            2,
            # the end, token 9, comes first in the second block, whose 4 accepted drafts are
            # dropped: 5 and 1
        ),
    ],
)
def test_drafts_count_into_tau(
    start: Start, tmp_path: Path, drafting: str, prompt: int, length: int, passes: int
) -> None:
    (answer,) = start("f32.gguf+draft.gguf" + drafting)(
        [[1, prompt]], [SamplingParams(max_new_tokens=length)]
    )
    assert answer.figures["target_passes"] == passes
    assert answer.tau == (len(answer.tokens) - 1) / passes
    ((_, options, _),) = asked(tmp_path)
    assert (
        f"-md draft.gguf --spec-type draft-dflash --spec-draft-n-max {drafting[1:] or 3} "
        in " ".join(options)
    )


def test_dspark_is_another_kind_of_drafting(start: Start, tmp_path: Path) -> None:
    start("f32.gguf+draft.gguf+2+draft-dspark")([[1, 20]], [SamplingParams(max_new_tokens=5)])
    ((_, options, _),) = asked(tmp_path)
    assert "--spec-type draft-dspark --spec-draft-n-max 2 " in " ".join(options)


def test_what_the_server_cannot_answer_is_refused(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = start("f32.gguf")
    with pytest.raises(InvalidParameter, match="length of prompt and answer is 4097"):
        method([[1] * 4092], [SamplingParams(max_new_tokens=5)])
    with pytest.raises(InvalidParameter, match="no token"):
        method([[-1]], [SamplingParams(max_new_tokens=5)])
    (tmp_path / "server").write_text(f"#!{sys.executable}\nraise SystemExit(3)")
    with pytest.raises(InvalidParameter, match="exit status is 3"):
        start("f32.gguf")
    monkeypatch.setenv("LLAMA_SERVER", str(tmp_path / "none"))
    with pytest.raises(InvalidParameter, match="LLAMA_SERVER is"):
        start("f32.gguf")
