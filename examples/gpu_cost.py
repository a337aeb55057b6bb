"""Seconds and memory of whole images on a GPU, stock inpainting's and ours, and the checks that only a GPU can do.

    python examples/gpu_cost.py --rows docs/cost/gpu.jsonl       # within 15 minutes on a large GPU; what it has stays
    python examples/gpu_cost.py --short --device cpu             # narrow networks at 64 pixels, to see that it runs
    python examples/gpu_cost.py --stop --device cpu              # how soon a Stop acts at 512 pixels, and nothing else

The networks have the configurations of Stable Diffusion 1.5 and XL and random weights: neither time nor memory depends
on values. Each row is the second of two equal calls, 50 steps at guidance 7.5 with the prompt's embeddings given; "no
small decoder" is without a `gradient_vae`, the other rows have one with TAESD's configuration. Peaks are of tensors,
weights among them. Then, with the bundled checkpoint: half precision beside float32; a compiled UNet beside one that
is not; two processes on one GPU beside one; and ``pytest -m gpu``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
    logging,
)
from full_size_cost import build
from torch import nn

from vml_ldm import VMLInpaintPipeline, VMLInpaintXLPipeline, bundled_model
from vml_ldm.assets import example_images
from vml_ldm.evaluation.metrics import psnr
from vml_ldm.evaluation.tasks import box_mask
from vml_ldm.images import from_pil, load_image
from vml_ldm.presets import PRESETS

STEPS, GUIDANCE = 50, 7.5
STOCK, ALONE = "stock", "balanced, no small decoder"
METHODS = (STOCK, *PRESETS, ALONE)
PIPELINES = {
    "sd15": (StableDiffusionInpaintPipeline, VMLInpaintPipeline),
    "sdxl": (StableDiffusionXLInpaintPipeline, VMLInpaintXLPipeline),
}
NARROW = 4  # times fewer channels, in the short form
UNETS = {
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,  # 1280 of the pooled prompt, and six numbers of 256
    },
}
POOLED = 1280
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def components(family: str, pixels: int, short: bool, dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """UNet, VAE and small decoder with random weights, in a precision, on a device."""
    width, config = NARROW if short else 1, dict(UNETS[family])
    config["block_out_channels"] = tuple(n // width for n in config["block_out_channels"])
    config["cross_attention_dim"] //= width
    if short and family == "sdxl":
        config["transformer_layers_per_block"] = (1, 1, 1)
    vae = {
        "block_out_channels": tuple(n // width for n in (128, 256, 512, 512)),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": pixels,
    }
    networks = {
        "unet": build(UNet2DConditionModel, device, sample_size=pixels // 8, norm_num_groups=32 // width, **config),
        "vae": build(AutoencoderKL, device, **vae),
        "gradient_vae": build(AutoencoderTiny, device),
    }
    return {name: nn.Module.to(network, dtype) for name, network in networks.items()}


def pipeline(family: str, method: str, networks: dict[str, nn.Module]):
    """The pipeline of a method, without text encoders: it is given embeddings."""
    stock, ours = PIPELINES[family]
    scheduler = DDIMScheduler(**SCHEDULE)
    given = {"unet": networks["unet"], "vae": networks["vae"], "scheduler": scheduler}
    given |= dict.fromkeys(("text_encoder", "tokenizer"))
    if family == "sd15":
        given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        given |= dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        given["add_watermarker"] = False
    pipe = (stock if method == STOCK else ours)(**given)
    if method not in (STOCK, ALONE):
        pipe.gradient_vae = networks["gradient_vae"]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def asked(family: str, method: str, pixels: int, unet: nn.Module, steps: int) -> dict:
    """A call's arguments: a picture of noise whose middle, half as wide, is painted."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randn(2, 77, unet.config.cross_attention_dim, generator=draw).to(unet.device, unet.dtype)
    mask = torch.zeros(1, 1, pixels, pixels)
    mask[..., pixels // 4 : -pixels // 4, pixels // 4 : -pixels // 4] = 1
    given = {
        "prompt_embeds": words[:1],
        "negative_prompt_embeds": words[1:],
        "image": torch.rand(1, 3, pixels, pixels, generator=draw),
        "mask_image": mask,
        "height": pixels,
        "width": pixels,
        "strength": 1.0,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
    if family == "sdxl":
        pooled = torch.randn(2, POOLED, generator=draw).to(words)
        given |= {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]}
    return given if method == STOCK else given | {"preset": "balanced" if method == ALONE else method}


def measure(family: str, method: str, pixels: int, networks: dict, steps: int, device: str) -> dict:
    """Seconds and peak of the second of two equal calls; None for both where memory runs out."""
    pipe = pipeline(family, method, networks)
    try:
        pipe(**asked(family, method, pixels, networks["unet"], steps))
        start(device)
        started = time.perf_counter()
        pipe(**asked(family, method, pixels, networks["unet"], steps))
        wait(device)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None}
    except torch.OutOfMemoryError:
        return {"seconds": None, "peak": None}


