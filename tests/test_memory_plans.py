"""`memory=`: plans keep the gradient and the networks as they are, take what was predicted, and fit their budget."""

import copy
import re

import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from vml_ldm import VMLInpaintPipeline, VMLInpaintSD3Pipeline, VMLRestorePipeline, VMLRestoreXLPipeline, vml_gradient
from vml_ldm.adapters.diffusers import StableDiffusionPrior
from vml_ldm.adapters.diffusers.footprint import Footprints, LiveBytes, graph_bytes
from vml_ldm.adapters.diffusers.memory import (
    Chosen,
    Fitted,
    Footprint,
    Plan,
    StepDown,
    choose,
    free_bytes,
    parse_memory,
    plans,
    predict,
)
from vml_ldm.operators import Downsample, Mask, Measurement
from vml_ldm.red import RedDiff

CPU = torch.device("cpu")
CHECKPOINTED = Plan(checkpointed=1)
AGAIN = Plan(denoiser_again=True)
TWICE = Plan(checkpointed=2, denoiser_again=True)
TWO_PASSES = Plan(checkpointed=1, denoiser_again=True, decoder_again=True)
BY_IMAGE = Plan(denoiser_again=True, decoder_again=True, by_image=True)
EXACT = (CHECKPOINTED, AGAIN, TWICE, Plan(decoder_again=True), TWO_PASSES, BY_IMAGE)
LEVEL = {"alpha": 0.7, "sigma": 0.7}


def make_prior(plan=None, **parts):
    parts = {"unet": tiny.unet(), "vae": tiny.vae(), **parts}
    condition = {"encoder_hidden_states": randn(2, 5, 128)}
    prior = StableDiffusionPrior(**parts, scheduler=tiny.scheduler(), condition=condition)
    prior.plan = plan or Plan()
    return prior


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measurement(h=8, w=8):
    known = torch.ones(1, 1, 8 * h, 8 * w)
    known[..., : 4 * w] = 0
    return Measurement(Mask(known), torch.rand(2, 3, 8 * h, 8 * w) * known, 0.1)


def state(*networks):
    """Everything of a module that is no module, weight or hook, and the weights' flags."""
    plain = [
        {name: value for name, value in vars(module).items() if not name.startswith("_") or "checkpoint" in name}
        for network in networks
        for module in network.modules()
    ]
    return plain, [p.requires_grad for network in networks for p in network.parameters()]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("plan", EXACT, ids=str)
def test_a_plan_has_the_gradient_of_one_graph(plan):
    x, seen = randn(2, 4, 8, 8), measurement()
    with make_prior() as prior:
        expected, expected_nll = vml_gradient(x, prior=prior, measurement=seen, **LEVEL)
    with make_prior(plan) as prior:
        gradient, nll = vml_gradient(x, prior=prior, measurement=seen, **LEVEL)
    assert relative(gradient, expected) < 1e-5 and relative(nll, expected_nll) < 1e-5


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("small", [False, True])
def test_tiles_draw_and_pull_back_as_the_tiling_vae_does(small, tiles, checkpointed):
    own = tiny.gradient_vae() if small else tiny.vae()
    own.tile_latent_min_size, own.tile_sample_min_size = 16, 128
    tiling = copy.deepcopy(own)
    tiling.tile_latent_min_size, tiling.tile_sample_min_size = 16 // tiles, 128 // tiles
    tiling.enable_tiling()
    z, cotangent = randn(2, 4, 20, 24).requires_grad_(), randn(2, 3, 160, 192, seed=1)
    plan = Plan(checkpointed, decoder_again=True, by_image=True, tiles=tiles)
    with make_prior(plan, **({} if small else {"vae": own})) as prior:
        drawn = prior.draft(own) if small else prior
        image, pull = drawn.decode_pullback(z)
        gradient, again = pull(cotangent), drawn.decode(z)
        scale = prior.vae.config.scaling_factor if not small else own.config.scaling_factor
    expected = tiling.decode(z / scale).sample / 2 + 0.5
    (expected_gradient,) = torch.autograd.grad(expected, z, cotangent)
    assert relative(image, expected) < 1e-6 and torch.equal(again, image)
    assert relative(gradient, expected_gradient) < 1e-5
    assert not own.use_tiling and own.tile_latent_min_size == 16


