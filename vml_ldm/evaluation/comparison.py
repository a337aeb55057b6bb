"""What comparisons share: images to try, a fingerprint of all that a row depends on, and measuring what is missing.

Work is done one batch of images after another, each in every place (a mask, a task) and by every method, so that a
comparison that was interrupted has whole results on fewer images.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import diffusers
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import vml_ldm
from vml_ldm.assets import example_images
from vml_ldm.evaluation import metrics
from vml_ldm.evaluation.rows import RowFile
from vml_ldm.images import from_pil, load_image, to_pil
from vml_ldm.pipelines import _solving

T = TypeVar("T")
MOST_PSNR = 100.0  # dB; what an error of zero is entered as
WARM_UP_STEPS = 6
# Sources that no row depends on: they show rows, choose settings that the fingerprint has anyway, or serve other hosts
_NO_SAY = {
    "batch",
    "benchmark_table",
    "manifest",
    "pages",
    "pictures",
    "plots",
    "posing",
    "prompts_sheet",
    "prompts_table",
    "scaling",
    "sheet",
    "table",
    "tuning",
}
_ELSEWHERE = ("app", "cli", "comfyui", "nodes")


@dataclass(frozen=True)
class Case:
    """One image of a comparison: truth (3, H, W) in [0, 1], its prompt, and the seed of all that is drawn for it."""

    name: str
    prompt: str
    seed: int
    truth: Tensor


@dataclass(frozen=True)
class Plan:
    """What every comparison is asked: the folder of a checkpoint, on which images; None is the pipeline's default."""

    model: str
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


def load_cases(plan: Plan, size: int) -> list[Case]:
    """Images spread evenly over the split's list, at size x size; the seed is the place in the list.

    Raises:
        ValueError: the plan asks for more images than the package holds.
    """
    listed = example_images(plan.split)
    if not 1 <= plan.images <= len(listed):
        raise ValueError(f"{plan.images} images asked for; expected 1 to {len(listed)}, which the package holds.")
    places = [i * len(listed) // plan.images for i in range(plan.images)]
    return [_load_case(*listed[place], plan.seed + place, size) for place in places]


def _load_case(path: Path, prompt: str, seed: int, size: int) -> Case:
    image = load_image(path).resize((size, size), Image.Resampling.LANCZOS)
    return Case(path.stem, prompt, seed, from_pil(image)[0])


def stack_truth(cases: Sequence[Case]) -> Tensor:
    """(B, 3, H, W)."""
    return torch.stack([case.truth for case in cases])


def stamp(plan: Plan, pipe, modules: Sequence[str] = ()) -> str:
    """Everything beside image, place, method and seed that a row depends on, as text.

    That is the checkpoint's files, the package's source, the versions of torch and diffusers, the kind of
    device, the networks' precision, the settings, and whether the perceptual distance can be measured.

    Args:
        modules: names of the only source files, or packages of them, that have a say (none: all have).
    """
    package = Path(vml_ldm.__file__).parent
    sources = [*package.rglob("*.py"), *Path(inspect.getfile(_solving)).parent.glob("*.py")]
    sources = [source for source in sources if not modules or {source.stem, source.parent.name} & set(modules)]
    versions = [vml_ldm.__version__, torch.__version__, diffusers.__version__]
    parts = {
        "checkpoint": _digest(path for path in Path(plan.model).rglob("*") if path.is_file()),
        "source": _digest(filter(_has_say, sources)),
        "versions": [*versions, pipe.device.type, str(pipe.unet.dtype)],
        "settings": plan.common_arguments(),
        "perceptual": metrics.has_perceptual_weights(),
    }
    return json.dumps(parts, sort_keys=True)


def _has_say(source: Path) -> bool:
    return source.parent.name not in _ELSEWHERE and source.stem not in _NO_SAY


def _digest(paths: Iterator[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Comparison(ABC):
    """One plan on one pipeline: measures what the row file lacks. A subclass says where, by what and how.

    A method has a ``name`` and ``settings(place)``, which go into the fingerprint; a place's ``str`` names folders.
    """

    def __init__(self, plan: Plan, pipe, rows: RowFile) -> None:
        self.plan, self.pipe, self.rows, self.stamp = plan, pipe, rows, stamp(plan, pipe)
        self.size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.cases = self.load_cases()
        self.distance = metrics.PerceptualDistance() if metrics.has_perceptual_weights() else None

    def load_cases(self) -> list[Case]:
        """The images to try, see `load_cases`."""
        return load_cases(self.plan, self.size)

    @abstractmethod
    def jobs(self) -> list[tuple[Hashable, object]]:
        """Every place with every method that is tried there, in order."""

    @abstractmethod
    def key(self, method, place, case: Case) -> tuple:
        """The row's first fields, up to the fingerprint."""

    @abstractmethod
    def measure(self, method, place, cases: Sequence[Case]) -> list:
        """Run one method on one batch; save its pictures and return its rows."""

    @abstractmethod
    def warm_up(self) -> None:
        """One short call of each method, so that no timing has first calls in it."""

    def fingerprint(self, method, place=None) -> str:
        """Short name of a method and all that its rows depend on beside image, place and seed."""
        text = self.stamp_of(method) + json.dumps([method.name, method.settings(place)], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def stamp_of(self, method) -> str:
        """All that a method's rows depend on beside its name, its settings, image, place and seed."""
        return self.stamp

    def is_done(self, method, place, case: Case) -> bool:
        return self.key(method, place, case) in self.rows.by_key

    def rows_of(self, method, place, cases: Sequence[Case]) -> list:
        """Rows that are there."""
        return [self.rows.by_key[self.key(method, place, case)] for case in cases]

    def measure_all(self) -> None:
        """Run every job on every image that has no row yet."""
        jobs, trial = self.jobs(), attrgetter("name", "seed")
        missing = {trial(case): [job for job in jobs if not self.is_done(job[1], job[0], case)] for case in self.cases}
        total = sum(map(len, missing.values()))
        if done := len(jobs) * len(self.cases) - total:
            print(f"{done} of {done + total} results stand in {self.rows.folder} already and are not run again.")
        self.rows.start()
        if total:
            self.warm_up()
        waiting = [case for case in self.cases if missing[trial(case)]]
        with tqdm(total=total, unit="image", disable=not total) as bar:
            for batch in _chunks(waiting, self.plan.batch):
                for place, method in jobs:
                    bar.set_description(f"{place}, {method.name}")
                    if cases := [case for case in batch if (place, method) in missing[trial(case)]]:
                        self.rows.append(self.measure(method, place, cases))
                        bar.update(len(cases))

    def result_file(self, method, place, case: Case) -> Path:
        folder = self.rows.folder / "results" / self.fingerprint(method, place) / str(place)
        return folder / f"{case.name}-{case.seed}.png"

    def save_pictures(self, method, place, cases: Sequence[Case], images: Tensor) -> None:
        """Write images (B, 3, H, W) in [0, 1] to their result files."""
        for case, image in zip(cases, to_pil(images), strict=True):
            path = self.result_file(method, place, case)
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


def _chunks(items: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    return (items[start : start + length] for start in range(0, len(items), length))
