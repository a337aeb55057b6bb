"""examples/gpu_cost.py: its short form runs on a CPU, and rows that are known are not measured again."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "examples" / "gpu_cost.py"


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(PATH.parent)
    spec = importlib.util.spec_from_file_location("gpu_cost", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(cost, monkeypatch, capsys, *options):
    monkeypatch.setattr(sys, "argv", ["gpu_cost.py", *options])
    cost.main()
    return capsys.readouterr().out.splitlines()


def test_the_short_form_runs_on_a_cpu(cost, monkeypatch, capsys, tmp_path):
    rows = tmp_path / "rows.jsonl"
    told = run(cost, monkeypatch, capsys, "--short", "--device", "cpu", "--rows", str(rows))
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["family"], row["method"]) for row in found] == [(f, m) for f in cost.PIPELINES for m in cost.METHODS]
    assert all(row["seconds"] > 0 and row["peak"] is None and row["device"] == "cpu" for row in found)
    assert sum(line.startswith(("sd15", "sdxl")) for line in told) == len(found)
    near = next(float(line.split()[6]) for line in told if line.startswith("  bfloat16"))
    assert near > 30  # dB to float32's picture
    assert told[-1].startswith("two processes at once")
    assert float(told[-1].split()[-1]) < 1e-5  # another number of threads takes sums in another order

    monkeypatch.setattr(cost, "measure", lambda *given: pytest.fail("measured again"))
    monkeypatch.setattr(cost, "check_two_processes", lambda *given: None)
    again = run(cost, monkeypatch, capsys, "--short", "--device", "cpu", "--rows", str(rows))
    assert again[: len(told) - 4] == told[:-4]


def test_a_stop_in_the_last_level_leaves_nothing_to_do(cost, monkeypatch, capsys):
    told = run(cost, monkeypatch, capsys, "--short", "--stop", "--device", "cpu")
    assert told[0] == "levels: 1 of 2 ended; stopped early: True"
    assert told[1] == "network calls after the one that the Stop came in: none"


def test_a_row_without_enough_memory_says_so(cost):
    row = {"family": "sdxl", "pixels": 1024, "precision": "float16", "method": "best", "seconds": None, "peak": None}
    stock = row | {"method": "stock", "seconds": 2.0, "peak": 2**33}
    assert cost.tell(row, stock).endswith("best                        out of memory")
    assert cost.tell(row | {"seconds": 3.0, "peak": 2**34}, stock).split()[-4:] == ["3.00", "1.50", "16.00", "2.00"]
    assert cost.tell(stock, row).split()[-2:] == ["2.00", "8.00"]
