"""Nodes that tests/test_comfyui.py adds to a real ComfyUI: small genuine networks, and what is asked of the engine.

It goes into the engine's custom_nodes, and is not imported by pytest.
"""

import dataclasses
import gc

import comfy.model_management as management
import comfy.supported_models as supported
import torch
from comfy.controlnet import ControlNet
from comfy.latent_formats import Wan21
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_base import BaseModel, ModelType
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy_api.latest import ComfyExtension, io


def node(inputs=(), outputs=()):
    """A node of a function, which has its name."""

    def make(function):
        def define_schema(cls):
            return io.Schema(
                node_id=function.__name__, inputs=[i() for i in inputs], outputs=[o.Output() for o in outputs]
            )

        def execute(cls, **given):
            result = function(**given)
            return io.NodeOutput(*(result if isinstance(result, tuple) else (result,)))

        members = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
        made = type(function.__name__, (io.ComfyNode,), members)
        NODES.append(made)
        return made

    return make


NODES = []


class Extension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return Extension()


def model(name="model"):
    return lambda: io.Model.Input(name)


def vae(name="vae"):
    return lambda: io.Vae.Input(name)


def latent(name):
    return lambda: io.Latent.Input(name)


def number(name):
    return lambda: io.Int.Input(name, min=0, max=10**6)


def anything(name):
    return lambda: io.AnyType.Input(name)


@node([number("width")], [io.Conditioning])
def ZeroText(width):
    """Nothing said, to a model whose text is so wide."""
    return [[torch.zeros(1, 77, width), {"pooled_output": torch.zeros(1, width)}]]


@node([lambda: io.Image.Input("image"), number("run")], [io.Image])
def Again(image, run):
    """The same picture. Another number makes what follows run again, which the engine would take from its cache."""
    return image


@node([number("run")], [io.String])
def Package(run):
    import vml_ldm

    return vml_ldm.__file__


@node([latent("a"), latent("b")], [io.String])
def Furthest(a, b):
    """The largest difference of two latents, and the standard deviation of the second."""
    return f"{(a['samples'] - b['samples']).abs().max()} {b['samples'].std()}"


@node([anything("after"), model(), vae(), vae("small")], [io.String])
def Held(after, model, vae, small):
    """Bytes of all tensors that there are, and of the networks' weights."""
    gc.collect()
    networks = [model.model, vae.first_stage_model, small.first_stage_model]
    weights = [w for n in networks for w in (*n.parameters(), *n.buffers())]
    every = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return f"{_size(every)} {_size(weights)}"


def _size(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == "cpu"}
    return sum(storages.values())


@node([lambda: io.Mask.Input("first"), lambda: io.Mask.Input("second")], [io.Mask])
def JoinMasks(first, second):
    """Two masks as one of two."""
    return torch.cat([first, second])


class _Dynamic(ModelPatcher):
    def is_dynamic(self):
        return True


@node([model()], [io.Model])
def Dynamic(model):
    """The MODEL with a patcher that calls itself dynamic, as those of a GPU do. (The engine may not know of it.)"""
    return _Dynamic(model.model, model.load_device, model.offload_device)


@node([model()], [io.Model])
def Video(model):
    """The MODEL with the latents of a video model."""
    found = model.clone()
    found.model = _Named(model.model, Wan21())
    return found


class _Named:
    def __init__(self, model, latent_format):
        self._model, self.latent_format = model, latent_format

    def __getattr__(self, name):
        return getattr(self._model, name)


@node([], [io.Vae])
def NoVAE():
    """What ComfyUI's loader gives for a checkpoint without a VAE."""
    return VAE(sd={})


