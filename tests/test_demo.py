"""The comparison: what it measures, that it goes on where it stopped, its rows, table and sheets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from vml_ldm.assets import bundled_model
from vml_ldm.evaluation import demo
from vml_ldm.evaluation.comparison import load_cases
from vml_ldm.evaluation.demo import FAST, STOCK, Comparison, Plan, run
from vml_ldm.evaluation.metrics import mean_and_interval
from vml_ldm.evaluation.rows import Row, RowFile
from vml_ldm.evaluation.sheet import draw_sheet
from vml_ldm.evaluation.table import comparison_table
from vml_ldm.images import from_pil
from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline


@pytest.fixture(scope="module")
def pipe() -> VMLInpaintPipeline:
    return VMLInpaintPipeline.from_pretrained(bundled_model(), safety_checker=None)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(model=bundled_model(), methods=(STOCK, FAST), masks=("half", "box"), images=2, steps=4)


@pytest.fixture(scope="module")
def finished(pipe, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the table of a small comparison."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run(plan, pipe, RowFile(folder))


def test_files_and_table(finished: tuple[Path, str]) -> None:
    folder, table = finished
    assert {path.name for path in folder.iterdir()} == {"rows.csv", "results", "sheet.png", "table.md"}
    assert (folder / "table.md").read_text(encoding="utf-8").strip() == table
    lines = [line for line in table.splitlines() if line.startswith("| half") or line.startswith("| box")]
    assert len(lines) == 4
    assert len(list(folder.glob("results/*/*/*.png"))) == 8


def test_rows_are_the_metrics_of_the_results(finished: tuple[Path, str], pipe, plan: Plan) -> None:
    folder, _ = finished
    comparison = Comparison(plan, pipe, RowFile(folder))
    from vml_ldm.evaluation.metrics import psnr
    from vml_ldm.evaluation.tasks import stack_masks

    for case in comparison.cases:
        row = comparison.rows.by_key[case.name, "half", "stock", case.seed, comparison.fingerprint(STOCK)]
        result = from_pil(Image.open(comparison.result_file(STOCK, "half", case)))
        known = stack_masks("half", 128, 128, [case.seed])
        truth = case.truth[None]
        assert torch.equal((known * result), known * truth)
        assert psnr(result, truth, 1 - known).item() == pytest.approx(row.psnr_unknown, abs=0.02)
        assert row.seconds > 0 and row.outside is None


def test_second_run_does_nothing_again(finished, pipe, plan: Plan, monkeypatch, capsys) -> None:
    folder, table = finished
    before = (folder / "rows.csv").read_bytes()

    def fail(*_args) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(Comparison, "_solve", fail)
    assert run(plan, pipe, RowFile(folder)) == table
    assert (folder / "rows.csv").read_bytes() == before
    assert "8 of 8 results stand in" in capsys.readouterr().out


def test_rows_without_their_pictures_make_the_table_again(finished, pipe, plan: Plan, tmp_path, capsys) -> None:
    folder, table = finished
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "rows.csv").write_bytes((folder / "rows.csv").read_bytes())
    assert run(plan, pipe, RowFile(tmp_path / "kept")) == table
    assert "No sheet" in capsys.readouterr().out and not (tmp_path / "kept" / "sheet.png").exists()


def test_other_settings_are_other_rows(finished, pipe, plan: Plan) -> None:
    rows = RowFile(finished[0])
    assert all(is_done for is_done in done(Comparison(plan, pipe, rows)))
    for change in ({"steps": 5}, {"guidance": 2.0}, {"seed": 1}, {"masks": ("text",)}):
        assert not any(done(Comparison(dataclasses.replace(plan, **change), pipe, rows)))


def done(comparison: Comparison) -> list[bool]:
    plan = comparison.plan
    return [comparison.is_done(m, mask, case) for m in plan.methods for mask in plan.masks for case in comparison.cases]


def test_other_code_or_checkpoint_is_another_fingerprint(pipe, plan: Plan, tmp_path: Path, monkeypatch) -> None:
    rows = RowFile(tmp_path / "new")
    first = Comparison(plan, pipe, rows).fingerprint(STOCK)
    assert Comparison(plan, pipe, rows).fingerprint(STOCK) == first
    assert Comparison(plan, pipe, rows).fingerprint(FAST) != first
    other = tmp_path / "model"
    other.mkdir()
    (other / "model_index.json").write_text("{}")
    assert Comparison(dataclasses.replace(plan, model=str(other)), pipe, rows).fingerprint(STOCK) != first
    monkeypatch.setattr(demo.torch, "__version__", "0.0")
    assert Comparison(plan, pipe, rows).fingerprint(STOCK) != first


def test_an_interrupted_run_goes_on(pipe, plan: Plan, tmp_path: Path, monkeypatch) -> None:
    folder, measure, calls = tmp_path / "demo", Comparison.measure, []

    def interrupted(self, method, mask, cases):
        calls.append((mask, method.name, len(cases)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, method, mask, cases)

    monkeypatch.setattr(Comparison, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(plan, pipe, RowFile(folder))
    assert len(RowFile(folder).by_key) == 4
    run(plan, pipe, RowFile(folder))
    assert calls[2:4] == [calls[2]] * 2 and len(calls) == 5
    assert len(RowFile(folder).by_key) == 8


def test_no_method_sees_the_truth_in_the_hole(pipe, plan: Plan, tmp_path: Path) -> None:
    comparison = Comparison(plan, pipe, RowFile(tmp_path))
    (case, *_), known = comparison.cases, demo.stack_masks("half", 128, 128, [0])
    blind = dataclasses.replace(case, truth=(known * case.truth)[0])
    for method in plan.methods:
        raw = [comparison._solve(method, [c], known, {"num_inference_steps": 4})[0] for c in (case, blind)]
        assert torch.equal(*raw)


def test_cases_are_spread_over_the_list_and_keep_their_seeds(plan: Plan) -> None:
    few, many = (load_cases(dataclasses.replace(plan, images=count), 64) for count in (4, 32))
    seeds = {case.name: case.seed for case in many}
    assert all(seeds[case.name] == case.seed for case in few)
    assert all(case.truth.shape == (3, 64, 64) and case.prompt for case in many)
    with pytest.raises(ValueError, match="5000 images asked for"):
        load_cases(dataclasses.replace(plan, images=5000), 64)


# rows


def row(**changes) -> Row:
    values = ["a", "half", "stock", 0, "f0", 10.5, 0.25, 20.0, 0.1, 1.5, None]
    return dataclasses.replace(Row(*values), **changes)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(), row(image="b, c", perceptual=None, outside=0.02), row(seed=1)]
    RowFile(tmp_path).append(rows[:1])
    RowFile(tmp_path).append(rows[1:])
    assert list(RowFile(tmp_path).by_key.values()) == rows


def test_a_later_row_replaces_an_earlier_one(tmp_path: Path) -> None:
    RowFile(tmp_path).append([row(), row(seconds=9.0)])
    assert list(RowFile(tmp_path).by_key.values()) == [row(seconds=9.0)]


def test_rows_of_another_layout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("name,score\nx,1\n")
    with pytest.raises(FileExistsError, match="another version or another program"):
        RowFile(tmp_path)


# table


def test_table_has_means_and_paired_intervals() -> None:
    stock = [row(image=str(i), psnr_unknown=10.0 + i) for i in range(8)]
    ours = [row(image=str(i), psnr_unknown=15.0 + i + 0.1 * (i % 2), outside=0.02) for i in range(8)]
    table = comparison_table({("half", "stock"): stock, ("half", "ours"): ours}, ["half"], ["stock", "ours"])
    mean, low, high, _ = mean_and_interval(torch.tensor([5 + 0.1 * (i % 2) for i in range(8)]))
    assert f"18.55 (+{mean:.2f} [+{low:.2f}, +{high:.2f}])" in table
    assert "0.250 (+0.000 [+0.000, +0.000])" in table
    assert "outside UNet and VAE calls: 2.0%" in table
    widths = {len(line) for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_table_leaves_out_what_was_not_measured() -> None:
    rows = {("half", "stock"): [row(perceptual=None)]}
    table = comparison_table(rows, ["half"], ["stock"])
    heading = table.splitlines()[0]
    assert "EfficientNet" not in heading and 'pip install "vml-ldm[eval]"' in table
    assert "Too few images" in table and "[" not in table.splitlines()[2]


# sheet


def test_sheet_shows_every_image() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    images = [Image.new("RGB", (16, 12), colour) for colour in colours]
    sheet = draw_sheet([("one", images), ("two", images)], ["a", "a", "b"], per_band=2)
    counts = dict(reversed(entry) for entry in sheet.getcolors(10_000))
    assert all(counts[colour] == 2 * 16 * 12 for colour in colours)
    with pytest.raises(ValueError, match="for 2 columns"):
        draw_sheet([("one", images)], ["a", "b"])
