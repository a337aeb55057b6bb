"""The comparison behind ``vml-ldm benchmark``: VML, other solvers and naive answers on problems of restoration.

``python -m vml_ldm.evaluation.benchmark`` is the same command. Checkpoint, prompts, seeds, y and operator are the
same for every method; every figure is of the whole image, but the residual, which is that of the decoder's image. Phase
retrieval cannot tell an image from its turn by 180 degrees: there, the better of the two by PSNR counts, for every
method alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vml_ldm.adapters.diffusers import StableDiffusionPrior
from vml_ldm.evaluation import comparison, metrics
from vml_ldm.evaluation.benchmark_table import benchmark_table, standing, summary, verdicts
from vml_ldm.evaluation.budgets import check_shared, equalise, tell
from vml_ldm.evaluation.comparison import MOST_PSNR, WARM_UP_STEPS, Case, stack_truth
from vml_ldm.evaluation.cost import measured
from vml_ldm.evaluation.methods import METHODS, Answer, Naive, Solver, at_steps
from vml_ldm.evaluation.pictures import draw_pictures
from vml_ldm.evaluation.problems import NOISES, TASKS, Problem, pose, turn_if_nearer
from vml_ldm.evaluation.rows import RowFile, key_of, tell_levels
from vml_ldm.evaluation.table import Group, all_have, mean
from vml_ldm.evaluation.tuning import best_settings
from vml_ldm.operators import Mask, Operator
from vml_ldm.pipelines.vml_restore import VMLRestorePipeline

SHORT = {"images": 2, "tasks": ("sr4", "random", "jpeg"), "noises": (0.05,)}
_PROBED = 4  # images, for what the first method costs
_ROUND = 1000  # from an image's seed to its next one: more than a split has images
CALLS = ("denoise", "denoise_vjp", "decode", "decode_vjp", "draft", "draft_vjp")


@dataclass(frozen=True)
class BenchmarkRow:
    """One method on one image of one task at one noise.

    The first six fields say what was run (``fingerprint`` stands for checkpoint, code and settings). Then: PSNR (dB)
    and SSIM of the whole image, its EfficientNet-Lite0 distance (None without the weights), rms of y - A(image) before
    the step in pixels and the clamp, the VAE's round-trip error of the truth as the operator sees it (both in units of
    y), and seconds for one image (a batch's time over its size). What came later may be None: how often the networks
    ran, forward and backward ("draft" is the small decoder), MiB that the call held at the most beyond what was held
    before it, for its whole batch, the share of the call's time that was spent outside the networks, LPIPS (None
    without its package and weights), the error at the borders of a mask, the residual by level (see `tell_levels`), and
    the calls of all networks, the encoder too.
    """

    image: str
    task: str
    sigma_y: float
    method: str
    seed: int
    fingerprint: str
    psnr: float
    ssim: float
    perceptual: float | None
    residual: float
    vae_error: float
    seconds: float
    denoise: int | None = None
    denoise_vjp: int | None = None
    decode: int | None = None
    decode_vjp: int | None = None
    draft: int | None = None
    draft_vjp: int | None = None
    memory: float | None = None
    outside: float | None = None
    lpips: float | None = None
    edge_error: float | None = None
    levels: str | None = None
    calls: int | None = None

    @property
    def expected(self) -> float:
        """``sqrt(sigma_y^2 + vae_error^2)``."""
        return (self.sigma_y**2 + self.vae_error**2) ** 0.5

    @property
    def ratio(self) -> float:
        """``residual / expected``."""
        return self.residual / max(self.expected, 1e-12)

    @property
    def percent_outside(self) -> float | None:
        return None if self.outside is None else 100 * self.outside

    @property
    def denoiser_calls(self) -> int | None:
        """Forward and backward."""
        return _total(self.denoise, self.denoise_vjp)

    @property
    def decoder_calls(self) -> int | None:
        """Forward and backward, without those of the small decoder."""
        return _total(self.decode, self.decode_vjp)

    @property
    def network_calls(self) -> int | None:
        """Of all networks, forward and backward; without the encoder's in rows that came before `calls`."""
        if self.calls is not None:
            return self.calls
        return _total(_total(self.denoiser_calls, self.decoder_calls), _total(self.draft, self.draft_vjp))


