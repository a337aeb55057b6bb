"""VMLRestorePipeline on tiny random networks: both solvers, many operators, batches, callbacks, errors, the report."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from vml_ldm import RedDiff, VMLRestorePipeline, red_diff, vml_map
from vml_ldm.adapters.diffusers import StableDiffusionPrior, scheduler_levels
from vml_ldm.evaluation.peers import ONLY_MASKS, PEERS, Peer
from vml_ldm.evaluation.tasks import box_mask
from vml_ldm.images import from_pil, to_pil
from vml_ldm.measuring import NEAR, settling
from vml_ldm.operators import (
    HDR,
    JPEG,
    Crop,
    Custom,
    Downsample,
    FourierLines,
    GaussianBlur,
    Grayscale,
    Mask,
    Measurement,
    PhaseRetrieval,
)
from vml_ldm.pipelines._common import to_y
from vml_ldm.presets import LEAST_NOISE, MOST_NOISE, PRESETS, RESTORE_STARTS, count_sampled, pick_levels
from vml_ldm.red import red_diff_levels

SIZE = 64
SHAPE = (SIZE, SIZE)
QUICK = {"height": SIZE, "width": SIZE, "num_inference_steps": 6, "inner_steps": 1, "guidance_scale": 1.0}
RED = {"solver": "red-diff", "num_inference_steps": 4, "inner_steps": None, "red": RedDiff(lr=0.1)}
SOLVERS = {"vml": {}, "red-diff": RED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = VMLRestorePipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(batch=1, seed=0):
    """Smooth colours, (B, 3, 64, 64) in [0.2, 0.8]."""
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * torch.nn.functional.interpolate(coarse, SHAPE, mode="bilinear")


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def call(pipe, operator=None, **arguments):
    operator = Downsample(4) if operator is None else operator
    y = {} if "y" in arguments else {"y": operator(pictures())}
    return pipe(**{"prompt": "a hat", "operator": operator, "generator": seeds(0), **QUICK, **y, **arguments})


def squared(image):
    """A callable that is no operator of ours: it has no start, no count, no adjoint."""
    return image[:, :, ::2].square()


OPERATORS = {
    "mask": Mask((pictures(seed=1)[:, :1] > 0.5).float()),
    "resolution": Downsample(4, "bicubic"),
    "blur": GaussianBlur(2.0),
    "grey": Grayscale(),
    "complex": FourierLines(SHAPE, 0.5),
    "jpeg": JPEG(10),
    "hdr": HDR(),
    "phase": PhaseRetrieval(),
    "chain": JPEG(50) @ GaussianBlur(1.0) @ Crop(SHAPE, 0, 8, 48, 40),
    "pair": Custom(lambda x: 2 * x, lambda x, c: 2 * c),
    "bare": squared,
}


def test_the_call_has_the_names_and_defaults_of_stock_and_ours_by_keyword():
    stock = inspect.signature(StableDiffusionPipeline.__call__).parameters
    ours = inspect.signature(VMLRestorePipeline.__call__).parameters
    named = [name for name in ours if ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert named == [name for name in stock if name not in ("eta", "guidance_rescale", "kwargs")]
    apart = {name for name in named if ours[name].default != stock[name].default}
    assert apart == {"guidance_scale"} and ours["guidance_scale"].default == 1.0
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in named)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_solved(pipe, name, solver):
    report = call(pipe, OPERATORS[name], **SOLVERS[solver], output_type="pt", return_report=True).report
    first, *_, last = (level["residual"][0] for level in report.trace)
    assert report.residual[0] < first and last < first


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_pipeline_is_the_core_solver_on_its_parts(pipe, solver):
    """Its latents are those of `vml_map` and `red_diff` on prior, levels, start and sigma_y put together by hand."""
    operator = GaussianBlur(1.5)
    y = operator(pictures(2))
    given = {"y": y, "sigma_y": [0.0, 0.1], "start": "measurement", **SOLVERS[solver]}
    out = call(pipe, operator, **given, generator=seeds(3, 4), output_type="latent", return_report=True)
    embeds, _ = pipe.encode_prompt(["a hat"] * 2, "cpu", 1, False)
    count = out.report.levels
    pipe.scheduler.set_timesteps(count if solver == "red-diff" else count_sampled(6, count, "measurement"))
    levels = scheduler_levels(pipe.scheduler, pipe.scheduler.timesteps)
    if solver == "vml":
        levels = levels.at(pick_levels(levels.noise, count, "measurement"))
    networks = {"unet": pipe.unet, "vae": pipe.vae, "scheduler": pipe.scheduler}
    measurement, generator = Measurement(operator, y, torch.tensor(out.report.effective_sigma_y)), seeds(3, 4)
    with StableDiffusionPrior(**networks, condition={"encoder_hidden_states": embeds}) as prior, torch.no_grad():
        z = prior.encode(measurement.guess(SHAPE, noise=torch.tensor([0.0, 0.1]), tolerance=NEAR))
        common = {"prior": prior, "measurement": measurement, "schedule": levels, "generator": generator}
        if solver == "red-diff":
            solution = red_diff(z, **common, lr=0.1)
        else:
            (alpha, sigma), noise = (
                levels.scales(0),
                torch.cat([torch.randn(1, *z.shape[1:], generator=g) for g in generator]),
            )
            step = settling(measurement, torch.tensor([0.0, 0.1]))
            solution = vml_map(alpha * z + sigma * noise, **common, inner_steps=1, correct_steps=2, settle=step)
    torch.testing.assert_close(out.images, solution.latent)
    assert out.report.residual == pytest.approx(solution.residual.tolist(), rel=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_is_its_images_alone(pipe, solver):
    operator, common = squared, {**SOLVERS[solver], "output_type": "pt"}
    y = operator(pictures(2))
    batch = call(pipe, operator, y=y, prompt=["a hat", "a cat"], sigma_y=[0.1, 0.0], generator=seeds(1, 2), **common)
    for i, (prompt, std) in enumerate([("a hat", 0.1), ("a cat", 0.0)]):
        alone = call(pipe, operator, y=y[i : i + 1], prompt=prompt, sigma_y=std, generator=seeds(1 + i), **common)
        torch.testing.assert_close(batch.images[i : i + 1], alone.images, atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_seed_same_image_other_seed_another(pipe, solver):
    one, same, other = (call(pipe, generator=seeds(s), output_type="pt", **SOLVERS[solver]).images for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_one_prompt_serves_several_y_and_each_may_come_in_copies(pipe):
    y = Downsample(4)(pictures(2))
    report = call(pipe, y=y, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), return_report=True).report
    assert report.vae_error[0] == report.vae_error[1] != report.vae_error[2] == report.vae_error[3]
    assert len(set(report.residual)) == 4


def test_the_budget_counts_denoiser_evaluations_and_corrections(pipe):
    def told(**arguments):
        return call(pipe, **arguments, return_report=True).report

    report = told(num_inference_steps=12, inner_steps=2)
    assert (report.levels, report.correct_steps, report.calls["denoise"], report.solver) == (2, 4, 6, "vml")
    report = told(num_inference_steps=12, inner_steps=2, start="noise")
    assert (report.levels, report.correct_steps, report.calls["denoise"]) == (3, 2, 9)
    for start in ("noise", "outline"):
        report = told(num_inference_steps=60, inner_steps=12, start=start)  # a sixth would be 10
        assert (report.levels, report.correct_steps, report.calls["denoise"]) == (4, 8, 52)
    report = told(num_inference_steps=12, inner_steps=2, correct_steps=0)
    assert (report.levels, report.correct_steps, report.calls["denoise"]) == (4, 0, 12)
    report = told(**{**RED, "num_inference_steps": 7})
    assert (report.levels, report.inner_steps, report.calls["denoise"], report.solver) == (7, 1, 7, "red-diff")
    assert "denoise_vjp" not in report.calls and report.jacobian == "free"
    assert told(**{**RED, "num_inference_steps": 8, "preset": "fast"}).calls["denoise"] == 4
    assert told(**{**RED, "red": RedDiff(order=[0, 3, 3])}).calls["denoise"] == 3


def test_the_vae_s_error_is_what_the_operator_sees_of_its_round_trip_not_of_the_noise(pipe):
    """A regularised start of a noisy y does not give y back; that difference is none of the VAE's."""
    operator = GaussianBlur(2.0)
    y = operator(pictures()) + 0.2 * torch.randn(1, 3, *SHAPE, generator=torch.Generator().manual_seed(5))
    report = call(pipe, operator, y=y, sigma_y=0.2, return_report=True).report
    start = Measurement(operator, y, 1.0).guess(SHAPE, noise=0.2, tolerance=NEAR)
    with torch.no_grad():
        latent = pipe.vae.encode(2 * start - 1).latent_dist.mode()
        trip = pipe.vae.decode(latent).sample / 2 + 0.5
    error = (operator(start) - operator(trip)).square().mean().sqrt().item()
    assert report.vae_error[0] == pytest.approx(error, rel=1e-4)
    assert report.effective_sigma_y[0] == pytest.approx(np.hypot(0.2, error / 4), rel=1e-4)
    assert report.expected[0] == pytest.approx(np.hypot(0.2, error), rel=1e-4)


