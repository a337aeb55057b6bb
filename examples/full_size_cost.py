"""Time and memory of each network call at full size, and of whole images: stock inpainting's and ours.

    python examples/full_size_cost.py               # Stable Diffusion 1.5 at 512 x 512: about 12 GB of memory, float32
    python examples/full_size_cost.py --small       # narrow networks at 64 x 64, to see that it runs
    python examples/full_size_cost.py --rows docs/cost/full_size.jsonl      # the table again, of what was measured

The networks have Stable Diffusion 1.5's configuration and random weights: neither time nor memory depends on values.
Each measurement is a process of its own. Its peak is that of the process (on a GPU, of its tensors) above what it held
with the weights in place; the prediction is what `memory=` chooses by. Whole images are added up from calls, as if no
step were saved by stopping at the noise: first inpainting by preset, then the plain algorithm (`proximal=False`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import nn

from vml_ldm import vml_gradient
from vml_ldm.adapters.diffusers import Footprints, StableDiffusionPrior, scheduler_levels
from vml_ldm.adapters.diffusers.memory import Plan
from vml_ldm.closeup import CloseUp, drawn_size, parts_near
from vml_ldm.operators import Mask, Measurement
from vml_ldm.presets import PRESETS, settings, spread_levels
from vml_ldm.report import in_units

STEPS = 50  # stock's
LENGTHS = 0.26  # decodes for its length that an exact inner step takes in the mean, see docs/cost; Jacobian-free one
LEVEL = {"alpha": 0.7, "sigma": 0.7}
PLANS = {
    "one graph": Plan(),
    "checkpointed": Plan(checkpointed=1),
    "one at a time": Plan(checkpointed=1, denoiser_again=True),
    "low": Plan(checkpointed=2, denoiser_again=True),
    "half tiles": Plan(checkpointed=1, denoiser_again=True, decoder_again=True, tiles=2),
}
SMALL = "too"  # the last level draws with the small decoder too; the VAE draws the answer
CLOSE_UP = "close-up"  # for a hole of 96 x 96 pixels; graphs are kept
FREE = "Jacobian-free"  # not measured: a forward pass of the UNet, and the decoder as "low" has it
FORWARD = ("UNet", "UNet, batch of 2", "encode", "decode", "decode, small")
WITH_VJP = ("UNet with VJP", "decode with VJP", "decode with VJP, small")
STEP = ("step", "step, small", "step, close-up")  # an inner step's gradient: both networks and their VJPs
MEASUREMENTS = [
    *((call, "one graph") for call in (*FORWARD, *WITH_VJP, *STEP, "decode, close-up")),
    *((call, "checkpointed") for call in (*WITH_VJP[:2], *STEP[:2])),
    ("step", "one at a time"),
    *((call, "low") for call in ("decode with VJP", "step")),
    *((call, "half tiles") for call in ("decode", "decode with VJP", "step")),
]
WHOLE = [  # plans of the levels that draw with the VAE, and of those with the small decoder
    *((plan, None) for plan in PLANS),
    ("one graph", "one graph"),
    ("low", "one graph"),
    ("low", "checkpointed"),
    ("half tiles", "checkpointed"),
    (FREE, FREE),
    (CLOSE_UP, None),
    (CLOSE_UP, "one graph"),
    (SMALL, "one graph"),
    (SMALL, "checkpointed"),
    (SMALL, FREE),
]


INPAINTED = [  # guidance, decoder of the levels, and how the graphs of inner steps are kept, where there are any
    (7.5, "small", None),
    (7.5, "full", None),
    (1.0, "small", "one graph"),
    (1.0, "small", "checkpointed"),
    (1.0, "full", None),
]


def build(cls, device: str, **config) -> nn.Module:
    """A network with random weights that keep its values of order one, made without its own slow initialisation."""
    with torch.device("meta"):
        network = cls(**config)
    network = network.to_empty(device=device).eval().requires_grad_(False)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.fill_(float("norm" in name and name.endswith("weight")))
    return network


def build_prior(small: bool, device: str) -> StableDiffusionPrior:
    width = 4 if small else 1
    unet = build(
        UNet2DConditionModel,
        device,
        sample_size=64 // (8 if small else 1),
        cross_attention_dim=768 // width,
        block_out_channels=tuple(n // width for n in (320, 640, 1280, 1280)),
        norm_num_groups=32 // width,
    )
    vae = build(
        AutoencoderKL,
        device,
        block_out_channels=tuple(n // width for n in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512 // (8 if small else 1),
    )
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    words = {"encoder_hidden_states": torch.randn(1, 77, 768 // width, device=device)}
    return StableDiffusionPrior(unet=unet, vae=vae, scheduler=scheduler, condition=words)


def measure(call: str, plan: str, small: bool, device: str) -> dict:
    """Seconds, peak and predicted peak of one call, in this process."""
    prior, pixels = build_prior(small, device), 64 if small else 512
    tiny = build(AutoencoderTiny, device) if call.endswith("small") else None
    prior.plan, batch = PLANS[plan], 2 if call.endswith("batch of 2") else 1
    known = torch.ones(batch, 1, pixels, pixels, device=device)
    known[..., pixels // 2 - 48 : pixels // 2 + 48, pixels // 2 - 48 : pixels // 2 + 48] = 0
    parts = parts_near(known, 8) if call.endswith(CLOSE_UP) else None
    z = torch.randn(batch, 4, pixels // 8, pixels // 8, device=device)
    image = torch.rand(batch, 3, pixels, pixels, device=device)
    prior.condition = {name: value.expand(batch, -1, -1) for name, value in prior.condition.items()}
    predicted = None
    if call in STEP:
        cells = None if parts is None else drawn_size(parts)
        predicted = Footprints(prior, z.shape, tiny, z.device, drawn=cells).need(prior.plan, drafting=tiny is not None)
    with prior, torch.no_grad():
        drawn = prior if tiny is None else prior.draft(tiny)
        drawn = drawn if parts is None else CloseUp(prior, parts, image, torch.randn_like(z))
        run = {
            "UNet": lambda: prior.denoise(z, **LEVEL),
            "encode": lambda: prior.encode(image),
            "decode": lambda: drawn.decode(z),
            "UNet with VJP": lambda: pulled(*prior.denoise_pullback(z, **LEVEL)),
            "decode with VJP": lambda: pulled(*drawn.decode_pullback(z)),
            "step": lambda: step(z, drawn, image, known),
        }[call.split(", ")[0]]
        before = held(device)
        seconds = timed(run, device)
        peak = max(0, peak_bytes(device) - before)  # the system counts pages in lots
    return {"seconds": seconds, "peak": peak, "predicted": predicted, "weights": weights_of(prior)}


def pulled(value, pull) -> None:
    pull(torch.ones_like(value))


def step(x, prior, image, known) -> None:
    vml_gradient(x, prior=prior, measurement=Measurement(Mask(known), image * known, 0.05), **LEVEL)


def timed(run, device: str) -> float:
    started = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def weights_of(prior) -> int:
    return sum(p.numel() * p.element_size() for network in (prior.unet, prior.vae) for p in network.parameters())


def held(device: str) -> int:
    """Bytes held now; the peak begins anew from here."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmHWM")


def peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def status(name: str) -> int:
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def measure_apart(call: str, plan: str, options: list[str]) -> dict:
    command = [sys.executable, __file__, "--measure", call, "--plan", plan, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{call} ({plan}) ended with {done.returncode}; killed for memory if that is -9.")
    return json.loads(done.stdout.splitlines()[-1])


def whole_image(found: dict, preset: str, plan: str, draft: str | None) -> tuple[float, int]:
    """Seconds and peak of one of our images with guidance, at stock's number of steps, if no inner step is saved.

    Args:
        found: what was measured, by call and plan.
        plan, draft: of the last level and of the others, which draw with the small decoder; None: all levels are alike.
            A close-up is one of both.
    """
    view = ", close-up" if plan == CLOSE_UP else ""
    plan = "one graph" if view else plan
    levels, inner = PRESETS[preset].split(STEPS)
    first, last = inner * (levels - 1), 2 * inner  # inner steps
    drafts = 0 if draft is None else first + last * (plan == SMALL)
    steps = [(first + last - drafts, plan, view), (drafts, draft, ", small")]
    steps = [(count, _step(found, chosen, decoder)) for count, chosen, decoder in steps if count]
    ends = [
        (1, _of(found, "encode", plan)),
        (2, _of(found, "decode", plan)),
        (2 * levels - 1, _of(found, "UNet", plan)),
    ]
    return _add_up([*steps, *ends])


def inpainted_image(found: dict, preset: str, guided: bool, drafts: bool, plan: str) -> tuple[float, int]:
    """Seconds and peak of one inpainting, guided or not, at stock's number of steps, if no step is saved.

    Args:
        drafts: there is a small decoder: levels but the last draw with it, and so do all gradients.
        plan: how the graphs of inner steps are kept.
    """
    chosen = settings(preset, inpaints=True, guided=guided, drafts=drafts)
    levels, steps = chosen.split(STEPS)
    corrections, small = chosen.corrections(STEPS), ", small" if drafts else ""
    inner = steps * sum(not chosen.proximal.is_alone(*scales) for scales in scales_of(levels))
    refreshed = -(-corrections // chosen.proximal.refresh)
    calls = [
        (inner, _of(found, f"step{small}", plan)),
        (inner, _of(found, f"decode{small}", plan)),  # for the step's length: the first of a level has it so
        (levels, _of(found, "UNet, batch of 2" if guided else "UNet", plan)),
        (levels - 1, _of(found, f"decode{small}", plan)),
        (levels + 1, _of(found, "encode", plan)),
        (1 + 2 + refreshed, _of(found, "decode", plan)),  # the last level's, the ends', and the corrections'
        (corrections, _of(found, "decode with VJP, small", plan)),
        (LENGTHS * corrections, _of(found, "decode, small", plan)),
    ]
    return _add_up([(count, cost) for count, cost in calls if count])


def scales_of(count: int) -> list[tuple[float, float]]:
    """(alpha, sigma) of an inpainting's levels, by Stable Diffusion's own noise."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(STEPS)
    levels = scheduler_levels(scheduler, scheduler.timesteps)
    return [levels.scales(i) for i in spread_levels(levels.noise, count)]


def _step(found: dict, plan: str, decoder: str) -> tuple[float, int]:
    """Seconds and peak of an inner step: the gradient, and decodes for its length."""
    gradient = [(1, "UNet"), (1, f"decode with VJP{decoder}")] if plan == FREE else [(1, f"step{decoder}")]
    length = 1 if plan == FREE else LENGTHS, f"decode{decoder}"
    return _add_up([(count, _of(found, call, plan)) for count, call in (*gradient, length)])


def _add_up(costs: list[tuple[float, tuple[float, int]]]) -> tuple[float, int]:
    """Seconds of so many calls of each kind, and the highest of their peaks."""
    return sum(count * seconds for count, (seconds, _) in costs), max(peak for _, (_, peak) in costs)


def _of(found: dict, call: str, plan: str) -> tuple[float, int]:
    """Of a call under a plan; what no plan changes was measured under one."""
    plan = "low" if plan == FREE else plan
    row = found.get((call, plan), found[call, "one graph"])
    return row["seconds"], row["peak"]


def tell_whole(found: dict) -> None:
    weights = found["step", "one graph"]["weights"]
    calls = [(STEPS, "UNet, batch of 2"), (1, "encode"), (1, "decode")]
    stock = _add_up([(count, _of(found, call, "one graph")) for count, call in calls])
    print(f"\none image, {STEPS} steps, guidance; weights of UNet and VAE: {in_units(weights)}\n")
    print(f"{'':62}{'seconds':>10}{'x stock':>9}{'peak above':>13}{'x stock, with weights':>24}")
    rows = [("stock", None, *stock)]
    for preset in PRESETS:
        for scale, decoder, plan in INPAINTED:
            name = f"{preset} inpainting, guidance {scale:g}, {decoder} decoder" + (f" {plan}" if plan else "")
            rows.append(
                (name, None, *inpainted_image(found, preset, scale > 1, decoder == "small", plan or "one graph"))
            )
    for preset in PRESETS:
        for plan, draft in WHOLE:
            decoder = "full decoder" if draft is None else f"small decoder {draft}, last level"
            rows.append((f"{preset}, {decoder} {plan}", draft, *whole_image(found, preset, plan, draft)))
    rows = [(*row, row[2] / stock[0], (row[3] + weights) / (stock[1] + weights)) for row in rows]
    for name, _, seconds, above, time_ratio, peak_ratio in rows:
        print(f"{name:62}{seconds:10.1f}{time_ratio:9.2f}{in_units(above):>13}{peak_ratio:24.2f}")
    print()
    balanced = [row for row in rows[1:] if row[0].startswith("balanced, ") and not row[0].endswith((FREE, CLOSE_UP))]
    _tell_aim("small decoder", 1.25, [row for row in balanced if row[1] is not None])
    _tell_aim("full decoder", 2.0, [row for row in balanced if row[1] is None])
    _tell_aim('memory="low"', 1.5, [row for row in balanced if row[0].endswith(" low") and row[1] != "one graph"])


def _tell_aim(what: str, most: float, rows: list[tuple]) -> None:
    """The fastest of the rows whose peak is within an aim."""
    name, *_, seconds, peak = min((row for row in rows if row[5] <= most), key=lambda row: row[4], default=[None] * 3)
    reached = "none" if name is None else f"{name}: {seconds:.2f} x the time, {peak:.2f} x the peak"
    print(f"{what}, the fastest within {most} x of stock's peak: {reached}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="narrow networks at 64 x 64 pixels")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--plan", default="one graph", choices=PLANS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help="a file of measurements: what it has is not measured again")
    a = parser.parse_args()
    if a.measure:
        print(json.dumps(measure(a.measure, a.plan, a.small, a.device)))
        return
    options = ["--device", a.device, *["--small"] * a.small]
    lines = a.rows.read_text().splitlines() if a.rows and a.rows.exists() else []
    found = {(row["call"], row["plan"]): row for row in map(json.loads, lines)}
    print(f"{'call':26}{'plan':16}{'seconds':>10}{'peak above weights':>22}{'predicted':>14}", flush=True)
    for call, plan in MEASUREMENTS:
        if (call, plan) not in found:
            found[call, plan] = {"call": call, "plan": plan, **measure_apart(call, plan, options)}
            if a.rows:
                with a.rows.open("a") as file:
                    print(json.dumps(found[call, plan]), file=file)
        row = found[call, plan]
        predicted = "" if row["predicted"] is None else in_units(row["predicted"])
        print(f"{call:26}{plan:16}{row['seconds']:10.3f}{in_units(row['peak']):>22}{predicted:>14}", flush=True)
    tell_whole(found)


if __name__ == "__main__":
    main()
