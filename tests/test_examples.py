"""The examples run, offline, and write the picture that they say they write."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {"deepinv_physics": "deepinv", "pixel_denoiser": "skimage"}
PICTURES = {
    "inpaint": ("inpainted.png", (512, 128)),
    "restore": ("restored.png", (512, 128)),
    "own_operator": ("own_operator.png", (384, 128)),
    "deepinv_physics": ("deepinv_physics.png", (384, 128)),
    "pixel_denoiser": ("pixel_denoiser.png", (576, 128)),
    "uncertainty": ("uncertainty.png", (384, 128)),
}


def run(command: list[str], folder: Path) -> str:
    quiet = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=quiet, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", PICTURES)
def test_an_example_writes_its_picture(name, tmp_path):
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    told = run([sys.executable, str(EXAMPLES / f"{name}.py")], tmp_path)
    file, size = PICTURES[name]
    with Image.open(tmp_path / file) as picture:
        assert picture.size == size and len(set(picture.convert("L").tobytes())) > 50
    assert told.strip()


def test_several_processes_share_a_folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (32, 32), (200, 90, 60)).save(tmp_path / "pictures" / f"{name}.png")
    path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "several_processes.sh"), "pictures", "results"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in (tmp_path / "results").glob("*.png")) == ["a.png", "b.png"]
