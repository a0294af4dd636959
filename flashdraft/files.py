"""What appears whole or not at all, and what may be written over.

Knows files and folders. Does not know what is in them, nor which command writes them.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["appears_whole", "write_file", "write_tensors"]


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """Where to write the file or the folder that shall appear at `path`, whole or not at all; its parent is a scratch folder."""
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / path.name
        yield made

        written = list(made.iterdir()) if made.is_dir() else [made]
        for each in written:
            os.chmod(each, 0o644)  # save_file's are private
            with each.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(made, path)


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all."""
    with appears_whole(path) as made:
        made.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file so that it appears whole or not at all."""
    with appears_whole(path) as made:
        save_file(dict(tensors), made, metadata={"format": "pt"})
