"""examples/full_size_cost.py: its narrow form runs, and whole images add up."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from vml_ldm.presets import PRESETS

PATH = Path(__file__).parents[1] / "examples" / "full_size_cost.py"
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="a process's peak is read from /proc")


@pytest.fixture(scope="module")
def cost():
    spec = importlib.util.spec_from_file_location("full_size_cost", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@LINUX
def test_the_narrow_form_runs(cost, monkeypatch, capsys):
    """Three calls, measured here and not in processes of their own, stand for all."""

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["full_size_cost.py", "--small", *options])
        cost.main()
        return capsys.readouterr().out.splitlines()

    torch.manual_seed(0)
    asked = {"step": ("step", "low"), "step, small": ("step, small", "checkpointed"), "other": ("decode", "half tiles")}
    rows = {name: json.loads(run("--measure", call, "--plan", plan)[-1]) for name, (call, plan) in asked.items()}
    assert all(row["seconds"] > 0 and row["peak"] >= 0 and row["weights"] > 10**7 for row in rows.values())
    assert rows["step"]["predicted"] > 0 < rows["step, small"]["predicted"] and rows["other"]["predicted"] is None
    monkeypatch.setattr(cost, "measure_apart", lambda call, plan, options: rows.get(call, rows["other"]))
    lines = run()
    assert sum(line.startswith(("UNet", "encode", "decode", "step")) for line in lines) == len(cost.MEASUREMENTS)
    assert sum(line.startswith("balanced, ") for line in lines) == len(cost.WHOLE)
    assert any(line.startswith("small decoder, the fastest within 1.25 x of stock's peak: bal") for line in lines)


def made_up(cost, **seconds):
    """A second and a byte each, but for the calls named."""
    row = {"seconds": 1.0, "peak": 1, "weights": 10, "predicted": None}
    return {(call, plan): {**row, "seconds": seconds.get(call, 1.0)} for call, plan in cost.MEASUREMENTS}


def test_whole_images_add_up(cost):
    levels, inner = PRESETS["balanced"].split(cost.STEPS)
    found, others = made_up(cost), 2 * levels + 1 + 2
    steps = (levels + 1) * inner  # the last level takes twice as many
    exact = 1 + cost.LENGTHS  # a gradient, and decodes for the step's length
    assert cost.whole_image(found, "balanced", "low", None) == (pytest.approx(steps * exact + others), 1)
    assert cost.whole_image(found, "balanced", cost.FREE, cost.FREE) == (steps * 3 + others, 1)
    found["step, small", "one graph"] |= {"seconds": 0.5, "peak": 7}
    found["step", "low"] |= {"seconds": 3.0, "peak": 5}
    mixed = (levels - 1) * inner * (exact - 0.5) + 2 * inner * (exact + 2) + others
    assert cost.whole_image(found, "balanced", "low", "one graph") == (pytest.approx(mixed), 7)
    found["step, close-up", "one graph"] |= {"seconds": 0.25}
    near = steps * (exact - 0.75) + others
    assert cost.whole_image(found, "balanced", cost.CLOSE_UP, None) == (pytest.approx(near), 1)


def test_what_was_reached_is_told(cost, capsys):
    found = made_up(cost)
    found["step", "one graph"]["peak"] = 100
    cost.tell_whole(found)
    out = capsys.readouterr().out
    assert "stock" in out and "balanced, small decoder one graph, last level low" in out
    ours, stock = cost.whole_image(found, "balanced", "checkpointed", None)[0], cost.STEPS + 2
    reached = f"balanced, full decoder checkpointed: {ours / stock:.2f} x the time"
    assert f"full decoder, the fastest within 2.0 x of stock's peak: {reached}" in out
    found["step", "low"]["peak"] = 100
    cost.tell_whole(found)
    assert """memory="low", the fastest within 1.5 x of stock's peak: none""" in capsys.readouterr().out


def test_inpaintings_add_up_by_preset(cost):
    """With guidance passes of two alone; without, a step at the levels of noise 1 and above, and corrections."""

    def alone(levels: int) -> int:
        """A pass and a decode at each level but the last; encodes; three decodes, at the start and at the end."""
        return 2 * levels - 1 + (levels + 1) + 3

    found, levels = made_up(cost), round(0.16 * cost.STEPS)
    fast = alone(levels)
    for guided, call in ((True, "UNet, batch of 2"), (False, "UNet")):
        found[call, "one graph"] |= {"seconds": 2.0}
        assert cost.inpainted_image(found, "fast", guided, True, "one graph") == (pytest.approx(fast + levels), 1)
        found[call, "one graph"] |= {"seconds": 1.0}
    corrected = 8 * (1 + cost.LENGTHS) + 2
    assert cost.inpainted_image(found, "balanced", True, True, "low")[0] == alone(round(0.24 * cost.STEPS))
    noisy = sum(sigma >= alpha for alpha, sigma in cost.scales_of(levels))
    assert cost.inpainted_image(found, "balanced", False, True, "low")[0] == pytest.approx(fast + corrected + 2 * noisy)
    assert cost.inpainted_image(found, "balanced", False, False, "low") == cost.inpainted_image(
        found, "fast", False, False, "low"
    )
