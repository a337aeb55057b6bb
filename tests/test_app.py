"""The web page: a solve watched from another thread, the handlers, and the page in a real headless browser."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vml_ldm import VMLInpaintPipeline
from vml_ldm.damage import TASKS
from vml_ldm.images import load_image

gr = pytest.importorskip("gradio", reason="gradio is not installed")

from vml_ldm.app import page as app  # noqa: E402
from vml_ldm.app.solving import Solver  # noqa: E402

SIZE, LEVELS = 64, 4
HOLE = (20, 20, 44, 44)
PLAIN = (0, 0, False, 0, 0, 0, 0)  # grow, feather, fill, margins
WISHES = ("", "balanced", 8, "the task's", 3, 1.0)  # prompt, preset, steps, levels, seed, guidance: four levels
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def solver(tmp_path_factory):
    return Solver(VMLInpaintPipeline.from_pretrained(tiny.save(tmp_path_factory.mktemp("tiny")), safety_checker=None))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def painted() -> Image.Image:
    layer = Image.new("RGBA", (SIZE, SIZE))
    layer.paste("red", HOLE)
    return layer


def edited(**changes) -> dict:
    """What the editor gives."""
    return {"background": picture(), "layers": [painted()], "composite": picture(), **changes}


def problem() -> dict:
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[..., 20:44, 20:44] = 1
    common = {"num_inference_steps": 8, "guidance_scale": 1.0, "prompt": ""}
    return {"image": torch.full((1, 3, SIZE, SIZE), 0.5), "mask_image": mask, "height": SIZE, "width": SIZE, **common}


def test_a_frame_for_each_level_and_then_the_pipeline_s_image(solver) -> None:
    *frames, last = solver.frames(solver.inpaint, seed=3, **problem())
    assert [len(frame.residuals) for frame in frames] == [1, 2, 3, 4]
    assert all(frame.report is None and frame.count == LEVELS for frame in frames)
    assert all(frame.image.shape == (1, 3, SIZE, SIZE) for frame in frames)
    seed = torch.Generator().manual_seed(3)
    direct = solver.inpaint(**problem(), generator=seed, output_type="pt", return_report=True)
    assert torch.equal(last.image, direct.images.float())
    assert last.residuals == pytest.approx([level["residual"][0] for level in direct.report.trace])


def test_a_stopped_solve_ends_after_its_level_with_its_report(solver) -> None:
    frames = solver.frames(solver.inpaint, seed=0, **problem())
    next(frames)
    solver.stop()
    *_, last = frames
    assert last.report is not None
    assert len(last.residuals) < LEVELS


@pytest.mark.parametrize("moment", ["before it is begun", "before its checks"])
def test_a_stop_that_comes_early_is_not_lost(solver, monkeypatch, moment) -> None:
    frames, check = solver.frames(solver.inpaint, seed=0, **problem()), solver.inpaint._check
    if moment == "before it is begun":
        solver.stop()
    else:
        monkeypatch.setattr(solver.inpaint, "_check", lambda *given: (solver.stop(), check(*given)))
    *_, last = frames
    assert last.report is not None and len(last.residuals) == 1


def test_whoever_goes_away_stops_the_solve(solver) -> None:
    frames = solver.frames(solver.inpaint, seed=0, **problem())
    next(frames)
    threads = threading.active_count()
    frames.close()
    assert threading.active_count() == threads - 1


def test_the_pipeline_s_errors_come_to_the_caller(solver) -> None:
    with pytest.raises(ValueError, match="preset is 'slow'"):
        list(solver.frames(solver.inpaint, seed=0, **problem(), preset="slow"))


def test_inpainting_gives_a_png_whose_known_pixels_are_the_picture_s(solver) -> None:
    *_, last = app._inpainting(solver)(edited(), *PLAIN, *WISHES)
    status, _, compare, file, curve, report = last
    assert status.startswith("Done")
    result = load_image(file["value"])
    known = np.ones((SIZE, SIZE), dtype=bool)
    known[HOLE[1] : HOLE[3], HOLE[0] : HOLE[2]] = False
    assert np.array_equal(np.asarray(result)[known], np.asarray(picture())[known])
    assert not np.array_equal(np.asarray(result)[~known], np.asarray(picture())[~known])
    assert [image.size for image in compare["value"]] == [(SIZE, SIZE)] * 2
    assert list(curve["what"].unique()) == ["residual", "expected of the truth"]
    assert report.startswith("residual")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "kernel"])
@pytest.mark.parametrize("simulate", [True, False])
def test_restoring_takes_every_damage_of_the_command_line(solver, task, simulate) -> None:
    values = [widget.value for widget in app._widgets(task).values()]
    small = picture().resize((16, 16)) if task.startswith("sr") and not simulate else picture()
    *_, last = app._restoring(solver)(small, simulate, task, 0.05, *values, *WISHES)
    before, after = last[2]["value"]
    assert last[0].startswith("Done")
    assert before.size == after.size


def test_the_page_paints_margins_without_a_stroke_and_grows_one(solver) -> None:
    paint = app._inpainting(solver)
    known = np.asarray(picture())
    *_, last = paint(edited(layers=[]), 0, 0, False, 0, 0, 32, 0, *WISHES)
    wide = np.asarray(load_image(last[3]["value"]))
    assert wide.shape == (SIZE, SIZE + 32, 3) and np.array_equal(wide[:, :SIZE], known)
    *_, last = paint(edited(), 4, 0, False, 0, 0, 0, 0, *WISHES)
    changed = (np.asarray(load_image(last[3]["value"])) != known).any(-1)
    left, top, _, bottom = HOLE
    assert changed[top:bottom, left - 4 : left].mean() > 0.9 and not changed[:, : left - 4].any()


@pytest.mark.parametrize(
    ("editor", "message"),
    [
        (None, "There is no picture"),
        (edited(background=None), "There is no picture"),
        (edited(layers=[Image.new("RGBA", (SIZE, SIZE))]), "Nothing is painted over"),
        (edited(layers=[]), "Nothing is painted over"),
    ],
)
def test_what_cannot_be_inpainted_is_a_warning_and_the_page_stays(solver, editor, message) -> None:
    assert kept_and_said(app._inpainting(solver), editor, *PLAIN, *WISHES) == message


def kept_and_said(handler, *given) -> str:
    """The beginning of the warning of a handler that leaves everything that the page shows as it was."""
    with pytest.warns(UserWarning) as said:
        (shown,) = app._telling(handler)(*given)
    assert shown == (gr.skip(),) * len(app._results()[1])
    return str(said[0].message).split(".")[0].split(";")[0]


def test_what_cannot_be_restored_is_a_warning_and_the_page_stays(solver) -> None:
    values = [widget.value for widget in app._widgets("kernel").values()]
    restore = app._restoring(solver)
    assert kept_and_said(restore, None, True, "sr4", 0.0, *values, *WISHES) == "There is no picture"
    assert kept_and_said(restore, picture(), True, "kernel", 0.0, *values, *WISHES) == "there is no kernel"
    negative = Image.fromarray(np.full((SIZE, SIZE), -1, dtype=np.int32))
    assert "mode I" in kept_and_said(restore, negative, True, "sr4", 0.0, *values, *WISHES)


def test_a_mistake_that_shows_in_the_solve_ends_as_a_warning_and_a_status(solver) -> None:
    with pytest.warns(UserWarning, match="preset is 'slow'"):
        *_, last = app._telling(app._inpainting(solver))(edited(), *PLAIN, "", "slow", *WISHES[2:])
    assert last[0].startswith("Not solved") and last[1:] == (gr.skip(),) * 5


def test_the_first_view_has_a_painted_example_and_sizes_are_told_before_a_run(solver) -> None:
    first = app._painted_example()
    _, hole = app._read_editor(first)
    assert 0.02 < (np.asarray(hole) > 0).mean() < 0.2
    sizes = {"native": 128, "stride": 8}
    assert "256 x 256, scaled to 128 x 128" in app._size_to_inpaint(sizes, first, *PLAIN)
    values = [widget.value for widget in app._widgets("sr4").values()]
    told = lambda simulate, task: app._size_to_restore(sizes, first["background"], simulate, task, 0.0, *values)  # noqa: E731
    assert "256 x 256, brought to 128 x 128 before it is damaged" in told(True, "sr4")
    assert "256 x 256, scaled to 32 x 32, solved at 128 x 128" in told(False, "sr4")
    assert told(False, "kernel").startswith("Cannot be solved: there is no kernel")
    assert (
        app._size_to_inpaint(sizes, None, *PLAIN) == app._size_to_restore(sizes, None, True, "sr4", 0.0, *values) == ""
    )


def test_a_measurement_of_16_bits_is_restored_at_its_depth(solver) -> None:
    ramp = np.linspace(0, 65535, SIZE * SIZE).round().reshape(SIZE, SIZE).astype(np.uint16)
    values = [widget.value for widget in app._widgets("deblur").values()]
    *_, last = app._restoring(solver)(Image.fromarray(ramp), False, "deblur", 0.0, *values, *WISHES)
    before, _ = last[2]["value"]
    assert np.abs(np.asarray(before)[..., 0] - ramp / 257).max() <= 1


def test_the_page_asks_nobody_for_fonts_and_sends_no_analytics(solver) -> None:
    assert not app.build(solver.inpaint).analytics_enabled
    assert app.THEME._stylesheets == []


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page as the command serves it, with the bundled checkpoint."""
    with subprocess.Popen(
        [sys.executable, "-m", "vml_ldm.cli", "app", "--no-browser"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path_factory.mktemp("served"),
    ) as server:
        line = next(line for line in server.stdout if "http" in line)
        yield next(word for word in line.split() if word.startswith("http"))
        server.terminate()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader", *quiet]
        )
        yield chromium.new_page(viewport={"width": 1280, "height": 1200})
        chromium.close()


