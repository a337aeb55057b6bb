"""VML-MAP against the closed-form MAP, and the laws of schedules and batches (float64, no network)."""

import json
import math

import pytest
import torch
from gaussian import Linear, random_problem
from torch.overrides import TorchFunctionMode

from vml_ldm.operators import Measurement
from vml_ldm.optimize import InnerStep
from vml_ldm.proximal import Proximal
from vml_ldm.red import red_diff_levels
from vml_ldm.solve import Levels, noise_like, record, start_from, vml_levels, vml_map

SCALES = [(1.0, 2.0), (1.0, 1.0), (1.0, 0.5), (1.0, 0.1)]


def start(batch=1, seed=0):
    return 2 * torch.randn(batch, 1, 1, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(x_T, y, *, schedule=None, **options):
    prior, h, _ = random_problem()
    options = {"generator": torch.Generator().manual_seed(5), **options}
    return vml_map(
        x_T, prior=prior, measurement=Measurement(Linear(h), y, 0.1), schedule=schedule or Levels(SCALES), **options
    )


def test_no_inner_steps_is_sampling_from_the_prior():
    _, _, y = random_problem()
    solution = solve(start(), y, inner_steps=0, schedule=Levels(SCALES, renoise=0))
    assert solution.calls == {"denoise": 4, "decode": 1}


@pytest.mark.parametrize("rule", ["analytic", "secant"])
@pytest.mark.parametrize("jacobian, vjps", [("exact", 12), ("free", 0)])
def test_calls_are_counted(jacobian, vjps, rule):
    """A step: a denoiser, a decode, its pull-back, and that through D when exact; a decode more for its length.

    By the secant rule, when exact, only a level's first needs that one, and those that come after a bad trial.
    """
    _, _, y = random_problem()
    calls = solve(start(), y, inner_steps=3, jacobian=jacobian, stop_at=0, step=InnerStep(rule)).calls
    assert calls["denoise"] == 4 * (3 + 1) and calls["denoise_vjp"] == vjps and calls["decode_vjp"] == 12
    lengths = calls["decode"] - 12 - 1
    assert lengths == 12 if (jacobian, rule) != ("exact", "secant") else 4 <= lengths < 12


def test_the_last_level_may_take_more_steps():
    _, _, y = random_problem()
    more, same = solve(start(), y, inner_steps=2, last_steps=20, stop_at=0), solve(start(), y, inner_steps=2, stop_at=0)
    assert [level["steps"] for level in more.trace] == [[2], [2], [2], [20]]
    assert more.residual < same.residual


def test_corrections_bring_the_answer_nearer_to_y_without_the_denoiser():
    _, _, y = random_problem()
    plain, corrected = (solve(start(), y, inner_steps=2, stop_at=0, correct_steps=n) for n in (0, 5))
    assert corrected.residual < plain.residual and corrected.calls["denoise"] == plain.calls["denoise"]
    assert corrected.calls["decode_vjp"] == plain.calls["decode_vjp"] + 5
    assert corrected.trace[:-1] == plain.trace[:-1]  # nothing is done before the last level's end


def test_a_batch_is_what_its_images_are_alone():
    """Step length, stopping and noise are per image."""
    _, _, y = random_problem()
    ys = torch.cat([y, y + 1, y - 2])
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(3)]  # noqa: E731
    together = solve(start(3), ys, generator=generators())
    alone = [solve(start(3)[i : i + 1], ys[i : i + 1], generator=[g]) for i, g in enumerate(generators())]
    assert torch.allclose(together.latent, torch.cat([s.latent for s in alone]), atol=1e-10)
    for i, solution in enumerate(alone):
        assert [level["steps"][i] for level in together.trace] == [level["steps"][0] for level in solution.trace]


def test_an_image_at_the_noise_rests_and_saves_its_calls():
    _, _, y = random_problem()
    solution = solve(start(), y, inner_steps=50, stop_at=1.0)
    assert sum(level["steps"][0] for level in solution.trace) < 4 * 50
    assert solution.residual.item() < 0.11


def test_a_level_can_be_edited_on_the_way():
    prior, h, y = random_problem()
    levels = vml_levels(
        start(), prior=prior, measurement=Measurement(Linear(h), y, 0.1), schedule=Levels(SCALES), inner_steps=1
    )
    first = next(levels)
    first.x_next = torch.full_like(first.x_next, 100.0)
    assert next(levels).z0_hat.abs().max() > 10


