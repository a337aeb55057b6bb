"""A folder of images over processes: one, or as many as `accelerate launch` or `torchrun` starts, on any machines.

The work is cut into batches by the names in order and the batch size, before it is dealt to the processes, and every
image has a generator of its own. So neither the number of processes nor their speed changes a file: at one batch size,
number of threads and kind of device the files are bit-identical (on a GPU as far as its kernels repeat themselves). At
another batch size a network's sums are taken in another order, and files agree within 1/255.

A batch is finished all at once (see `vml_ldm.manifest`), so a run that was interrupted goes on with whole batches and
gives the files of one that was not. If single files of a batch are missing (deleted, or added to the folder since),
those are solved without the others, within 1/255 of the whole batch.
"""

from __future__ import annotations

import inspect
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import vml_ldm
from vml_ldm.images import to_pil
from vml_ldm.manifest import Follower, Journal, Write, is_merged, lock, read, recover
from vml_ldm.posing import Inpaint, Restore, digest, model_sizes

__all__ = ["Inpaint", "Outcome", "Restore", "image_names", "image_seed", "process", "solve_folder"]

_ALIGNMENT = 64  # bytes
_POLL = 0.2  # seconds between looks at what other processes have finished
_OURS = (
    *("self", "prompt", "generator", "output_type", "return_dict", "return_report", "num_images_per_prompt"),
    *("latents", "prompt_embeds", "negative_prompt_embeds", "height", "width", "image", "mask_image", "y", "operator"),
    *("sigma_y", "padding_mask_crop", "masked_image_latents", "callback_on_step_end"),
    "callback_on_step_end_tensor_inputs",
)
_RECORDED = ("num_inference_steps", "guidance_scale", "preset", "solver")  # also where they were left to the pipeline
_OF_ONE_IMAGE = (ValueError, RuntimeError, FloatingPointError)  # what an image may raise without ending the run


@dataclass(frozen=True)
class Outcome:
    """How a run ended, the same in every process.

    Attributes:
        names: every image of the folder.
        kept: how many of them were finished before.
        failed: why an image could not be solved, by name.
    """

    names: tuple[str, ...]
    kept: int
    failed: dict[str, str]


@dataclass(frozen=True)
class _Plan:
    """What the main process found to do: batches of names, without those that are finished."""

    run: str
    settings: dict
    names: tuple[str, ...]
    batches: list[list[str]]

    @property
    def kept(self) -> int:
        return len(self.names) - sum(map(len, self.batches))


def solve_folder(
    pipe,
    task: Restore | Inpaint,
    folder: str | Path,
    out: str | Path,
    *,
    prompt: str = "",
    seed: int = 0,
    batch_size: int = 4,
    force: bool = False,
    show: bool = True,
    **arguments,
) -> Outcome:
    """Solve every image file in a folder; write ``STEM.png`` for each into `out`, and `manifest.jsonl`.

    Called in every process that a launcher started; each has loaded its pipeline onto ``process().device``. Both
    folders are shared by all machines. Images that are finished already, by these settings and from the same files, are
    not solved again. An image that cannot be read or solved is reported, and the others go on.

    A line of the manifest has, for each image: file, output, source (what the files held, as a digest), seed (of its
    generator, see `image_seed`), settings, batch (the images that were solved together), residual, vae_error and
    effective_sigma_y (as in `vml_ldm.report.Report`), seconds (of its batch, over the images in it), calls (of the
    networks, for its batch), retries, versions; or file and error.

    Args:
        pipe: the pipeline that the task names.
        task: what to do to each image.
        prompt: of all images.
        seed: of the run.
        batch_size: images at a time. It is no setting: a run that ended for want of memory goes on with a smaller one.
        force: overwrite what is in `out` from other settings, other images or other programs. False refuses.
        show: a progress bar over all images, of all processes, in the main one.
        arguments: of the pipeline's call, beside what the task and this function give.

    Raises:
        ValueError: no image, two images with one output, a folder that holds something else, or an argument out of
            range; in all processes, and before any work.
        TypeError: an argument that the pipeline's call does not take, or that this function gives.
    """
    folder, out = Path(folder), Path(out)
    settings = _settings(pipe, task, prompt, seed, arguments)
    state, held = process(), ExitStack()

    def plan() -> _Plan:
        names = image_names(folder, out)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out, main=True))
        finished = _finished(names, task, folder, out, settings, force)
        batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]
        missing = [[name for name in batch if name not in finished] for batch in batches]
        return _Plan(uuid.uuid4().hex[:8], settings, tuple(names), [batch for batch in missing if batch])

    with held, _silent(pipe):
        agreed = _agree(state, plan)
        if not state.is_main_process:
            held.enter_context(lock(out, main=False))
        _align(pipe)
        _work(state, agreed, _Solver(pipe, task, folder, prompt, seed, agreed.settings, arguments), out, show)
    failed = {record["file"]: record["error"] for record in read(out) if "error" in record}
    return Outcome(agreed.names, agreed.kept, {name: failed[name] for name in agreed.names if name in failed})


