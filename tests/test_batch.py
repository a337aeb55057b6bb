"""Folders of images: any number of processes, kills, bad images, refusals, the manifest. Tiny random networks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import trial_batch
from diffusers import EulerDiscreteScheduler
from peft import LoraConfig
from PIL import Image

import vml_ldm
from vml_ldm import manifest
from vml_ldm.assets import example_images
from vml_ldm.batch import Inpaint, Restore, image_seed, processes, solve_folder, solving
from vml_ldm.cli import main
from vml_ldm.images import load_image

QUICK = ("--steps", "4", "--preset", "fast")
STEPS = {"num_inference_steps": 4, "preset": "fast", "show": False}
SR4 = Restore("sr4")
_PRELOAD = ["vml_ldm.batch", "vml_ldm.pipelines.vml_restore", "test_batch"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def restorer(model):
    return vml_ldm.VMLRestorePipeline.from_pretrained(model, safety_checker=None)


@pytest.fixture(scope="module")
def painter(model):
    return vml_ldm.VMLInpaintPipeline.from_pretrained(model, safety_checker=None)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures of 16 x 16 pixels, a.png to e.png."""
    (tmp_path / "in").mkdir()
    for (path, _), name in zip(example_images("held_out"), "abcde", strict=False):
        load_image(path).resize((16, 16)).save(tmp_path / "in" / f"{name}.png")
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def files(out: Path) -> dict[str, bytes]:
    """The results, by name; nothing is in the folder beside them, the manifest and its lock."""
    beside = {path.name for path in out.iterdir() if path.suffix != ".png" or path.name.startswith(".")}
    assert beside == {"manifest.jsonl", ".manifest.lock"}
    return {path.name: path.read_bytes() for path in out.glob("*.png")}


def records(out: Path) -> dict[str, dict]:
    return {record["file"]: record for record in manifest.read(out)}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
}


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("accelerate", marks=pytest.mark.slow)])
def test_the_files_do_not_depend_on_the_number_of_processes(folder, out, model, tmp_path, one_thread, launcher) -> None:
    """Two genuine processes under gloo against this one, with a small decoder for the gradients."""
    (folder / "bad.png").write_text("no picture")
    shutil.copytree(model, tmp_path / "model")
    tiny.gradient_vae().save_pretrained(tmp_path / "model" / "gradient_vae")
    common = ["--model", str(tmp_path / "model"), "--batch", "2", "--steps", "16", "--preset", "fast"]
    command = ["batch", str(folder), "--task", "sr4", *common, "-o"]
    two = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "vml_ldm.cli", *command, str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert two.returncode == 1 and "bad.png: " in two.stderr, two.stderr
    assert "5 images solved, 0 finished before, 1 failed" in two.stdout
    assert main([*command, str(out)]) == 1
    assert files(out) == files(tmp_path / "two") and len(files(out)) == 5
    for one, other in zip(manifest.read(out), manifest.read(tmp_path / "two"), strict=True):
        memory, others = one.pop("memory", {}), other.pop("memory", {})
        assert one | {"seconds": 0} == other | {"seconds": 0}
        assert memory.get("plan") == others.get("plan") and ("error" in one or one["calls"]["draft"] > 0)
    free = {record["memory"]["free"] for record in manifest.read(tmp_path / "two") if "memory" in record}
    assert len(free) == 1  # both processes planned for the same


def test_the_batch_size_changes_no_pixel_by_more_than_1(folder, restorer, tmp_path) -> None:
    for size in (1, 3):
        solve_folder(restorer, SR4, folder, tmp_path / f"by{size}", batch_size=size, **STEPS)
    for name in "abcde":
        one, three = (pixels(tmp_path / f"by{size}" / f"{name}.png") for size in (1, 3))
        assert np.abs(one - three).max() <= 1
    assert records(tmp_path / "by3")["e.png"]["batch"] == ["d.png", "e.png"]


def test_weights_are_aligned_those_of_the_small_decoder_too(model) -> None:
    pipe = vml_ldm.VMLRestorePipeline.from_pretrained(model, gradient_vae=tiny.gradient_vae(), safety_checker=None)
    for part in (pipe.unet, pipe.gradient_vae):
        for weight in part.parameters():
            weight.data = torch.cat([weight.data.new_zeros(1), weight.data.flatten()])[1:].view_as(weight)
            assert weight.data_ptr() % 64
    processes.align(pipe)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder, pipe.gradient_vae)
    assert not any(weight.data_ptr() % 64 for part in parts for weight in part.parameters())


