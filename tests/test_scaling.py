"""The cost's table and plot: the line's arithmetic, and a run on tiny networks."""

import pytest
import tiny

from vml_ldm import VMLRestorePipeline
from vml_ldm.evaluation import scaling
from vml_ldm.evaluation.scaling import Point, fit, table, write
from vml_ldm.optimize import InnerStep
from vml_ldm.solve import vml_levels


def points(axis="levels", rest=0.0):
    return [Point(axis, n, 1 + 0.5 * n + rest * (-1) ** n, 0.04, 10 * n) for n in (1, 2, 4, 8)]


def test_the_line_is_that_of_the_points():
    start, slope, r2 = fit(points())
    assert (start, slope, r2) == pytest.approx((1, 0.5, 1))
    assert 0.9 < fit(points(rest=0.5)).r2 < 0.99


def test_files_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    text = write([*points(), *points("batch")], tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"cost.csv", "cost.md", "cost.png"}
    assert "- levels: 1.00 s + 0.5 s for each, R^2 = 1.0000" in text and "- images:" in text
    assert len((tmp_path / "new" / "cost.csv").read_text().splitlines()) == 9


def test_every_level_and_step_is_paid_for(tmp_path, monkeypatch):
    pipe = VMLRestorePipeline.from_pretrained(tiny.save(tmp_path / "tiny"), safety_checker=None)
    monkeypatch.setattr(scaling, "AXES", {"levels": (2, 4), "inner_steps": (1, 2), "side": (1, 2), "batch": (1, 2)})
    monkeypatch.setattr(scaling, "TIMES", 1)
    monkeypatch.setitem(vml_levels.__kwdefaults__, "step", InnerStep("analytic"))  # two decodes each
    found = {(point.axis, point.value): point.calls for point in scaling.measure(pipe)}
    fixed = 2 * found["levels", 2] - found["levels", 4]  # before the first level and after the last
    assert 0 < fixed < found["levels", 2]
    assert found["side", 64**2] == found["side", 128**2] == found["batch", 1] == found["batch", 2]
    assert found["inner_steps", 2] > found["inner_steps", 1]
    assert "pixels" in table(points("side"))
    report = scaling._solve(pipe, levels=3, inner_steps=2, side=1, batch=1)
    assert (report.levels, report.inner_steps, report.correct_steps) == (3, 2, 0)