def process() -> PartialState:
    """This process among those that were launched together: `device`, `process_index`, `is_main_process`."""
    return PartialState(cpu=not torch.cuda.is_available())


def image_names(folder: Path, out: Path) -> list[str]:
    """The image files of a folder by their names' endings, in order.

    Raises:
        ValueError: no folder, no image in it, two images with the same output, or outputs in the same folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected a folder of images.")
    if folder.resolve() == out.resolve():
        raise ValueError(f"{out} holds the images; expected another folder for the results.")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in endings and p.is_file())
    names = [name for name in names if not name.startswith(".")]
    if not names:
        raise ValueError(f"{folder} has no image; expected files that end in .png, .jpg and the like.")
    by_output: dict[str, str] = {}
    for name in names:
        if (other := by_output.setdefault(_output(name).casefold(), name)) != name:
            raise ValueError(f"{other} and {name} would both become {_output(name)}; rename one of them.")
    return names


def image_seed(seed: int, name: str) -> int:
    """The seed of an image's generator, from the run's seed and the file's name: 53 bits, exact in any JSON."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()[:8], "big") >> 11


def _output(name: str) -> str:
    return f"{Path(name).stem}.png"


def _settings(pipe, task: Restore | Inpaint, prompt: str, seed: int, arguments: dict) -> dict:
    """All that a result depends on beside the files, the image's name and the versions, as JSON gives it back."""
    if type(pipe).__name__ != task.pipeline:
        raise TypeError(f"the pipeline is {type(pipe).__name__}; expected {task.pipeline} for this task.")
    call = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in arguments if name not in call or name in _OURS]:
        raise TypeError(f"solve_folder() got {unknown[0]!r}; expected arguments of the call that it does not give.")
    model = {
        "model": str(pipe.config.get("_name_or_path")),
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.unet.dtype).removeprefix("torch."),
    }
    asked = {name: call[name].default for name in _RECORDED} | arguments
    return json.loads(json.dumps({**task.settings(), **model, "prompt": prompt, "seed": seed, **asked}, default=_plain))


def _plain(value):
    if is_dataclass(value):
        return asdict(value)
    raise TypeError(f"an argument is {type(value).__name__}; expected what JSON holds, or a dataclass of it.")


def _agree(state: PartialState, plan: Callable[[], _Plan]) -> _Plan:
    """The main process's plan, in every process; its refusal is raised in all of them."""
    box: list = [None]
    if state.is_main_process:
        try:
            box = [plan()]
        except ValueError as refusal:
            box = [refusal]
    if state.num_processes > 1:
        broadcast_object_list(box)
    if isinstance(box[0], ValueError):
        raise box[0]
    return box[0]


def _finished(
    names: list[str], task: Restore | Inpaint, folder: Path, out: Path, settings: dict, force: bool
) -> set[str]:
    """The names that need no more work, after `out` was put in order.

    Raises:
        ValueError: without `force`, something in `out` that is not what this run would put there.
    """
    records = {name: record for name, record in recover(out).items() if "error" not in record}
    if not force:
        for record in records.values():
            _check_settings(out, record["settings"], settings)
    finished = set()
    for name in names:
        path, record = out / _output(name), records.get(name)
        if not path.exists():
            continue
        if record and record["settings"] == settings and record["source"] == _source(task, folder / name):
            finished.add(name)
        elif not force:
            what = "was made from other files" if record else "is not from this command"
            raise ValueError(f"{path} {what}; expected another folder, or force (--force) to overwrite it.")
    return finished


def _check_settings(out: Path, before: dict, now: dict) -> None:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changed = ", ".join(f"{name} {before.get(name)!r} and now {now.get(name)!r}" for name in names)
        raise ValueError(
            f"{out} has images of other settings ({changed}); expected the same settings, another folder, or force "
            "(--force) to solve them again."
        )


def _source(task: Restore | Inpaint, path: Path) -> str | None:
    """What the files of an image hold, as a digest; None where they cannot be read."""
    try:
        return digest(task.files(path))
    except ValueError:
        return None