def test_a_run_that_goes_on_plans_for_the_memory_of_the_images_before_it(folder, out, restorer, monkeypatch) -> None:
    """Less memory at the second start gives tiles or another plan of its own, were it asked again."""
    for name in "de":
        (folder / f"{name}.png").unlink()
    monkeypatch.setattr(processes, "free_bytes", lambda device: 8 * 1024**3)
    solve_folder(restorer, SR4, folder, out, batch_size=2, **STEPS)
    whole, plan = files(out), records(out)["a.png"]["memory"]
    assert plan["free"] == 8 * 1024**3 and plan["plan"] == "one graph" and restorer.free_memory is None
    (out / "a.png").unlink()
    (out / "b.png").unlink()
    monkeypatch.setattr(processes, "free_bytes", lambda device: 1)
    assert solve_folder(restorer, SR4, folder, out, batch_size=2, **STEPS).kept == 1
    assert files(out) == whole and records(out)["a.png"]["memory"] == plan
    for name in "bc":  # a plan for each size is predicted, which takes seconds
        (folder / f"{name}.png").unlink()
    alone = out.with_name("alone")
    solve_folder(restorer, SR4, folder, alone, batch_size=2, **STEPS)
    assert records(alone)["a.png"]["memory"]["plan"] != plan["plan"]


def test_the_processes_share_what_is_free_where_they_run(monkeypatch) -> None:
    state = SimpleNamespace(num_processes=4, wait_for_everyone=lambda: None)
    here, there = ("here", "cpu"), ("there", "cpu")
    found = [(here, 30), (here, 20), (here, 40), (there, 9)]
    monkeypatch.setattr(processes, "gather_object", lambda own: found)
    assert processes.least_free(state, torch.device("cpu")) == 20 // 3
    found[3] = (there, None)
    assert processes.least_free(state, torch.device("cpu")) is None


@pytest.mark.parametrize("what", ["gradient_vae", "unet", "scheduler", "scheduler_config", "lora", "memory"])
def test_what_changes_a_result_is_a_setting(folder, out, model, what) -> None:
    for name in "bcde":
        (folder / f"{name}.png").unlink()
    pipe = vml_ldm.VMLRestorePipeline.from_pretrained(model, safety_checker=None)
    solve_folder(pipe, SR4, folder, out, **STEPS)
    arguments, expected = STEPS, what
    if what == "gradient_vae":
        pipe.gradient_vae = tiny.gradient_vae()
    elif what == "unet":
        pipe.unet = tiny.unet(seed=1)
    elif what == "scheduler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    elif what == "scheduler_config":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    elif what == "lora":
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        solved = out.with_name("lora")
        solve_folder(pipe, SR4, folder, solved, **STEPS)
        pipe.set_adapters("style", 0.5)
        with pytest.raises(ValueError, match=r"other settings \(unet "):
            solve_folder(pipe, SR4, folder, solved, **STEPS)
        expected = "unet"
    else:
        arguments = STEPS | {"memory": "low"}
    with pytest.raises(ValueError, match=rf"images of other settings \(.*{expected} "):
        solve_folder(pipe, SR4, folder, out, **arguments)


def test_an_image_s_seed_makes_its_file_again(folder, out, restorer, model, tmp_path) -> None:
    solve_folder(restorer, SR4, folder, out, seed=7, batch_size=2, **STEPS)
    seed, alone = str(records(out)["b.png"]["seed"]), tmp_path / "alone.png"
    arguments = [str(folder / "b.png"), "-o", str(alone), "--task", "sr4", "--model", model, "--seed", seed]
    assert main(["restore", *arguments, *QUICK]) == 0
    assert np.abs(pixels(alone) - pixels(out / "b.png")).max() <= 1


def test_seeds_differ_by_name_and_by_the_run_s_seed() -> None:
    seeds = [image_seed(seed, f"{name}.png") for seed in range(30) for name in range(30)]
    assert len(set(seeds)) == 900 and all(0 <= seed < 2**53 for seed in seeds)
    assert image_seed(0, "a.png") == image_seed(0, "a.png")


def run_alone(folder: Path, out: Path, model: str) -> None:
    """One run in a process of its own, slow enough to be killed in the middle."""
    torch.set_num_threads(1)
    pipe = vml_ldm.VMLRestorePipeline.from_pretrained(model, safety_checker=None)
    solve_folder(pipe, SR4, folder, out, batch_size=2, **(STEPS | {"num_inference_steps": 8}))