def test_the_report_measures_the_image(pipe):
    operator = HDR()
    out = call(pipe, operator, output_type="pt", return_report=True)  # not linear: no step in pixels
    error = (operator(pictures()) - operator(out.images)).square().mean().sqrt()
    assert out.report.residual[0] == pytest.approx(error.item(), rel=0.05)  # of the image before it is clamped
    assert "vml, 2 levels, up to 1 inner steps" in out.report.text()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_step_in_pixels_gives_what_the_decoder_could_not_draw_of_a_noiseless_y(pipe, solver):
    operator, kwargs = Downsample(4), {"output_type": "pt", "return_report": True, **SOLVERS[solver]}
    drawn = call(pipe, operator, pixel_step=False, **kwargs)
    settled = call(pipe, operator, **kwargs)
    y, inside = operator(pictures()), settled.images.clamp(0.001, 0.999) == settled.images
    error = lambda image: (y - operator(image)).square().mean().sqrt()  # noqa: E731
    assert inside.float().mean() > 0.9 and error(settled.images) < 0.2 * error(drawn.images)
    assert settled.report.residual == drawn.report.residual  # told of the decoder's image
    nothing = call(pipe, JPEG(50), pixel_step=True, **kwargs).images
    assert torch.equal(nothing, call(pipe, JPEG(50), pixel_step=False, **kwargs).images)