def test_tiles_encode_as_the_tiling_vae_does():
    vae, image = tiny.vae(), torch.rand(2, 3, 96, 96)
    with make_prior(Plan(tiles=1), vae=vae) as prior, torch.no_grad():
        latent = prior.encode(image)
    vae.enable_tiling()
    with torch.no_grad():
        expected = vae.encode(2 * image - 1).latent_dist.mode() * vae.config.scaling_factor
    assert relative(latent, expected) < 1e-5


def test_one_tile_of_one_image_has_a_graph_at_a_time():
    prior, seen = make_prior(Plan(decoder_again=True, by_image=True, tiles=1)), []
    handle = prior.vae.decoder.register_forward_hook(
        lambda module, args, out: seen.append((tuple(args[0].shape), out.requires_grad))
    )
    with prior:
        image, pull = prior.decode_pullback(randn(2, 4, 8, 16))
        pull(torch.ones_like(image))
    handle.remove()
    drawn, pulled = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert {shape[0] for shape, _ in seen} == {1} and max(shape[3] for shape, _ in seen) == 8
    assert not any(graph for _, graph in drawn) and all(graph for _, graph in pulled)


@pytest.mark.parametrize("plan", [*EXACT, Plan(1, True, True, True, 1)], ids=str)
def test_networks_are_left_as_found_also_after_an_exception(plan):
    prior = make_prior(plan)
    prior.vae.enable_gradient_checkpointing()
    prior.vae.encoder.gradient_checkpointing = False
    found = state(prior.unet, prior.vae)
    with prior:
        vml_gradient(randn(2, 4, 16, 16), prior=prior, measurement=measurement(16, 16), **LEVEL)
    assert state(prior.unet, prior.vae) == found
    with pytest.raises(KeyError), prior:
        prior.decode_pullback(randn(2, 4, 16, 16))
        raise KeyError
    assert state(prior.unet, prior.vae) == found


def test_layers_checkpointed_one_by_one_take_less_than_blocks():
    found = []
    for own in (True, False):
        prior = make_prior(Plan(0 if own else 1))
        if own:
            prior.vae.enable_gradient_checkpointing()
        with prior, LiveBytes() as count:
            count.leave_out(prior.vae.parameters())
            image, pull = prior.decode_pullback(randn(2, 4, 24, 24))
            pull(torch.ones_like(image))
        found.append(count.peak)
    assert found[1] < 0.8 * found[0], found


@pytest.mark.parametrize(("plan", "draft_plan"), [(TWICE, Plan()), (Plan(), TWICE), (TWICE, None)])
def test_levels_with_a_small_decoder_have_a_plan_of_their_own(plan, draft_plan):
    """A denoiser that runs again is called twice for one gradient, and a checkpointed layer once more than that."""
    x, seen, prior, ran = randn(2, 4, 8, 8), measurement(), make_prior(plan), []
    found = state(prior.unet, prior.vae)
    prior.draft_plan = draft_plan
    layer = prior.unet.down_blocks[0].resnets[0]
    handles = [m.register_forward_pre_hook(lambda m, _: ran.append(m)) for m in (prior.unet, layer)]
    with make_prior() as other:
        expected = [vml_gradient(x, prior=p, measurement=seen, **LEVEL)[0] for p in (other.draft(small()), other)]
    with prior:
        for drawing, kept, gradient in zip(
            (prior.draft(small()), prior), (draft_plan or plan, plan), expected, strict=True
        ):
            ran.clear()
            assert relative(vml_gradient(x, prior=drawing, measurement=seen, **LEVEL)[0], gradient) < 1e-5
            runs = 1 + kept.denoiser_again
            assert ran.count(prior.unet) == runs
            assert ran.count(layer) == runs + bool(kept.checkpointed)
    for handle in handles:
        handle.remove()
    assert state(prior.unet, prior.vae) == found


def small():
    return tiny.gradient_vae()


LADDER = list(plans(2, (8, 8), 8, denoiser=True, decoder=True, may_free=True))
NEEDS = dict(zip(LADDER, (1000, 500, 400, 405, 410, 300, 50), strict=True))