def test_killed_at_random_moments_and_started_again(folder, out, model, tmp_path) -> None:
    for name in "abcde":
        for copy in "1234":
            (folder / f"{name}{copy}.png").write_bytes((folder / f"{name}.png").read_bytes())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    chance, seen = random.Random(0), {}
    for kill in (True, True, True, False):
        run = context.Process(target=run_alone, args=(folder, out, model))
        run.start()
        if kill:
            enough = len(finished(out)) + chance.randrange(1, 4)
            while run.is_alive() and len(finished(out)) < enough:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            run.kill()
        run.join()
        assert run.exitcode == (-9 if kill else 0)
        now = finished(out)
        assert all(now[name] == record for name, record in seen.items())  # with its seconds: nothing solved twice
        assert len(now) > len(seen)
        seen = now
    assert len(files(out)) == 25 == len(seen)
    whole = context.Process(target=run_alone, args=(folder, tmp_path / "whole", model))
    whole.start()
    whole.join()
    assert files(out) == files(tmp_path / "whole")


def finished(out: Path) -> dict[str, dict]:
    """What manifest and journals in a folder hold, as a run would find it, without changing anything.

    Also while a run goes on: the journals are read first, for what is merged meanwhile is in the manifest read after.
    """
    lines = []
    for journal in out.glob("manifest-part-*.jsonl"):
        with suppress(FileNotFoundError):  # merged since it was listed
            lines += journal.read_bytes().splitlines(keepends=True)
    entries = manifest.read(out) if out.is_dir() else []
    for line in lines:
        entries += json.loads(line).get("images", []) if line.endswith(b"\n") else []
    return {record["file"]: record for record in entries}


@pytest.mark.parametrize("call, survives", [("_append", False), ("replace", True)])
def test_a_batch_is_finished_whole_or_not_at_all(folder, out, restorer, monkeypatch, call, survives) -> None:
    """A stop before the journal's line loses the second batch; one between its renames loses nothing."""
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == (2 if call == "_append" else 4):  # in the second batch of two
            raise KeyboardInterrupt
        return original(*args)

    where = manifest.Journal if call == "_append" else manifest.os
    original = getattr(where, call)
    with monkeypatch.context() as patch:
        patch.setattr(where, call, stop)
        with pytest.raises(KeyboardInterrupt):
            solve_folder(restorer, SR4, folder, out, batch_size=2, **STEPS)
    assert set(finished(out)) == set(("a.png", "b.png", "c.png", "d.png")[: 4 if survives else 2])
    before = finished(out)
    (out / ".c.png.manifest-part-gone-00000.tmp").write_bytes(b"of a killed run")
    outcome = solve_folder(restorer, SR4, folder, out, batch_size=2, **STEPS)
    assert outcome.kept == len(before) and len(files(out)) == 5
    assert before.items() <= records(out).items()


def test_a_line_that_was_cut_short_does_not_count(folder, out, restorer) -> None:
    out.mkdir()
    journal = manifest.Journal(out, "first", 0)
    journal.finish([{"file": "x.png", "error": "none"}])
    with journal.path.open("ab") as file:
        file.write(b'{"images": [{"file": "a.pn')
    assert solve_folder(restorer, SR4, folder, out, **STEPS).kept == 0
    assert set(records(out)) == {"x.png", *(f"{name}.png" for name in "abcde")}


