"""Files that are written as a whole."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hands out a temporary path and moves it into place when all went well.

    What is left of it after a kill ends in ``.part``, so that nobody takes it for the
    file.
    """
    part = path.with_name(f".{path.name}-{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
