"""A folder of images over processes: one, or as many as `accelerate launch` or `torchrun` starts, on any machines.

The work is cut into batches by the names in order and the batch size, before it is dealt to the processes, and every
image has a generator of its own. So neither the number of processes nor their speed changes a file: at one batch size,
number of threads and kind of device the files are bit-identical (on a GPU as far as its kernels repeat themselves). At
another batch size a network's sums are taken in another order, and files agree within 1/255. With ``memory="auto"``
all processes plan for one free memory, the least that any of them has for itself, and a run that goes on plans for that
of the images before it. Where memory is so short that one process would take another plan than two, name a mode or a
budget instead: the plan then depends on nothing else. The manifest has both.

A batch is finished all at once (see `vml_ldm.manifest`), so a run that was interrupted goes on with whole batches and
gives the files of one that was not. If single files of a batch are missing (deleted, or added to the folder since),
those are solved without the others, within 1/255 of the whole batch.
"""

from __future__ import annotations

import sys
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from vml_ldm.batch.processes import agree, align, as_agreed, least_free, process
from vml_ldm.batch.settings import settings as all_settings
from vml_ldm.batch.solving import Solver, image_seed, output, source
from vml_ldm.manifest import Follower, Journal, is_merged, lock, read, recover
from vml_ldm.posing import Inpaint, Restore

__all__ = ["Inpaint", "Outcome", "Restore", "image_names", "image_seed", "process", "solve_folder"]

_POLL = 0.2  # seconds between looks at what other processes have finished


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
    names: tuple[str, ...]
    batches: list[list[str]]
    free: int | None
    settings: dict = field(repr=False)

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
    networks, for its batch), retries, memory (the plan, and the free memory that it was made for), versions; or file
    and error.

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
    settings = all_settings(pipe, task, prompt, seed, arguments)
    state, held = process(), ExitStack()
    free = least_free(state, pipe._execution_device)

    def plan() -> _Plan:
        names = image_names(folder, out)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more.")
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(out, main=True))
        records = {name: record for name, record in recover(out).items() if "error" not in record}
        finished = _finished(names, records, task, folder, out, settings, force)
        batches = [names[start : start + batch_size] for start in range(0, len(names), batch_size)]
        missing = [[name for name in batch if name not in finished] for batch in batches]
        before = [records[name]["memory"]["free"] for name in finished]
        return _Plan(
            run=uuid.uuid4().hex[:8],
            names=tuple(names),
            batches=[batch for batch in missing if batch],
            free=before[0] if before else free,
            settings=settings,
        )

    with held:
        agreed = agree(state, plan)
        if not state.is_main_process:
            held.enter_context(lock(out, main=False))
        align(pipe)
        with as_agreed(pipe, agreed.free):
            _work(state, agreed, Solver(pipe, task, folder, prompt, seed, agreed.settings, arguments), out, show)
    failed = {record["file"]: record["error"] for record in read(out) if "error" in record}
    return Outcome(agreed.names, agreed.kept, {name: failed[name] for name in agreed.names if name in failed})


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
        if (other := by_output.setdefault(output(name).casefold(), name)) != name:
            raise ValueError(f"{other} and {name} would both become {output(name)}; rename one of them.")
    return names


def _finished(
    names: list[str],
    records: dict[str, dict],
    task: Restore | Inpaint,
    folder: Path,
    out: Path,
    settings: dict,
    force: bool,
) -> set[str]:
    """The names that need no more work, of those that have a record.

    Raises:
        ValueError: without `force`, something in `out` that is not what this run would put there.
    """
    if not force:
        for record in records.values():
            _check_settings(out, record["settings"], settings)
    finished = set()
    for name in names:
        path, record = out / output(name), records.get(name)
        if not path.exists():
            continue
        if record and record["settings"] == settings and record["source"] == source(task, folder / name):
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


def _work(state: PartialState, plan: _Plan, solver: Solver, out: Path, show: bool) -> None:
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