def start(device: str) -> None:
    """Wait, and forget earlier peaks."""
    wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rows_of(a: argparse.Namespace, known: list[dict]) -> Iterator[dict]:
    """The table's rows, those that are known and those that are measured now."""
    for family in PIPELINES:
        for pixels in (64,) if a.short else (512, 1024):
            for precision in ("float32",) if a.device == "cpu" else ("float16", "bfloat16"):
                networks = None
                for method in METHODS:
                    row = {"family": family, "pixels": pixels, "precision": precision, "method": method}
                    found = next((k for k in known if row.items() <= k.items()), None)
                    if found is None:
                        networks = networks or components(family, pixels, a.short, getattr(torch, precision), a.device)
                        steps = 10 if a.short else STEPS
                        found = row | measure(family, method, pixels, networks, steps, a.device) | machine(a.device)
                    yield found
                del networks
                gc.collect()
                if a.device == "cuda":
                    torch.cuda.empty_cache()


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__.split("+")[0]}


def tell(row: dict, stock: dict) -> str:
    """A row of the table, beside its stock."""
    name = f"{row['family']:6}{row['pixels']:5}  {row['precision']:10}{row['method']:28}"
    if row["seconds"] is None:
        return f"{name}out of memory"
    ratio = "" if stock["seconds"] is None else f"{row['seconds'] / stock['seconds']:9.2f}"
    if row["peak"] is None:
        return f"{name}{row['seconds']:9.2f}{ratio}"
    peak = "" if stock["peak"] is None else f"{row['peak'] / stock['peak']:9.2f}"
    return f"{name}{row['seconds']:9.2f}{ratio}{row['peak'] / 2**30:9.2f}{peak}"


def load_bundled(precision: str, device: str) -> VMLInpaintPipeline:
    """The bundled checkpoint with UNet and VAE in a precision."""
    pipe = VMLInpaintPipeline.from_pretrained(bundled_model())
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae):
        nn.Module.to(network, device, getattr(torch, precision))
    pipe.text_encoder.to(device)
    return pipe


def paint(pipe: VMLInpaintPipeline, steps: int) -> tuple[torch.Tensor, float]:
    """What a pipeline of the bundled checkpoint paints into a box of a validation picture, and its PSNR there."""
    path, prompt = example_images("validation")[0]
    image, known = from_pil(load_image(path).resize((128, 128))), box_mask(128, 128).reshape(1, 1, 128, 128)
    call = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "output_type": "pt"}
    found = pipe(prompt, image, 1 - known, **call, generator=torch.Generator().manual_seed(0)).images.float().cpu()
    return found, psnr(found, image, 1 - known).item()


def check_precisions(device: str, steps: int) -> torch.Tensor:
    """float32's picture; prints how far those of half precision are from it."""
    exact, quality = paint(load_bundled("float32", device), steps)
    print(f"\nbundled checkpoint, a box of one picture: float32 {quality:.2f} dB to the truth")
    for precision in ("float16", "bfloat16") if device == "cuda" else ("bfloat16",):
        found, quality = paint(load_bundled(precision, device), steps)
        near = psnr(found, exact).item()
        print(f"  {precision:9} {quality:.2f} dB to the truth, {near:.1f} dB to float32's picture")
    return exact


