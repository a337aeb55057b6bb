"""The comparison of restoration: its problems, its methods, that it goes on, its table, on tiny random networks."""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from torch import Generator, Tensor

import vml_ldm
from vml_ldm import RedDiff, cli, operators
from vml_ldm.evaluation import methods, metrics, pages, plots, tuning
from vml_ldm.evaluation.benchmark import Benchmark, BenchmarkRow, Place, Plan, run
from vml_ldm.evaluation.benchmark_table import benchmark_table, is_ahead, over_noises, standing, summary, verdicts
from vml_ldm.evaluation.budgets import equalise, tell
from vml_ldm.evaluation.comparison import Case
from vml_ldm.evaluation.cost import measured
from vml_ldm.evaluation.methods import (
    BICUBIC,
    CEILING,
    EXACT,
    FREE,
    METHODS,
    RED,
    RED_TUNED,
    SMOOTH,
    START,
    TELEA,
    Solver,
    draw_measured,
)
from vml_ldm.evaluation.metrics import mean_and_interval, psnr
from vml_ldm.evaluation.problems import LINEAR, TASKS, make_operator, pose, turn_if_nearer
from vml_ldm.evaluation.rows import RowFile, read_levels, tell_levels
from vml_ldm.evaluation.table import Group
from vml_ldm.images import from_pil, load_image
from vml_ldm.pipelines.vml_restore import VMLRestorePipeline
from vml_ldm.presets import PRESETS

SIZE = 64
SEEDS = [3, 7]
SHAPES = {"sr4": (3, 16, 16), "sr8": (3, 8, 8), "colorize": (1, 64, 64), "phase": (3, 128, 128)}


def truth() -> Tensor:
    """Two smooth images, (2, 3, 64, 64) in [0.2, 0.8]."""
    coarse = torch.rand(2, 3, 5, 5, generator=Generator().manual_seed(0))
    return 0.2 + 0.6 * torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)


def cases() -> list[Case]:
    return [Case(f"image-{seed}", "a picture", seed, image) for seed, image in zip(SEEDS, truth(), strict=True)]


# problems


@pytest.mark.parametrize("task", TASKS)
def test_tasks_show_images_in_their_shape(task: str) -> None:
    operator = make_operator(task, SIZE, SEEDS)
    y = operator(truth())
    assert y.shape == (2, *SHAPES.get(task, (3, SIZE, SIZE))) and y.isfinite().all()
    assert operator.linear == (task in LINEAR)
    alone = make_operator(task, SIZE, SEEDS[1:])(truth()[1:])
    torch.testing.assert_close(y[1:], alone)


def test_what_is_drawn_is_drawn_from_the_image_s_seed() -> None:
    for task in TASKS:
        one, other = (make_operator(task, SIZE, [seed])(truth()[:1]) for seed in SEEDS)
        assert torch.equal(one, other) != (task in ("motion", "random"))
    with pytest.raises(ValueError, match="task is 'sr5'; expected one of sr4"):
        make_operator("sr5", SIZE, [0])


def test_noise_is_of_the_size_asked_for_and_of_the_seed() -> None:
    clean, small, large = (pose("deblur", sigma_y, cases(), truth()).y for sigma_y in (0.0, 0.01, 0.05))
    torch.testing.assert_close(large - clean, 5 * (small - clean), atol=1e-6, rtol=0)
    assert (large - clean).std().item() == pytest.approx(0.05, rel=0.02)
    torch.testing.assert_close(pose("deblur", 0.05, cases()[1:], truth()[1:]).y, large[1:])
    start = torch.randn(16, generator=Generator().manual_seed(SEEDS[0]))  # what a solver begins with
    assert not torch.allclose((large - clean)[0].flatten()[:16], 0.05 * start, atol=1e-3)


def test_missing_pixels_have_no_noise() -> None:
    problem = pose("random", 0.05, cases(), truth())
    assert not problem.y[(problem.operator.mask == 0).expand_as(problem.y)].any()
    torch.testing.assert_close(problem.residual(truth()), torch.full((2,), 0.05), atol=0.003, rtol=0)


def test_the_vae_s_error_is_that_of_the_truth_as_seen() -> None:
    problem = pose("half", 0.03, cases(), truth() + 0.04)
    torch.testing.assert_close(problem.vae_error, torch.full((2,), 0.04))
    torch.testing.assert_close(problem.expected, torch.full((2,), 0.05))


def test_a_turned_image_counts_as_it_is_nearer() -> None:
    images = truth()
    turned = torch.cat([images[:1].flip(2, 3), images[1:]])
    assert torch.equal(turn_if_nearer(turned, images), images)