def pick(memory, free=None, ladder=LADDER):
    return choose(memory, ladder, NEEDS.get, free)


def test_the_ladder_holds_what_makes_a_difference():
    names = [str(plan) for plan in plans(2, (128, 128), 64, denoiser=True, decoder=True, may_free=True)]
    assert names[:3] == ["one graph", "one graph, checkpointed", "one graph at a time, checkpointed"]
    assert names[3] == "one graph at a time, checkpointed twice"
    assert names[4:6] == ["two passes, checkpointed twice", "two passes, checkpointed twice, image by image"]
    assert names[6] == "two passes, checkpointed, image by image, tiles"
    assert [name.split(", ")[3:] for name in names[6:]] == [
        ["tiles"], ["half tiles"], ["quarter tiles"], ["quarter tiles", "Jacobian-free"]
    ]  # fmt: skip
    through = {"denoiser": False, "decoder": True, "may_free": True}
    halves = [Plan(1, False, True, False, n) for n in (2, 4)]
    assert list(plans(1, (64, 64), 64, **through))[1:] == [CHECKPOINTED, Plan(2), Plan(2, False, True), *halves]
    assert list(plans(1, (64, 64), None, **through, small=True)) == [Plan(), Plan(decoder_again=True)]
    assert list(plans(1, (64, 64), None, denoiser=False, decoder=False, may_free=True)) == [Plan()]
    assert not any(plan.free for plan in plans(1, (8, 8), 8, denoiser=True, decoder=True, may_free=False))


@pytest.mark.parametrize(
    ("memory", "free", "place"),
    [("fast", 1, 0), ("auto", 2000, 0), ("auto", 1200, 1), ("auto", 10, 6), ("low", None, 5),
     (1000, None, 0), (999, None, 1), (450, None, 2), (399, 10**9, 5), (299, None, 6), (50, None, 6)],
)  # fmt: skip
def test_the_choice_follows_from_the_budget(memory, free, place):
    chosen = pick(memory, free)
    assert chosen.plan == LADDER[place] and chosen.predicted == NEEDS[LADDER[place]]


def test_low_saves_nothing_that_is_taken_elsewhere():
    assert choose("low", LADDER, NEEDS.get, None, taken=450).plan == LADDER[2]
    assert choose("low", LADDER, NEEDS.get, None, taken=2000).plan == LADDER[0]
    assert choose("low", LADDER, NEEDS.get, None, taken=10).plan == LADDER[5]


def test_steps_are_jacobian_free_at_all_levels_or_none():
    free, exact = Chosen(LADDER[-1], 10, 20), Chosen(Plan(), 15, 20)
    for fitted in (Fitted.of(free, exact), Fitted.of(exact, free)):
        assert fitted.full.plan.free and fitted.draft.plan.free and not fitted.is_exact
    assert Fitted.of(exact, None) == (exact, None) and Fitted.of(exact, exact).is_exact


def test_nothing_is_predicted_where_memory_is_plenty():
    """A prediction takes seconds: a default call of a small picture makes none."""
    asked = []
    plenty = choose("auto", LADDER, asked.append, 10**12, latents=64)
    assert plenty.plan == LADDER[0] and plenty.predicted is None and not asked
    assert choose("auto", LADDER, NEEDS.get, 2000, latents=64).predicted == NEEDS[LADDER[0]]


def test_an_impossible_budget_names_the_least():
    with pytest.raises(ValueError, match=r"memory is 49 B; expected at least 50 B above .* Jacobian-free\)"):
        pick(49)
    with pytest.raises(ValueError, match="at least 300 B"):
        pick(49, ladder=LADDER[:-1])


def test_what_cannot_be_predicted_is_said():
    unknown = lambda plan: None  # noqa: E731
    assert choose("auto", LADDER, unknown, 10**9).plan == LADDER[0]
    assert choose("low", LADDER, unknown, None).plan == LADDER[5]
    with pytest.raises(ValueError, match="cannot be predicted"):
        choose(10**9, LADDER, unknown, None)


