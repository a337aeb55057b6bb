"""azula's methods on our prior and levels; skipped without azula (pip install --no-deps azula einops)."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("azula", reason="azula is not installed: pip install --no-deps azula einops")

import tiny
from test_peers import Half, problem  # noqa: F401 - a fixture

from vml_ldm import Downsample, VMLRestorePipeline
from vml_ldm.evaluation.azula_peers import METHODS, AzulaPeer
from vml_ldm.operators import Measurement

BACKWARD = {"dps": (1, 1), "pigdm": (1, 0), "mmps": (4, 4), "tmpd": (2, 2), "diffpir": (0, 4)}  # of UNet, of decoder
SETTINGS = {"dps": (("zeta", 0.3),), "mmps": (("iterations", 3),), "diffpir": (("lmbda", 1.0), ("iterations", 3))}


@pytest.mark.parametrize("name", METHODS)
def test_it_finds_what_y_tells(problem, name):  # noqa: F811
    prior, truth, measurement, levels = problem
    found = []
    for i in range(16):
        generator = torch.Generator().manual_seed(i)
        start = torch.randn(1, 1, 1, truth.shape[-1], generator=generator, dtype=torch.float64)
        one = Measurement(Half(), measurement.y[i : i + 1], measurement.sigma_y[i])
        peer = AzulaPeer(name, SETTINGS.get(name, ()))
        found.append(peer(start, prior=prior, measurement=one, schedule=levels, generator=generator).latent)
    error, blind = ((x - truth[:16]).square().mean() for x in (torch.cat(found), prior.mean.expand_as(truth[:16])))
    assert error < 0.6 * blind


@pytest.mark.parametrize("name", METHODS)
def test_it_runs_in_the_pipeline_and_its_seed_is_the_generator_s(tmp_path, name):
    """Also on networks whose layout is channels-last, as the command line has it."""
    pipe = VMLRestorePipeline(**tiny.components(), requires_safety_checker=False)
    for network in (pipe.unet, pipe.vae):
        network.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    operator = Downsample(4)
    y = operator(torch.full((1, 3, 64, 64), 0.4))
    given = {"y": y, "operator": operator, "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
    solver = AzulaPeer(name, SETTINGS.get(name, ()))
    draw = lambda seed: pipe(  # noqa: E731
        "a hat", solver=solver, sigma_y=0.05, generator=torch.Generator().manual_seed(seed), return_report=True, **given
    )
    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first.images, again.images) and not torch.equal(first.images, other.images)
    assert torch.isfinite(first.images).all() and first.report.solver == f"azula-{name}"
    assert first.report.calls["denoise"] == 3
    passes = tuple(first.report.calls.get(network, 0) for network in ("denoise_vjp", "decode_vjp"))
    assert passes == tuple(3 * count for count in BACKWARD[name])
    with pytest.raises(ValueError, match="came with 2 images; expected one"):
        pipe("a hat", solver=solver, **{**given, "y": y.repeat(2, 1, 1, 1)})
