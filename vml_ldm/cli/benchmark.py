"""``vml-ldm benchmark``: VML, other solvers and naive answers on problems of restoration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vml_ldm.families import ONE

from .files import (
    UsageError,
    check_count,
    named,
    one_line,
    open_checkpoint,
    open_pipeline,
    open_rows,
    peak_memory,
    quiet,
)

_INSTALLING = {"cv2": 'pip install "vml-ldm[eval]"', "azula": "pip install --no-deps azula einops"}


def run(options: argparse.Namespace) -> int:
    """Run the comparison, or the search for a method's settings, and print the table."""
    quiet()
    if options.cost:
        return _measure_cost(options)
    from vml_ldm.evaluation import benchmark

    part, count = options.part
    name = f"{part}of{count}" if count > 1 else ""
    rows = open_rows(_folder(options), kind=benchmark.BenchmarkRow, part=name)
    model, chosen = open_checkpoint(options.model), _chosen(options)
    pipe = open_pipeline(options, "restore", families=ONE)
    plan = benchmark.Plan(
        model=model,
        steps=options.steps,
        guidance=options.guidance,
        seed=options.seed,
        seeds=options.seeds,
        batch=options.batch,
        part=options.part,
        tuning=options.tune or "",
        equal=options.equal or "",
        **chosen,
    )
    try:
        table = benchmark.run(plan, pipe, rows, solve=not options.table)
    except (FileExistsError, FileNotFoundError) as error:
        raise UsageError(one_line(error)) from error
    except KeyboardInterrupt:
        print(f"\nRows and table so far are in {rows.folder}; the same command goes on from there.", file=sys.stderr)
        raise
    print(f"\n{table}\n{peak_memory()}\nTable, rows and pictures are in {rows.folder}.")
    return 0


def _measure_cost(options: argparse.Namespace) -> int:
    """How the cost of a solve grows."""
    from vml_ldm.evaluation import scaling

    if options.output is None:
        raise UsageError("--cost came without -o; expected a folder for its table, rows and plot.")
    if taken := [name for name in ("cost.csv", "cost.md", "cost.png") if (options.output / name).exists()]:
        raise UsageError(f"{options.output / taken[0]} exists. Move it away, or pass another folder with -o.")
    points = scaling.measure(open_pipeline(options, "restore", families=ONE))
    print(f"\n{scaling.write(points, options.output)}\nTable, rows and plot are in {options.output}.")
    return 0


def _folder(options: argparse.Namespace) -> Path:
    return options.output or Path(f"vml-ldm-tuning-{options.tune}" if options.tune else "vml-ldm-benchmark")


def _chosen(options: argparse.Namespace) -> dict:
    """Images, split, tasks, noises and methods, checked; what was not asked for is left to the plan."""
    from vml_ldm.evaluation import benchmark, methods, tuning
    from vml_ldm.evaluation.problems import TASKS

    if options.tune and (options.methods or options.split == "held-out"):
        raise UsageError("--tune came with --methods or --split held-out; it tries a grid, on validation images only.")
    if options.tune and options.tune not in tuning.GRIDS:
        raise UsageError(f"--tune came with {options.tune!r}; expected one of {', '.join(tuning.GRIDS)}.")
    if options.points and not options.tune:
        raise UsageError("--points came without --tune; expected the method whose grid they are of.")
    split = (options.split or ("validation" if options.tune else "held-out")).replace("-", "_")
    chosen = {"images": 4} if options.tune else {}
    chosen |= benchmark.SHORT if options.short else {}
    asked = {"images": options.images, "noises": options.noise, "tasks": named(options.tasks, TASKS, "task")}
    chosen |= {name: value for name, value in asked.items() if value is not None}
    check_count(chosen.get("images", 0), split)
    if options.tune:
        ours = (methods.EXACT,) if options.equal else ()
        grid = {point.name: point for point in methods.grid(options.tune)}
        tried = [grid[name] for name in named(options.points, tuple(grid), "point") or grid]
        return {**chosen, "split": split, "methods": (*ours, *tried)}
    known = {method.name: method for method in (*methods.METHODS, *methods.VARIANTS, *methods.PEERS)}
    wanted = [known[name] for name in named(options.methods, tuple(known), "method") or _names(methods.METHODS)]
    for method in (method for method in wanted if not methods.is_installed(method)):
        print(f"{method.name} is left out, {method.module} is not installed; {_INSTALLING[method.module]} adds it.")
    return {**chosen, "split": split, "methods": tuple(filter(methods.is_installed, wanted))}


def _names(methods) -> list[str]:
    return [method.name for method in methods]


def part(text: str) -> tuple[int, int]:
    """``I/N`` as (I, N)."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; expected I/N, such as 1/4, I from 1 to N")
    return int(first), int(count)


def noises(text: str) -> tuple[float, ...]:
    """Comma-separated standard deviations."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} has something that is no number") from error
    if not all(0 <= value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} has a value that is not a number >= 0")
    return values
