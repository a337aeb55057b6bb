"""The documentation's tables, of equations and of pains, name code and tests that there are."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def lines_of(name: str) -> list[list[str]]:
    """The cells of a table in docs/, without its head."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in lines[1:]]


EQUATIONS, PAINS = lines_of("equations.md"), lines_of("pains.md")


@pytest.mark.parametrize(("table", "columns"), [(EQUATIONS, 5), (PAINS, 4)])
def test_every_line_is_whole(table: list[list[str]], columns: int) -> None:
    assert len(table) > 10 and all(len(cells) == columns and all(cells) for cells in table)
    assert all(re.fullmatch("`[^`]+`( `[^`]+`)*", cells[-1]) for cells in table)


@pytest.mark.parametrize("code", [cells[3].strip("`") for cells in EQUATIONS])
def test_the_code_exists_and_is_documented(code: str) -> None:
    module, name = code.rsplit(".", 1)
    assert getattr(importlib.import_module(module), name).__doc__


@pytest.mark.parametrize("test", [test for cells in EQUATIONS + PAINS for test in re.findall("`([^`]+)`", cells[-1])])
def test_the_test_exists(test: str) -> None:
    file, function = test.split("::")
    assert f"\ndef {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
