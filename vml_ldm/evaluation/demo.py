"""The comparison behind ``vml-ldm demo``: stock diffusers inpainting and ours on images kept from training.

Same checkpoint, prompts, seeds and input for every method. What a method may see is the image with its missing
pixels grey (0.5), which is how the stock pipeline itself blanks them: the truth reaches none of them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import Generator, Tensor
from tqdm import tqdm

import vml_ldm
from vml_ldm.assets import example_images
from vml_ldm.evaluation import metrics
from vml_ldm.evaluation.rows import Row, RowFile
from vml_ldm.evaluation.sheet import draw_sheet
from vml_ldm.evaluation.table import comparison_table
from vml_ldm.evaluation.tasks import MASKS, stack_masks
from vml_ldm.images import from_pil, load_image, seamless, to_pil
from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline

MOST_PSNR = 100.0  # dB; what an error of zero is entered as


@dataclass(frozen=True)
class Method:
    """A name in the table, and what it passes to the pipeline beyond the common arguments."""

    name: str
    arguments: tuple[tuple[str, object], ...] = ()


_RAW = (("paste", False), ("return_report", True))
STOCK = Method("stock", (("solver", "none"),))
OURS = Method("ours", _RAW)
FAST = Method("ours, fast preset", (*_RAW, ("preset", "fast")))
EXACT = Method("ours, exact", (*_RAW, ("jacobian", "exact")))
FREE = Method("ours, Jacobian-free", (*_RAW, ("jacobian", "free")))
SHORT_METHODS = (STOCK, OURS)
FULL_METHODS = (STOCK, EXACT, FREE, FAST)


@dataclass(frozen=True)
class Case:
    """One image of the comparison: truth (3, H, W) in [0, 1], its prompt, and the seed of its mask and noise."""

    name: str
    prompt: str
    seed: int
    truth: Tensor


@dataclass(frozen=True)
class Plan:
    """What to compare: the folder of a checkpoint, and on what; None is the pipeline's default."""

    model: str
    methods: tuple[Method, ...] = SHORT_METHODS
    masks: tuple[str, ...] = MASKS
    images: int = 4
    split: str = "held_out"
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 8

    def common_arguments(self) -> dict[str, object]:
        """Arguments that every method gets, the pipeline's defaults where nothing was asked for."""
        chosen = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        return {name: value for name, value in chosen.items() if value is not None}


def run(plan: Plan, pipe: VMLInpaintPipeline, rows: RowFile) -> str:
    """Run the comparison, write its files into the rows' folder and return the table (Markdown).

    The folder gets ``rows.csv`` (appended batch by batch; what stands there already is not run again unless
    something that could change it has changed), ``results/`` (the pasted images), ``table.md``, and
    ``sheet.png`` or, for more than eight images, one ``sheet-MASK.png`` for each mask.

    Raises:
        ValueError: the plan asks for an unknown mask or for more images than the package holds.
    """
    pipe.set_progress_bar_config(disable=True)
    comparison = Comparison(plan, pipe, rows)
    comparison.measure_all()
    table = comparison.table()
    (rows.folder / "table.md").write_text(table + "\n", encoding="utf-8")
    comparison.draw_sheets()
    return table