def test_the_levels_are_the_scheduler_s_own_and_end_above_the_least_noise():
    assert pick_levels([9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.05], 3) == [1, 3, 5]
    assert pick_levels([9.0, 4.0, 0.05], 5) == [0, 1] and pick_levels([0.05, 0.01], 2) == [0, 1]
    scheduler = tiny.components()["scheduler"]
    for steps in (10, 50):
        scheduler.set_timesteps(steps)
        noise = scheduler_levels(scheduler, scheduler.timesteps).noise
        chosen = [noise[i] for i in pick_levels(noise, 5)]
        assert len(chosen) == 5 and chosen[-1] == min(value for value in noise if value >= LEAST_NOISE)


@pytest.mark.parametrize("start", MOST_NOISE)
def test_from_the_measurement_the_levels_begin_at_a_noise_of_one_and_from_an_outline_of_three(start):
    first = {"measurement": [3, 5, 7], "outline": [2, 5, 7]}[start]
    assert pick_levels([9.0, 4.0, 2.0, 1.0, 0.7, 0.5, 0.3, 0.2, 0.05], 3, start) == first
    assert pick_levels([9.0, 4.0, 0.05], 2, start) == [1] and pick_levels([0.5], 3, start) == [0]
    scheduler = tiny.components()["scheduler"]
    for steps, count in ((4, 4), (50, 4), (50, 7)):
        scheduler.set_timesteps(count_sampled(steps, count, start))
        noise = scheduler_levels(scheduler, scheduler.timesteps).noise
        chosen = [noise[i] for i in pick_levels(noise, count, start)]
        assert len(chosen) == count and chosen[0] == max(value for value in noise if value <= MOST_NOISE[start])
        assert chosen[-1] == min(value for value in noise if value >= LEAST_NOISE)