def test_graphs_that_live_together_are_added():
    denoiser, decoder = Footprint(100, 130), Footprint(50, 90)
    assert predict(denoiser, [decoder], 0) == 190
    assert predict(denoiser, [decoder], 70) == 220
    assert predict(Footprint(0, 130), [decoder, Footprint(0, 95)], 0) == 130


@pytest.mark.parametrize(
    ("given", "parsed"),
    [("auto", "auto"), ("low", "low"), (123, 123), ("4GiB", 4 << 30), ("1.5 GB", 15 * 10**8), ("300MiB", 300 << 20)],
)
def test_memory_is_read(given, parsed):
    assert parse_memory(given) == parsed


@pytest.mark.parametrize("given", ["much", "4 gigs", "", "0", 0, -1, 1.5, True, None, "4Gi"])
def test_other_memory_is_refused(given):
    with pytest.raises(ValueError, match=r"memory is .*; expected 'auto', 'fast', 'low', or bytes"):
        parse_memory(given)


def test_free_memory_is_known_here_and_sane():
    assert free_bytes(torch.device("meta")) is None
    assert free_bytes(CPU) is None or 2**20 < free_bytes(CPU) < 2**50


def taken(prior, x, seen):
    """The most bytes alive in one gradient, by running it."""
    with prior, LiveBytes() as count:
        count.leave_out([*prior.unet.parameters(), *prior.vae.parameters()])
        vml_gradient(x, prior=prior, measurement=seen, **LEVEL)
    return count.peak


def test_plans_take_what_was_predicted_and_ever_less():
    x, seen = randn(2, 4, 24, 24), measurement(24, 24)
    footprints = Footprints(
        make_prior(), x.shape, None, CPU, operator=graph_bytes(seen.operator, torch.zeros_like(seen.y))
    )
    ladder = [Plan(), CHECKPOINTED, TWICE, Plan(2, True, True, True), Plan(1, True, True, True, 1)]
    predicted = [footprints.need(plan) for plan in ladder]
    found = [taken(make_prior(plan), x, seen) for plan in ladder]
    for one, other in zip(predicted, found, strict=True):
        assert 0.8 < one / other < 1.2, (predicted, found)
    assert found == sorted(found, reverse=True) and found[-1] < 0.25 * found[0], found
    assert found[1] < 0.5 * found[0] and found[2] < 0.9 * found[1] and found[3] < 0.65 * found[2], found


def test_predicting_runs_no_network_and_draws_no_random_number():
    prior, ran = make_prior(), []
    handles = [
        m.register_forward_pre_hook(lambda *_: ran.append(1)) for n in (prior.unet, prior.vae) for m in n.modules()
    ]
    footprints = Footprints(prior, (2, 4, 40, 8), tiny.gradient_vae(), CPU)
    before, found = torch.get_rng_state(), state(prior.unet, prior.vae)
    assert footprints.need(TWO_PASSES) > 0
    assert not ran and torch.equal(torch.get_rng_state(), before) and state(prior.unet, prior.vae) == found
    for handle in handles:
        handle.remove()


def test_sliced_attention_saves_nothing_with_a_graph():
    x, shape = randn(2, 4, 24, 24), (2, 4, 24, 24)
    fused, sliced = make_prior(), make_prior()
    sliced.unet.set_attention_slice("max")
    with fused, sliced:
        held = []
        for prior in (fused, sliced):
            with LiveBytes() as count:
                count.leave_out(prior.unet.parameters())
                z0_hat, pull = prior.denoise_pullback(x, **LEVEL)
                held.append(count.live)
                pull(z0_hat)
    assert held[1] > held[0]
    needs = [Footprints(prior, shape, None, CPU).need(Plan()) for prior in (fused, sliced)]
    assert needs[1] - needs[0] > 0.5 * (held[1] - held[0])


