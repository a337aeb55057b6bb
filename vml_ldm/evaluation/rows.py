"""Measured rows in CSV files that grow batch by batch and are read again by a later run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

R = TypeVar("R")
_READERS = {"str": str, "int": int, "float": float, "float | None": lambda cell: float(cell) if cell else None}


@dataclass(frozen=True)
class Row:
    """One method on one image under one mask: a row of the demo.

    The first five fields say what was run (``fingerprint`` stands for checkpoint, code and settings). Then:
    PSNR of the unknown pixels (dB), EfficientNet-Lite0 distance of the pasted image (None without its weights),
    PSNR of the known pixels before any paste (dB), edge error after it, seconds for one image (a batch's time
    over its size), and the share of the solver's time outside the networks (None for stock).
    """

    image: str
    mask: str
    method: str
    seed: int
    fingerprint: str
    psnr_unknown: float
    perceptual: float | None
    psnr_known: float
    edge_error: float
    seconds: float
    outside: float | None


def key_of(row) -> tuple:
    """The fields of a row that say what was run: those up to ``fingerprint``."""
    names = [field.name for field in fields(row)]
    return astuple(row)[: names.index("fingerprint") + 1]


class RowFile(Generic[R]):
    """``rows.csv`` in a folder that belongs to the comparison, and the files of its parts beside it.

    Args:
        folder: new, empty, or one that a comparison wrote.
        kind: dataclass of the rows; its fields are annotated ``str``, ``int``, ``float`` or ``float | None``.
        part: name of the part of the work that is done here, "" for all of it. A part appends to ``rows-PART.csv``;
            every ``rows*.csv`` is read.

    Attributes:
        folder, path: the folder, and the file in it that is appended to.
        by_key: the rows read and appended, the last one of each key (see `key_of`).

    Raises:
        FileExistsError: the folder holds other files but no rows, or rows of another layout.
    """

    def __init__(self, folder: Path, kind: type[R] = Row, part: str = "") -> None:
        self.folder, self.kind, self.part = Path(folder), kind, part
        self.path = self.folder / (f"rows-{part}.csv" if part else "rows.csv")
        self.header = [field.name for field in fields(kind)]
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{folder} is a file; expected a folder. Pass another one with -o.")
        files = sorted(self.folder.glob("rows*.csv"))
        if not files and self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"{folder} has files that are not from this command; expected a new or empty folder, "
                "or one that it wrote. Pass another one with -o."
            )
        self.by_key: dict[tuple, R] = {key_of(row): row for file in files for row in self._read(file)}

    def _read(self, path: Path) -> list[R]:
        """Rows of one file; files that were joined may have their headers in between."""
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            header = next(lines, None)
            if header != self.header:
                raise FileExistsError(
                    f"{path} starts with {header}; expected {self.header}. It is from another version or another "
                    "program: move it away or pass another folder with -o."
                )
            return [self._parse(cells) for cells in lines if len(cells) == len(header) and cells != header]

    def _parse(self, cells: list[str]) -> R:
        return self.kind(*(_READERS[f.type](cell) for f, cell in zip(fields(self.kind), cells, strict=True)))

    def start(self) -> None:
        """Make the folder and the file, if they are not there; from then on the folder is known as ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            with self.path.open("x", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(self.header)

    def append(self, rows: Sequence[R]) -> None:
        """Add rows to the file, at once and on disk."""
        self.start()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerows(["" if value is None else value for value in astuple(row)] for row in rows)
        self.by_key.update({key_of(row): row for row in rows})