HALF = torch.ones(1, 1, *SHAPE)
HALF[..., SIZE // 2 :] = 0
BOX = torch.ones(1, 1, *SHAPE)
BOX[..., 24:40, 24:40] = 0


@pytest.mark.parametrize("preset", PRESETS)
def test_what_leaves_most_of_a_picture_open_takes_more_levels_of_fewer_steps_at_the_same_cost(pipe, preset):
    given = {"preset": preset, "inner_steps": None, "num_inference_steps": 50, "return_report": True}
    few, clipped, *others = (
        call(pipe, operator, y=operator(pictures()), **given).report
        for operator in (Mask(BOX), HDR(2.0), Mask(HALF), Grayscale())
    )
    assert clipped.levels == few.levels
    for many in others:
        assert many.levels > few.levels and many.inner_steps == PRESETS[preset].inner_steps // 2
    budget = 50 * PRESETS[preset].budget
    for report in (few, *others):
        spent = report.calls["denoise"] + report.correct_steps
        assert budget - (report.inner_steps + 1) < spent <= budget  # what is left would pay no other level
        if (report, preset) != (few, "best"):  # whose levels cost 16, of which the budget of 100 leaves 12
            assert spent == pytest.approx(budget, rel=0.1)


STARTS = {
    "blur": (GaussianBlur(2.0), "measurement"),
    "grey": (Grayscale(), "outline"),
    "scattered": (
        Mask((torch.rand(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0)) > 0.5).float()),
        "measurement",
    ),
    "bare": (squared, "measurement"),
    "hole": (Mask(HALF), "noise"),
    "hole in grey": (Grayscale() @ Mask(HALF), "noise"),
    "hole behind a blur": (Mask(HALF) @ GaussianBlur(1.0), "noise"),
    "burnt out": (HDR(2.0), "noise"),
}


@pytest.mark.parametrize("name", STARTS)
def test_it_starts_from_the_measurement_unless_a_latent_or_a_colour_is_not_seen(pipe, name):
    """The default start gives the image of the one it stands for, bit for bit."""
    operator, start = STARTS[name]
    image = pictures()
    image[..., 40:, 40:] = 1
    problem = {"y": operator(image), "output_type": "pt"}
    by_default = call(pipe, operator, **problem).images
    for other in RESTORE_STARTS:
        assert torch.equal(by_default, call(pipe, operator, start=other, **problem).images) == (other == start)


@pytest.mark.parametrize("name", PEERS)
def test_a_function_is_a_solver(pipe, name):
    """The solvers of other papers run on the pipeline's prior, levels and start, two images in one call as alone.

    Before the step in pixels, whose conjugate gradients stop at a tolerance: rounding can make it a step more or less.
    """
    operator = Mask(box_mask(*SHAPE)) if name in ONLY_MASKS else Downsample(4)
    together = {"prompt": "a hat", "output_type": "pt", "solver": Peer(name), "pixel_step": False}
    y = operator(pictures(2))
    calls = [call(pipe, operator, y=y[i : i + 1], generator=seeds(i), inner_steps=None, **together) for i in (0, 1)]
    out = call(pipe, operator, y=y, generator=seeds(0, 1), inner_steps=None, return_report=True, **together)
    for i in (0, 1):
        torch.testing.assert_close(out.images[i], calls[i].images[0], atol=1e-4, rtol=0)
    assert out.report.solver == name and out.report.levels == 6
    assert out.report.calls["denoise"] == (11 if name == "ding" else 6)
    assert f"{name}, 6 levels, steps of its own" in out.report.text()


