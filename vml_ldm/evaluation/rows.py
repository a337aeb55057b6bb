"""Measured rows in a CSV file that grows batch by batch and is read again by a later run."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

Key = tuple[str, str, str, int, str]


@dataclass(frozen=True)
class Row:
    """One method on one image under one mask.

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

    @property
    def key(self) -> Key:
        return self.image, self.mask, self.method, self.seed, self.fingerprint


HEADER = [field.name for field in fields(Row)]


class RowFile:
    """``rows.csv`` in a folder that belongs to the comparison.

    Attributes:
        folder, path: the folder and the file in it.
        by_key: the rows read and appended, the last one of each key.

    Raises:
        FileExistsError: the folder holds other files but no ``rows.csv`` of this layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = Path(folder), Path(folder) / "rows.csv"
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{folder} is a file; expected a folder. Pass another one with -o.")
        if not self.path.is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(
                f"{folder} has files that are not from this command; expected a new or empty folder, "
                "or one that it wrote. Pass another one with -o."
            )
        self.by_key: dict[Key, Row] = {row.key: row for row in self._read()}

    def _read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file)
            header = next(lines, None)
            if header != HEADER:
                raise FileExistsError(
                    f"{self.path} starts with {header}; expected {HEADER}. It is from another version or another "
                    "program: move it away or pass another folder with -o."
                )
            return [_parse(cells) for cells in lines if len(cells) == len(HEADER)]

    def start(self) -> None:
        """Make the folder and the file, if they are not there; from then on the folder is known as ours."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            with self.path.open("x", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(HEADER)

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows to the file, at once and on disk."""
        self.start()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerows(["" if value is None else value for value in astuple(row)] for row in rows)
        self.by_key.update({row.key: row for row in rows})


def _parse(cells: list[str]) -> Row:
    texts, seed, fingerprint, numbers = cells[:3], int(cells[3]), cells[4], cells[5:]
    return Row(*texts, seed, fingerprint, *(float(cell) if cell else None for cell in numbers))