def test_ctrl_c_stops_with_its_status_and_the_same_command_goes_on(folder, out, model, capsys, monkeypatch) -> None:
    solve, batches = solving.Solver.solve, []

    def interrupt(self, names):
        batches.append(names)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return solve(self, names)

    command = ["batch", str(folder), "-o", str(out), "--task", "sr4", "--model", model, "--batch", "2", *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(solving.Solver, "solve", interrupt)
        assert main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    first = {name: (out / name).stat().st_mtime_ns for name in ("a.png", "b.png")}
    assert main(command) == 0
    assert "3 images solved, 2 finished before, 0 failed" in capsys.readouterr().out
    assert first == {name: (out / name).stat().st_mtime_ns for name in first}


def test_bad_images_are_reported_and_the_others_are_solved(folder, out, restorer) -> None:
    solve_folder(restorer, SR4, folder, out, **STEPS)
    good = files(out)
    (folder / "f.png").write_bytes((folder / "a.png").read_bytes()[:300])
    (folder / "notes.txt").write_text("no image by its name")
    outcome = solve_folder(restorer, SR4, folder, out, **STEPS)
    assert set(outcome.failed) == {"f.png"} and "is no image that can be read" in outcome.failed["f.png"]
    assert outcome.kept == 5 and good.items() <= files(out).items()
    assert records(out)["f.png"] == {"file": "f.png", "error": outcome.failed["f.png"]}
    assert solve_folder(restorer, SR4, folder, out, **STEPS).failed == outcome.failed  # tried again


def test_an_image_that_is_too_large_is_reported_with_what_to_do(folder, out, restorer) -> None:
    load_image(folder / "a.png").resize((40, 40)).save(folder / "large.png")
    outcome = solve_folder(restorer, SR4, folder, out, **STEPS)
    assert set(outcome.failed) == {"large.png"} and "result would have 160 x 160" in outcome.failed["large.png"]
    assert solve_folder(restorer, Restore("sr4", oversize="resize"), folder, out, force=True, **STEPS).failed == {}
    assert pixels(out / "large.png").shape == (64, 64, 3)


def test_an_image_that_a_batch_fails_on_fails_alone(folder, out, restorer, monkeypatch) -> None:
    call = solving.Solver._call

    def refuse(self, group):
        if "c.png" in group:
            raise RuntimeError("out of\nmemory")
        return call(self, group)

    monkeypatch.setattr(solving.Solver, "_call", refuse)
    outcome = solve_folder(restorer, SR4, folder, out, **STEPS)
    assert outcome.failed == {"c.png": "out of memory"}
    assert set(files(out)) == {"a.png", "b.png", "d.png", "e.png"}


def test_inpainting_with_a_mask_for_each_image(folder, out, painter, tmp_path) -> None:
    (tmp_path / "masks").mkdir()
    for name, size in (("a", 16), ("b", 16), ("c", 17), ("d", 16)):
        mask = Image.new("L", (size, 16))
        mask.paste(255, (0, 0, 8, 16))
        mask.save(tmp_path / "masks" / f"{name}.bmp")
    Image.new("L", (16, 16)).save(tmp_path / "masks" / "d.png")
    outcome = solve_folder(painter, Inpaint(tmp_path / "masks"), folder, out, **STEPS)
    assert set(files(out)) == {"a.png", "b.png"}
    for name in ("a.png", "b.png"):
        assert (pixels(out / name)[:, 8:] == pixels(folder / name)[:, 8:]).all()
        assert (pixels(out / name)[:, :8] != pixels(folder / name)[:, :8]).any()
    complaints = {"c.png": "has 17 x 16 pixels", "d.png": "has 2 masks in", "e.png": "has 0 masks in"}
    assert all(complaint in outcome.failed[name] for name, complaint in complaints.items())
    with pytest.raises(ValueError, match=r"a.png was made from other files"):
        Image.new("L", (16, 16)).save(tmp_path / "masks" / "a.bmp")
        solve_folder(painter, Inpaint(tmp_path / "masks"), folder, out, **STEPS)


def test_the_manifest_says_what_was_done(folder, out, restorer) -> None:
    solve_folder(restorer, Restore("sr4", 0.05, mode="average"), folder, out, prompt="a hat", batch_size=2, **STEPS)
    record = records(out)["a.png"]
    assert list(records(out)) == [f"{name}.png" for name in "abcde"]
    assert record["output"] == "a.png" and record["seed"] == image_seed(0, "a.png")
    asked = {"task": "sr4", "noise": 0.05, "mode": "average", "prompt": "a hat", "seed": 0, "preset": "fast"}
    defaults = {"num_inference_steps": 4, "guidance_scale": 1.0, "solver": "vml", "dtype": "float32"}
    assert (asked | defaults).items() <= record["settings"].items()
    assert record["batch"] == ["a.png", "b.png"] and record["calls"]["encode"] == 1 and record["seconds"] > 0
    expected = np.hypot(0.05 * min(1, 16 / 16), record["vae_error"] / 4)
    assert record["effective_sigma_y"] == pytest.approx(expected, rel=1e-4) and record["residual"] > 0
    assert record["versions"]["torch"] == torch.__version__ and record["versions"]["vml_ldm"] == vml_ldm.__version__


def test_other_settings_in_the_same_folder_are_refused_until_forced(folder, out, restorer) -> None:
    solve_folder(restorer, SR4, folder, out, **STEPS)
    before = files(out)
    with pytest.raises(ValueError, match=r"images of other settings \(seed 0 and now 1\); expected the same settings"):
        solve_folder(restorer, SR4, folder, out, seed=1, **STEPS)
    with pytest.raises(ValueError, match=r"task 'sr4' and now 'hdr'"):
        solve_folder(restorer, Restore("hdr"), folder, out, **STEPS)
    assert files(out) == before
    assert solve_folder(restorer, SR4, folder, out, batch_size=1, **STEPS).kept == 5  # the same settings
    assert solve_folder(restorer, SR4, folder, out, seed=1, force=True, **STEPS).kept == 0
    assert all(files(out)[name] != before[name] for name in before)


def test_files_that_are_not_ours_are_left_alone_until_forced(folder, out, restorer) -> None:
    out.mkdir()
    (out / "c.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"c.png is not from this command; expected another folder, or force"):
        solve_folder(restorer, SR4, folder, out, **STEPS)
    assert (out / "c.png").read_bytes() == b"mine"
    solve_folder(restorer, SR4, folder, out, force=True, **STEPS)
    assert pixels(out / "c.png").shape == (64, 64, 3)


def test_a_folder_serves_one_run_at_a_time(folder, out, restorer, monkeypatch) -> None:
    out.mkdir()
    monkeypatch.setattr(manifest, "PATIENCE", 0.0)
    with manifest.lock(out, main=True), pytest.raises(ValueError, match="is in use by another run"):
        solve_folder(restorer, SR4, folder, out, **STEPS)
    assert solve_folder(restorer, SR4, folder, out, **STEPS).kept == 0
    with pytest.raises(ValueError, match="expected a folder that all machines share"):
        manifest.lock(folder, main=False)


def test_the_trial_tells_what_is_broken(folder, out, restorer) -> None:
    solve_folder(restorer, SR4, folder, out, **STEPS)
    expected = trial_batch.results(out)
    assert len(expected) == 5 and trial_batch.differences(out, expected) == []
    (out / "a.png").write_bytes(b"broken")
    (out / "b.png").unlink()
    (out / ".c.png.tmp").write_bytes(b"of a killed run")
    assert set(trial_batch.differences(out, expected)) == {
        *("out: a.png differs", "out: b.png is missing", "out: .c.png.tmp is too many")
    }


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"batch_size": 0}, ValueError, "batch_size is 0; expected 1 or more"),
        ({"preset": "slow"}, ValueError, "preset is 'slow'; expected one of"),
        ({"solver": "red-diff", "start": "outline"}, ValueError, "start is 'outline'; expected one of 'noise'"),
        ({"num_images_per_prompt": 2}, TypeError, r"got 'num_images_per_prompt'; expected arguments of the call"),
        ({"memory": "some"}, ValueError, "memory is 'some'; expected 'auto', 'fast', 'low', or bytes"),
        ({"jacobean": "free"}, TypeError, "got 'jacobean'"),
        ({"cross_attention_kwargs": {"x": object()}}, TypeError, "an argument is object; expected what JSON holds"),
        ({"task": Inpaint("mask.png")}, TypeError, "is VMLRestorePipeline; expected VMLInpaintPipeline"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(folder, out, restorer, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        solve_folder(**{"pipe": restorer, "task": SR4, "folder": folder, "out": out, **STEPS, **arguments})
    assert not out.exists()


@pytest.mark.parametrize(
    "more, complaint",
    [
        (["none"], "none is no folder; expected a folder of images"),
        (["empty"], "empty has no image; expected files that end in .png"),
        (["in", "-o", "in"], "in holds the images; expected another folder for the results"),
        (["twins"], "a.jpg and a.png would both become a.png; rename one of them"),
        (["in", "--mask", "m.png"], "--mask came with --task sr4, which does not take it"),
        (["in", "--task", "inpaint"], "--task inpaint came without --mask; expected a mask's file, or a folder"),
        (["in", "--task", "inpaint", "--mask", "no.png"], "with --mask no.png, which does not exist"),
        (["in", "--task", "inpaint", "--mask", "in", "--start", "noise"], "--start came with --task inpaint"),
        (["in", "--task", "inpaint", "--mask", "in", "--quality", "5"], "--quality came with --task inpaint"),
        (["in", "--quality", "5"], "--quality came with --task sr4; expected only --mode"),
        (["in", "--task", "sr4+jpeg"], "--task sr4+jpeg came without --quality; expected that of all images"),
        (
            ["in", "--task", "inpaint", "--mask", "in", "--crop"],
            "--crop came with --task inpaint, which solves any size",
        ),
        (
            ["in", "--solver", "red-diff", "--start", "outline"],
            "--start outline came with --solver red-diff; expected --start noise or measurement",
        ),
        (["in", "--memory", "much"], "memory is 'much'; expected 'auto', 'fast', 'low', or bytes"),
        (["in", "--model", "none"], "none is no folder; expected a Stable Diffusion checkpoint"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(folder, tmp_path, capsys, monkeypatch, more, complaint) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("twins").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (16, 16)).save(Path("twins", name))
    assert main(["batch", "-o", "out", "--task", "sr4", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vml-ldm batch: error: ") and complaint in line
    assert not Path("out").exists()