def ended(tab) -> str:
    tab.wait_for_function("/^(Done|Stopped)/.test(document.querySelector('#status').innerText)", timeout=300_000)
    return tab.locator("#status").inner_text()


def test_a_picture_is_painted_over_and_one_restored_in_a_browser(address, browser, tmp_path) -> None:
    asked = []
    browser.on("request", lambda request: asked.append(request.url))
    browser.goto(address)
    browser.locator(".examples button:visible").first.click()
    browser.wait_for_function("document.querySelector('textarea').value != ''")
    browser.wait_for_timeout(8000)  # the editor draws the picture, on a busy machine too
    box = browser.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    browser.mouse.move(x - 40, y - 30)
    browser.mouse.down()
    browser.mouse.move(x + 40, y + 30, steps=8)
    browser.mouse.up()
    browser.locator("#inpaint").click()
    assert ended(browser).startswith("Done")
    assert "residual" in browser.locator("#report").inner_text() and browser.locator("#curve").is_visible()
    before, after = (browser.locator("#compare img").nth(i).get_attribute("src") for i in range(2))
    assert before != after  # the slider's two sides
    with browser.expect_download() as download:
        browser.locator("#download").click()
    download.value.save_as(tmp_path / "painted.png")
    from vml_ldm.assets import example_images

    truth = np.asarray(load_image(example_images("held_out")[0][0])).astype(int)
    changed = np.abs(np.asarray(load_image(tmp_path / "painted.png")) - truth).max(-1) > 0
    assert 0.01 < changed.mean() < 0.2  # the stroke and nothing else

    browser.get_by_role("tab", name="Restore").click()
    browser.locator("#task input").click()
    browser.get_by_role("option", name="jpeg").click()
    browser.locator("#parameter-quality").wait_for()
    assert not browser.locator("#parameter-std").is_visible()
    browser.locator(".examples button:visible").nth(1).click()
    browser.locator("#measured img").wait_for()
    browser.locator("#restore").click()
    browser.wait_for_function("document.querySelector('#status').innerText.startsWith('Level 1')", timeout=300_000)
    browser.locator("#stop").click()
    assert ended(browser).startswith("Stopped after level")
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
