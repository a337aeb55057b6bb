"""Step counts at which every solver costs what the first one does: ``vml-ldm benchmark --equal seconds | calls``.

A solver's cost is taken for a straight line in its number of steps. Two short solves of one image give the line for
each task (the first task's serves all where a grid is tried), and the first method's mean cost on four images is where
the lines are read. Images are solved alone. What was found is kept in ``budgets.json`` beside the rows, so that a
comparison goes on with the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from tqdm import tqdm

from vml_ldm.evaluation.methods import Naive, Solver, at_steps

COSTS = ("seconds", "calls")
PROBES = (8, 24)  # steps
_FILE = "budgets.json"

Steps = dict[str, dict[str, int]]  # method -> task -> number of steps
Spend = Callable[[Solver, str, "int | None"], float]


def check_shared(folder: Path) -> None:
    """Refuse a part of a comparison whose steps nobody has found yet: each part would find its own.

    Raises:
        FileNotFoundError: the folder has no steps.
    """
    if not (folder / _FILE).is_file():
        raise FileNotFoundError(
            f"{folder / _FILE} is missing; expected the steps that all parts take. Run the same command once with "
            "--images 4 and without --part, then the parts."
        )


def equalise(
    methods: Sequence[Solver | Naive], tasks: Sequence[str], cost: str, folder: Path, spend: Spend, alike: bool = False
) -> tuple[Solver | Naive, ...]:
    """The methods, with as many steps for each task as cost what the first method does there.

    Args:
        cost: one of `COSTS`; the folder keeps one of them.
        folder: of the rows, which exists.
        spend: (method, task, steps; None is the plan's number) -> the cost of one image.
        alike: take a method's cost in steps to be the same for all tasks.

    Raises:
        FileExistsError: the folder's steps are for another cost.
    """
    first, *others = (method for method in methods if isinstance(method, Solver))
    known = _read(folder, cost)
    waiting = [(task, m) for task in tasks for m in others if task in m.tasks and task not in known.get(m.name, {})]
    target = cache(lambda task: spend(first, task, None))
    probe = cache(lambda method, task: [spend(method, task, n) for n in PROBES])
    with tqdm(waiting, unit="budget", disable=not waiting) as bar:
        for task, method in bar:
            bar.set_description(f"equal {cost}: {task}, {method.name}")
            probed = next(t for t in tasks if t in method.tasks) if alike else task
            known.setdefault(method.name, {})[task] = _steps(target(task), probe(method, probed))
            _write(folder, cost, known)
    return tuple(at_steps(m, known[m.name].__getitem__) if m in others else m for m in methods)


def _steps(target: float, costs: Sequence[float]) -> int:
    """Where the line through the probes' costs meets the target; at least one step."""
    (few, many), (low, high) = PROBES, costs
    slope = max((high - low) / (many - few), 1e-9)
    return max(1, round(few + (target - low) / slope))


def tell(folder: Path) -> str:
    """The folder's numbers of steps, a line for each method (Markdown)."""
    kept = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    lines = [
        f"- {method}: {', '.join(f'{task} {count}' for task, count in steps.items())}"
        for method, steps in kept["steps"].items()
    ]
    return "\n".join([f"Steps that cost as much as the first method's, in {kept['cost']}:", "", *lines])


def _read(folder: Path, cost: str) -> Steps:
    path = folder / _FILE
    if not path.is_file():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))
    if kept["cost"] != cost:
        raise FileExistsError(f"{path} is for equal {kept['cost']}; expected {cost}. Pass another folder with -o.")
    return kept["steps"]


def _write(folder: Path, cost: str, steps: Steps) -> None:
    new = folder / f"{_FILE}.new"
    new.write_text(json.dumps({"cost": cost, "steps": steps}, indent=1) + "\n", encoding="utf-8")
    new.replace(folder / _FILE)
