"""The command line: results, what is refused, and in how many words.

Inpainting runs on the bundled checkpoint, restoration on tiny random networks.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionXLPipeline
from PIL import Image, ImageDraw

import vml_ldm
from vml_ldm import cli, damage
from vml_ldm.assets import bundled_model, example_images
from vml_ldm.cli import files, main
from vml_ldm.families import FAMILIES
from vml_ldm.images import load_image
from vml_ldm.pipelines._registering import PIPELINES
from vml_ldm.presets import RESTORE_STARTS

QUICK = ("--steps", "4", "--preset", "fast")


@pytest.fixture
def pair(tmp_path: Path):
    """Write an emoji and a mask with a white box, of a size; return their paths."""

    def write(width: int, height: int) -> tuple[str, str]:
        image, mask = tmp_path / "image.png", tmp_path / "mask.png"
        load_image(example_images("held_out")[0][0]).resize((width, height)).save(image)
        canvas = Image.new("L", (width, height), 0)
        ImageDraw.Draw(canvas).rectangle((width // 3, height // 3, width // 2, height // 2), fill=255)
        canvas.save(mask)
        return str(image), str(mask)

    return write


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_version_and_help_load_nothing_heavy(tmp_path: Path) -> None:
    for arguments in (
        ["--version"],
        ["--help"],
        ["inpaint", "--help"],
        ["restore", "--help"],
        ["demo", "--help"],
        ["batch", "--help"],
        ["benchmark", "--help"],
    ):
        code = (
            "import sys\nfrom vml_ldm.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert end.code == 0\n"
            "assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if arguments == ["--version"]:
            assert done.stdout.strip() == f"vml-ldm {vml_ldm.__version__}"


@pytest.mark.parametrize("size", [(128, 128), (150, 131), (200, 300), (90, 60)])
def test_inpaint_keeps_size_and_known_pixels(pair, tmp_path: Path, capsys, size: tuple[int, int]) -> None:
    image, mask = pair(*size)
    out = tmp_path / "out.png"
    assert main(["inpaint", image, mask, "-o", str(out), *QUICK]) == 0
    before, after, white = pixels(image), pixels(out), pixels(mask) > 0
    assert after.shape == before.shape
    assert (after[~white] == before[~white]).all()
    assert (after[white] != before[white]).any()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"size       {size[0]} x {size[1]}")
    assert [line.split()[0] for line in printed[1:6]] == ["residual", "expected", "solver", "networks", "seconds"]
    assert printed[-1] == f"wrote {out}"


def test_same_seed_same_file(pair, tmp_path: Path) -> None:
    image, mask = pair(128, 128)
    outs = []
    for seed in ("3", "3", "4"):
        outs.append(tmp_path / f"out{len(outs)}.png")
        assert main(["inpaint", image, mask, "-o", str(outs[-1]), "--seed", seed, *QUICK]) == 0
    assert (pixels(outs[0]) == pixels(outs[1])).all()
    assert (pixels(outs[0]) != pixels(outs[2])).any()


def test_overwrites_only_with_force(pair, tmp_path: Path, capsys) -> None:
    image, mask = pair(128, 128)
    out = tmp_path / "out.png"
    out.write_bytes(b"mine")
    assert main(["inpaint", image, mask, "-o", str(out)]) == 2
    assert "exists. Pass --force" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert main(["inpaint", image, mask, "-o", str(out), "--force", *QUICK]) == 0
    assert pixels(out).shape == (128, 128, 3)


def refused(arguments: list[str], capsys) -> str:
    """The one line on stderr with which arguments are refused."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith(f"vml-ldm {arguments[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"image": "none.png"}, "none.png does not exist; expected an image file"),
        ({"image": "."}, "is a folder; expected an image file"),
        ({"mask": "text.png"}, "text.png is no image that can be read"),
        ({"mask": "small.png"}, "has 64 x 64 pixels"),
        ({"out": "nowhere/out.png"}, "nowhere, which is no folder"),
        ({"out": "out.xyz"}, "ends in '.xyz'; expected an image format"),
        ({"more": ["--model", "."]}, "has no model_index.json; expected a Stable Diffusion checkpoint"),
        ({"more": ["--model", "none"]}, "none is no folder; expected a Stable Diffusion checkpoint"),
        ({"more": ["--model", "broken"]}, "broken does not load as a Stable Diffusion checkpoint"),
        ({"more": ["--guidance", "nan", "--steps", "0"]}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_one_line_for_each_mistake(pair, tmp_path: Path, capsys, monkeypatch, change: dict, complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    image, mask = pair(128, 128)
    Path("text.png").write_text("no picture")
    Image.new("L", (64, 64)).save("small.png")
    shutil.copytree(bundled_model(), "broken")
    Path("broken/unet/config.json").write_text("{}")
    given = {"image": image, "mask": mask, "out": "out.png", "more": []} | change
    arguments = ["inpaint", given["image"], given["mask"], "-o", given["out"], *given["more"]]
    if complaint is None:
        with pytest.raises(SystemExit) as stop:  # argparse's own refusal
            main(arguments)
        assert stop.value.code == 2
    else:
        assert complaint in refused(arguments, capsys)
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--masks", "half,circle"], "no mask is called 'circle'; expected some of half,box"),
        (["--images", "5000"], "5000 images came with --images; expected at most"),
        (["--model", "none"], "none is no folder"),
    ],
)
def test_demo_refuses(tmp_path: Path, capsys, monkeypatch, more: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(["demo", *more], capsys)
    assert not list(tmp_path.iterdir())


def test_demo_leaves_other_peoples_folders_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not from this command" in refused(["demo", "-o", str(tmp_path)], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--tasks", "sr4,sr5"], "no task is called 'sr5'; expected some of sr4,sr8"),
        (["--methods", "dps"], "no method is called 'dps'; expected some of vml,vml-free"),
        (["--images", "5000"], "5000 images came with --images; expected at most"),
        (["--tune", "--split", "held-out"], "it tries a grid, on validation images only"),
        (["--tune", "dps"], "--tune came with 'dps'; expected one of red-diff"),
        (["--tune", "--methods", "vml"], "it tries a grid, on validation images only"),
        (["--tune", "latino", "--points", "delta 2"], "no point is called 'delta 2'; expected some of delta 0.1,"),
        (["--points", "delta 1"], "--points came without --tune"),
        (["--model", "none"], "none is no folder"),
    ],
)
def test_benchmark_refuses(tmp_path: Path, capsys, monkeypatch, more: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert complaint in refused(["benchmark", *more], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["--part", "3/2"], ["--part", "2"], ["--noise", "0.1,-1"], ["--noise", "low"]])
def test_benchmark_refuses_what_cannot_be_read(more: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *more])
    assert stop.value.code == 2