# methods


def answer(method, task: str, sigma_y: float = 0.0):
    return method.answer(pose(task, sigma_y, cases(), truth() + 0.02), None, {})


@pytest.mark.parametrize("task", TASKS)
def test_what_was_measured_is_shown_at_the_image_s_size(task: str) -> None:
    problem = pose(task, 0.0, cases(), truth())
    shown = draw_measured(problem)
    assert shown.shape == truth().shape
    if task in ("deblur", "motion", "jpeg", "hdr"):
        assert torch.equal(shown, problem.y)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "phase"])
def test_the_start_is_an_image_that_agrees_without_noise(task: str) -> None:
    image, residual, *_ = answer(START, task)
    assert image.shape == (2, 3, SIZE, SIZE) and image.min() >= 0 and image.max() <= 1
    assert residual.max() < 0.03


def test_naive_answers_are_near_smooth_images() -> None:
    for task in ("sr4", "sr8"):
        assert psnr(answer(BICUBIC, task).image, truth()).min() > 25
    torch.testing.assert_close(answer(CEILING, "sr4").image, truth() + 0.02)
    torch.testing.assert_close(answer(CEILING, "sr4").residual, torch.full((2,), 0.02), atol=1e-5, rtol=0)


def test_methods_refuse_tasks_that_are_not_theirs() -> None:
    with pytest.raises(TypeError, match="expected Downsample"):
        answer(BICUBIC, "deblur")


def test_telea_fills_holes_from_their_border_and_keeps_the_rest() -> None:
    pytest.importorskip("cv2")
    problem = pose("random", 0.01, cases(), truth())
    image = answer(TELEA, "random", 0.01).image
    known = (problem.operator.mask > 0).expand_as(image)
    assert torch.equal(image[known], problem.y[known])
    assert psnr(image, truth()).min() > 25
    with pytest.raises(TypeError, match="expected Mask"):
        answer(TELEA, "deblur")


def test_a_method_without_its_library_is_known_to_be_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    assert [method.name for method in METHODS if not methods.is_installed(method)] == ["telea"]


def test_what_is_called_vml_is_the_pipeline_s_default() -> None:
    assert EXACT.settings(("sr4", 0.0)) == {"jacobian": PRESETS["balanced"].jacobian}
    assert len({method.name for method in METHODS}) == len(METHODS)


# settings of the others


QUIET, LOUD = ((("lambda_", 0.25), ("lr", 0.2)), (("lambda_", 1.0), ("lr", 0.5)))


def test_tuned_settings_are_those_of_the_nearest_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "TUNED", {("red-diff", "sr4", 0.0): QUIET, ("red-diff", "sr4", 0.05): LOUD})
    found = [tuning.tuned("red-diff", "sr4", sigma_y) for sigma_y in (0.0, 0.02, 0.04, 1.0)]
    assert found == [QUIET, QUIET, LOUD, LOUD]
    assert tuning.tuned("red-diff", "sr8", 0.0) == tuning.points("red-diff")[0]
    assert RED_TUNED.settings(("sr4", 0.05))["red"] == RedDiff(lambda_=1.0, lr=0.5)


def test_red_diff_s_grid_begins_with_the_authors() -> None:
    assert RedDiff(**dict(tuning.points("red-diff")[0])) == RedDiff()


@pytest.mark.parametrize("method", tuning.GRIDS)
def test_a_grid_repeats_nothing_and_its_points_are_passed_on(method: str) -> None:
    found = [solver for solver in methods.grid(method) if methods.is_installed(solver)]
    assert len({solver.name for solver in found}) == len(found)
    passed = [solver.settings(("sr4", 0.0)) for solver in found]
    assert len({str(settings) for settings in passed}) == len(found)
    assert all(str(value) in str(s) for s, p in zip(passed, tuning.points(method), strict=False) for _, value in p)


def test_the_best_settings_are_told_as_python() -> None:
    first = tuning.points("red-diff")[0]
    rows = {tuning.name_of(first): [row(psnr=20.0)], tuning.name_of(LOUD): [row(psnr=22.0)]}
    (_, line) = tuning.best_settings("red-diff", [Group(("sr4", "0.05", "1"), rows)]).splitlines()
    assert line.endswith("# 22.00 dB, first 20.00 dB; at the grid's edge")
    assert eval(f"{{{line}\n}}") == {("red-diff", "sr4", 0.05): LOUD}