def test_what_fused_and_sliced_attention_save():
    """Without a graph slicing saves over unfused attention; over a fused kernel it saves nothing, ever."""

    def peak(processor, size=None):
        prior = make_prior()
        if size is None:
            prior.unet.set_attn_processor(processor)
        else:
            prior.unet.set_attention_slice(size)
        found = []
        with prior, torch.no_grad():
            for run in (prior.denoise, lambda *a: prior.denoise_pullback(*a)[1](torch.ones_like(a[0]))):
                with LiveBytes() as count:
                    count.leave_out(prior.unet.parameters())
                    run(randn(2, 4, 32, 32), *LEVEL.values())
                found.append(count.peak)
        return found

    (fused, fused_vjp), (plain, plain_vjp), (sliced, sliced_vjp) = (
        peak(AttnProcessor2_0()), peak(AttnProcessor()), peak(None, size=1)
    )  # fmt: skip
    assert fused <= sliced < 0.6 * plain, (fused, sliced, plain)
    assert fused_vjp < 0.8 * sliced_vjp and sliced_vjp > 0.8 * plain_vjp, (fused_vjp, sliced_vjp, plain_vjp)


# the pipelines

PICTURE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PAINTED = torch.zeros(1, 1, 64, 64)
PAINTED[..., 32:] = 1
CALL = {"image": PICTURE, "mask_image": PAINTED, "num_inference_steps": 8, "inner_steps": 1, "output_type": "pt"}


@pytest.fixture
def pipe():
    pipe = VMLInpaintPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.gradient_vae = tiny.gradient_vae()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solve(pipe, **changes):
    given = {**CALL, "prompt": ["a"] * 2, "generator": torch.Generator().manual_seed(0), "return_report": True}
    return pipe(**{**given, **changes})


def test_modes_give_the_same_images_and_the_report_says_which(pipe, caplog):
    caplog.set_level("INFO")
    fast, low, auto = (solve(pipe, memory=memory) for memory in ("fast", "low", "auto"))
    assert relative(low.images, fast.images) < 1e-3 and torch.equal(auto.images, fast.images)
    assert fast.report.memory["plan"] == auto.report.memory["plan"] == "one graph"
    assert (
        "image by image" in low.report.memory["plan"]
        and low.report.memory["predicted"] < fast.report.memory["predicted"]
    )
    assert "memory: two passes" in low.report.text() and len(low.report.text().splitlines()) == 5
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("memory: ")]
    assert len(said) == 3 and "MiB above the weights" in said[1]


def test_jacobian_free_steps_are_the_last_resort_and_said(caplog):
    thin = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, sample_size=16).eval()  # the UNet takes most
    pipe = quiet(VMLInpaintPipeline(**{**tiny.components(), "vae": thin}, requires_safety_checker=False))
    short = {"num_inference_steps": 4, "height": 32, "width": 32}
    exact = solve(pipe, memory="low", **short).report
    budget = exact.memory["predicted"] - 1
    report = solve(pipe, memory=budget, **short).report
    assert exact.jacobian == "exact" and report.jacobian == "free" and "denoise_vjp" not in report.calls
    assert report.memory["predicted"] <= budget == report.memory["budget"]
    assert any("Jacobian-free" in r.getMessage() and r.levelname == "WARNING" for r in caplog.records)
    with pytest.raises(ValueError, match=r"expected at least .* above the networks' weights"):
        solve(pipe, memory=budget, jacobian="exact", **short)
    with pytest.raises(ValueError, match=r"memory is 1 KiB; expected at least .* Jacobian-free"):
        solve(pipe, memory="1KiB", **short)


