"""Compiled networks: the same pictures, with a graph and without.

The compiler's last stage, which makes machine code, is left out here: it takes minutes. `examples/gpu_cost.py` has it.
"""

import pytest
import tiny
import torch

from vml_ldm import VMLInpaintPipeline

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
