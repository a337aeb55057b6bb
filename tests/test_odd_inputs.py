"""300 odd inputs, made by hypothesis: each ends in a right picture or in one clear sentence of ours.

A picture is right when it has the size that was asked for, values in [0, 1], and, where its mask is black, the pixels
that came. A sentence is ours when a ValueError or TypeError was raised in this repository.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.cli import main
from vml_ldm.operators import Downsample, Grayscale, Mask

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

OURS = tuple(str(Path(__file__).parents[1] / part) for part in ("vml_ldm", "pipelines"))
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F")
ARRAYS = ("bool", "uint8", "uint16", "uint32", "int8", "int16", "int64", "float16", "float32", "float64", "complex64")
TENSORS = ("bool", "uint8", "uint16", "int16", "int64", "float16", "bfloat16", "float32", "float64", "complex64")
SIDES = st.sampled_from([(64, 64), (64, 64), (64, 64), (48, 80), (65, 33), (1, 1), (8, 64)])
KINDS = st.sampled_from(["unit", "unit", "bytes", "signed", "nearly", "huge", "nan", "inf", "black", "white", "steps"])
TIMES = hypothesis.settings(
    max_examples=75, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)


def values(shape: tuple[int, ...], kind: str, seed: int) -> np.ndarray:
    """Numbers of a kind, float64."""
    unit = np.random.default_rng(seed).random(shape)
    if unit.size == 0:
        return unit
    if kind in ("nan", "inf"):
        unit.flat[seed % unit.size] = np.nan if kind == "nan" else np.inf
    if kind == "nearly":
        unit.flat[seed % unit.size] = -1e-6
    return {
        "bytes": 255 * unit,
        "signed": 2 * unit - 1,
        "huge": 1e6 * unit,
        "black": np.zeros(shape),
        "white": np.ones(shape),
        "steps": unit.round(),
    }.get(kind, unit)


@st.composite
def pictures(draw, channels: int = 3):
    """Anything that may be handed in as a picture or a mask: PIL, numpy, torch, lists of them, and what is none."""
    form = draw(st.sampled_from(["pil", "pil", "array", "tensor", "tensor", "list", "none"]))
    if form == "none":
        return draw(st.sampled_from([None, [], "picture.png", 3, {}, np.array("text"), torch.zeros(0), [None]]))
    if form == "list":
        return [draw(pictures(channels)) for _ in range(draw(st.integers(1, 3)))]
    (height, width), kind, seed = draw(SIDES), draw(KINDS), draw(st.integers(0, 99))
    if form == "pil":
        mode = draw(st.sampled_from(MODES))
        return pil(mode, values((height, width), kind, seed))
    count = draw(st.sampled_from([1, 3, channels, 4, 2, 0]))
    batch = draw(st.sampled_from([(), (1,), (2,), (0,)]))
    if form == "array":
        shape = draw(st.sampled_from([(height, width), (*batch, height, width, count), (*batch, height, width)]))
        return cast(values(shape, kind, seed), draw(st.sampled_from(ARRAYS)))
    shape = draw(st.sampled_from([(height, width), (*batch, count, height, width), (*batch, height, width)]))
    dtype = draw(st.sampled_from(TENSORS))
    return torch.from_numpy(values(shape, kind, seed).copy()).to(getattr(torch, dtype))


def pil(mode: str, numbers: np.ndarray) -> Image.Image:
    """A PIL image of any mode."""
    finite = np.nan_to_num(numbers, posinf=1e6)
    if mode == "F":
        return Image.fromarray(numbers.astype(np.float32))
    if mode == "I":
        return Image.fromarray(np.round(1000 * finite).astype(np.int32))
    if mode.startswith("I;16"):
        made = Image.frombytes("I;16", numbers.shape[::-1], (65535 * finite.clip(0, 1)).astype("<u2").tobytes())
        return made if mode == "I;16" else Image.frombytes(mode, made.size, np.asarray(made).astype(">u2").tobytes())
    grey = Image.fromarray((255 * finite.clip(0, 1)).astype(np.uint8))
    through = {"LAB": None, "PA": None, "HSV": "RGB", "LA": "L"}.get(mode, "RGB" if mode != "1" else "L")
    if through is None:
        return Image.merge("LAB", [grey] * 3) if mode == "LAB" else grey.convert("P").convert("PA")
    return grey.convert(through).convert(mode)


def cast(numbers: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return numbers.astype(dtype)


def outcome(call):
    """What a call gives, or None for one clear sentence of ours; anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except (ValueError, TypeError) as error:
            last = error.__traceback__
            while last.tb_next is not None:
                last = last.tb_next
            where = last.tb_frame.f_code.co_filename
            assert where.startswith(OURS), f"raised in {where}: {error}"
            assert len(str(error)) > 20, error
            hypothesis.event("a sentence")
            return None