@node([number("channels")], [io.Vae])
def SmallVAE(channels):
    """A VAE of ComfyUI's own, with random weights and 8 pixels for each latent."""
    shape = {
        "double_z": True, "z_channels": channels, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    own = {"ddconfig": shape, "embed_dim": channels}
    weights = _random(AutoencoderKL(**own)).state_dict()
    made = VAE(sd=weights, config={"params": own}, dtype=torch.float32)
    made.latent_channels = channels
    return made


@node([], [io.Model])
def SmallFluxFill():
    """Flux Fill's model, with random weights: 16 channels of latent, 16 of image and 64 of mask."""
    shape = {
        "image_model": "flux", "in_channels": 96, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 32,
        "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    }  # fmt: skip
    if "txt_ids_dims" in [field.name for field in dataclasses.fields(FluxParams)]:
        shape["txt_ids_dims"] = []
    config = supported.FluxInpaint(shape)
    config.set_inference_dtype(torch.float32, None)
    return _patcher(config.get_model({}))


@node([latent("mean"), vae()], [io.Model])
def GaussianFlow(mean, vae):
    """Flow matching's exact estimate where latents are N(mean, 0.1^2)."""
    config = supported.SD15({"in_channels": 4, "model_channels": 320})
    config.set_inference_dtype(torch.float32, None)
    made = BaseModel(config, ModelType.FLOW, unet_model=lambda **_: Gaussian())
    made.diffusion_model.register_buffer("mean", made.process_latent_in(mean["samples"]))
    return ModelPatcher(made, management.get_torch_device(), management.unet_offload_device())


class Gaussian(torch.nn.Module):
    """``E[z0 | x_t] = m + g (x_t - (1 - s) m)``, as the velocity that flow models give."""

    dtype = torch.float32

    def forward(self, x, timesteps, **_):
        s = (timesteps / 1000).reshape(-1, 1, 1, 1)
        return (x - self.mean - gain(s) * (x - (1 - s) * self.mean)) / s


def gain(s):
    return 0.01 * (1 - s) / (0.01 * (1 - s) ** 2 + s**2)


@node([model(), vae(), lambda: io.Conditioning.Input("positive")], [io.String])
def FurthestEstimate(model, vae, positive):
    """`ComfyPrior` against what `GaussianFlow` is: the largest error of estimates and of J^T b, in two scalings."""
    from vml_ldm.adapters.comfyui import run

    mean, errors = model.model.diffusion_model.mean.clone(), []

    def work(sampling):
        generator = torch.Generator().manual_seed(0)
        x, b = (torch.randn(mean.shape, generator=generator) for _ in range(2))
        for s in (0.9, 0.5, 0.1):
            expected = mean + gain(s) * (x - (1 - s) * mean)
            for scale in (1.0, 1 / (1 - s)):  # flow matching's own, and Stable Diffusion's
                state = scale * x, scale * (1 - s), scale * s
                found, pull = sampling.prior.denoise_pullback(*state)
                wrong = found - expected, sampling.prior.denoise(*state) - found, pull(b) - gain(s) / scale * b
                errors.extend(error.abs().max().item() for error in wrong)
        return x

    with torch.inference_mode(False):
        run(
            work, model=model, vae=vae, positive=positive, negative=positive, cfg=1.0, sigmas=torch.tensor([1.0, 0.0]),
            batch=1, size=tuple(8 * length for length in mean.shape[2:]), seed=0,
        )  # fmt: skip
    return str(max(errors))


@node([], [io.ControlNet])
def SmallControlNet():
    """A ControlNet of ComfyUI's own for the small UNet, with random weights."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet as Network

    network = Network(
        image_size=32, in_channels=4, hint_channels=3, model_channels=320, num_res_blocks=[1], channel_mult=[1],
        num_heads=8, use_spatial_transformer=True, transformer_depth=[1], transformer_depth_output=[1, 1],
        transformer_depth_middle=1, context_dim=768, operations=comfy.ops.manual_cast,
    )  # fmt: skip
    return ControlNet(_random(network), load_device=management.get_torch_device(), manual_cast_dtype=torch.float32)


def _patcher(made):
    _random(made.diffusion_model)
    return ModelPatcher(made, management.get_torch_device(), management.unet_offload_device())


def _random(network):
    """The network with every weight drawn; ComfyUI's own layers leave theirs as memory was."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        size = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.0
        gain = float(weight.ndim == 1 and name.endswith(("weight", "scale")))
        weight.data = size * torch.randn(weight.shape, generator=generator) + gain
    return network.eval()
