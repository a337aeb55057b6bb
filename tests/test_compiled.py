"""Compiled and exported networks: the same pictures, with a graph and without.

The compiler's last stage, which makes machine code, is left out here: it takes minutes. `examples/gpu_cost.py` has it.
"""

import pytest
import tiny
import torch
from torch import nn

from vml_ldm import Measurement, VMLInpaintPipeline, vml_map
from vml_ldm.operators import Mask
from vml_ldm.proximal import Proximal
from vml_ldm.solve import Levels

CALL = {**tiny.HALF_PAINTED, "prompt": "a hat"}
WAYS = {
    "guided levels, no graph": {"guidance_scale": 7.5, "inner_steps": None},
    "exact steps": {"guidance_scale": 1.0},
    "Jacobian-free steps": {"guidance_scale": 1.0, "jacobian": "free"},
}


def solve(compiled: str, **changes):
    torch._dynamo.reset()
    pipe = VMLInpaintPipeline(**tiny.components(), requires_safety_checker=False)
    pipe.gradient_vae = tiny.gradient_vae()
    pipe.set_progress_bar_config(disable=True)
    if compiled == "regions":
        pipe.unet.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    elif compiled == "whole":
        for network in (pipe.unet, pipe.vae.decoder, pipe.gradient_vae.decoder):
            network.compile(backend="eager")  # "aot_eager" cannot take a group norm after attention on a CPU
    return pipe(**CALL | changes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compiled", ["regions", "whole"])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_network_paints_the_same_picture(compiled, way):
    found, plain = solve(compiled, **WAYS[way]), solve("", **WAYS[way])
    assert (found.images - plain.images).abs().max() < 1 / 255
    assert found.report.calls == plain.report.calls


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_checkpointed_graphs_of_compiled_networks_too(memory):
    found, plain = (solve(compiled, guidance_scale=1.0, memory=memory) for compiled in ("regions", ""))
    assert (found.images - plain.images).abs().max() < 1 / 255


class Exported:
    """A prior of programs from `torch.export`, which know no gradient."""

    def __init__(self):
        vae, z, image = tiny.vae(), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 64, 64)
        decoder = nn.Sequential(vae.post_quant_conv, vae.decoder).eval()
        encoder = nn.Sequential(vae.encoder, vae.quant_conv).eval()
        with torch.no_grad():
            self._decoder, self._encoder = (
                torch.export.export(network, (x,)).module() for network, x in ((decoder, z), (encoder, image))
            )

    def denoise(self, x_t, alpha, sigma):
        return alpha * x_t / (alpha**2 + sigma**2)  # of z0 ~ N(0, I)

    def encode(self, image):
        return self._encoder(2 * image - 1)[:, :4]

    def decode(self, z):
        return self._decoder(z) / 2 + 0.5


def test_an_exported_decoder_serves_levels_without_gradients(monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: pytest.fail("asked for a gradient"))
    picture, known = tiny.HALF_PAINTED["image"], tiny.KNOWN
    seen = Measurement(Mask(known), picture * known, 0.02)
    found = vml_map(
        torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), prior=Exported(), measurement=seen,
        schedule=Levels([(1.0, 3.0), (1.0, 1.0), (1.0, 0.3)]), inner_steps=0, proximal=Proximal(),
        settle=lambda image: known * picture + (1 - known) * image, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert found.calls == {"denoise": 3, "decode": 4, "encode": 3} and found.image.isfinite().all()
