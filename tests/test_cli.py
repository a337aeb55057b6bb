"""The command line, on the bundled checkpoint: results, what is refused, and in how many words."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import vml_ldm
from vml_ldm.assets import bundled_model, example_images
from vml_ldm.cli import main
from vml_ldm.images import load_image

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
    for arguments in (["--version"], ["--help"], ["inpaint", "--help"], ["demo", "--help"]):
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


def test_interrupt_has_its_own_status(tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupt(*_args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vml_ldm.evaluation.demo.run", interrupt)
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
