"""The small decoder that stands in at all levels but the last."""

import pytest
import tiny
import torch
from diffusers import StableDiffusionInpaintPipeline

from vml_ldm import VMLInpaintPipeline, VMLRestorePipeline
from vml_ldm.operators import Grayscale
from vml_ldm.optimize import InnerStep
from vml_ldm.solve import vml_levels

CALL = {**tiny.HALF_PAINTED, "prompt": "a"}


def load(gradient_vae=None):
    pipe = VMLInpaintPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.gradient_vae = gradient_vae
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solve(pipe, **changes):
    return pipe(**{**CALL, "generator": torch.Generator().manual_seed(0), **changes})


@pytest.fixture(scope="module")
def pipe():
    return load(gradient_vae=tiny.gradient_vae())


@pytest.fixture
def two_decodes(monkeypatch):
    """Steps that take two decodes each, so that calls can be counted."""
    monkeypatch.setitem(vml_levels.__kwdefaults__, "step", InnerStep("analytic"))


def test_it_draws_at_all_levels_but_the_last(pipe, two_decodes):
    calls = solve(pipe).report.calls  # 4 levels of 2 inner steps: a decode and a probe at each
    assert (calls["draft"], calls["draft_vjp"]) == (3 * 4, 3 * 2)
    assert (calls["decode"], calls["decode_vjp"]) == (1 + 4 + 1, 2)  # the VAE's own error, the last level, the answer


@pytest.mark.parametrize("memory", ["auto", "low"])
def test_throughout_the_vae_draws_the_answer_alone(pipe, memory, two_decodes):
    out = solve(pipe, use_gradient_vae="throughout", memory=memory)
    calls = out.report.calls
    assert (calls["draft"], calls["draft_vjp"]) == (4 * 4, 4 * 2)
    assert calls["decode"] == 1 + 1 and "decode_vjp" not in calls  # the VAE's own error, the answer
    if memory == "low":
        assert out.report.memory["predicted"] < solve(pipe, memory="low").report.memory["predicted"]


def test_what_it_may_do_is_named(pipe):
    with pytest.raises(ValueError, match=r"use_gradient_vae is 'always'; expected True, False, None or 'throughout'"):
        solve(pipe, use_gradient_vae="always")
    with pytest.raises(ValueError, match="use_gradient_vae='throughout' came without a `gradient_vae`"):
        solve(load(), use_gradient_vae="throughout")


def test_the_text_report_counts_it_apart(pipe, two_decodes):
    assert "decoder 6 / 2 (small one 12 / 6)" in solve(pipe).report.text()


def test_it_can_be_left_out(pipe):
    out, without = solve(pipe, use_gradient_vae=False), solve(load())
    assert "draft" not in out.report.calls and torch.equal(out.images, without.images)


def test_its_weights_are_as_they_were(pipe):
    before = [(p.clone(), p.requires_grad) for p in pipe.gradient_vae.parameters()]
    solve(pipe)
    for (value, flag), after in zip(before, pipe.gradient_vae.parameters(), strict=True):
        assert torch.equal(value, after) and flag == after.requires_grad and after.grad is None


def test_a_folder_has_it_without_naming_it(tmp_path):
    folder = tiny.save(tmp_path / "model")
    assert VMLInpaintPipeline.from_pretrained(folder).gradient_vae is None
    tiny.gradient_vae().save_pretrained(tmp_path / "model" / "gradient_vae")
    pipe = VMLInpaintPipeline.from_pretrained(folder)
    assert pipe.gradient_vae is not None
    assert VMLRestorePipeline.from_pretrained(folder).gradient_vae is not None
    assert StableDiffusionInpaintPipeline.from_pretrained(folder).components.keys() == pipe.components.keys()
    assert VMLInpaintPipeline.from_pretrained(folder, gradient_vae=None).gradient_vae is None
    pipe.save_pretrained(tmp_path / "again")
    assert VMLInpaintPipeline.from_pretrained(tmp_path / "again").gradient_vae is not None


def test_it_comes_along_between_pipelines(pipe):
    assert VMLRestorePipeline.from_pipe(pipe).gradient_vae is pipe.gradient_vae
    stock = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    assert VMLInpaintPipeline.from_pipe(stock).gradient_vae is None


def test_restoring_takes_it_too(pipe):
    restore = VMLRestorePipeline.from_pipe(pipe)
    y = Grayscale()(CALL["image"])
    out = restore(
        y=y, operator=Grayscale(), num_inference_steps=12, inner_steps=1, output_type="pt", return_report=True
    )
    assert (out.report.levels, out.report.calls["draft_vjp"]) == (5, 4)


def test_what_does_not_fit_is_refused_before_any_work(pipe):
    with pytest.raises(ValueError, match=r"use_gradient_vae=True came without.*gradient_vae=AutoencoderTiny"):
        solve(load(), use_gradient_vae=True)
    with pytest.raises(ValueError, match="16 latent channels and stride 8; expected 4 and 8"):
        solve(load(gradient_vae=tiny.gradient_vae(latent_channels=16)))
    two = {"decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)}
    with pytest.raises(ValueError, match="4 latent channels and stride 2; expected 4 and 8"):
        solve(load(gradient_vae=tiny.gradient_vae(**two)))


def test_it_follows_the_vae_s_precision(pipe):
    half = VMLInpaintPipeline.from_pipe(pipe, gradient_vae=tiny.gradient_vae(), dtype=torch.float32)
    half.vae.to(torch.bfloat16)
    try:
        assert torch.isfinite(solve(half, num_inference_steps=6).images).all()
        assert half.gradient_vae.dtype == torch.bfloat16
    finally:
        half.vae.to(torch.float32)
