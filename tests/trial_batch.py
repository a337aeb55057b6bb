"""Two trials of ``vml-ldm batch`` on the bundled checkpoint, too long for the test suite. Run it on an idle machine.

    python tests/trial_batch.py [--images N] [--steps N] [--kills N] [--launcher torchrun|accelerate]

One process against two under gloo, each with one thread: seconds, and whether the files are the same.
Then two processes, killed at random moments, from their start to just before their end, and started again: whether all
images are there, none was solved twice, and the files are those of a run that nobody killed.

It ends with status 1, and says why, if a promise is broken: other files, an image missing, a file too many, an image
solved twice, or, with enough images to tell, two processes that take 0.65 of one's time or more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from vml_ldm.assets import example_images
from vml_ldm.images import load_image
from vml_ldm.manifest import NAME

LAUNCHERS = {
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
}
RATIO, ENOUGH = 0.65, 24  # two processes' time over one's, and from how many images on that is a promise
_BESIDE = {NAME, f".{Path(NAME).stem}.lock"}


def start(launcher: tuple[str, ...], folder: Path, out: Path, steps: int) -> subprocess.Popen:
    command = ("-m", "vml_ldm.cli", "batch", folder, "-o", out, "--task", "sr4", "--batch", "2", "--steps", str(steps))
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def finished(out: Path) -> dict[str, dict]:
    """The records of manifest and journals, by file, also while a run goes on."""
    lines = []
    for part in out.glob("manifest*.jsonl"):
        try:
            lines += part.read_bytes().splitlines(True)
        except FileNotFoundError:  # merged since
            continue
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    records = [record for entry in entries for record in entry.get("images", [entry])]
    return {record["file"]: record for record in records if "output" in record}


def timed(launcher: tuple[str, ...], folder: Path, out: Path, steps: int) -> tuple[float, float]:
    """Seconds of a run, and seconds without the start: from the first journal, which is made after loading."""
    began, loaded = time.perf_counter(), None
    run = start(launcher, folder, out, steps)
    while run.poll() is None:
        if loaded is None and any(out.glob("manifest-part-*")):
            loaded = time.perf_counter()
        time.sleep(0.05)
    if run.returncode != 0 or loaded is None:
        raise SystemExit(f"FAILED: a run ended with {run.returncode}")
    return time.perf_counter() - began, time.perf_counter() - loaded


def kill_all(process: int) -> None:
    """Kill a process and all that it started: a launcher's processes have sessions of their own and would go on."""
    every = [process]
    for parent in every:
        every += [child for child, (_, its_parent) in alive().items() if its_parent == parent]
    for one in every:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    while not alive().keys().isdisjoint(every):
        time.sleep(0.01)


def alive() -> dict[int, tuple[str, int]]:
    """State and parent of every process that has not ended, by its number (Linux)."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended since
            continue
        if state not in "ZX":
            found[int(stat.parent.name)] = state, int(parent)
    return found


def killed(launcher: tuple[str, ...], folder: Path, out: Path, steps: int, kills: int, seconds: float) -> list[str]:
    """What went wrong in runs of which each but the last is killed.

    Args:
        seconds: of a whole run. The first kill comes while the program loads, the last one as the images run out, the
            others at any moment of a share of it, so that none finds the work done.
    """
    chance, seen, wrong = random.Random(), {}, []
    count = len(list(folder.iterdir()))
    for kill in range(kills + 1):
        run, began = start(launcher, folder, out, steps), time.perf_counter()
        if kill == kills - 1 > 0:  # two images from the end, then any time until the run has cleaned up after itself
            while run.poll() is None and len(finished(out)) < count - 2:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 3 * seconds / count))
        elif kill < kills:
            time.sleep(chance.uniform(0, seconds * (0.2 if kill == 0 else 1 / max(1, kills - 1))))
        if kill < kills and run.poll() is None:
            kill_all(run.pid)
        status, after, now = run.wait(), time.perf_counter() - began, finished(out)
        twice = [name for name, record in seen.items() if now.get(name) != record]
        print(f"run {kill + 1}: ended with {status} after {after:.1f} s, {len(now)} images finished", flush=True)
        if twice:
            wrong.append(f"solved twice or lost: {', '.join(twice)}")
        if kill == kills and status != 0:
            wrong.append(f"the last run ended with {status}")
        seen = now
    return wrong


def results(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def differences(out: Path, expected: dict[str, bytes]) -> list[str]:
    """How the files in a folder differ from those of the run in one process."""
    found = results(out)
    beside = {path.name for path in out.iterdir() if path.suffix != ".png"}
    kinds = {
        "is missing": expected.keys() - found.keys(),
        "is too many": (found.keys() - expected.keys()) | (beside - _BESIDE),
        "differs": {name for name in found.keys() & expected.keys() if found[name] != expected[name]},
        "has no record": {Path(name).stem for name in expected} - {Path(name).stem for name in finished(out)},
    }
    wrong = [f"{out.name}: {name} {what}" for what, names in kinds.items() for name in sorted(names)]
    print(f"{out.name}: {len(found)} of {len(expected)} files, {len(wrong)} differences")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=ENOUGH)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--launcher", choices=tuple(LAUNCHERS), default="torchrun")
    options = parser.parse_args()
    two = LAUNCHERS[options.launcher]
    with tempfile.TemporaryDirectory() as place:
        folder, outs = Path(place, "in"), [Path(place, name) for name in ("one", "two", "killed")]
        folder.mkdir()
        for path, _ in example_images("held_out")[: options.images]:
            load_image(path).resize((32, 32)).save(folder / f"{path.stem}.png")
        times = [timed(launcher, folder, out, options.steps) for launcher, out in zip(((), two), outs, strict=False)]
        ratios = [now / before for before, now in zip(*times, strict=True)]
        for what, before, now, ratio in zip(("in all", "without the start"), *times, ratios, strict=True):
            print(f"{what}: one process {before:.1f} s, two {now:.1f} s, {ratio:.2f} of it", flush=True)
        wrong = killed(two, folder, outs[2], options.steps, options.kills, times[1][0])
        expected = results(outs[0])
        if len(expected) != len(list(folder.iterdir())):
            wrong.append(f"one: {len(expected)} of {len(list(folder.iterdir()))} files")
        for out in outs[1:]:
            wrong += differences(out, expected)
        if options.images >= ENOUGH and ratios[0] >= RATIO:
            wrong.append(f"two processes take {ratios[0]:.2f} of one's time; expected under {RATIO}")
    for line in wrong:
        print(f"FAILED: {line}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
