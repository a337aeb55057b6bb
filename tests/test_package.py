"""The package as users get it: names, lazy imports, the wheel, and what the README promises."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import vml_ldm
from vml_ldm.assets import bundled_model, example_images

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE", "vml_ldm", "pipelines")


def python(*args: str, cwd: Path, **environment: str) -> str:
    """Run this Python in another process; return what it printed, or fail with what it said."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(set(vml_ldm.__all__) - {"__version__"}))
def test_public_name_is_loaded_from_its_home(name: str) -> None:
    value = getattr(vml_ldm, name)
    assert value is getattr(import_module(vml_ldm._HOMES[name]), name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'vml_mop'"):
        _ = vml_ldm.vml_mop
    assert set(vml_ldm.__all__) <= set(dir(vml_ldm))


def test_import_loads_no_host(tmp_path: Path) -> None:
    code = (
        "import sys, vml_ldm, vml_ldm.assets, vml_ldm.cli\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'comfy', 'PIL') if m in sys.modules])"
    )
    assert python("-c", code, cwd=tmp_path).strip() == "[]"


def test_core_loads_no_diffusers(tmp_path: Path) -> None:
    code = (
        "import sys, vml_ldm\n"
        "vml_ldm.vml_map, vml_ldm.vml_gradient, vml_ldm.Measurement\n"
        "print([m for m in ('diffusers', 'transformers', 'comfy') if m in sys.modules])"
    )
    assert python("-c", code, cwd=tmp_path).strip() == "[]"


def test_bundled_model_is_complete() -> None:
    folder = Path(bundled_model())
    for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        assert any((folder / part).iterdir()), part
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size <= 40_000_000


@pytest.mark.parametrize("split", ["held_out", "validation"])
def test_example_images_exist(split: str) -> None:
    rows = example_images(split)
    assert all(path.is_file() and prompt for path, prompt in rows)
    assert len({path for path, _ in rows}) == len(rows)


def test_splits_share_no_image() -> None:
    names = [{path.name for path, _ in example_images(split)} for split in ("held_out", "validation")]
    assert not names[0] & names[1]


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="split is 'train'; expected one of 'held_out', 'validation'"):
        example_images("train")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources, offline, with what is installed."""
    if importlib.util.find_spec("build") is None:
        pytest.skip("needs the dev extra: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder / name)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=folder)
    (built,) = (folder / "dist").glob("vml_ldm-*.whl")
    return built


def test_wheel_holds_everything(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "vml-ldm = vml_ldm.cli:main" in archive.read(entry_points).decode()
    wanted = {f"vml_ldm/{path.relative_to(ROOT / 'vml_ldm').as_posix()}" for path in shipped_files()}
    wanted |= {f"vml_ldm/pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.py")}
    assert wanted - names == set()
    assert {"vml_ldm/pipelines/vml_inpaint.py", "vml_ldm/assets/emoji-sd-128/model_index.json"} <= names
    assert any(name.endswith("licenses/NOTICE") for name in names)


def shipped_files() -> list[Path]:
    """Every file under vml_ldm/ that a user needs: all but Python's own caches."""
    files = (path for path in (ROOT / "vml_ldm").rglob("*") if path.is_file())
    return [path for path in files if "__pycache__" not in path.parts]


def test_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site))
    python(*install, str(wheel), cwd=tmp_path)
    code = (
        "import vml_ldm\n"
        "from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline\n"
        "pipe = VMLInpaintPipeline.from_pretrained(vml_ldm.bundled_model(), safety_checker=None)\n"
        "print(vml_ldm.__file__, type(pipe.vae).__name__, len(vml_ldm.assets.example_images('held_out')))\n"
    )
    printed = python("-c", code, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert Path(printed[0]).is_relative_to(site)
    assert printed[1] == "AutoencoderKL"
    assert int(printed[2]) >= 1


def test_ci_runs_the_line_of_the_readme() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    (command,) = (line for line in lines if "-m pytest" in line)
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_version_is_the_same_everywhere() -> None:
    assert f"version: {vml_ldm.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"## {vml_ldm.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
