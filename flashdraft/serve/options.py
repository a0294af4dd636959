"""What a server is told beside its model: the options of `flashdraft serve`.

Imports nothing of the extra `serve`, so that the command's help needs none.
"""

import re
from dataclasses import dataclass

from flashdraft.types import check_options, option, require

__all__ = ["KEY", "ServeOptions"]

KEY = "FLASHDRAFT_API_KEY"  # the environment variable that holds API keys, one a line
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]-]+")  # nothing behind the host and port


@dataclass(frozen=True)
class ServeOptions:
    """What a server is told beside its model."""

    host: str = option(
        "127.0.0.1", f"address to listen at; another one than this machine's needs a key: {KEY}"
    )
    port: int = option(8000, "0 takes one that is free", least=0, most=65535)
    max_rows: int = option(8, "requests decoded together, at most", least=1, most=1024)
    queue: int = option(64, "requests that wait for a row; more get 429", least=0, most=100_000)
    max_body_bytes: int = option(4 * 2**20, "a larger body gets 413", least=1024, most=2**30)
    cache_bytes: int | None = option(
        None,
        "bytes for keys and values, the drafter's included; by default half of what is free",
        least=2**20,
        most=2**50,
    )
    request_timeout: float = option(600.0, "seconds for a whole answer", above=0, most=86_400)
    drain_timeout: float = option(
        30.0, "seconds for what runs when the server is told to end", least=0, most=86_400
    )
    default_max_tokens: int = option(
        2048, "tokens of an answer whose request names no limit", least=1, most=2**31 - 1
    )
    api_key_file: str | None = option(
        None, f"file with one API key a line; {KEY} holds one without a file"
    )
    cors_origin: tuple[str, ...] = option(
        (), "a web page's origin that may ask, like https://example.org; several may be given"
    )
    served_model_name: str | None = option(
        None, "what clients call the model; by default as TARGET is called"
    )
    log_level: str = option(
        "info", "debug, info, warning or error", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "cors_origin", tuple(self.cors_origin))  # typer gives a list
        check_options(self)
        for origin in self.cors_origin:
            is_origin = origin == "*" or _ORIGIN.fullmatch(origin) is not None
            wanted = "as browsers send it, like https://example.org, with nothing behind it"
            require(is_origin, "cors_origin", origin, wanted)
