"""API keys, of the environment and of a file. Imports nothing of the extra `serve`."""

from pathlib import Path

from flashdraft.errors import FlashDraftError

__all__ = ["read_keys"]

_MOST_KEY_BYTES = 1024


def read_keys(from_environment: str | None, file: Path | None) -> list[bytes]:
    """Keys, one a line: of the environment variable's text and of a file.

    Raises FlashDraftError for a key that no header can carry, and for a variable or a file that is
    there and holds none: whoever set it does not want to be open.
    """
    lines = (from_environment or "").split("\n")
    if from_environment is not None and not from_environment.strip():
        refused = "FLASHDRAFT_API_KEY is set and holds no key"
        raise FlashDraftError(refused, hint="give it one, or unset it")
    if file is not None:
        own = file.read_text(encoding="utf-8").split("\n")
        if not any(line.strip() for line in own):
            raise FlashDraftError(f"`{file}` holds no key", hint="write one key a line")
        lines += own

    keys = []
    for line in lines:
        key = line.strip()
        if not key:
            continue
        is_sendable = key.isascii() and key.isprintable() and " " not in key
        if not is_sendable or len(key) > _MOST_KEY_BYTES:
            refused = "an API key holds a space, or a character that is not ASCII, or is too long"
            raise FlashDraftError(refused, hint="make one with: openssl rand -hex 32")
        keys.append(key.encode())
    return keys
