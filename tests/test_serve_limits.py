"""What stands in front of the app, by itself: keys that are read, a body that is handed on."""

from __future__ import annotations

import asyncio
import tracemalloc
from pathlib import Path

import pytest
from starlette.types import Message, Receive, Scope, Send

from flashdraft.errors import FlashDraftError
from flashdraft.serve.keys import read_keys
from flashdraft.serve.limits import BodyLimit

LIMIT = 4 * 2**20


def test_a_body_is_not_held_while_it_is_answered() -> None:
    held = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b" " * LIMIT, "more_body": False}

    async def send(message: Message) -> None: ...

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        assert len(message.pop("body")) == LIMIT
        held.append(tracemalloc.get_traced_memory()[0])

    scope: Scope = {"type": "http", "headers": []}
    tracemalloc.start()
    try:
        asyncio.run(BodyLimit(app, LIMIT)(scope, receive, send))
    finally:
        tracemalloc.stop()
    assert held[0] < LIMIT // 2


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two  \r\n")
    assert read_keys("zero", file) == [b"zero", b"one", b"two"]
    assert read_keys(None, None) == []
    assert read_keys("a\nb\n", None) == [b"a", b"b"]
    file.write_text("\n")
    with pytest.raises(FlashDraftError, match="holds no key"):
        read_keys(None, file)
    for empty in ("", " \n"):  # a variable that is there is meant
        with pytest.raises(FlashDraftError, match="holds no key"):
            read_keys(empty, None)
    for bad in ("has a space", "schlüssel", "x" * 2000):
        with pytest.raises(FlashDraftError, match="API key"):
            read_keys(bad, None)