def test_solvers_of_other_papers_are_measured_one_image_at_a_time_where_they_must(pipe, plan: Plan, tmp_path) -> None:
    tried = [m for m in methods.PEERS if m.name in ("latent-dps", "latino", "azula-dps") and methods.is_installed(m)]
    some = dataclasses.replace(plan, methods=(START, *tried), tasks=("sr4",), batch=2)
    rows = rows_in(tmp_path)
    run(some, pipe, rows)
    assert len(rows.by_key) == 2 * (1 + len(tried))


def test_diffusers_inpainting_is_a_method_where_there_is_a_mask(pipe) -> None:
    guided, _, free = methods.grid("stock")
    assert guided.tasks == ("box", "half", "random")
    problem = pose("box", 0.0, cases(), truth())
    known = problem.operator.mask.expand(2, 3, -1, -1) > 0
    image, residual, calls, in_networks, _ = methods.at_steps(free, lambda task: 4).answer(problem, pipe, {})
    assert calls == {"encode": 2, "denoise": 4, "decode": 1} and in_networks > 0
    assert (image - problem.y)[known].square().mean().sqrt() < 0.1 * residual.min()  # the step in pixels
    assert methods.at_steps(guided, lambda task: 4).answer(problem, pipe, {}).calls["denoise"] == 8


# a run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(model: str) -> VMLRestorePipeline:
    return VMLRestorePipeline.from_pretrained(model, safety_checker=None)


@pytest.fixture(scope="module")
def plan(model: str) -> Plan:
    tried = (EXACT, RED_TUNED, START, BICUBIC, CEILING)
    return Plan(model, images=2, methods=tried, tasks=("sr4", "phase"), noises=(0.05,), steps=4, batch=1)


