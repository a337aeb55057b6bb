"""A folder of results and what is known of each, kept whole through kills and shared by several processes.

`manifest.jsonl` has a line for each image, in the order of names. While a run lasts, every process appends to a
journal of its own, so that no two ever write into one file: appending to a common file is atomic on a local disk,
but not on the network disks that several machines share. The main process merges the journals into the manifest.

A batch is finished all at once: its images are written to temporary files in the same folder, then one line in the
journal says that they are finished, then they are renamed. A kill before the line leaves temporary files that the next
run deletes; a kill after it leaves renames that the next run does. So a batch is in the folder whole or not at all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

NAME = "manifest.jsonl"
_JOURNAL = "manifest-part-"
_LOCK = ".manifest.lock"
PATIENCE = 10.0  # seconds that killed processes of an earlier run have to vanish

Write = Callable[[BinaryIO], None]


class Journal:
    """What one process of a run has finished.

    Args:
        folder: of the results.
        run: name of the run, the same in all its processes, and of no other run in this folder.
        process: index of the process.
    """

    def __init__(self, folder: Path, run: str, process: int):
        self.folder, self.path = folder, folder / f"{_JOURNAL}{run}-{process:05}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)

    def finish(self, records: list[dict], writes: Iterable[Write] = ()) -> None:
        """Put a batch into the folder, all of it or nothing.

        Args:
            records: a dict for each image; `file` names it, and `output` is the file that is written for it, or
                `error` says why there is none.
            writes: one for each record with an `output`, in order; it writes the file.
        """
        outputs = [record["output"] for record in records if "output" in record]
        staged = {_staged(self.path, output): self.folder / output for output in outputs}
        try:
            for path, write in zip(staged, writes, strict=True):
                with path.open("xb") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
            _flush_folder(self.folder)
        except BaseException:
            for path in staged:
                path.unlink(missing_ok=True)
            raise
        self._append({"images": records})
        for path, output in staged.items():
            os.replace(path, output)
        _flush_folder(self.folder)

    def close(self) -> None:
        """Say that this process has nothing more to do."""
        self._append({"end": True})
        os.close(self._file)

    def _append(self, entry: dict) -> None:
        line = memoryview(json.dumps(entry).encode() + b"\n")
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)


class Follower:
    """Reads the journals of a run as they grow. `ended` counts the processes that have nothing more to do."""

    def __init__(self, folder: Path, run: str):
        self.folder, self.run, self.ended = folder, run, 0
        self._read: dict[Path, int] = {}

    def new(self) -> Iterator[dict]:
        """The records that were added since the last time."""
        for path in sorted(self.folder.glob(f"{_JOURNAL}{self.run}-*.jsonl")):
            entries, self._read[path] = _entries(path, self._read.get(path, 0))
            for entry in entries:
                self.ended += "end" in entry
                yield from entry.get("images", ())


def recover(folder: Path) -> dict[str, dict]:
    """Put the folder in order after whatever happened to earlier runs, and merge their journals into the manifest.

    Returns:
        The manifest's records by `file`; the newest where there are several.

    Raises:
        ValueError: a manifest that is from another program.
    """
    records = {record["file"]: record for record in read(folder)}
    journals = sorted(folder.glob(f"{_JOURNAL}*.jsonl"))
    for journal in journals:
        for entry in _entries(journal)[0]:
            for record in entry.get("images", ()):
                records[record["file"]] = record
                if "output" in record and (path := _staged(journal, record["output"])).exists():
                    os.replace(path, folder / record["output"])
    for stale in folder.glob(f".*.{_JOURNAL}*.tmp"):
        stale.unlink()
    if journals:
        _write(folder / NAME, "".join(json.dumps(records[name]) + "\n" for name in sorted(records)).encode())
        for journal in journals:
            journal.unlink()
    return records


def read(folder: Path) -> list[dict]:
    """The manifest's records; none where there is no manifest. Raises ValueError for one from another program."""
    path = folder / NAME
    records = _entries(path)[0] if path.exists() else []
    if not all(isinstance(record, dict) and "file" in record for record in records):
        raise ValueError(f"{path} is from another program; expected a line of JSON with a `file` for each image.")
    return records


def is_merged(journal: Journal) -> bool:
    """Whether the main process has taken over all that a journal said."""
    return not journal.path.exists()


def lock(folder: Path, *, main: bool) -> BinaryIO:
    """Keep the folder for one run, until the file that this returns is closed or the process ends, however it ends.

    The main process comes first and makes sure that no process of an earlier run is alive; then the others join.
    A file system that has no locks gives none.

    Raises:
        ValueError: another run writes into the folder, or the folder is not the main process's.
    """
    try:
        file = (folder / _LOCK).open("a+b" if main else "r+b")
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not the main process's; expected a folder that all machines share.") from error
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            if main:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > give_up:
                file.close()
                raise ValueError(f"{folder} is in use by another run; wait for its end, or stop it.") from error
            time.sleep(0.1)
        except OSError:
            return file


def _staged(journal: Path, output: str) -> Path:
    """Where an output lies before its batch is finished."""
    return journal.with_name(f".{output}.{journal.stem}.tmp")


def _entries(path: Path, start: int = 0) -> tuple[list[dict], int]:
    """The whole lines from a byte of a file on, and where they end: a line that a kill cut short is left out."""
    with path.open("rb") as file:
        file.seek(start)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], start + len(whole)
    except ValueError as error:
        raise ValueError(f"{path} is from another program; a line of it is no JSON ({error}). Move it away.") from error


def _write(path: Path, data: bytes) -> None:
    """Replace a file, by all of the data or not at all."""
    staged = path.with_name(f".{path.name}.{_JOURNAL}merged.tmp")
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make new names last through a power cut, where a folder can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
