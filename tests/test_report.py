"""The report's arithmetic."""

import json

import pytest

from vml_ldm.report import Report


def report(**changes):
    figures = {"sigma_y": [0.0], "vae_error": [0.03], "effective_sigma_y": [0.03], "residual": [0.024]}
    common = {"levels": 8, "inner_steps": 5, "jacobian": "exact", "preset": "balanced"}
    seconds = {"denoise": 1.0, "denoise_vjp": 2.0, "decode": 3.0, "decode_vjp": 3.5, "encode": 0.4, "total": 10.0}
    return Report(**{**figures, **common, "seconds": seconds, "calls": {"denoise": 48}, **changes})


def test_overhead_is_the_time_outside_the_networks():
    assert abs(report().overhead - 0.01) < 1e-9 and report(seconds={}).overhead == 0


def test_text_has_five_lines_and_the_ratio_to_what_the_vae_can_do():
    lines = report(retries={"the VAE decoder": 1}).text().splitlines()
    assert len(lines) == 5 and "0.80" in lines[1] and "1 x the VAE decoder" in lines[2] and "1.0%" in lines[4]


def test_text_names_the_solver_and_what_it_has():
    assert "solver     vml, 8 levels, up to 5 inner steps each, Jacobian exact" in report().text()
    text = report(solver="red-diff", inner_steps=1).text()
    assert "solver     red-diff, 8 levels, one step each, preset balanced" in text and "Jacobian" not in text


def test_the_dict_is_plain():
    assert json.loads(json.dumps(report().to_dict()))["overhead"] > 0


def test_the_plot_has_each_image_s_residual_what_is_expected_of_it_and_all_of_the_time(tmp_path):
    pytest.importorskip("matplotlib")
    trace = [{"residual": [0.2, 0.1]}, {"residual": [0.05, 0.03]}]
    two = {"sigma_y": [0.0, 0.04], "vae_error": [0.03, 0.03], "trace": trace, "residual": [0.04, 0.02]}
    figure = report(**two).plot()
    curve, cost = figure.axes
    first, first_expected, second, second_expected = curve.lines
    assert (list(first.get_ydata()), list(second.get_ydata())) == ([0.2, 0.05, 0.04], [0.1, 0.03, 0.02])
    assert first_expected.get_ydata()[0] == pytest.approx(0.03)
    assert second_expected.get_ydata()[0] == pytest.approx(0.05)
    assert sum(bar.get_width() for bar in cost.patches) == pytest.approx(10)
    figure.savefig(tmp_path / "plot.png")
