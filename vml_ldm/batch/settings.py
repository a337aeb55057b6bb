"""All that the results of a run depend on beside its files, written down so that two runs can be compared."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, is_dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from vml_ldm.families import FAMILIES
from vml_ldm.posing import Inpaint, Restore, denoiser

_OURS = (
    *("self", "prompt", "generator", "output_type", "return_dict", "return_report", "num_images_per_prompt"),
    *("latents", "prompt_embeds", "negative_prompt_embeds", "height", "width", "image", "mask_image", "y", "operator"),
    *("sigma_y", "padding_mask_crop", "masked_image_latents", "callback_on_step_end"),
    "callback_on_step_end_tensor_inputs",
)
_RECORDED = ("num_inference_steps", "guidance_scale", "preset", "solver", "memory")  # also those left to the pipeline
_SAMPLE = 64  # weights of a tensor that its digest sees
_SWITCHES = (  # attributes of modules and attention processors by which a loaded network changes
    *("scaling", "active_adapters", "disable_adapters", "merged", "scale"),  # LoRA and its like; IP-Adapter
    *("s1", "s2", "b1", "b2", "use_slicing", "use_tiling"),  # FreeU; the VAE's
)


def settings(pipe, task: Restore | Inpaint, prompt: str, seed: int, arguments: dict) -> dict:
    """All that a result depends on beside the files, the image's name and the versions, as JSON gives it back.

    A network is there by a digest of its configuration, of some weights of every tensor, and of adapters' scales.

    Raises:
        TypeError: another pipeline than the task's, or an argument that is not of its call or no plain value.
        ValueError: an argument out of its range.
    """
    names = [tasks[task.kind] for tasks in FAMILIES.values() if task.kind in tasks]
    if type(pipe).__name__ not in names:
        raise TypeError(f"the pipeline is {type(pipe).__name__}; expected {' or '.join(names)} for this task.")
    call = inspect.signature(type(pipe).__call__).parameters
    if unknown := [name for name in arguments if name not in call or name in _OURS]:
        raise TypeError(f"solve_folder() got {unknown[0]!r}; expected arguments of the call that it does not give.")
    pipe.check_choices(**arguments)
    model = {
        "model": str(pipe.config.get("_name_or_path")),
        "scheduler": type(pipe.scheduler).__name__,
        "scheduler_config": _public(json.loads(pipe.scheduler.to_json_string())),
        "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
        **{name: _fingerprint(part) for name, part in networks(pipe).items()},
    }
    asked = {name: call[name].default for name in _RECORDED} | arguments
    return json.loads(json.dumps({**task.settings(), **model, "prompt": prompt, "seed": seed, **asked}, default=_plain))


def networks(pipe) -> dict[str, nn.Module | None]:
    """A pipeline's networks by name, the small decoder among them; None where an optional one is left out."""
    parts = {**pipe.components, "gradient_vae": pipe.gradient_vae}
    return {name: part for name, part in parts.items() if part is None or isinstance(part, nn.Module)}


def _fingerprint(network: nn.Module | None) -> str | None:
    if network is None:
        return None
    config = getattr(network, "config", {})
    seen = sha256(repr(sorted(_public(config if isinstance(config, dict) else config.to_dict()).items())).encode())
    for name, tensor in network.state_dict().items():
        seen.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if not tensor.is_meta:  # offloaded one by one
            seen.update(_sample(tensor).numpy().tobytes())
    processors = getattr(network, "attn_processors", {})
    for name, part in (*network.named_modules(), *processors.items()):
        switches = {key: getattr(part, key) for key in _SWITCHES if _is_plain(getattr(part, key, None))}
        seen.update(f"{name}{switches}".encode() if switches else b"")
    return seen.hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor:
    """Some entries, from the first to the last."""
    flat = tensor.detach().flatten()
    index = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLE, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)].double().cpu()


def _is_plain(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (bool, int, float, str))


def _public(config: dict) -> dict:
    """Without what was noted of where it came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _plain(value):
    if is_dataclass(value):
        return asdict(value)
    raise TypeError(f"an argument is {type(value).__name__}; expected what JSON holds, or a dataclass of it.")
