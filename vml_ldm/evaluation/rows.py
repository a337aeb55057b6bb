"""Measured rows in CSV files that grow batch by batch and are read again by a later run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, astuple, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

R = TypeVar("R")
_MOST_LEVELS = 25  # of a solver, that a row tells
_READERS = {
    "str": str,
    "int": int,
    "float": float,
    "int | None": lambda cell: int(cell) if cell else None,
    "float | None": lambda cell: float(cell) if cell else None,
    "str | None": lambda cell: cell or None,
}


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


def tell_levels(trace: Sequence[Mapping], image: int) -> str | None:
    """``noise:residual`` of an image at up to 25 of a solver's levels, evenly; the noise is ``sigma / alpha``.

    Args:
        trace: a dict for each level, as a `Report` has them; an empty one gives None.
    """
    last = len(trace) - 1
    places = sorted({round(i * last / (_MOST_LEVELS - 1)) for i in range(_MOST_LEVELS)}) if trace else []
    levels = (trace[place] for place in places)
    return (
        " ".join(
            f"{x['sigma'] / max(x['alpha'], 1e-6):.4g}:{x['residual'][image]:.4g}"
            for x in levels
            if x["residual"][image] is not None
        )
        or None
    )


def read_levels(text: str) -> list[tuple[float, float]]:
    """(noise, residual) of each level that `tell_levels` told."""
    return [(float(noise), float(residual)) for noise, residual in (pair.split(":") for pair in text.split())]


class RowFile(Generic[R]):
    """``rows.csv`` in a folder that belongs to the comparison, and the files of its parts beside it.

    Args:
        folder: new, empty, or one that a comparison wrote.
        kind: dataclass of the rows; its fields are annotated ``str``, ``int``, ``float``, or one of
            these ``| None``. Fields with a default came later: files without them are read, and get them when they
            are appended to.
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
            if header is None or not self._is_ours(header):
                raise FileExistsError(
                    f"{path} starts with {header}; expected {self.header}. It is from another version or another "
                    "program: move it away or pass another folder with -o."
                )
            return [self._parse(cells) for cells in lines if len(cells) == len(header) and cells != header]

    def _is_ours(self, header: list[str]) -> bool:
        """Whether it names this layout's fields, all or all but the last of those with a default."""
        needed = sum(field.default is MISSING for field in fields(self.kind))
        return len(header) >= needed and header == self.header[: len(header)]

    def _parse(self, cells: list[str]) -> R:
        """A row; fields that its file does not have are left to their defaults."""
        return self.kind(*(_READERS[field.type](cell) for field, cell in zip(fields(self.kind), cells, strict=False)))

    def start(self) -> None:
        """Make the folder and the file, if they are not there; from then on the folder is known as ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            with self.path.open("x", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(self.header)
        elif self._header() != self.header:
            self._widen()

    def _header(self) -> list[str]:
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _widen(self) -> None:
        """Give an earlier layout's file the fields that came later, empty."""
        rows, new = self._read(self.path), self.path.with_suffix(".csv.new")
        with new.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.header, *map(_cells, rows)])
        new.replace(self.path)

    def append(self, rows: Sequence[R]) -> None:
        """Add rows to the file, at once and on disk."""
        self.start()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(map(_cells, rows))
        self.by_key.update({key_of(row): row for row in rows})


def _cells(row) -> list:
    return ["" if value is None else value for value in astuple(row)]