def test_each_decoder_s_levels_get_the_fastest_plan_that_fits(pipe):
    fast = solve(pipe, memory="fast")
    drafts, full = fast.report.memory["draft_predicted"], fast.report.memory["predicted"]
    assert drafts < 0.8 * full
    with LiveBytes() as count:
        count.leave_out(p for network in (pipe.unet, pipe.vae, pipe.text_encoder) for p in network.parameters())
        out = solve(pipe, memory=(drafts + full) // 2)
    told = out.report.memory
    images = 12 * out.images.nbytes  # what a solve keeps beside its networks
    assert count.peak - images < 1.2 * max(told["predicted"], told["draft_predicted"]) < full
    assert told["draft_plan"] == "one graph" and "checkpointed" in told["plan"] and told["predicted"] < full
    assert relative(out.images, fast.images) < 1e-3
    assert f"; memory: {told['plan']} (at most about " in out.report.text()
    assert re.search(r"above the weights\); one graph \(.*\) where the small decoder draws", out.report.text())
    without = solve(pipe, memory=(drafts + full) // 2, use_gradient_vae=False).report.memory
    assert "draft_plan" not in without and without["plan"] == told["plan"]


def test_what_changes_images_unasked_is_a_warning(pipe, caplog, monkeypatch):
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 32, 256
    image = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    given = {"image": image, "mask_image": torch.ones(1, 1, 320, 320), "prompt": "a", "height": 320, "width": 320}
    given |= {"num_inference_steps": 2, "use_gradient_vae": False, "jacobian": "exact", "inner_steps": 0}
    given["mask_image"][..., :160] = 0
    monkeypatch.setattr("vml_ldm.pipelines._solving.free_bytes", lambda device: 2**20)
    report = solve(pipe, **given).report
    warned = [r.getMessage() for r in caplog.records if r.name.startswith("vml_ldm") and r.levelname == "WARNING"]
    assert len(warned) == 1 and "half tiles" in warned[0] and " of 819 KiB above the weights" in warned[0]
    assert report.memory["plan"] in warned[0]


def test_plenty_of_memory_is_said_in_the_report(pipe, monkeypatch):
    monkeypatch.setattr("vml_ldm.pipelines._solving.free_bytes", lambda device: 10 * 2**30)
    text = solve(pipe).report.text()
    assert "memory: one graph (peak not predicted: 8 GiB are plenty)" in text


def test_bad_memory_is_refused_before_any_work(pipe):
    with pytest.raises(ValueError, match="memory is 'lots'"):
        solve(pipe, memory="lots")


@pytest.mark.parametrize(
    ("way", "tiled"),
    [("model", True), ("sequential", True), ("sequential", False), ("group", True), ("block", False), ("cast", False)],
)
def test_low_memory_goes_with_offloading(pipe, way, tiled, tmp_path):
    if way == "cast":
        for network in (pipe.unet, pipe.vae):
            network.to(torch.bfloat16).to(torch.float32)
    if tiled:
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 32
    short = {"memory": "low", "num_inference_steps": 4, "height": 48, "width": 48}
    images = solve(pipe, **short).images
    if way == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif way == "group":
        pipe.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    elif way == "block":
        blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
        pipe.enable_group_offload("cpu", **blocks, offload_to_disk_path=str(tmp_path))
    for network in (pipe.unet, pipe.vae):
        if way == "sequential":
            cpu_offload(network, CPU, offload_buffers=True)
        elif way == "cast":
            network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    out = solve(pipe, **short)
    assert relative(out.images, images) < 1e-4 and ("tiles" in out.report.memory["plan"]) == tiled
    assert ("checkpointed twice" in out.report.memory["plan"]) != tiled


def test_half_precision_goes_with_low_memory(pipe):
    pipe.to(torch.bfloat16)
    out = solve(pipe, memory="low")
    assert torch.isfinite(out.images).all() and "two passes" in out.report.memory["plan"]


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def restore(pipe, **changes):
    given = {"y": PICTURE[:, :, ::4, ::4], "operator": Downsample(4), "num_inference_steps": 2, "prompt": ["a"] * 2}
    return pipe(**{**given, "output_type": "pt", "return_report": True, "memory": "low", **changes})


def test_other_families_are_predicted_too():
    xl = restore(quiet(VMLRestoreXLPipeline(**tiny.xl_components(), add_watermarker=False)))
    sd3 = quiet(VMLInpaintSD3Pipeline(**tiny.sd3_components(t5=False)))
    flow = sd3(**{**CALL, "prompt": ["a"] * 2, "return_report": True, "memory": "low"})
    for report in (xl.report, flow.report):
        assert report.memory["predicted"] > 0 and report.memory["plan"] != "one graph"


def test_red_diff_has_no_graph_of_the_denoiser_to_save(pipe):
    sd = quiet(VMLRestorePipeline.from_pipe(pipe))
    report = restore(sd, solver="red-diff", red=RedDiff()).report
    assert "one graph at a time" not in report.memory["plan"] and report.memory["predicted"] > 0


def test_without_xformers_one_message_and_pytorch_s_attention(pipe):
    if torch.cuda.is_available():
        pytest.skip("xformers may be there")
    images = solve(pipe).images
    with pytest.warns(UserWarning, match="scaled_dot_product_attention goes on") as told:
        pipe.enable_xformers_memory_efficient_attention()
    assert len(told) == 1 and torch.equal(solve(pipe).images, images)
    pipe.disable_xformers_memory_efficient_attention()


def runs_out(times, with_graph=True):
    """A hook after which memory runs out so many times, of passes with a graph or of any."""
    left = [times]

    def hook(module, *args):
        if left[0] and (torch.is_grad_enabled() or not with_graph):
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return hook


def gradient(prior):
    with prior:
        return vml_gradient(randn(2, 4, 8, 8), prior=prior, measurement=measurement(), **LEVEL)[0]


WAY = list(plans(2, (8, 8), None, denoiser=True, decoder=True, may_free=True))


@pytest.mark.parametrize("network", ["unet", "vae"])
@pytest.mark.parametrize("passes", ["forward", "backward"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_pass_that_runs_out_of_memory_is_made_again_by_the_next_plan(network, passes, times, caplog):
    torch.manual_seed(0)
    exact = gradient(make_prior())
    torch.manual_seed(0)
    prior = make_prior()
    prior.steps = StepDown(WAY)
    layer = prior.unet.conv_out if network == "unet" else prior.vae.decoder.conv_out
    hook = runs_out(times, with_graph=passes == "forward")
    (layer.register_forward_hook if passes == "forward" else layer.register_full_backward_hook)(hook)
    with caplog.at_level("INFO"):
        assert relative(gradient(prior), exact) < 1e-5
    told = [r.getMessage() for r in caplog.records if "memory ran out" in r.getMessage()]
    assert prior.steps.plan(Plan()) == WAY[times] and len(told) == times
    assert told[0] == f"memory ran out with the plan one graph; the solve goes on with {WAY[1]}"


def test_a_plan_that_ran_out_of_memory_is_not_tried_again():
    prior = make_prior()
    prior.steps, passes = StepDown(WAY), []
    prior.vae.decoder.conv_in.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    prior.vae.decoder.conv_out.register_forward_hook(runs_out(2))
    gradient(prior)
    first = len(passes)
    gradient(prior)
    assert len(passes) - first == 1 + first - 3  # the two that failed are not made


def test_what_no_plan_can_hold_raises_as_the_device_does():
    prior = make_prior()
    prior.steps = StepDown(WAY)
    prior.vae.decoder.conv_out.register_forward_hook(runs_out(100, with_graph=False))
    with pytest.raises(torch.OutOfMemoryError):
        gradient(prior)
    other = make_prior()
    other.steps = StepDown(WAY)
    other.vae.decoder.conv_out.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        gradient(other)
    assert other.steps.plan(Plan()) == Plan()


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_goes_one_by_one_where_a_batch_of_both_prompts_is_too_large(pipe, caplog, batch):
    guided, sizes = {"guidance_scale": 7.5, "inner_steps": None, "preset": "fast"}, []
    guided |= {"image": PICTURE[:batch], "prompt": ["a"] * batch}
    found = solve(pipe, **guided)

    def hook(module, args):
        sizes.append(len(args[0]))
        if len(args[0]) > batch:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe.unet.register_forward_pre_hook(hook)
    with caplog.at_level("INFO"):
        again = solve(pipe, **guided)
    assert sizes[0] == 2 * batch and set(sizes[1:]) == {batch}
    assert relative(again.images, found.images) < 1e-4 and again.report.calls == found.report.calls
    assert sum("both prompts in one batch" in r.getMessage() for r in caplog.records) == 1
    with pytest.raises(torch.OutOfMemoryError):
        solve(pipe, **guided, memory="fast")


def test_the_report_has_the_plan_that_was_run(pipe):
    pipe.unet.conv_out.register_forward_hook(runs_out(1))
    report = solve(pipe, guidance_scale=1.0, proximal=False).report
    assert report.memory["plan"] == report.memory["draft_plan"] == str(CHECKPOINTED)


def test_nothing_is_foretold_where_a_device_says_when_it_runs_out():
    assert free_bytes(torch.device("cuda")) is None
    assert choose("auto", LADDER, lambda plan: pytest.fail("foretold"), None) == Chosen(LADDER[0], None, None)