def test_what_a_function_is_not_told_or_does_not_return_is_refused(pipe):
    with pytest.raises(ValueError, match="inner_steps is 1 with solver='psld', which has none; bind its settings"):
        call(pipe, solver=Peer("psld"))
    with pytest.raises(ValueError, match="`red` came with solver='psld'"):
        call(pipe, solver=Peer("psld"), inner_steps=None, red=RedDiff())
    with pytest.raises(TypeError, match=r"`solver` returned Tensor; expected a vml_ldm\.Solution"):
        call(pipe, solver=lambda x_T, **given: x_T, inner_steps=None)


def test_operators_keep_their_precision_under_the_caller_s_autocast():
    operator, x = Downsample(4, "bicubic"), pictures(2)
    measurement = Measurement(operator, operator(x), 0.1)
    plain = measurement.guess(SHAPE, noise=0.1), measurement.residual(x / 2), measurement.start()
    with torch.autocast("cpu", torch.bfloat16):
        cast = measurement.guess(SHAPE, noise=0.1), measurement.residual(x / 2), measurement.start()
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", [Downsample(4), squared])
def test_a_start_from_the_measurement_is_its_guess_encoded(pipe, operator):
    """RED-diff that hardly steps shows where it started."""
    guess = Measurement(operator, operator(pictures()), 1.0).guess(SHAPE, tolerance=NEAR)
    with torch.no_grad():
        z = pipe.vae.encode(2 * guess - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    out = call(pipe, operator, **{**RED, "red": RedDiff(lr=1e-9)}, output_type="latent")
    torch.testing.assert_close(out.images, z, atol=1e-6, rtol=0)


def test_latents_are_the_start_s_noise_and_red_diff_s_start(pipe):
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        call(pipe, latents=noise, generator=seeds(7), output_type="pt").images,
        call(pipe, latents=noise, generator=seeds(7), output_type="pt").images,
    )
    seen = []
    red = {**RED, "start": "noise", "red": RedDiff(lr=1e-9), "latents": noise, "output_type": "latent"}
    out = call(pipe, **red, callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]))
    assert torch.allclose(out.images, noise, atol=1e-6) and len(seen) == 4


def test_output_types_are_one_image(pipe):
    tensor = call(pipe, output_type="pt").images
    assert tensor.shape == (1, 3, *SHAPE) and tensor.min() >= 0 and tensor.max() <= 1
    assert np.array_equal(call(pipe, output_type="np").images, tensor.permute(0, 2, 3, 1).numpy())
    (image,) = call(pipe).images
    assert np.array_equal(np.asarray(image), np.asarray(to_pil(tensor)[0]))
    assert call(pipe, output_type="latent").images.shape == (1, 4, 8, 8)
    images, flags, report = call(pipe, return_dict=False, return_report=True)
    assert images[0].size == SHAPE and flags is None and len(call(pipe, return_dict=False)) == 2
    assert report.calls == call(pipe, return_report=True).report.to_dict()["calls"]


def test_no_prompt_is_an_empty_prompt_and_embeddings_are_a_prompt(pipe):
    guided = {"guidance_scale": 3.0, "output_type": "pt"}
    assert torch.equal(call(pipe, prompt=None, **guided).images, call(pipe, prompt="", **guided).images)
    embeds, negative = pipe.encode_prompt("a hat", "cpu", 1, True)
    by_embeds = call(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, **guided).images
    assert torch.equal(by_embeds, call(pipe, **guided).images)
    assert not torch.equal(by_embeds, call(pipe, prompt="", **guided).images)