@pytest.mark.parametrize("renoise", [0.0, 0.5, 1.0])
def test_the_next_state_has_the_next_level_s_noise(renoise):
    """Given the true z0, Levels.step keeps the marginal alpha z0 + sigma e."""
    schedule = Levels([(0.6, 0.8), (0.8, 0.6)], renoise=renoise)
    generator = torch.Generator().manual_seed(0)
    z0 = torch.ones(1, 1, 1, 200_000, dtype=torch.float64)
    x_next = schedule.step(0, 0.6 * z0 + 0.8 * noise_like(z0, generator), z0, generator)
    assert abs(x_next.mean().item() - 0.8) < 0.01 and abs(x_next.std().item() - 0.6) < 0.01
    assert torch.equal(schedule.step(1, x_next, z0, generator), z0)


@pytest.mark.parametrize(
    "scales, renoise",
    [
        ([], 1.0),
        ([(1, 0.0)], 1.0),
        ([(1, 0.5), (1, 0.7)], 1.0),
        ([(1, 0.5)], 1.5),
        ([(1, 0.5)], math.nan),
        ([(1, math.nan), (1, 0.1)], 1.0),
        ([(math.nan, 1), (1, 0.1)], 1.0),
        ([(1, math.inf), (1, 0.1)], 1.0),
    ],
)
def test_bad_levels_are_refused(scales, renoise):
    with pytest.raises(ValueError, match="expected"):
        Levels(scales, renoise=renoise)


@pytest.mark.parametrize(
    "options",
    [
        {"jacobian": "none"},
        {"inner_steps": -1},
        {"inner_steps": 2.5},
        {"inner_steps": True},
        {"last_steps": -1},
        {"correct_steps": -1},
        {"correct_steps": True},
        {"stop_at": math.nan},
        {"stop_at": -1.0},
    ],
)
def test_bad_choices_are_refused_before_any_work(options):
    _, _, y = random_problem()
    with pytest.raises(ValueError, match="expected"):
        solve(start(), y, **options)


def test_a_start_for_each_y():
    _, _, y = random_problem()
    with pytest.raises(ValueError, match="x_T has 1 images and y 2; expected the same"):
        solve(start(), torch.cat([y, y]))


def test_generators_must_match_the_batch():
    with pytest.raises(ValueError, match="2 generators came for 3 images"):
        noise_like(torch.zeros(3, 1, 1, 1), [torch.Generator(), torch.Generator()])


def test_a_preconditioned_step_s_calls_are_counted():
    """In place of the decoder pass for the step's length: one for its Jacobian, and two products a CG step."""
    _, _, y = random_problem()
    step = InnerStep(precondition="gauss-newton", cg_steps=2)
    calls = solve(start(), y, inner_steps=3, stop_at=0, step=step).calls
    assert calls["denoise"] == 4 * (3 + 1) and calls["denoise_vjp"] == 12
    assert calls["decode"] == 2 * 12 + 1 and calls["decode_vjp"] == 12 * (1 + 2) and calls["decode_jvp"] == 12 * 2


@pytest.mark.parametrize("rule", [0.005, lambda params: torch.optim.Adam(params, lr=0.05)])
def test_other_step_rules_come_as_near_to_y(rule):
    _, _, y = random_problem()
    solution = solve(start(), y, inner_steps=100, step=InnerStep(rule=rule))
    assert solution.residual.item() < 0.11


def test_the_prior_stops_at_a_noise_level():
    """The answer is the clean estimate of the last level above it, without what the levels below would change."""
    _, _, y = random_problem()
    whole, stopped, short = (
        solve(start(), y, schedule=Levels(scales), inner_steps=2, stop_prior_at=at)
        for scales, at in [(SCALES, 0.0), (SCALES, 0.5), (SCALES[:3], 0.0)]
    )
    assert torch.equal(stopped.latent, short.latent) and stopped.calls == short.calls
    assert not torch.equal(stopped.latent, whole.latent)
    with pytest.raises(ValueError, match=r"stop_prior_at is 3.0; expected at most 2, the first level's noise"):
        solve(start(), y, stop_prior_at=3.0)


def test_a_solution_reports_itself():
    """What it knows, and beside it what its caller does."""
    _, _, y = random_problem()
    solution = solve(start(), y, inner_steps=2, last_steps=3, stop_at=0)
    report = solution.report()
    assert (report.levels, report.inner_steps, report.last_steps, report.jacobian) == (4, 2, 3, "exact")
    assert report.residual == solution.residual.tolist() and report.sigma_y == report.expected == [0.1]
    text = solution.report(vae_error=[0.3], preset="best").text()
    assert (
        "up to 2 inner steps each, 3 at the last, Jacobian exact, preset best" in text and "own round trip 0.3" in text
    )
    assert "preset" not in report.text()
    assert solve(start(), y, inner_steps=1, jacobian="free").report().jacobian == "free"


