"""A file of results that a crash cannot harm: one JSON line a finished training.

A line is appended as a whole and flushed to the disk. One that was cut off in the
middle is dropped with a message, and everything before it kept.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class JournalError(Exception):
    """A results file cannot be read or written, or is none."""


class Journal:
    """The results of a file, which it alone writes as long as it is open."""

    def __init__(self, path: Path, records: list[Record], message: str | None) -> None:
        self.path, self.records, self.message = path, records, message

    def append(self, record: Record) -> None:
        """Adds a result, and returns when it is on the disk."""
        line = json.dumps(record) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())
        self.records.append(record)


@contextmanager
def opened(path: Path) -> Iterator[Journal]:
    """Opens a results file for one writer; makes it where there is none.

    What follows the last whole line is cut off, and ``Journal.message`` says so.

    Raises:
      JournalError: if it is no results file, or another process writes it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise JournalError(f"Expected a results file in {path}: {error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(
                f"Expected to write {path} alone, but another process does. Wait for "
                "it, or give another file."
            ) from None
        file.seek(0)
        content = file.read()
        whole = _whole_lines(content)
        records = _parse(path, whole)
        message = None
        if whole != content:
            if not records and not content.lstrip().startswith(b"{"):
                raise JournalError(f"Expected JSON lines in {path}, got no line.")
            message = (
                f"{path}: the last line was cut off; dropped it and kept the "
                f"{len(records)} before it."
            )
            file.truncate(len(whole))
        yield Journal(path, records, message)


def read(path: Path) -> list[Record]:
    """Returns the results of a file, without its last line if that was cut off.

    Raises:
      JournalError: if it is no results file.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JournalError(f"Expected a results file in {path}: {error}.") from error
    return _parse(path, _whole_lines(content))


def _whole_lines(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def _parse(path: Path, content: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise JournalError(
                f"Expected a JSON line in {path}, line {number}: {error}. Mend or "
                "remove that line; the others are whole."
            ) from error
        if not isinstance(record, dict) or "experiment" not in record:
            raise JournalError(
                f"Expected the results of a sweep in {path}, got another kind of "
                f"record in line {number}."
            )
        records.append(record)
    return records