def test_the_benchmark_s_help_names_every_task_and_method(capsys) -> None:
    from vml_ldm.evaluation import methods, problems

    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    told = re.sub(r"-\n\s+", "-", capsys.readouterr().out)  # a name may be broken at its hyphen
    known = [m.name for m in (*methods.METHODS, *methods.VARIANTS, *methods.PEERS)]
    assert {*known, *problems.TASKS} <= set(re.findall(r"[a-z0-9-]+", told))


def test_benchmark_in_parts_then_whole(model, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "parts"
    common = ["benchmark", "--short", "--tasks", "sr4", "--methods", "vml,bicubic", "--model", model, "--steps", "4"]
    for part in ("1/2", "2/2"):
        assert main([*common, "-o", str(folder), "--part", part]) == 0
    assert {path.name for path in folder.glob("*.*")} == {
        *("rows-1of2.csv", "rows-2of2.csv", "table-1of2.md", "table-2of2.md")
    }
    capsys.readouterr()
    assert main([*common, "-o", str(folder), "--table"]) == 0
    printed = capsys.readouterr().out
    assert "2 held-out images at 64 x 64" in printed and "| sr4  | 0.05    | 2 " in printed
    assert (folder / "sheet-sr4.png").is_file() and (folder / "table.md").is_file()


def test_benchmark_s_search_is_on_validation_images(model, tmp_path: Path, capsys) -> None:
    arguments = ["--tune", "--tasks", "hdr", "--noise", "0", "--images", "1", "--model", model, "--steps", "2"]
    assert main(["benchmark", *arguments, "-o", str(tmp_path / "tuning")]) == 0
    printed = capsys.readouterr().out
    assert "1 validation images" in printed and """("red-diff", "hdr", 0.0): (('lambda_',""" in printed


def test_benchmark_s_search_at_equal_cost_has_ours_first(model, tmp_path: Path, capsys) -> None:
    arguments = ["--tune", "latino", "--tasks", "sr4", "--noise", "0.01", "--images", "1", "--model", model]
    arguments += ["--points", "delta 0.3,delta 1"]
    assert main(["benchmark", *arguments, "--steps", "6", "--equal", "calls", "-o", str(tmp_path / "tuning")]) == 0
    printed = capsys.readouterr().out
    assert """("latino", "sr4", 0.01): (('delta',""" in printed and "| sr4  | 0.01    | 1      | vml" in printed
    assert set(re.findall(r"\| (delta \S+)", printed)) == {"delta 0.3", "delta 1"}


def test_interrupt_has_its_own_status(tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupt(*_args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vml_ldm.evaluation.demo.run", interrupt)
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of random weights for images of 64 x 64 pixels."""
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def photo(tmp_path: Path):
    """Write an emoji of a size; return its path."""

    def write(width: int, height: int) -> str:
        load_image(example_images("held_out")[0][0]).resize((width, height)).save(tmp_path / "photo.png")
        return str(tmp_path / "photo.png")

    return write


@pytest.mark.parametrize(
    ("task", "channels"), [(("sr4", "--solver", "red-diff"), 3), (("jpeg", "--quality", "20"), 3), (("colorize",), 1)]
)
def test_restoring_a_simulation_s_measurement_is_the_simulation(photo, model, tmp_path, capsys, task, channels) -> None:
    clean, out, again = photo(64, 72), tmp_path / "out.png", tmp_path / "again.png"
    common = ["--model", model, *QUICK, "--noise", "0.05", "--task", *task]
    assert main(["restore", clean, "-o", str(out), "--simulate", *common]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "simulated  from 64 x 72, brought to 64 x 72 first"
    measured = tmp_path / "out-measured.png"
    assert printed[-1] == f"wrote {out} and {measured}"
    assert pixels(out).shape == (72, 64, 3) and (pixels(measured).ndim == 2) == (channels == 1)
    assert main(["restore", str(measured), "-o", str(again), *common]) == 0
    assert (pixels(again) == pixels(out)).all()
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["size", "residual", "expected", "solver", "networks", "seconds", "wrote"]


def test_a_grey_picture_starts_where_it_is_told_to(photo, model, tmp_path) -> None:
    found = {}
    for start in (None, *cli.STARTS):
        out, asked = tmp_path / f"{start}.png", [] if start is None else ["--start", start]
        command = ["restore", photo(64, 64), "-o", str(out), "--model", model, "--steps", "20", "--simulate"]
        assert main([*command, "--task", "colorize", *asked]) == 0
        found[start] = out.read_bytes()
    assert found[None] == found["outline"] and len(set(found.values())) == len(cli.STARTS)
    assert cli.STARTS == RESTORE_STARTS


@pytest.mark.parametrize(
    ("size", "task", "result", "said"),
    [
        ((18, 20), "sr4", (72, 80), "size       18 x 20, solved at 72 x 80; the result is 72 x 80"),
        ((120, 80), "sr8 --resize", (96, 64), "scaled to 12 x 8"),
        ((150, 100), "motion --crop", (96, 96), "of which the middle 96 x 96 is used, solved at 96 x 96"),
        ((150, 70), "jpeg --quality 10", (150, 70), "150 x 70, solved at 152 x 72 and cropped; the result is 150 x 70"),
        ((30, 28), "sr4 --whole", (120, 112), "30 x 28, solved at 120 x 112; the result is 120 x 112"),
        ((10, 12), "sr4", (40, 48), "scaled to 16 x 19, solved at 64 x 80 and cropped; the result is 40 x 48"),
        ((40, 48), "crop --margin 4,8,12,16", (64, 64), "size       40 x 48, solved at 64 x 64; the result is 64 x 64"),
        ((16, 16), "sr4+jpeg --quality 50", (64, 64), "size       16 x 16, solved at 64 x 64"),
        ((64, 32), "rows", (64, 64), "size       64 x 32, solved at 64 x 64"),
    ],
)
def test_a_measurement_of_any_size_is_solved(photo, model, tmp_path, capsys, size, task, result, said) -> None:
    out = tmp_path / "out.png"
    assert main(["restore", photo(*size), "-o", str(out), "--model", model, *QUICK, "--task", *task.split()]) == 0
    assert Image.open(out).size == result
    assert said in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--task", "sr4", "--quality", "5"], "--quality came with --task sr4; expected only --mode"),
        (["--task", "colorize", "--kernel-seed", "5"], "--kernel-seed came with --task colorize; expected none of"),
        (["--task", "jpeg", "--quality", "0"], "quality is 0; expected a whole number from 1 to 100"),
        (["--task", "kernel"], "--task kernel came without --kernel; expected it"),
        (["--task", "kernel", "--kernel", "none.png"], "none.png does not exist"),
        (["--task", "kernel", "--kernel", "black.png"], "black.png is all black; expected a picture of a kernel"),
        (["--task", "hdr", "--simulate"], "out-measured.png exists. Pass --force"),
        (["--task", "hdr", "--model", "none"], "none is no folder"),
        (
            ["--task", "sr4"],
            "64 x 64 pixels, whose result would have 256 x 256; expected a result whose shorter side is",
        ),
        (["--task", "jpeg+sr4", "--std", "3"], "--std came with --task jpeg+sr4; expected only --quality, --mode"),
        (["--task", "colorize+jpeg"], "comes after its colours were lost"),
        (["--task", "hdr", "--memory", "much"], "memory is 'much'; expected 'auto', 'fast', 'low', or bytes"),
        (
            ["--task", "hdr", "--model", "flux"],
            "flux is a checkpoint of FluxPipeline; to restore here, expected one of Stable",
        ),
    ],
)
def test_restore_refuses(photo, model, tmp_path, capsys, monkeypatch, more: list[str], complaint: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flux").mkdir()
    parts = {"transformer": ["diffusers", "FluxTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    Path("flux", "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **parts}))
    more = more if "--model" in more else [*more, "--model", model]
    Image.new("L", (5, 5)).save("black.png")
    Path("out-measured.png").write_bytes(b"mine")
    assert complaint in refused(["restore", photo(64, 64), "-o", "out.png", *more], capsys)
    assert not Path("out.png").exists() and Path("out-measured.png").read_bytes() == b"mine"


@pytest.mark.parametrize(("save", "said"), [({"quality": 20}, "20, by the steps in"), (None, "10, assumed")])
def test_jpeg_takes_the_file_s_own_quality_or_says_what_it_assumes(photo, model, tmp_path, capsys, save, said) -> None:
    clean, out = photo(64, 64), tmp_path / "out.png"
    if save:
        Image.open(clean).convert("RGB").save(tmp_path / "photo.jpg", **save)
        clean = str(tmp_path / "photo.jpg")
    command = ["restore", clean, "-o", str(out), "--task", "jpeg", "--model", model, *QUICK]
    assert main(command) == 0
    assert said in capsys.readouterr().out.splitlines()[0]
    before = pixels(out)
    assert main([*command, "--quality", said.split(",")[0], "--force"]) == 0
    assert "quality" not in capsys.readouterr().out and (pixels(out) == before).all()


@pytest.mark.parametrize("family", ["stable-diffusion-xl", "stable-diffusion-3"])
@pytest.mark.parametrize("precision", [[], ["--bfloat16"]])
def test_the_pipeline_is_that_of_the_folder_s_family(pair, tmp_path, capsys, family, precision) -> None:
    xl = family.endswith("xl")
    parts, stock = (
        (tiny.xl_components(), StableDiffusionXLPipeline)
        if xl
        else (
            tiny.sd3_components(),
            StableDiffusion3Pipeline,
        )
    )
    stock(**parts).save_pretrained(tmp_path / "model")
    image, mask = pair(64, 72)
    out, more = tmp_path / "out.png", ["--model", str(tmp_path / "model"), *QUICK, *precision, "--memory", "fast"]
    assert main(["inpaint", image, mask, "-o", str(out), *more]) == 0
    before, after, white = pixels(image), pixels(out), pixels(mask) > 0
    assert (after[~white] == before[~white]).all() and (after[white] != before[white]).any()
    capsys.readouterr()
    said = refused(["demo", "--model", str(tmp_path / "model"), "-o", str(tmp_path / "demo")], capsys)
    assert said.endswith("to inpaint here, expected one of Stable Diffusion 1.x and 2.x.")
    assert main(["restore", image, "-o", str(out), "--task", "hdr", "--force", *more]) == 0
    assert pixels(out).shape == (72, 64, 3)


def test_families_are_diffusers_own_and_so_are_their_pipelines() -> None:
    from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING as STOCK

    for family, kinds in FAMILIES.items():
        assert issubclass(getattr(vml_ldm, kinds["inpaint"]), STOCK[family])
    served = {name for kinds in FAMILIES.values() for name in kinds.values()}
    every = {pipeline.__name__ for pipeline in PIPELINES}
    assert every - served == {"VMLControlNetInpaintPipeline"}  # the commands have no control image
    assert served < every


def test_half_precision_is_that_of_the_networks(model, monkeypatch) -> None:
    options = argparse.Namespace(model=Path(model), dtype="bfloat16", memory="1GiB")
    pipe = files.open_pipeline(options, "restore", "cpu")
    assert {network.dtype for network in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


@pytest.mark.parametrize("able", [True, False])
def test_half_precision_that_a_processor_lacks_is_told(model, capsys, monkeypatch, able) -> None:
    monkeypatch.setattr(files, "calculates_in", lambda dtype: able)
    files.load(model, "VMLRestorePipeline", "cpu")
    assert capsys.readouterr().err == ""
    files.load(model, "VMLRestorePipeline", "cpu", "bfloat16")
    assert ("cannot calculate in bfloat16" in capsys.readouterr().err) is not able


def test_whether_a_processor_has_it_is_asked_of_torch(monkeypatch) -> None:
    assert {files.calculates_in(dtype) for dtype in ("float16", "bfloat16")} <= {True, False}
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert files.calculates_in("float16")  # not known: nothing is said


def test_a_kernel_from_a_file_is_brought_to_sum_one(photo, model, tmp_path) -> None:
    kernel, out = tmp_path / "kernel.png", tmp_path / "out.png"
    Image.new("L", (3, 1), 77).save(kernel)
    arguments = ["restore", photo(64, 64), "-o", str(out), "--task", "kernel", "--kernel", str(kernel), "--simulate"]
    assert main([*arguments, "--model", model, *QUICK]) == 0
    clean = pixels(photo(64, 64)).astype(float)
    blurred = (clean[:, :-2] + clean[:, 1:-1] + clean[:, 2:]) / 3
    assert np.abs(pixels(tmp_path / "out-measured.png")[:, 1:-1] - blurred).max() <= 0.51


def test_the_parser_knows_every_task_and_parameter() -> None:
    assert tuple(cli.TASKS) == tuple(damage.TASKS) and cli.JOIN == damage.JOIN
    for command in (["restore", "x"], ["batch", "x"]):
        options = cli._parser().parse_args([*command, "-o", "y", "--task", "sr4+jpeg"])
        assert all(getattr(options, name) is None for name in damage.PARAMETERS) and options.oversize == "refuse"
        assert {"memory", "dtype"} <= vars(options).keys()