def test_a_level_shows_the_image_that_its_residual_is_of():
    prior, h, y = random_problem()
    measurement = Measurement(Linear(h), y, 0.1)
    at = {"prior": prior, "measurement": measurement, "schedule": Levels(SCALES)}
    for level in vml_levels(start(), inner_steps=2, generator=torch.Generator().manual_seed(0), **at):
        assert torch.equal(measurement.rms(measurement.residual(level.image)), level.residual)
        assert torch.equal(level.image, prior.decode(level.drawn)) and not torch.equal(level.drawn, level.z0_hat)
    for level in vml_levels(start(), inner_steps=2, proximal=Proximal(), correct_steps=2, **at):
        assert torch.equal(level.image, prior.decode(level.drawn))
    for level in red_diff_levels(0 * start(), s=0.1, **at):
        assert torch.equal(level.image, prior.decode(level.drawn))
        assert torch.equal(measurement.rms(measurement.residual(level.image)), level.residual)
    assert all(level.image is None for level in vml_levels(start(), inner_steps=0, **at))


def test_a_start_from_an_image_has_its_latent_and_the_first_level_s_noise():
    prior, _, _ = random_problem()
    image = torch.full((1, 1, 1, 200_000), 3.0, dtype=torch.float64)
    schedule = Levels([(0.6, 0.8), (0.8, 0.6)])
    x_T = start_from(image, prior=prior, schedule=schedule, generator=torch.Generator().manual_seed(0))
    assert abs(x_T.mean().item() - 0.6 * 3) < 0.01 and abs(x_T.std().item() - 0.8) < 0.01


def test_a_draft_serves_all_levels_but_the_last():
    """The same prior as its own draft changes nothing but the count; another draft is not what answers."""
    prior, h, y = random_problem()
    options = {
        "measurement": Measurement(Linear(h), y, 0.1),
        "schedule": Levels(SCALES),
        "inner_steps": 3,
        "stop_at": 0,
        "step": InnerStep("analytic"),  # two decodes each
    }
    run = lambda **more: vml_map(  # noqa: E731
        start(), prior=prior, generator=torch.Generator().manual_seed(5), **options, **more
    )
    plain, drafted = run(), run(draft=prior)
    assert torch.equal(plain.latent, drafted.latent)
    assert drafted.calls["draft"] == 3 * 2 * 3 and drafted.calls["decode"] == 2 * 3 + 1
    assert drafted.calls["draft_vjp"] == 3 * 3 and drafted.calls["decode_vjp"] == 3
    single = vml_map(start(), prior=prior, draft=prior, **{**options, "schedule": Levels(SCALES[:1])})
    assert "draft" not in single.calls
    throughout = run(draft=prior, draft_last=True)
    assert torch.equal(plain.latent, throughout.latent)
    assert throughout.calls["draft"] == 4 * 2 * 3 and throughout.calls["decode"] == 1


def test_a_trace_is_json_also_where_a_level_draws_nothing():
    """Levels without inner steps, and those where the state says nothing of z0, have no residual: null, not NaN."""
    prior, h, y = random_problem()
    measurement = Measurement(Linear(h), y, 0.1)
    x_T = torch.randn(1, 1, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    schedule = Levels([(0.0, 1.0), (0.8, 0.6)])
    for steps in (0, 2):
        found = vml_map(x_T, prior=prior, measurement=measurement, schedule=schedule, inner_steps=steps)
        again = json.loads(json.dumps(found.trace, allow_nan=False))
        assert again == found.trace and again[0]["residual"] == [None]
        assert (again[1]["residual"] == [None]) == (steps == 0)


class Reads(TorchFunctionMode):
    """Counts what makes a program wait for a device: values that come to Python."""

    KINDS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "nonzero", "cpu", "numpy", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.KINDS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "steps, proximal, a_level",
    [
        (0, None, 0),  # levels alone: the next state is asked for before this one is known
        (0, Proximal(), 0),
        (1, None, 1),  # who is at rest
        (1, Proximal(alone_below=0.0), 1),
        (3, None, 5),  # and from the second step on, whether its length has to be drawn
    ],
)
def test_levels_wait_for_a_device_as_seldom_as_their_steps_need(steps, proximal, a_level):
    prior, h, y = random_problem()
    reads = Reads()
    levels = vml_levels(
        start(), prior=prior, measurement=Measurement(Linear(h), y, 0.1), schedule=Levels(SCALES), inner_steps=steps,
        stop_at=0, proximal=proximal, settle=lambda image: image,
    )  # fmt: skip
    with reads:
        solved = list(levels)
    assert reads.count <= a_level * len(SCALES)
    before, trace = reads.count, []
    with reads:
        trace += [record(level) for level in solved]
    assert reads.count - before == len(SCALES)
    assert [level["steps"] for level in trace] == [level.steps.tolist() for level in solved]
    assert [level["residual"] for level in trace][-1] in ([None], solved[-1].residual.tolist())