def _work(state: PartialState, plan: _Plan, solver: _Solver, out: Path, show: bool) -> None:
    """This process's share of the batches; then wait until the main process has merged what all have done.

    They wait by looking at files, not at a barrier of the process group, which gives up after some minutes.
    """
    journal, follower = Journal(out, plan.run, state.process_index), Follower(out, plan.run)
    share = plan.batches[state.process_index :: state.num_processes]
    if not state.is_main_process:
        for batch in share:
            journal.finish(*solver.solve(batch))
        journal.close()
        while not is_merged(journal):
            time.sleep(_POLL)
        return
    with tqdm(total=len(plan.names), initial=plan.kept, unit="image", disable=not show) as bar:
        for batch in share:
            journal.finish(*solver.solve(batch))
            _tell(bar, follower)
        journal.close()
        while follower.ended < state.num_processes:
            _tell(bar, follower)
            time.sleep(_POLL if state.num_processes > 1 else 0)
    recover(out)


def _tell(bar: tqdm, follower: Follower) -> None:
    """Move the bar on by what all processes have done since the last time, and say what failed."""
    for record in follower.new():
        bar.update()
        if "error" in record and not bar.disable:
            bar.write(f"{record['file']}: {record['error']}", file=sys.stderr)


def _align(pipe) -> None:
    """Move weights on the CPU to where the allocator aligns them.

    A file that was mapped into memory begins anywhere, elsewhere in one process than in the next, and the order in
    which products of matrices are summed depends on it.
    """
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in chain(part.parameters(), part.buffers()):
                if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
                    tensor.data = tensor.data.clone()


@contextmanager
def _silent(pipe) -> Iterator[None]:
    """Without the pipeline's own progress bar."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@dataclass(frozen=True)
class _Solver:
    """Solves batches of files by one pipeline and one task."""

    pipe: Callable
    task: Restore | Inpaint
    folder: Path
    prompt: str
    seed: int
    settings: dict
    arguments: dict

    def solve(self, names: list[str]) -> tuple[list[dict], list[Write]]:
        """A record for each name, and for each that has an output in it what writes the file."""
        problems: dict[str, tuple[Tensor, ...]] = {}
        done: dict[str, tuple[dict, Image.Image | None]] = {}
        for name in names:
            try:
                problems[name] = self.task.read(self.folder / name)
            except ValueError as error:
                done[name] = _failure(name, error)
        for group in _by_shape(problems):
            done |= self._solve(group)
        records = [done[name][0] for name in names]
        return records, [
            partial(image.save, format="PNG") for _, image in (done[n] for n in names) if image is not None
        ]

    def _solve(self, group: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[dict, Image.Image | None]]:
        """Images of one size, at once; if that fails one by one, so that a bad image fails alone."""
        try:
            return self._call(group)
        except _OF_ONE_IMAGE as error:
            if len(group) == 1:
                return {name: _failure(name, error) for name in group}
        done = {}
        for name, problem in group.items():
            done |= self._solve({name: problem})
        return done

    def _call(self, group: dict[str, tuple[Tensor, ...]]) -> dict[str, tuple[dict, Image.Image]]:
        names = list(group)
        seeds = [image_seed(self.seed, name) for name in names]
        posed = self.task.pose(*map(torch.cat, zip(*group.values(), strict=True)), **model_sizes(self.pipe))
        out = self.pipe(
            prompt=self.prompt,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            return_report=True,
            **posed.arguments,
            **self.arguments,
        )
        images, report = to_pil(posed.take_back(out.images.float().cpu())), out.report
        flagged = out.nsfw_content_detected or [False] * len(names)
        shared = {
            "settings": self.settings,
            "batch": names,
            "seconds": report.seconds["total"] / len(names),
            "calls": report.calls,
            "retries": report.retries,
            "versions": self._versions,
        }
        done = {}
        for i, (name, image) in enumerate(zip(names, images, strict=True)):
            own = {"file": name, "output": _output(name), "source": _source(self.task, self.folder / name)}
            figures = {key: getattr(report, key)[i] for key in ("residual", "vae_error", "effective_sigma_y")}
            done[name] = {**own, "seed": seeds[i], **figures, "flagged": bool(flagged[i]), **shared}, image
        return done

    @cached_property
    def _versions(self) -> dict:
        device = self.pipe.device
        return {
            **{"vml_ldm": vml_ldm.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        }


def _failure(name: str, error: Exception) -> tuple[dict, None]:
    return {"file": name, "error": " ".join(str(error).split()) or type(error).__name__}, None


def _by_shape(problems: dict[str, tuple[Tensor, ...]]) -> list[dict[str, tuple[Tensor, ...]]]:
    """Problems whose tensors have the same shapes, together, in order."""
    groups: dict[tuple, dict] = {}
    for name, tensors in problems.items():
        groups.setdefault(tuple(tensor.shape for tensor in tensors), {})[name] = tensors
    return list(groups.values())
