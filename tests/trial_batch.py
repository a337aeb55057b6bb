"""Two trials of ``vml-ldm batch`` on the bundled checkpoint, too long for the test suite. Run it on an idle machine.

    python tests/trial_batch.py [--images N] [--steps N] [--kills N]

One process against two under gloo, each with one thread: seconds, and whether the files are the same.
Then two processes, killed at random moments and started again: whether all images are there, none was solved twice,
and the files are those of a run that nobody killed.
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
from pathlib import Path

from vml_ldm.assets import example_images
from vml_ldm.images import load_image

LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(processes: int, folder: Path, out: Path, steps: int) -> subprocess.Popen:
    launcher = LAUNCHER if processes == 2 else ()
    command = ("-m", "vml_ldm.cli", "batch", folder, "-o", out, "--task", "sr4", "--batch", "2", "--steps", str(steps))
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, so that a kill takes the launcher and all that it started
    )


def finished(out: Path) -> dict[str, dict]:
    """The records of manifest and journals, by file, also while a run goes on."""
    lines = [line for part in out.glob("manifest*.jsonl") for line in part.read_bytes().splitlines(True)]
    entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
    records = [record for entry in entries for record in entry.get("images", [entry])]
    return {record["file"]: record for record in records if "output" in record}


def timed(processes: int, folder: Path, out: Path, steps: int) -> tuple[float, float]:
    """Seconds of a run, and seconds without the start: from the first journal, which is made after loading."""
    began, loaded = time.perf_counter(), None
    run = start(processes, folder, out, steps)
    while run.poll() is None:
        if loaded is None and any(out.glob("manifest-part-*")):
            loaded = time.perf_counter()
        time.sleep(0.05)
    assert run.returncode == 0 and loaded is not None, f"{processes} processes ended with {run.returncode}"
    return time.perf_counter() - began, time.perf_counter() - loaded


def killed(folder: Path, out: Path, steps: int, kills: int) -> None:
    chance, seen = random.Random(), {}
    for kill in range(kills + 1):
        run, before = start(2, folder, out, steps), len(finished(out))
        if kill < kills:
            while run.poll() is None and len(finished(out)) == before:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 5))
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        now = finished(out)
        twice = [name for name, record in seen.items() if now.get(name) != record]
        print(f"run {kill + 1}: {len(now)} images finished, solved twice: {twice or 'none'}")
        seen = now


def results(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kills", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, outs = Path(place, "in"), [Path(place, name) for name in ("one", "two", "killed")]
        folder.mkdir()
        for path, _ in example_images("held_out")[: options.images]:
            load_image(path).resize((32, 32)).save(folder / f"{path.stem}.png")
        one, two = (timed(n, folder, out, options.steps) for n, out in zip((1, 2), outs, strict=False))
        for what, before, now in zip(("in all", "without the start"), one, two, strict=True):
            print(f"{what}: one process {before:.1f} s, two {now:.1f} s, {now / before:.2f} of it")
        killed(folder, outs[2], options.steps, options.kills)
        count = len(list(folder.iterdir()))
        for out in outs[1:]:
            print(f"{out.name}: {len(results(out))} of {count} files, the same: {results(out) == results(outs[0])}")
        left = sorted(path.name for path in outs[2].iterdir() if path.suffix != ".png")
        print(f"beside them: {', '.join(left)}")


if __name__ == "__main__":
    main()