def load_cases(plan: Plan, size: int) -> list[Case]:
    """Images spread evenly over the split's list, at size x size; the seed is the place in the list."""
    listed = example_images(plan.split)
    if not 1 <= plan.images <= len(listed):
        raise ValueError(f"{plan.images} images asked for; expected 1 to {len(listed)}, which the package holds.")
    places = [i * len(listed) // plan.images for i in range(plan.images)]
    return [_load_case(*listed[place], plan.seed + place, size) for place in places]


def _load_case(path: Path, prompt: str, seed: int, size: int) -> Case:
    image = load_image(path).resize((size, size), Image.Resampling.LANCZOS)
    return Case(path.stem, prompt, seed, from_pil(image)[0])


def stamp(plan: Plan, pipe: VMLInpaintPipeline) -> str:
    """Everything beside image, mask, method and seed that a row depends on, as text.

    That is the checkpoint's files, the package's source, the versions of torch and diffusers, the kind of
    device, the settings, and whether the perceptual distance can be measured.
    """
    package = Path(vml_ldm.__file__).parent
    sources = [*package.rglob("*.py"), *Path(inspect.getfile(VMLInpaintPipeline)).parent.glob("*.py")]
    parts = {
        "checkpoint": _digest(path for path in Path(plan.model).rglob("*") if path.is_file()),
        "source": _digest(path for path in sources if not _only_shows(path)),
        "versions": [vml_ldm.__version__, torch.__version__, diffusers.__version__, pipe.device.type],
        "settings": plan.common_arguments(),
        "perceptual": metrics.has_perceptual_weights(),
    }
    return json.dumps(parts, sort_keys=True)


def _only_shows(path: Path) -> bool:
    """Whether a source file has no say in the rows."""
    return path.parent.name == "cli" or path.name in ("sheet.py", "table.py")


def _digest(paths: Iterator[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Comparison:
    """One plan on one pipeline: measures what the row file lacks, then tabulates and draws."""

    def __init__(self, plan: Plan, pipe: VMLInpaintPipeline, rows: RowFile) -> None:
        self.plan, self.pipe, self.rows, self.stamp = plan, pipe, rows, stamp(plan, pipe)
        self.size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.cases = load_cases(plan, self.size)
        self.distance = metrics.PerceptualDistance() if metrics.has_perceptual_weights() else None

    def fingerprint(self, method: Method) -> str:
        """Short name of all that a row of this method depends on beside image, mask and seed."""
        text = self.stamp + json.dumps(method.arguments)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def result_file(self, method: Method, mask: str, case: Case) -> Path:
        return self.rows.folder / "results" / self.fingerprint(method) / mask / f"{case.name}-{case.seed}.png"

    def is_done(self, method: Method, mask: str, case: Case) -> bool:
        return (case.name, mask, method.name, case.seed, self.fingerprint(method)) in self.rows.by_key

    def measure_all(self) -> None:
        """Run every method on every mask and image that has no row yet."""
        pairs = [(mask, method) for mask in self.plan.masks for method in self.plan.methods]
        todo = {p: [c for c in self.cases if not self.is_done(p[1], p[0], c)] for p in pairs}
        total = sum(map(len, todo.values()))
        done = len(pairs) * len(self.cases) - total
        if done:
            print(f"{done} of {done + total} results stand in {self.rows.path} already and are not run again.")
        self.rows.start()
        if total:
            self._warm_up()
        with tqdm(total=total, unit="image", disable=not total) as bar:
            for (mask, method), cases in todo.items():
                bar.set_description(f"{mask}, {method.name}")
                for start in range(0, len(cases), self.plan.batch):
                    batch = cases[start : start + self.plan.batch]
                    self.rows.append(self.measure(method, mask, batch))
                    bar.update(len(batch))

    def _warm_up(self) -> None:
        """One short call of each method, so that no timing has first calls in it."""
        for method in self.plan.methods:
            known = stack_masks("half", self.size, self.size, [0])
            self._solve(method, self.cases[:1], known, {**self.plan.common_arguments(), "num_inference_steps": 6})

    def measure(self, method: Method, mask: str, cases: Sequence[Case]) -> list[Row]:
        """Run one method on one batch; save the pasted images and return the rows."""
        truth = torch.stack([case.truth for case in cases])
        known = stack_masks(mask, self.size, self.size, [case.seed for case in cases])
        start = time.perf_counter()
        raw, report = self._solve(method, cases, known, self.plan.common_arguments())
        seconds = (time.perf_counter() - start) / len(cases)
        pasted = seamless(truth, raw, known)  # stock too: what differs is the solver
        figures = zip(
            metrics.psnr(pasted, truth, 1 - known).clamp(max=MOST_PSNR).tolist(),
            self.distance(pasted, truth).tolist() if self.distance else [None] * len(cases),
            metrics.psnr(raw, truth, known).clamp(max=MOST_PSNR).tolist(),
            metrics.edge_error(pasted, truth, known).tolist(),
            strict=True,
        )
        for case, image in zip(cases, to_pil(pasted), strict=True):
            path = self.result_file(method, mask, case)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        place = (mask, method.name)
        outside = report.to_dict()["overhead"] if report else None
        fingerprint = self.fingerprint(method)
        return [
            Row(case.name, *place, case.seed, fingerprint, *values, seconds, outside)
            for case, values in zip(cases, figures, strict=True)
        ]

    def _solve(self, method: Method, cases: Sequence[Case], known: Tensor, common: dict):
        """The decoded images before any paste, (B, 3, H, W) on the CPU, and the report (None for stock)."""
        truth = torch.stack([case.truth for case in cases])
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

    def _rows(self, mask: str, method: Method) -> list[Row]:
        fingerprint = self.fingerprint(method)
        keys = [(case.name, mask, method.name, case.seed, fingerprint) for case in self.cases]
        return [self.rows.by_key[key] for key in keys]

    def table(self) -> str:
        """The table over all masks and methods (Markdown), with a line on how it was made."""
        plan = self.plan
        found = {(mask, m.name): self._rows(mask, m) for mask in plan.masks for m in plan.methods}
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
        wanted = (self.result_file(m, mask, case) for m in self.plan.methods for mask in masks for case in self.cases)
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
        truth = torch.stack([case.truth for _, case in columns])
        known = torch.cat([stack_masks(mask, self.size, self.size, [case.seed]) for mask, case in columns])
        rows = [("truth", to_pil(truth)), ("known", to_pil(known * truth + (1 - known) * 0.5))]
        for method in self.plan.methods:
            files = [self.result_file(method, mask, case) for mask, case in columns]
            rows.append((method.name, [load_image(file) for file in files]))
        return rows