@pytest.fixture(scope="module")
def inpaint() -> VMLInpaintPipeline:
    pipe = VMLInpaintPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.gradient_vae = tiny.gradient_vae()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def restore(inpaint) -> VMLRestorePipeline:
    pipe = VMLRestorePipeline(**inpaint.components, requires_safety_checker=False)
    pipe.gradient_vae = inpaint.gradient_vae
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check(images: torch.Tensor) -> None:
    hypothesis.event("a picture")
    assert images.ndim == 4 and images.shape[1] == 3 and len(images) > 0
    assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1


@TIMES
@hypothesis.given(image=pictures(), mask=pictures(channels=1), scale=st.sampled_from([1.0, 7.5]))
def test_inpaint(inpaint, image, mask, scale):
    call = {"num_inference_steps": 1, "guidance_scale": scale, "output_type": "pt", "preset": "fast"}
    found = outcome(lambda: inpaint("a", image=image, mask_image=mask, height=64, width=64, **call).images)
    if found is not None:
        check(found)
        assert found.shape[2:] == (64, 64)
        plain = isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (64, 64)
        if plain and isinstance(mask, Image.Image) and mask.mode == "L" and mask.size == (64, 64):
            known = torch.from_numpy(np.array(mask) == 0)
            came = torch.from_numpy(np.array(image)).movedim(2, 0) / 255
            assert torch.equal(found[0][:, known], came[:, known])


OPERATORS = {
    "sr": (Downsample(4), (3, 16, 16)),
    "grey": (Grayscale(), (1, 64, 64)),
    "mask": (Mask(torch.ones(1, 1, 64, 64)), (3, 64, 64)),
    "none": (None, (3, 64, 64)),
    "identity": (lambda x: x, (3, 64, 64)),
}


@st.composite
def measurements(draw):
    """An operator's name and a y: of the operator's shape, or anything."""
    name, batch, kind = draw(st.sampled_from(sorted(OPERATORS))), draw(st.integers(1, 2)), draw(KINDS)
    if draw(st.booleans()):
        return name, draw(pictures())
    numbers = torch.from_numpy(values((batch, *OPERATORS[name][1]), kind, draw(st.integers(0, 99))))
    return name, numbers.to(getattr(torch, draw(st.sampled_from(TENSORS))))


@TIMES
@hypothesis.given(posed=measurements(), sigma_y=st.sampled_from([None, None, 0.1, -1, [0.1]]))
def test_restore(restore, posed, sigma_y):
    name, y = posed
    call = {"num_inference_steps": 1, "output_type": "pt", "preset": "fast", "height": 64, "width": 64}
    found = outcome(lambda: restore("a", y=y, operator=OPERATORS[name][0], sigma_y=sigma_y, **call).images)
    if found is not None:
        check(found)
        assert found.shape[2:] == (64, 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.save(tmp_path_factory.mktemp("model")))


TASKS = st.sampled_from(["inpaint", "restore"])
FILES = st.sampled_from(["png", "png", "jpg", "tiff", "webp", "bmp", "gif", "txt", "absent"])


def write(folder: Path, stem: str, suffix: str, image) -> Path:
    """A file of an image, as far as its format and its mode go together; else of words."""
    path = folder / f"{stem}.{suffix}"
    if suffix == "absent":
        return path
    try:
        image.save(path)
    except (OSError, ValueError, KeyError, AttributeError):
        path.write_text("no picture")
    return path


def run(call: list) -> tuple[int, str]:
    """The exit status of the command line, and what it said of errors."""
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        status = main([str(word) for word in call])
    assert "Traceback" not in said.getvalue()
    hypothesis.event(f"status {status}")
    return status, said.getvalue()


def check_file(path: Path) -> None:
    with Image.open(path) as found:
        assert found.mode in ("RGB", "L", "I;16") and min(found.size) > 0  # of 16 bits grey comes grey


@TIMES
@hypothesis.given(image=pictures(), mask=pictures(channels=1), kinds=st.tuples(FILES, FILES), task=TASKS)
def test_command_line(model, tmp_path_factory, image, mask, kinds, task):
    folder = tmp_path_factory.mktemp("files")
    files = [write(folder, stem, kind, each) for stem, kind, each in zip("im", kinds, (image, mask), strict=True)]
    out = folder / "out.png"
    given = files if task == "inpaint" else [files[0], "--task", "sr4"]
    status, said = run([task, *given, "-o", out, "--model", model, "--steps", 1, "--preset", "fast"])
    if status == 0:
        check_file(out)
    else:
        assert not out.exists() and len(said.strip()) > 20


@TIMES
@hypothesis.given(images=st.lists(st.tuples(pictures(), FILES), min_size=1, max_size=3))
def test_batch(model, tmp_path_factory, images):
    folder, out = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("made") / "out"
    for stem, (image, kind) in zip("abc", images, strict=False):
        write(folder, stem, kind, image)
    run(["batch", folder, "-o", out, "--task", "sr4", "--model", model, "--steps", 1, "--preset", "fast"])
    made = list(out.glob("*.png")) if out.exists() else []
    for path in made:
        check_file(path)
    if (out / "manifest.jsonl").exists():
        lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
        assert {line["output"] for line in lines if "output" in line} == {path.name for path in made}
        assert all(len(line["error"]) > 10 for line in lines if "error" in line)