@pytest.mark.parametrize("solver", SOLVERS)
def test_callbacks_count_levels_and_change_tensors(pipe, solver):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    names = ["latents", "negative_prompt_embeds", "prompt_embeds"]
    asked = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names, "guidance_scale": 3.0}
    out = call(
        pipe,
        **{**SOLVERS[solver], "red": RedDiff(order="ascending") if solver != "vml" else None},
        **asked,
        output_type="latent",
    )
    assert [step for step, *_ in seen] == list(range(2 if solver == "vml" else 4)) and seen[0][2] == names
    times = [t for _, t, _ in seen]
    assert times == sorted(times, reverse=solver == "vml") and len(set(times)) == len(times)
    assert not out.images.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_interrupted_call_returns_its_last_clean_estimate(pipe, solver):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return tensors

    out = call(pipe, callback_on_step_end=stop, return_report=True, **SOLVERS[solver])
    assert len(out.report.trace) == 1 and out.images[0].size == SHAPE


def test_inside_inference_mode(pipe):
    expected = call(pipe, squared, output_type="pt").images
    with torch.inference_mode():
        assert torch.equal(call(pipe, squared, output_type="pt").images, expected)


def test_the_file_is_a_custom_pipeline(folder):
    file = Path(inspect.getfile(VMLRestorePipeline))
    loaded = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(file), trust_remote_code=True, safety_checker=None
    )
    assert type(loaded).__name__ == "VMLRestorePipeline"


def test_y_is_taken_as_it_is_from_tensors_pictures_and_arrays():
    image = to_pil(pictures())[0]
    pixels, grey = from_pil(image), image.convert("L")
    assert torch.equal(to_y(image), pixels) and torch.equal(to_y(pixels), pixels)
    assert torch.equal(to_y(np.asarray(image)), pixels)
    assert torch.equal(to_y([image, np.asarray(image)[None]]), torch.cat([pixels, pixels]))
    assert to_y(grey).shape == (1, 1, *SHAPE) and torch.equal(to_y(np.asarray(grey)), to_y(grey))
    assert torch.equal(to_y(grey), from_pil(grey)[:, :1])
    noisy = torch.tensor([[-0.5, 1.5]], dtype=torch.float64)
    assert to_y(noisy).tolist() == noisy.tolist() and to_y(noisy).dtype == torch.float32
    assert to_y(noisy.to(torch.complex128)).dtype == torch.complex64
    assert to_y(np.full((5, 7), -0.5)).min() == -0.5


def test_the_settings_of_red_diff_are_its_own_arguments():
    for function in (red_diff, red_diff_levels):
        parameters = inspect.signature(function).parameters
        assert all(parameters[name].default == value for name, value in vars(RedDiff()).items())
        assert set(parameters) - set(vars(RedDiff())) == {"mu", "prior", "measurement", "schedule", "generator"}
    with pytest.raises(ValueError, match="weighting is 'cubic'; expected one of"):
        RedDiff(weighting="cubic")