@pytest.fixture(scope="module")
def finished(pipe, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the table of a small comparison."""
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, run(plan, pipe, rows_in(folder))


def rows_in(folder: Path, part: str = "") -> RowFile[BenchmarkRow]:
    return RowFile(folder, BenchmarkRow, part)


def test_files_and_table(finished: tuple[Path, str]) -> None:
    folder, table = finished
    sheets = {"sheet-phase.png", "sheet-sr4.png", "gallery.png"}
    plots = {"quality-seconds.png", "quality-network_calls.png"}
    expected = {"rows.csv", "results", "table.md", "tasks", "residual-levels.png", *plots, *sheets}
    pages_ = {"phase.md", "phase.png", "sr4.md", "sr4.png", "README.md"}
    assert {path.name for path in (folder / "tasks").iterdir()} == pages_
    assert (folder / "tasks" / "README.md").read_text(encoding="utf-8").count(".md)") == 2
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder / "table.md").read_text(encoding="utf-8").strip() == table
    assert (
        len([line for line in table.splitlines() if line.startswith(("| sr4", "| phase"))]) == 11
    )  # bicubic: sr4 only; one of each in the summary
    assert len(list(folder.glob("results/*/*/*.png"))) == 18


def test_rows_are_the_metrics_of_the_results(finished, pipe, plan: Plan) -> None:
    benchmark = Benchmark(plan, pipe, rows_in(finished[0]))
    for place, method in benchmark.jobs():
        for case, found in zip(benchmark.cases, benchmark.rows_of(method, place, benchmark.cases), strict=True):
            result = from_pil(load_image(benchmark.result_file(method, place, case)))
            assert psnr(result, case.truth[None]).item() == pytest.approx(found.psnr, abs=0.05)
            assert found.seconds >= 0 and found.residual > 0
            solved = isinstance(method, Solver)
            assert (found.denoise > 0) == (found.decode + found.draft > 0) == solved
            assert 0 < found.outside < 1 if solved else found.outside == 1
            assert (found.levels is not None) == solved
            assert found.edge_error is None  # no mask here
            if method is CEILING:
                assert found.ratio == pytest.approx(1, abs=0.1)


def test_images_come_batch_by_batch_through_every_task(finished, plan: Plan) -> None:
    found = list(rows_in(finished[0]).by_key.values())
    assert len({row.image for row in found[:9]}) == 1 and {row.task for row in found[:9]} == set(plan.tasks)


def test_second_run_does_nothing_again_nor_does_one_from_joined_files(
    finished, pipe, plan: Plan, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder, table = finished
    text = (folder / "rows.csv").read_bytes()
    (tmp_path / "rows-joined.csv").write_bytes(text + text)
    monkeypatch.setattr(Benchmark, "measure", None)
    for kept in (folder, tmp_path):
        assert run(plan, pipe, rows_in(kept)) == table
    assert (folder / "rows.csv").read_bytes() == text
    said = capsys.readouterr().out
    assert said.count("18 of 18 results stand in") == 2 and said.count("No sheet of") == 2


def test_a_table_is_made_of_rows_that_another_version_recorded(finished, pipe, plan: Plan, tmp_path: Path) -> None:
    text = (finished[0] / "rows.csv").read_text(encoding="utf-8")
    lines = [line.split(",") for line in text.splitlines()]
    old = [",".join([*cells[:5], f"old{cells[5]}"[:12], *cells[6:]]) for cells in lines[1:]]
    (tmp_path / "rows.csv").write_text("\n".join([",".join(lines[0]), *old]) + "\n", encoding="utf-8")
    assert not any(Benchmark(plan, pipe, rows_in(tmp_path)).groups())
    table = run(plan, pipe, rows_in(tmp_path), solve=False)
    assert table.splitlines()[1:] == finished[1].splitlines()[1:] and "as they were recorded" in table.splitlines()[0]


def test_a_table_of_recorded_rows_has_at_each_task_who_answered_it(pipe, plan: Plan, tmp_path: Path) -> None:
    both = dataclasses.replace(plan, images=1, methods=(START, SMOOTH), tasks=("sr4", "box"))
    run(dataclasses.replace(both, methods=(START,)), pipe, rows_in(tmp_path))
    run(dataclasses.replace(both, tasks=("box",)), pipe, rows_in(tmp_path))
    table = run(both, pipe, rows_in(tmp_path), solve=False)
    lines = [line.split("|") for line in table.splitlines() if line.startswith(("| sr4", "| box"))]
    found = [(task.strip(), method.strip()) for _, task, _, _, method, *rest in lines if rest[3:]]
    assert found == [("sr4", "start"), ("box", "start"), ("box", "smooth")]


def test_an_interrupted_run_leaves_a_table_and_goes_on(finished, pipe, plan: Plan, tmp_path, monkeypatch) -> None:
    folder, measure, calls = tmp_path / "new", Benchmark.measure, []

    def interrupted(self, method, place, cases):
        calls.append((method.name, place))
        if len(calls) == 7:  # sr4 is done on the first image
            raise KeyboardInterrupt
        return measure(self, method, place, cases)

    monkeypatch.setattr(Benchmark, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(plan, pipe, rows_in(folder))
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "| sr4" in table and "| phase" not in table
    run(plan, pipe, rows_in(folder))
    assert calls[6] == calls[7] and len(calls) == 19
    first, again = (rows_in(path).by_key for path in (finished[0], folder))
    assert {key: row.psnr for key, row in first.items()} == {key: row.psnr for key, row in again.items()}


def test_under_a_mask_the_error_at_its_border_is_measured_and_told(pipe, plan: Plan, tmp_path: Path) -> None:
    masked = dataclasses.replace(plan, methods=(START, CEILING), tasks=("box", "sr4"))
    table = run(masked, pipe, rows_in(tmp_path)).splitlines()
    benchmark = Benchmark(masked, pipe, rows_in(tmp_path))
    known = make_operator("box", benchmark.size, [0]).mask
    for case in benchmark.cases:
        (row,) = benchmark.rows_of(START, Place("box", 0.05), [case])
        result = from_pil(load_image(benchmark.result_file(START, Place("box", 0.05), case)))
        assert row.edge_error == pytest.approx(metrics.edge_error(result, case.truth[None], known).item(), abs=4e-3)
    place = table[2].split("|").index(next(cell for cell in table[2].split("|") if "edge error" in cell))
    told = {line.split("|")[1].strip(): line.split("|")[place].strip() for line in table[4:8]}
    assert float(told["box"]) > 0 and told["sr4"] == ""


def test_levels_are_told_evenly_and_read_again() -> None:
    trace = [{"alpha": 0.5, "sigma": (40 - i) / 2, "residual": [1.0, 1 / (i + 1)]} for i in range(40)]
    levels = read_levels(tell_levels(trace, 1))
    assert len(levels) == 25 and levels[0] == (40, 1) and levels[-1] == (1, 0.025)
    assert all(a > b and residual > after for (a, residual), (b, after) in pairwise(levels))
    assert read_levels(tell_levels(trace[:3], 0)) == [(40, 1), (39, 1), (38, 1)] and tell_levels([], 0) is None


def test_lpips_is_a_column_where_every_row_has_it(pipe, plan: Plan, tmp_path: Path, monkeypatch) -> None:
    class Error(torch.nn.Module):
        def forward(self, image: Tensor, truth: Tensor) -> Tensor:
            return (image - truth).abs().mean((1, 2, 3))

    quick = dataclasses.replace(plan, methods=(START, BICUBIC), tasks=("sr4",))
    assert "LPIPS ↓" not in run(quick, pipe, rows_in(tmp_path))
    monkeypatch.setattr(metrics, "has_lpips", lambda: True)
    monkeypatch.setattr(metrics, "LPIPS", Error)
    assert "LPIPS ↓" in run(quick, pipe, rows_in(tmp_path))  # rows without it were not taken for these
    told = [row.lpips for row in rows_in(tmp_path).by_key.values()]
    assert len(told) == 8 and told.count(None) == 4 and all(0 < value < 1 for value in told if value is not None)


def test_an_image_with_several_seeds_is_one_row_of_the_table(pipe, plan: Plan, tmp_path: Path) -> None:
    often = dataclasses.replace(plan, methods=(RED_TUNED, START), tasks=("motion",), seeds=3, batch=8)
    run(often, pipe, rows_in(tmp_path))
    recorded = list(rows_in(tmp_path).by_key.values())
    assert len({(row.image, row.method, row.seed) for row in recorded}) == len(recorded) == 12
    assert len({row.psnr for row in recorded}) == 12  # noise, kernel and what a solver begins with: all of the seed's
    (group,) = Benchmark(often, pipe, rows_in(tmp_path)).groups()
    for method, rows in group.rows.items():
        for row in rows:
            of_image = [found for found in recorded if (found.image, found.method) == (row.image, method)]
            for name in ("psnr", "perceptual", "residual", "seconds", "denoise"):
                figures = [getattr(found, name) for found in of_image]
                expected = None if None in figures else pytest.approx(sum(figures) / 3)
                assert getattr(row, name) == expected
        assert len(rows) == 2 == int(group.labels[-1])
    (first,) = Benchmark(dataclasses.replace(often, seeds=1), pipe, rows_in(tmp_path)).groups()
    assert all(row in recorded for rows in first.rows.values() for row in rows)  # one seed: rows are what they were


def test_parts_share_a_folder_and_the_work(finished, pipe, plan: Plan, tmp_path: Path) -> None:
    quick = dataclasses.replace(plan, methods=(START, BICUBIC), tasks=("sr4",))
    for part in (1, 2):
        run(dataclasses.replace(quick, part=(part, 2)), pipe, rows_in(tmp_path, f"{part}of2"))
    benchmark = Benchmark(quick, pipe, rows_in(tmp_path))
    assert all(benchmark.is_done(method, place, case) for place, method in benchmark.jobs() for case in benchmark.cases)
    assert {path.name for path in tmp_path.glob("rows*")} == {"rows-1of2.csv", "rows-2of2.csv"}
    assert "| 2 " in run(quick, pipe, rows_in(tmp_path), solve=False)


def test_only_what_changes_a_row_changes_its_fingerprint(pipe, plan: Plan, tmp_path: Path, monkeypatch) -> None:
    rows, place = rows_in(tmp_path), Place("sr4", 0.05)

    def names(**changes) -> list[str]:
        benchmark = Benchmark(dataclasses.replace(plan, **changes), pipe, rows)
        return [benchmark.fingerprint(method, place) for method in (EXACT, FREE, RED, RED_TUNED)]

    before = names()
    assert len(set(before)) == 4
    assert names(images=1, batch=3, noises=(0.0,)) == before
    assert not set(names(steps=5)) & set(before) and not set(names(guidance=2.0)) & set(before)
    monkeypatch.setattr(tuning, "TUNED", {("red-diff", "sr4", 0.05): LOUD})
    assert names()[:3] == before[:3] and names()[3] != before[3]
    monkeypatch.undo()
    half = VMLRestorePipeline(**pipe.components, requires_safety_checker=False)
    half.unet = tiny.unet().bfloat16()
    assert Benchmark(plan, half, rows).fingerprint(EXACT, place) != before[0]


def test_no_method_sees_the_truth_in_a_hole(pipe, plan: Plan) -> None:
    blind = [dataclasses.replace(case, truth=case.truth * (torch.arange(SIZE) < SIZE // 2)) for case in cases()]
    for method in (EXACT, RED, START, *([TELEA] if methods.is_installed(TELEA) else [])):
        problems = [pose("half", 0.05, some, truth()) for some in (cases(), blind)]
        seen, unseen = (method.answer(problem, pipe, {"num_inference_steps": 4}).image for problem in problems)
        assert torch.equal(seen, unseen)


def test_tuning_is_on_validation_images_only(pipe, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tuning came with split 'held_out'"):
        run(dataclasses.replace(plan, tuning="red-diff"), pipe, rows_in(tmp_path / "new"))


# equal budgets


def test_every_solver_gets_the_steps_that_cost_what_the_first_costs(tmp_path: Path) -> None:
    asked = []

    def spend(method: Solver, task: str, steps: int | None) -> float:
        asked.append((method.name, task, steps))
        per_step = {"vml": 6.0, "red-diff": 3.0, "vml-free": 50.0}[method.name]
        return 10 + per_step * (50 if steps is None else steps)

    given = (EXACT, RED, FREE, START)
    first, red, free, start = equalise(given, ("sr4", "jpeg"), "calls", tmp_path, spend)
    assert (first, start) == (EXACT, START)
    assert red.arguments("sr4", 0.0) == RED.arguments("sr4", 0.0) | {"num_inference_steps": 100}
    assert free.arguments("jpeg", 0.05)["num_inference_steps"] == 6
    assert "- red-diff: sr4 100, jpeg 100" in tell(tmp_path)

    count = len(asked)
    again = equalise(given, ("sr4", "jpeg"), "calls", tmp_path, spend)
    assert again[1].settings(("sr4", 0.0)) == red.settings(("sr4", 0.0)) and len(asked) == count  # kept
    with pytest.raises(FileExistsError, match="for equal calls; expected seconds"):
        equalise(given, ("sr4",), "seconds", tmp_path, spend)


def test_of_a_grid_only_the_first_task_is_probed(tmp_path: Path) -> None:
    asked = []

    def spend(method: Solver, task: str, steps: int | None) -> float:
        asked.append((method.name, task, steps))
        return 100.0 if steps is None else 10.0 * steps

    one, other = methods.grid("latino")[:2]
    equalise((EXACT, one, other), ("sr4", "box"), "calls", tmp_path, spend, alike=True)
    assert asked.count(("vml", "box", None)) == 1
    assert {task for name, task, _ in asked if name != "vml"} == {"sr4"}


def test_a_comparison_at_equal_calls_has_about_as_many(pipe, plan: Plan, tmp_path: Path) -> None:
    asked = dataclasses.replace(plan, images=1, tasks=("box",), methods=(EXACT, RED), equal="calls", steps=24)
    table = run(asked, pipe, rows_in(tmp_path), solve=True)
    ours, theirs = (row.network_calls for row in rows_in(tmp_path).by_key.values())
    assert theirs == pytest.approx(ours, rel=0.1)
    assert "Steps that cost as much as the first method's, in calls:" in table


def test_a_part_takes_no_steps_of_its_own(pipe, plan: Plan, tmp_path: Path) -> None:
    """One process finds the steps: parts would find different ones, and overwrite each other's."""
    asked = dataclasses.replace(plan, images=2, tasks=("sr4",), methods=(EXACT, RED), equal="calls", part=(2, 2))
    with pytest.raises(FileNotFoundError, match=r"budgets\.json is missing.*--images 4 and without --part"):
        run(asked, pipe, rows_in(tmp_path, "2of2"))


# rows and table


def row(**changes) -> BenchmarkRow:
    values = ["a", "sr4", 0.05, "vml", 0, "f0", 20.0, 0.8, None, 0.06, 0.04, 1.5]
    return dataclasses.replace(BenchmarkRow(*values), **changes)


def group(gain: float, *, task: str = "sr4", images: int = 8, nearer: float | None = None) -> Group:
    """A rival whose PSNR is that much below vml's, give or take 0.1, and whose distance is that much larger."""
    ours = [row(task=task, image=str(i), psnr=20.0 + i) for i in range(images)]
    theirs = [row(task=task, image=str(i), psnr=20.0 + i - gain + 0.1 * (-1) ** i) for i in range(images)]
    if nearer is not None:
        ours = [dataclasses.replace(r, perceptual=0.3) for r in ours]
        theirs = [dataclasses.replace(r, perceptual=0.3 + nearer) for r in theirs]
    return Group((task, "0.05", str(images)), {"vml": ours, "red-diff": theirs})


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [row(), row(image="b, c", perceptual=0.25), row(sigma_y=0.0)]
    rows_in(tmp_path).append(rows)
    assert list(rows_in(tmp_path).by_key.values()) == rows
    assert row(residual=0.1, sigma_y=0.03, vae_error=0.04).ratio == pytest.approx(2)
    with pytest.raises(FileExistsError, match="another version or another program"):
        RowFile(tmp_path)


def test_rows_of_an_earlier_layout_are_read_and_get_the_fields_that_came_later(tmp_path: Path) -> None:
    names = [field.name for field in dataclasses.fields(BenchmarkRow)]
    cells = [str(value) for value in dataclasses.astuple(row(perceptual=0.5))[: names.index("denoise")]]
    old = [",".join(names[: len(cells)]), ",".join(cells)]
    (tmp_path / "rows.csv").write_text("\n".join(old) + "\n")
    rows = rows_in(tmp_path)
    assert list(rows.by_key.values()) == [row(perceptual=0.5)]
    assert (tmp_path / "rows.csv").read_text().splitlines() == old  # nothing is written by reading
    new = row(image="b", denoise=7, memory=1.5)
    rows.append([new])
    assert list(rows_in(tmp_path).by_key.values()) == [row(perceptual=0.5), new]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_rows_of_half_a_layout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("image,task,sigma_y\n")
    with pytest.raises(FileExistsError, match="another version or another program"):
        rows_in(tmp_path)


def test_a_call_s_memory_is_what_it_held_at_the_most() -> None:
    def hold(mib: int) -> int:
        held = torch.ones(mib, 2**18)  # float32
        return len(held)

    result, large = measured(lambda: hold(256), torch.device("cpu"))
    _, small = measured(lambda: hold(1), torch.device("cpu"))
    assert result == 256
    if large.memory is None:
        pytest.skip("this system does not tell")
    assert 250 < large.memory < 300
    assert small.memory < 10  # the first call's peak is forgotten


def test_a_second_call_s_memory_is_that_of_the_first() -> None:
    def hold() -> int:
        return len([torch.ones(2**14) for _ in range(1000)])  # 64 KiB each

    (_, first), (_, second) = (measured(hold, torch.device("cpu")) for _ in range(2))
    if first.memory is None or not sys.platform.startswith("linux"):
        pytest.skip("this system does not tell")
    assert 50 < first.memory < 80
    assert 50 < second.memory < 80  # what the C library had kept counts again


def test_table_has_means_and_paired_intervals() -> None:
    table = benchmark_table([group(1.0)])
    interval = mean_and_interval(torch.tensor([-1 + 0.1 * (-1) ** i for i in range(8)]))
    assert f"22.50 ({interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}])" in table
    assert interval.low == pytest.approx(-1 - 2.3646 * 0.1 / 7**0.5, rel=1e-3)  # Student's t, 7 degrees of freedom
    assert "| 0.0600   | 0.94" in table and "EfficientNet-Lite0 distance is left out" in table
    assert "[" not in benchmark_table([group(1.0, images=7)]).splitlines()[3]


@pytest.mark.parametrize(
    ("gain", "nearer", "ahead"),
    [(1.0, None, True), (0.0, None, False), (-1.0, None, False), (-1.0, 0.1, True), (0.0, -0.1, False)],
)
def test_ahead_is_by_psnr_or_distance(gain: float, nearer: float | None, ahead: bool) -> None:
    assert is_ahead(group(gain, nearer=nearer), "vml", "red-diff") == ahead


@pytest.mark.parametrize("task", TASKS)
def test_a_task_s_page_has_its_operator_and_a_command_that_is_understood(task: str) -> None:
    words = pages.TASKS[task]
    known = torch.ones(1, 1, SIZE, SIZE)
    operator = eval(words.operator, vars(operators) | {"known": known})
    if task not in ("box", "half", "random", "motion"):  # drawn for each image
        image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(operator(image), make_operator(task, SIZE, [0])(image))
    assert bool(pages.commands(task)) == (task != "phase")
    for line in pages.commands(task):
        command = line.partition("#")[0].split()
        assert cli._parser().parse_args(command[1:]).command == ("inpaint" if "mask.png" in command else "restore")
    page = pages.write(task, [group(1.0, task=task)], "a.png")
    assert f"from vml_ldm import VMLRestorePipeline, {type(operator).__name__}" in page
    assert hasattr(vml_ldm, type(operator).__name__)


def test_verdicts_name_linear_tasks_and_who_is_not_behind() -> None:
    far, near, few = group(1.0), group(0.0, task="half"), group(1.0, task="box", images=7)
    far.rows["vae-round-trip"] = [dataclasses.replace(r, psnr=90.0) for r in far.rows["vml"]]  # no rival
    meaning, _, *lines = verdicts([far, near, few, group(1.0, task="jpeg")]).splitlines()
    assert meaning.startswith("Ahead: in PSNR or in distance")
    assert lines[0] == "- sr4: vml is ahead of all others. Residual / expected 0.94 at sigma_y = 0.05."
    assert lines[1].startswith("- box: fewer than 8 images")
    assert lines[2].startswith("- half: vml is not ahead of red-diff. ")
    assert len(lines) == 3
    assert verdicts([group(1.0, task="jpeg")]) == ""
    alone = Group(far.labels, {"vml": far.rows["vml"], "vae-round-trip": far.rows["vae-round-trip"]})
    assert verdicts([alone]).splitlines()[-1] == "- sr4: no other method to compare vml with."


def test_verdicts_are_over_the_noises_and_name_a_noise_where_it_is_not_so() -> None:
    clean, noisy = group(-0.1), group(2.0)
    clean = Group(("sr4", "0", "8"), clean.rows)
    for each in (clean, noisy):
        each.rows["vml-free"] = each.rows["vml"]  # another form of the first is no rival
    _, _, line = verdicts([clean, noisy]).splitlines()
    assert line.startswith("- sr4: vml is ahead of all others; taken alone, not of red-diff at sigma_y = 0 (behind). ")


def test_verdicts_say_in_what_the_first_is_behind() -> None:
    _, _, line = verdicts([group(-1.0, nearer=0.1)]).splitlines()
    assert line.startswith("- sr4: vml is ahead of all others; behind red-diff in PSNR. ")
    _, _, line = verdicts([group(-1.0, nearer=-0.1)]).splitlines()
    assert line.startswith("- sr4: vml is not ahead of red-diff; behind red-diff in PSNR and distance. ")


def test_at_equal_cost_ours_stands_against_the_best_of_the_others_in_each_task() -> None:
    """Level is an interval above -0.2 dB and a distance not worse; forms of the first and the ceiling are no rivals."""
    ahead, level, behind = group(1.0, nearer=0.1), group(-0.1, nearer=0.0, task="half"), group(-1.0, task="box")
    for each in (ahead, level, behind):
        each.rows["weaker"] = [dataclasses.replace(r, psnr=r.psnr - 9) for r in each.rows["red-diff"]]
        each.rows["vml-free"] = each.rows["vae-round-trip"] = [
            dataclasses.replace(r, psnr=90.0) for r in each.rows["vml"]
        ]
    head, _, *lines = standing([ahead, level, behind, group(1.0, task="jpeg")]).splitlines()
    assert head.startswith("Against the best of the others by PSNR")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [(c[0], c[2], c[-1]) for c in cells] == [
        ("sr4", "red-diff", "yes"),
        ("half", "red-diff", "yes"),
        ("box", "red-diff", "no"),
        ("mean", "", "yes"),
    ]
    assert cells[0][3].startswith("+1.00 [") and cells[0][4].startswith("-0.100") and cells[2][4] == ""
    assert cells[3][3].startswith("-0.03 [")  # (1 - 0.1 - 1) / 3
    farther = group(1.0, nearer=-0.1)
    assert standing([farther]).splitlines()[4].split("|")[-2].strip() == "no"
    assert standing([group(1.0, task="jpeg")]) == standing([group(1.0, images=7)]) == ""


def test_the_summary_has_means_over_images_and_noises_and_a_gap_where_a_method_was_not_tried() -> None:
    first, second, other = group(1.0, nearer=0.1), group(3.0, nearer=0.3), group(0.0, task="half")
    other.rows["telea"] = other.rows["vml"]
    lines = summary([first, second]).splitlines()
    assert lines[0] == "Means over the images and noises: PSNR (dB), EfficientNet-Lite0 distance."
    assert lines[-1] == "| sr4  | 23.5, 0.30 | 21.5, 0.50 |"
    lines = summary([group(1.0), other]).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[-2:]] == ["", "23.5"]


def test_pooling_is_each_image_s_mean_over_the_noises_that_all_have() -> None:
    few, many = group(1.0, images=8), group(3.0, images=9)
    pooled = over_noises([few, many]).rows["red-diff"]
    assert len(pooled) == 8
    assert pooled[2].psnr == pytest.approx(22 - 2 + 0.1)
    assert pooled[2].perceptual is None


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_a_plot_s_legend_is_within_it(tasks: int) -> None:
    names = ("vml", "red-diff-tuned", "start", "azula-diffpir", "latent-daps", "vae-round-trip", "vml-small-decoder")
    made = {name: [row(method=name, image=str(i), psnr=20.0 + i) for i in range(8)] for name in names}
    figure = plots.draw_quality([Group((f"task{t}", "0.01", "8"), made) for t in range(tasks)], "seconds")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    found, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= found.x0 and found.x1 <= whole.x1 and whole.y0 <= found.y0
    assert len(legend.get_texts()) == len(names)
    panels = [panel.get_window_extent() for panel in figure.axes if panel.get_visible()]
    assert found.y1 <= min(panel.y0 for panel in panels) and min(panel.height for panel in panels) > 100
