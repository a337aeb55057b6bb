"""What only a GPU shows: half precision with its kernels, plans in its memory, xformers."""

import pytest
import tiny
import torch
from diffusers.models.attention_processor import XFormersAttnProcessor
from torch import nn

from vml_ldm import VMLInpaintPipeline, VMLInpaintXLPipeline, vml_gradient
from vml_ldm.adapters.diffusers import Plan, StableDiffusionPrior, StepDown, plans
from vml_ldm.operators import Mask, Measurement

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
LEVEL = {"alpha": 0.7, "sigma": 0.7}
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
CALL = {**tiny.HALF_PAINTED, "prompt": "a hat"}


@pytest.fixture(autouse=True)
def full_float32():
    """Convolutions not in TensorFloat-32, whose rounding would hide a wrong gradient."""
    found, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = found


def load(cls=VMLInpaintPipeline, parts=None, **options):
    parts = tiny.components() if parts is None else parts
    pipe = cls(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, DEVICE)
    return pipe


def load_sd(**parts):
    return load(parts={**tiny.components(), **parts}, requires_safety_checker=False)


def solve(pipe, **changes):
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **changes})


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_prior(plan=None, dtype=torch.float32):
    condition = {"encoder_hidden_states": randn(2, 5, 128)}
    unet, vae = (nn.Module.to(network, DEVICE, dtype) for network in (tiny.unet(), tiny.vae()))
    prior = StableDiffusionPrior(unet=unet, vae=vae, scheduler=tiny.scheduler(), condition=condition)
    prior.plan = plan or Plan()
    return prior


def gradient(prior, size=8):
    known = torch.ones(1, 1, 8 * size, 8 * size, device=DEVICE)
    known[..., : 4 * size] = 0
    seen = Measurement(Mask(known), randn(2, 3, 8 * size, 8 * size, seed=1) * known, 0.1)
    with prior:
        return vml_gradient(randn(2, 4, size, size), prior=prior, measurement=seen, **LEVEL)[0]


@HALF
@pytest.mark.parametrize("plan", [Plan(), Plan(2, True, True)], ids=str)
def test_half_precision_has_float32_s_gradient_to_its_own_rounding(dtype, plan):
    prior = make_prior(plan, dtype)
    found = gradient(prior)
    assert found.dtype == torch.float32 and not prior.retries
    assert relative(found, gradient(make_prior())) < (0.02 if dtype == torch.float16 else 0.1)


@HALF
@pytest.mark.parametrize("memory", ["auto", "low"])
def test_half_precision_solves(dtype, memory):
    pipe = load_sd(unet=tiny.unet().to(dtype), vae=tiny.vae().to(dtype))
    pipe.gradient_vae = tiny.gradient_vae()
    out = solve(pipe, memory=memory)
    assert out.images.dtype == torch.float32 and out.images.isfinite().all() and not out.report.retries
    assert pipe.unet.dtype == pipe.vae.dtype == dtype and pipe.gradient_vae.device.type == DEVICE


def test_a_vae_that_overflows_in_float16_still_gives_an_image_and_the_report_counts_it():
    vae = tiny.vae()
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2e5)  # what it gives is beyond float16; the next norm takes it off again
    pipe = load_sd(vae=nn.Module.to(vae, torch.float16))
    with pytest.warns(UserWarning, match=r"the VAE decoder gave non-finite values in torch.float16"):
        out = solve(pipe)
    assert out.images.isfinite().all() and out.report.retries["the VAE decoder"] >= 1
    assert pipe.vae.dtype == torch.float16 and next(pipe.vae.parameters()).device.type == DEVICE


@pytest.mark.parametrize(
    "plan",
    [Plan(1), Plan(1, True), Plan(2, True), Plan(2, True, True), Plan(2, True, True, True)],
    ids=str,
)
def test_a_plan_has_the_gradient_of_one_graph(plan):
    assert relative(gradient(make_prior(plan)), gradient(make_prior())) < 1e-4


def test_plans_take_ever_less():
    found = []
    for plan in (Plan(), Plan(1), Plan(2, True, True, True)):
        prior = make_prior(plan)
        gradient(prior, size=8)  # loads kernels and their workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient(prior, size=48)
        found.append(torch.cuda.max_memory_allocated() - before)
        del prior
    assert found[1] < 0.8 * found[0] and found[2] < 0.8 * found[1], found


def test_a_solve_steps_down_where_memory_runs_out(caplog):
    """The process is left half of what the first plan takes above what it holds."""
    prior = make_prior()
    exact = gradient(prior, size=48)
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    gradient(prior, size=48)
    most = held + (torch.cuda.max_memory_allocated() - held) // 2
    tight = make_prior()
    tight.steps = StepDown(plans(2, (48, 48), None, denoiser=True, decoder=True, may_free=False))
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info()[1])
    try:
        with caplog.at_level("INFO"):
            found = gradient(tight, size=48)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("memory ran out" in record.getMessage() for record in caplog.records)
    assert relative(found, exact) < 1e-4


def test_force_upcast_runs_xl_s_float16_vae_in_float32_with_its_gradient():
    parts = tiny.xl_components()
    for part in parts.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, torch.float16)
    pipe = load(VMLInpaintXLPipeline, parts, add_watermarker=False)
    vae, seen = pipe.vae, []
    vae.decoder.register_forward_hook(lambda network, args, out: seen.append((args[0].dtype, out.requires_grad)))
    out = solve(pipe)
    assert {dtype for dtype, _ in seen} == {torch.float32} and any(gradient for _, gradient in seen)
    assert vae.dtype == torch.float16 and not out.report.retries and out.images.isfinite().all()


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("jacobian", ["exact", "free"])
def test_xformers_is_honoured_with_and_without_a_graph(jacobian, memory):
    pytest.importorskip("xformers.ops")
    pipe = load_sd()
    given = {"jacobian": jacobian, "memory": memory, "num_inference_steps": 4, "inner_steps": 1}
    images = solve(pipe, **given).images
    pipe.enable_xformers_memory_efficient_attention()
    assert any(isinstance(p, XFormersAttnProcessor) for p in pipe.unet.attn_processors.values())
    assert relative(solve(pipe, **given).images, images) < 1e-2