def _total(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _edge_errors(image: Tensor, truth: Tensor, operator: Operator) -> Sequence[float | None]:
    """`metrics.edge_error` under a mask, None elsewhere."""
    if not isinstance(operator, Mask):
        return [None] * len(image)
    return metrics.edge_error(image, truth, operator.mask).tolist()


def over_seeds(rows: Sequence[BenchmarkRow]) -> list[BenchmarkRow]:
    """One row for each image, in the order of their first: the means over its rows; seed and levels are the first's."""
    by_image: dict[str, list[BenchmarkRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    return [_mean_row(found) for found in by_image.values()]


def _mean_row(rows: Sequence[BenchmarkRow]) -> BenchmarkRow:
    first, *others = rows
    if not others:
        return first
    figures = [field.name for field in fields(first)[len(key_of(first)) :] if field.name != "levels"]
    return replace(first, **{name: mean(rows, name) if all_have(rows, name) else None for name in figures})


class Place(NamedTuple):
    """A task at a noise."""

    task: str
    sigma_y: float

    def __str__(self) -> str:
        return f"{self.task}-{self.sigma_y:g}"


@dataclass(frozen=True)
class Plan(comparison.Plan):
    """What to compare: tasks, each at every noise, and methods, of which the first is what others are compared to.

    Attributes:
        seeds: how often each image is tried: with the seed of its place in the list, then with others. A seed is that
            of all that is drawn: the solver's numbers, the noise of y, a kernel, scattered pixels. An image's figures
            are means over its seeds, so that intervals are of images.
        part: (i, n), the i-th of n parts of the images, i from 1.
        tuning: the methods are the grid of this one, of which the best is told; with `equal` ours is the first of them.
        equal: "seconds" or "calls": every solver gets as many steps as cost what the first one costs; "": they all get
            the plan's number.
    """

    images: int = 24
    methods: tuple[Solver | Naive, ...] = METHODS
    tasks: tuple[str, ...] = TASKS
    noises: tuple[float, ...] = NOISES
    seeds: int = 1
    part: tuple[int, int] = (1, 1)
    tuning: str = ""
    equal: str = ""


def run(plan: Plan, pipe: VMLRestorePipeline, rows: RowFile[BenchmarkRow], solve: bool = True) -> str:
    """Run the comparison, write its files into the rows' folder and return the table (Markdown).

    The folder gets the rows (appended batch by batch; what stands there already is not run again unless something that
    could change it has changed), ``results/`` (the images), ``table.md`` of what there is, also when it is
    interrupted, and the files of `vml_ldm.evaluation.pictures`. A part writes ``table-PART.md`` and no pictures.

    Args:
        solve: False only makes table and sheets of the rows that are there, also of rows that other versions of the
            package made: for each place and method the version that was recorded last.

    Raises:
        ValueError: the plan asks for an unknown task, for more images than the package holds, or tunes on another
            split than the validation images.
    """
    if plan.tuning and plan.split != "validation":
        raise ValueError(f"tuning came with split {plan.split!r}; expected 'validation': figures come from the other.")
    pipe.set_progress_bar_config(disable=True)
    benchmark = Benchmark(plan, pipe, rows, solve)
    rows.start()
    try:
        if solve:
            benchmark.equalise()
            benchmark.measure_all()
    finally:
        table = benchmark.table()
        name = f"table-{rows.part}.md" if rows.part else "table.md"
        (rows.folder / name).write_text(table + "\n", encoding="utf-8")
    if not rows.part:
        draw_pictures(benchmark)
    return table


class Benchmark(comparison.Comparison):
    """One plan on one pipeline: measures what the row file lacks, then tabulates and draws what there is.

    Args:
        solve: False takes the rows as they were recorded, by whichever version of the package.
    """

    def __init__(self, plan: Plan, pipe: VMLRestorePipeline, rows: RowFile[BenchmarkRow], solve: bool = True) -> None:
        super().__init__(plan, pipe, rows)
        made = [] if solve else rows.by_key.values()
        self._recorded = {(row.task, row.sigma_y, row.method): row.fingerprint for row in made}
        first, count = plan.part
        self.images = self.cases[first - 1 :: count]
        self.cases = [replace(c, seed=c.seed + _ROUND * i) for i in range(plan.seeds) for c in self.images]
        self.lpips = metrics.LPIPS() if metrics.has_lpips() else None
        self.stamp += " and LPIPS" * (self.lpips is not None)
        self._seen: tuple[tuple[str, ...], Tensor | None] = ((), None)

    def jobs(self) -> list[tuple[Place, Solver | Naive]]:
        return [(place, method) for place in self.places() for method in self.methods_at(place)]

    def places(self) -> list[Place]:
        return [Place(task, sigma_y) for task in self.plan.tasks for sigma_y in self.plan.noises]

    def methods_at(self, place: Place) -> list[Solver | Naive]:
        """Who answers a place; of a table that is made anew, who has."""
        able = [method for method in self.plan.methods if place.task in method.tasks]
        return [m for m in able if (*place, m.name) in self._recorded] if self._recorded else able

    def fingerprint(self, method: Solver | Naive, place: Place) -> str:
        return self._recorded.get((*place, method.name)) or super().fingerprint(method, place)

    def key(self, method: Solver | Naive, place: Place, case: Case) -> tuple:
        return case.name, *place, method.name, case.seed, self.fingerprint(method, place)

    def warm_up(self) -> None:
        """A short solve by each solver."""
        for method in self.plan.methods:
            asked = [task for task in self.plan.tasks if task in method.tasks]
            if isinstance(method, Solver) and asked:
                self._spend(method, asked[0], WARM_UP_STEPS)

    def equalise(self) -> None:
        """Give every solver the steps that `Plan.equal` asks for; parts take those that the folder has.

        Raises:
            FileExistsError, FileNotFoundError: the folder's are for another cost; a part finds none.
        """
        if self.plan.equal:
            if self.rows.part:
                check_shared(self.rows.folder)
            if self.plan.equal == "seconds":
                self.warm_up()
            asked = (self.plan.methods, self.plan.tasks, self.plan.equal, self.rows.folder)
            self.plan = replace(self.plan, methods=equalise(*asked, self._spend, alike=bool(self.plan.tuning)))

    def _spend(self, method: Solver, task: str, steps: int | None) -> float:
        """Seconds for an image, or network calls, of a method: on the first image with so many steps, or (None) the
        mean over the first four with the plan's, for a solver may rest early on one of them."""
        asked = method if steps is None else at_steps(method, lambda task: steps)
        spent = []
        for case in self.cases[: _PROBED if steps is None else 1]:
            problem = self.pose(Place(task, self.plan.noises[0]), [case])
            answer, cost = measured(partial(self._answer, asked, problem), self.pipe.device)
            spent.append(cost.seconds if self.plan.equal == "seconds" else sum(answer.calls.values()))
        return sum(spent) / len(spent)

    def measure(self, method: Solver | Naive, place: Place, cases: Sequence[Case]) -> list[BenchmarkRow]:
        """Run one method on one batch; save the images and return the rows."""
        if len(cases) > 1 and getattr(method, "alone", False):
            return [row for case in cases for row in self.measure(method, place, [case])]
        problem, truth = self.pose(place, cases), stack_truth(cases)
        answer, cost = measured(lambda: self._answer(method, problem), self.pipe.device)
        image = turn_if_nearer(answer.image, truth) if place.task == "phase" else answer.image
        self.save_pictures(method, place, cases, image)
        figures = zip(
            metrics.psnr(image, truth).clamp(max=MOST_PSNR).tolist(),
            metrics.ssim(image, truth).tolist(),
            self.distance(image, truth).tolist() if self.distance else [None] * len(cases),
            answer.residual.tolist(),
            problem.vae_error.tolist(),
            self.lpips(image, truth).tolist() if self.lpips else [None] * len(cases),
            _edge_errors(image, truth, problem.operator),
            strict=True,
        )
        return [
            BenchmarkRow(
                *self.key(method, place, case),
                *values,
                cost.seconds / len(cases),
                **{name: answer.calls.get(name, 0) for name in CALLS},
                memory=cost.memory,
                outside=1 - answer.in_networks / cost.seconds,
                lpips=lpips,
                edge_error=edge_error,
                levels=tell_levels(answer.trace, i),
                calls=sum(answer.calls.values()),
            )
            for i, (case, (*values, lpips, edge_error)) in enumerate(zip(cases, figures, strict=True))
        ]

    def _answer(self, method: Solver | Naive, problem: Problem) -> Answer:
        return method.answer(problem, self.pipe, self.plan.common_arguments())

    def pose(self, place: Place, cases: Sequence[Case]) -> Problem:
        """The place's problem of some images; what the VAE makes of them is kept for the next call with the same."""
        names = tuple(case.name for case in cases)
        if self._seen[0] != names:
            self._seen = names, self._through_vae(stack_truth(cases))
        return pose(*place, cases, self._seen[1])

    @torch.no_grad()
    def _through_vae(self, truth: Tensor) -> Tensor:
        """Dec(Enc(truth)), on the CPU."""
        parts = {"unet": self.pipe.unet, "vae": self.pipe.vae, "scheduler": self.pipe.scheduler}
        with StableDiffusionPrior(**parts, condition={}) as prior:
            return prior.decode(prior.encode(truth.to(self.pipe.device))).cpu()

    def groups(self) -> list[Group]:
        """Rows by place, one for each image: its means over the seeds that every method there has answered. Places
        without any are left out."""
        found = []
        for place in self.places():
            methods = self.methods_at(place)
            if cases := [c for c in self.cases if all(self.is_done(m, place, c) for m in methods)]:
                rows = {method.name: over_seeds(self.rows_of(method, place, cases)) for method in methods}
                count = str(len(rows[methods[0].name]))
                found.append(Group((place.task, f"{place.sigma_y:g}", count), rows))
        return found

    def table(self) -> str:
        """The table over all places and methods (Markdown), with a line on how it was made."""
        plan, groups = self.plan, self.groups()
        if not groups:
            return "No image has been answered by every method yet."
        images = f"{len(self.images)} {plan.split.replace('_', '-')} images at {self.size} x {self.size} pixels"
        made = (
            f"{plan.steps or 50} steps, seeds from {plan.seed}, batches of up to {plan.batch}, {self.pipe.device.type} "
            f"in {str(self.pipe.unet.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads"
        )
        images += f", {plan.seeds} seeds each" if plan.seeds > 1 else ""
        head = f"{images}, rows as they were recorded." if self._recorded else f"{images}, {made}."
        end = best_settings(plan.tuning, groups) if plan.tuning else f"{summary(groups)}\n\n{verdicts(groups)}"
        at_equal_cost = [tell(self.rows.folder), standing(groups)] if plan.equal else []
        return "\n\n".join(filter(None, [head, benchmark_table(groups), *at_equal_cost, end]))


if __name__ == "__main__":
    import sys

    from vml_ldm.cli import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