@pytest.fixture
def asleep(pipe, monkeypatch):
    """The pipeline with networks that must not run."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a network ran")

    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        monkeypatch.setattr(network, "forward", refuse)
    monkeypatch.setattr(pipe.vae, "encode", refuse)
    monkeypatch.setattr(pipe.vae, "decode", refuse)
    return pipe


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"y": torch.rand(1, 3, 8, 8)},
            r"maps an image \(1, 3, 64, 64\) to \(1, 3, 16, 16\), y has shape \(1, 3, 8, 8\)",
        ),
        ({"height": 128}, r"images of 128 x 64 pixels, the model's size; y has shape \(1, 3, 16, 16\)"),
        ({"height": 60}, "divisible by 8"),
        ({"operator": Crop((32, 32), 0, 0, 8, 8), "y": torch.rand(1, 3, 8, 8)}, "the model's size"),
        ({"operator": lambda x: x.detach(), "y": pictures()}, "has no gradient in its image"),
        ({"y": torch.zeros(1, 3, 16, 16, dtype=torch.int64)}, "`y` is of type int64"),
        ({"y": torch.full((1, 3, 16, 16), torch.nan)}, "`y` has values that are not finite"),
        ({"y": [torch.rand(1, 3, 16, 16), torch.rand(1, 3, 8, 8)]}, "expected one shape"),
        ({"y": np.zeros((16, 16, 7))}, r"array of shape \(16, 16, 7\); expected"),
        ({"y": torch.rand(3, 3, 16, 16), "prompt": ["a", "b"]}, "3 of `y` came for 2 prompts; expected 1 or 2"),
        ({"sigma_y": -0.1}, "sigma_y is -0.1; expected >= 0"),
        ({"sigma_y": [0.1, 0.2]}, r"sigma_y has shape \(2,\); expected a number, or one for each of 1 images"),
        ({"solver": "none"}, "solver is 'none'; expected one of 'vml', 'red-diff'"),
        ({"start": "here"}, "start is 'here'; expected one of 'noise', 'measurement'"),
        ({"preset": "turbo"}, "preset is 'turbo'; expected"),
        ({"jacobian": "half"}, "jacobian is 'half'; expected"),
        ({"inner_steps": -1}, "inner_steps is -1; expected"),
        ({"renoise": 2.0}, "renoise is 2.0; expected"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; expected a whole number >= 1"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; expected one of 'pil'"),
        ({"generator": seeds(0, 1)}, "2 generators came for 1 images"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"`latents` has shape \(1, 4, 4, 4\); expected \(1, 4, 8, 8\)"),
        ({"red": RedDiff()}, "`red` came with solver='vml'"),
        ({**RED, "jacobian": "exact"}, "jacobian is 'exact' with solver='red-diff', which has none"),
        ({**RED, "latents": torch.zeros(1, 4, 8, 8)}, "expected start='noise', or no `latents`"),
        ({**RED, "red": RedDiff(order=[4])}, "each from 0 to 3"),
        ({"callback_on_step_end_tensor_inputs": ["mask"]}, "`callback_on_step_end_tensor_inputs` has to be in"),
    ],
)
def test_bad_input_is_refused_before_any_network_runs(asleep, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(asleep, **arguments)


def test_what_is_no_operator_no_y_or_no_settings_is_a_type_error(asleep):
    for arguments, message in (
        ({"operator": "blur", "y": pictures()}, "`operator` is str; expected a callable"),
        ({"y": "photo.png"}, "`y` is str; expected a tensor"),
        ({**RED, "red": {"lr": 1.0}}, "`red` is dict; expected a vml_ldm.RedDiff"),
        ({"jacobean": "free"}, "jacobean"),
    ):
        with pytest.raises(TypeError, match=message):
            call(asleep, **arguments)


def test_an_inpainting_unet_is_refused(pipe):
    other = VMLRestorePipeline(**{**pipe.components, "unet": tiny.unet(9)}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="the UNet takes 9 channels; expected 4"):
        call(other)


def test_clip_skip_takes_an_earlier_layer(pipe):
    operator = GaussianBlur(1.5)
    call_with = lambda **options: call(pipe, operator, y=operator(pictures(1)), output_type="pt", **options).images  # noqa: E731
    plain, none, one = call_with(), call_with(clip_skip=0), call_with(clip_skip=1)
    assert torch.allclose(plain, none, atol=1e-4) and not torch.allclose(plain, one, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_offloaded_to_a_disk_pull_back_the_same(tmp_path, solver):
    parts = tiny.components()
    pipe = VMLRestorePipeline(**parts, requires_safety_checker=False)
    operator = GaussianBlur(1.5)
    problem = {"y": operator(pictures(1)), "output_type": "pt", "pixel_step": False, **SOLVERS[solver]}
    if solver == "vml":
        problem["correct_steps"] = 0  # conjugate steps through random weights make much of the last digit
    images = call(pipe, operator, generator=seeds(0), **problem).images
    pipe.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert torch.allclose(call(pipe, operator, generator=seeds(0), **problem).images, images, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_it_solves_under_the_caller_s_autocast(pipe, solver):
    with torch.autocast("cpu", torch.bfloat16):
        images = call(pipe, Downsample(4), output_type="pt", **SOLVERS[solver]).images
    assert images.dtype == torch.float32 and torch.isfinite(images).all()
