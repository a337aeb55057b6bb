"""The comparison behind ``vml-ldm demo``: stock diffusers inpainting and ours on images kept from training.

Same checkpoint, prompts, seeds and input for every method. What a method may see is the image with its missing
pixels grey (0.5), which is how the stock pipeline itself blanks them: the truth reaches none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Generator, Tensor

from vml_ldm.evaluation import comparison, metrics
from vml_ldm.evaluation.comparison import MOST_PSNR, WARM_UP_STEPS, Case, stack_truth
from vml_ldm.evaluation.cost import measured
from vml_ldm.evaluation.rows import Row, RowFile
from vml_ldm.evaluation.sheet import draw_sheet
from vml_ldm.evaluation.table import comparison_table
from vml_ldm.evaluation.tasks import MASKS, stack_masks
from vml_ldm.images import load_image, seamless, to_pil
from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline


@dataclass(frozen=True)
class Method:
    """A name in the table, and what it passes to the pipeline beyond the common arguments."""

    name: str
    arguments: tuple[tuple[str, object], ...] = ()

    def settings(self, mask: str | None) -> tuple[tuple[str, object], ...]:
        """What a row depends on; the same under every mask."""
        return self.arguments


_RAW = (("paste", False), ("return_report", True))
STOCK = Method("stock", (("solver", "none"),))
OURS = Method("ours", _RAW)
FAST = Method("ours, fast preset", (*_RAW, ("preset", "fast")))
BEST = Method("ours, best preset", (*_RAW, ("preset", "best")))
PLAIN = Method("ours, inner steps alone", (*_RAW, ("proximal", False)))
SHORT_METHODS = (STOCK, OURS)
GUIDANCE = 1.0  # the prompts were never trained on, and would lead any method astray
FULL_METHODS = (STOCK, OURS, FAST, BEST, PLAIN)


@dataclass(frozen=True)
class Plan(comparison.Plan):
    """What to compare, and on which images under which masks."""

    guidance: float | None = GUIDANCE
    methods: tuple[Method, ...] = SHORT_METHODS
    masks: tuple[str, ...] = MASKS


def run(plan: Plan, pipe: VMLInpaintPipeline, rows: RowFile) -> str:
    """Run the comparison, write its files into the rows' folder and return the table (Markdown).

    The folder gets ``rows.csv`` (appended batch by batch; what stands there already is not run again unless
    something that could change it has changed), ``results/`` (the pasted images), ``table.md``, and
    ``sheet.png`` or, for more than eight images, one ``sheet-MASK.png`` for each mask.

    Raises:
        ValueError: the plan asks for an unknown mask or for more images than the package holds.
    """
    pipe.set_progress_bar_config(disable=True)
    trial = Comparison(plan, pipe, rows)
    trial.measure_all()
    table = trial.table()
    (rows.folder / "table.md").write_text(table + "\n", encoding="utf-8")
    trial.draw_sheets()
    return table


class Comparison(comparison.Comparison):
    """One plan on one pipeline: measures what the row file lacks, then tabulates and draws. Places are masks."""

    def jobs(self) -> list[tuple[str, Method]]:
        return [(mask, method) for mask in self.plan.masks for method in self.plan.methods]

    def key(self, method: Method, mask: str, case: Case) -> tuple:
        return case.name, mask, method.name, case.seed, self.fingerprint(method)

    def warm_up(self) -> None:
        for method in self.plan.methods:
            known = stack_masks("half", self.size, self.size, [0])
            short = {**self.plan.common_arguments(), "num_inference_steps": WARM_UP_STEPS}
            self._solve(method, self.cases[:1], known, short)

    def measure(self, method: Method, mask: str, cases: Sequence[Case]) -> list[Row]:
        """Run one method on one batch; save the pasted images and return the rows."""
        truth = stack_truth(cases)
        known = stack_masks(mask, self.size, self.size, [case.seed for case in cases])
        solve = lambda: self._solve(method, cases, known, self.plan.common_arguments())  # noqa: E731
        (raw, report), cost = measured(solve, self.pipe.device)
        pasted = seamless(truth, raw, known)  # stock too: what differs is the solver
        self.save_pictures(method, mask, cases, pasted)
        figures = zip(
            metrics.psnr(pasted, truth, 1 - known).clamp(max=MOST_PSNR).tolist(),
            self.distance(pasted, truth).tolist() if self.distance else [None] * len(cases),
            metrics.psnr(raw, truth, known).clamp(max=MOST_PSNR).tolist(),
            metrics.edge_error(pasted, truth, known).tolist(),
            strict=True,
        )
        outside = report.to_dict()["overhead"] if report else None
        return [
            Row(*self.key(method, mask, case), *values, cost.seconds / len(cases), outside)
            for case, values in zip(cases, figures, strict=True)
        ]

    def _solve(self, method: Method, cases: Sequence[Case], known: Tensor, common: dict):
        """The decoded images before any paste, (B, 3, H, W) on the CPU, and the report (None for stock)."""
        truth = stack_truth(cases)
        out = self.pipe(
            prompt=[case.prompt for case in cases],
            image=known * truth + (1 - known) * 0.5,
            mask_image=1 - known,
            height=self.size,
            width=self.size,
            generator=[Generator().manual_seed(case.seed) for case in cases],
            output_type="pt",
            **common,
            **dict(method.arguments),
        )
        return out.images.float().cpu(), getattr(out, "report", None)

    def table(self) -> str:
        """The table over all masks and methods (Markdown), with a line on how it was made."""
        plan = self.plan
        found = {(mask, m.name): self.rows_of(m, mask, self.cases) for mask, m in self.jobs()}
        steps = plan.steps or 50
        head = (
            f"{plan.images} {plan.split.replace('_', '-')} images at {self.size} x {self.size} pixels, {steps} steps, "
            f"seeds from {plan.seed}, batches of up to {plan.batch}, {self.pipe.device.type}, "
            f"{torch.get_num_threads()} threads."
        )
        return f"{head}\n\n{comparison_table(found, plan.masks, [m.name for m in plan.methods])}"

    def draw_sheets(self) -> None:
        """Draw one sheet over all masks, or for more than eight images one for each mask.

        Rows that came without their pictures (kept in a repository, say) make a table but no sheet.
        """
        masks = self.plan.masks
        wanted = (self.result_file(method, mask, case) for mask, method in self.jobs() for case in self.cases)
        if not all(file.is_file() for file in wanted):
            print(f"No sheet: {self.rows.folder} holds the rows of some results but not their pictures.")
            return
        if len(self.cases) > 8:
            for mask in masks:
                sheet = draw_sheet(self._sheet_rows([(mask, case) for case in self.cases]), [mask] * len(self.cases))
                sheet.save(self.rows.folder / f"sheet-{mask}.png")
            return
        half = max(1, len(self.cases) // 2)
        bands = [self.cases[start : start + half] for start in range(0, len(self.cases), half)]
        columns = [(mask, case) for band in bands for mask in masks for case in band]
        sheet = draw_sheet(self._sheet_rows(columns), [mask for mask, _ in columns], per_band=half * len(masks))
        sheet.save(self.rows.folder / "sheet.png")

    def _sheet_rows(self, columns: list[tuple[str, Case]]) -> list[tuple[str, list[Image.Image]]]:
        """Truth, what is known, and every method's pasted result, for (mask, case) columns."""
        truth = stack_truth([case for _, case in columns])
        known = torch.cat([stack_masks(mask, self.size, self.size, [case.seed]) for mask, case in columns])
        rows = [("truth", to_pil(truth)), ("known", to_pil(known * truth + (1 - known) * 0.5))]
        for method in self.plan.methods:
            files = [self.result_file(method, mask, case) for mask, case in columns]
            rows.append((method.name, [load_image(file) for file in files]))
        return rows