def check_compiled(device: str, steps: int, exact: torch.Tensor) -> None:
    """The UNet's transformer blocks compiled: the same picture, and the seconds beside those without."""
    pipe, seconds = load_bundled("float32", device), {}
    for name in ("plain", "compiled"):
        if name == "compiled":
            pipe.unet.compile_repeated_blocks(fullgraph=True)
        for run in ("first", "second"):
            wait(device)
            started = time.perf_counter()
            found, _ = paint(pipe, steps)
            seconds[name, run] = time.perf_counter() - started
    apart = (found - exact).abs().max().item()
    ratio = seconds["compiled", "second"] / seconds["plain", "second"]
    print(
        f"compiled: {apart * 255:.2f} / 255 from the picture without, {ratio:.2f} x its seconds, "
        f"after {seconds['compiled', 'first']:.0f} s to compile"
    )


def check_two_processes(options: list[str], device: str, steps: int, exact: torch.Tensor) -> None:
    """Two processes at once on the device paint what one paints."""
    command = [sys.executable, __file__, "--paint", *options]
    started = time.perf_counter()
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[0].splitlines() for process in both]
    if any(process.returncode for process in both):
        raise SystemExit(f"two processes: they ended with {[process.returncode for process in both]}.")
    apart = max(abs(float(lines[-1]) - exact.mean().item()) for lines in told)
    print(f"two processes at once: {time.perf_counter() - started:.1f} s, means of their pictures within {apart:.1e}")


def tell_stop(short: bool, device: str) -> None:
    """Stop during a pass of the UNet in the last level, one with an inner step, and say what was still done."""
    pixels, precision = 64 if short else 512, torch.float32 if device == "cpu" else torch.float16
    networks = components("sd15", pixels, short, precision, device)
    pipe, calls = pipeline("sd15", ALONE, networks), []

    def begin(name: str, network: nn.Module) -> None:
        wait(device)
        calls.append((name, time.perf_counter()))
        if name == "UNet" and pipe.level is not None and pipe.level.index == pipe.num_timesteps - 2:
            pipe._interrupt = True

    for name, network in (("UNet", networks["unet"]), ("decoder", networks["vae"].decoder)):
        network.register_forward_pre_hook(lambda network, given, name=name: begin(name, network))
    call = asked("sd15", ALONE, pixels, networks["unet"], 4) | {"guidance_scale": 1.0, "return_report": True}
    report = pipe(**call, inner_steps=1, proximal=False).report
    ended = time.perf_counter()
    at = max(place for place, (name, _) in enumerate(calls) if name == "UNet")
    after = [name for name, _ in calls[at + 1 :]]
    print(f"levels: {len(report.trace)} of {report.levels} ended; stopped early: {report.interrupted}")
    print(f"network calls after the one that the Stop came in: {', '.join(after) or 'none'}")
    print(f"seconds of that call and what came after: {ended - calls[at][1]:.2f}")
    means = {name: report.seconds[name] / report.calls[name] for name in ("denoise", "denoise_vjp", "decode")}
    print("seconds of a call in the mean: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in means.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="narrow networks at 64 pixels, 10 steps")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=Path, help="a file of rows: what it has is not measured again")
    parser.add_argument("--stop", action="store_true", help="only how soon a Stop acts")
    parser.add_argument("--paint", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; expected one, or --short --device cpu to see that this runs.")
    logging.set_verbosity_error()  # stock XL says at every call that its VAE goes to float32
    logging.disable_progress_bar()
    steps = 10 if a.short else STEPS
    if a.paint:
        print(paint(load_bundled("float32", a.device), steps)[0].mean().item())
        return
    if a.stop:
        tell_stop(a.short, a.device)
        return
    known = [json.loads(line) for line in a.rows.read_text().splitlines()] if a.rows and a.rows.exists() else []
    unit = "" if a.device == "cpu" else f"{'peak, GiB':>9}{'x stock':>9}"
    print(f"{'':51}{'seconds':>9}{'x stock':>9}{unit}", flush=True)
    stock = None
    for row in rows_of(a, known):
        stock = row if row["method"] == STOCK else stock
        print(tell(row, stock), flush=True)
        if a.rows and row not in known:
            with a.rows.open("a") as file:
                print(json.dumps(row), file=file)
    exact = check_precisions(a.device, steps)
    check_compiled(a.device, steps, exact)
    check_two_processes(["--device", a.device, *["--short"] * a.short], a.device, steps, exact)
    if a.device == "cuda":
        tests = Path(__file__).parents[1] / "tests"
        raise SystemExit(subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(tests)]).returncode)


if __name__ == "__main__":
    main()
