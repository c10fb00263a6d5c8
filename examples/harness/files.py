"""Files that are written as a whole, and folders that are new."""

import contextlib
import datetime
import itertools
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


def new_folder(wanted: Path | None, name: str) -> Path:
    """Makes a folder that did not exist before.

    Raises:
      FileExistsError: if ``wanted`` exists: results are never overwritten.
    """
    if wanted is not None:
        if wanted.exists():
            raise FileExistsError(f"Expected --out to be a new folder, got {wanted}.")
        wanted.mkdir(parents=True)
        return wanted
    stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H%M%S")
    for number in itertools.count(1):
        folder = Path("runs") / f"{stamp}-{name}{f'-{number}' if number > 1 else ''}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise AssertionError
