"""What networks take of memory, found without running them.

A sketch of the prior, built from its networks' configurations, runs the prior's own passes on tensors that have a
shape, a precision and a device but no values (PyTorch's fake tensors), and every storage that is made and freed is
counted. So the figures hold for this size, precision and attention; they cost no arithmetic and no memory, and neither
hooks, weights nor random numbers of the real networks are touched. A short run of the real networks would need all of
these, and would have to be extrapolated. Of kernels' workspace only the greatest part is counted, the copy of its
weights that a convolution makes; the allocator's fragments are not seen. (Resident memory of Stable Diffusion's UNet
with its VJP on a CPU was a fifth more, checkpointed half a GB more.)
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ...objective import PullBack
from .memory import Footprint, Plan, predict
from .precision import Guard, can_checkpoint, is_checkpointed

logger = logging.getLogger(__name__)
_torch_logger = logging.getLogger("torch._subclasses.fake_tensor")
_LEVEL = (0.6, 0.8)  # any: a network takes the same at every level
_IMAGES = 6  # as many as the whole batch of float32 tensors, while tiles are blended and pulled back
_known: dict[tuple, Footprint] = {}


class Footprints:
    """The footprints of a prior's networks, by plan.

    Args:
        prior: a `GuidedPrior`, before it is entered.
        shape: (B, c, h, w), of its latents.
        draft: another decoder of the same latents, or None.
        device: where the networks run.
        denoiser, decoder: steps go back through it.
        operator: bytes that the operator's graph holds.
        draft_last: no step goes back through the VAE's own decoder, only through the other one.
        drawn: (h, w), how much of the latents decoders draw; None: all.
    """

    def __init__(
        self,
        prior,
        shape: tuple,
        draft: nn.Module | None,
        device: torch.device,
        *,
        denoiser: bool = True,
        decoder: bool = True,
        operator: int = 0,
        draft_last: bool = False,
        drawn: tuple[int, int] | None = None,
    ):
        self._prior, self._shape, self._draft, self._device = prior, tuple(shape), draft, device
        self._drawn_shape = self._shape if drawn is None else (*shape[:2], *drawn)
        self._denoiser, self._operator = denoiser, operator
        self._pulled = {"draft": decoder, "decode": decoder and not draft_last}
        self._fake, self._skeletons = None, {}
        self._away = sum(_away(network, device) for network in {*prior._networks(), draft} - {None})

    def need(self, plan: Plan, drafting: bool = False) -> int | None:
        """The predicted peak in bytes, above the weights that are in place; None if a network cannot be sketched.

        Args:
            drafting: at levels that draw with the other decoder.
        """
        level = _torch_logger.level
        _torch_logger.setLevel(logging.CRITICAL)  # it would print what is said below, and a traceback
        try:
            return self._away + self._need(plan, drafting)
        except Exception as error:  # a network of any make: what cannot be predicted can still be run
            logger.info("the memory that the networks take cannot be predicted: %s: %s", type(error).__name__, error)
            return None
        finally:
            _torch_logger.setLevel(level)

    def _need(self, plan: Plan, drafting: bool) -> int:
        self._fake = self._fake or _fake_tensors()
        pulled = self._denoiser and not plan.free
        denoiser = self._of("denoise", plan.checkpointed, pulled, self._shape)
        if plan.denoiser_again:
            denoiser = Footprint(0, denoiser.peak)
        if drafting:
            return predict(denoiser, [self._drawn("draft", self._draft, plan)], self._operator)
        networks = [self._drawn("decode", self._prior.vae, plan)]
        if not self._pulled["decode"] or self._drawn_shape != self._shape:
            # otherwise the decoder with its graph takes more than the encoder without one
            networks.append(self._drawn("encode", self._prior.vae, plan))
        if self._drawn_shape != self._shape:
            networks.append(self._drawn("whole", self._prior.vae, plan))  # at each level and for the answer
        return predict(denoiser, networks, self._operator)

    def _drawn(self, kind: str, vae: nn.Module, plan: Plan) -> Footprint:
        """Of a VAE, which takes the latents whole or in pieces: a piece's, and what puts images together.

        With a graph of all pieces, that of the whole, as often as tiles overlap.
        """
        shape = self._shape if kind in ("encode", "whole") else self._drawn_shape
        piece, overlap = _piece(vae, plan, shape)
        pulled = self._pulled.get(kind, False)
        if pulled and not plan.decoder_again:
            whole = self._of(kind, plan.checkpointed, True, shape)
            return Footprint(*(int(overlap * count) for count in whole))
        peak = self._of(kind, plan.checkpointed, pulled, piece).peak
        if piece == shape:
            return Footprint(0, peak)
        batch, _, *latent = shape
        images = _IMAGES * 4 * 3 * batch * math.prod(latent) * _stride(self._prior.vae) ** 2
        return Footprint(images, peak + images)

    def _of(self, kind: str, checkpointed: int, pulled: bool, shape: tuple) -> Footprint:
        checkpointed = checkpointed if kind == "decode" else min(1, checkpointed) if kind == "denoise" else 0
        networks = self._prior._networks() if kind != "draft" else (*self._prior._networks(), self._draft)
        given = [(tuple(t.shape), t.dtype) for t in _tensors(self._prior.condition)]
        key = (kind, checkpointed, pulled, shape, self._device, type(self._prior), *given, *map(_identity, networks))
        if key not in _known:
            _known[key] = self._measure(kind, checkpointed, pulled, shape)
        return _known[key]

    def _measure(self, kind: str, checkpointed: int, pulled: bool, shape: tuple) -> Footprint:
        unthreaded = torch.autograd.set_multithreading_enabled(False)  # the count is this thread's
        with unthreaded, self._fake, self._sketch(Plan(checkpointed), shape) as sketch:
            drawn = sketch.draft(self._skeleton(self._draft, sketch.vae.dtype)) if kind == "draft" else sketch
            z, weights = self._empty(*shape), [*sketch._network.parameters(), *drawn.vae.parameters()]
            if kind == "encode":
                stride = _stride(sketch.vae)
                image = self._empty(len(z), sketch.vae.config.in_channels, *(stride * n for n in z.shape[2:]))
                return _count(lambda: sketch.encode(image), None, weights, sketch.vae)
            if kind == "denoise":
                one, other = lambda: sketch.denoise(z, *_LEVEL), lambda: sketch.denoise_pullback(z, *_LEVEL)
            else:
                one, other = lambda: drawn.decode(z), lambda: drawn.decode_pullback(z)
            return _count(one, other if pulled else None, weights, sketch._network if kind == "denoise" else drawn.vae)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device)

    def _sketch(self, plan: Plan, shape: tuple):
        """The prior with networks and conditions that have no values, and the plan."""
        sketch = copy.copy(self._prior)
        networks = {id(network): self._skeleton(network) for network in self._prior._networks()}
        for name, value in vars(self._prior).items():
            if id(value) in networks:
                setattr(sketch, name, networks[id(value)])
        sketch.condition = _emptied(self._prior.condition, self._device)
        appended = self._prior._network.config.in_channels - shape[1]
        sketch.inpainting = self._empty(shape[0], appended, *shape[2:]) if appended > 0 else None
        sketch._guard, sketch.plan, sketch.draft_plan = _Unchecked(), plan, None
        return sketch

    def _skeleton(self, network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        if network not in self._skeletons:
            self._skeletons[network] = _skeleton(network, dtype or network.dtype, self._device)
        return self._skeletons[network]


def graph_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """What the graph of ``function(x)`` holds beside x, by running it."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
        source = x.detach().requires_grad_()
        value = function(source)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values()) + value.numel() * value.element_size()


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, as long as they live.

    Attributes:
        live, peak: bytes now, and at most.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Do not count these, nor their views."""
        for tensor in tensors:
            self._follow(tensor, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._follow(tensor, tensor.untyped_storage().nbytes())
        return out

    def _follow(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # one object as long as the storage lives
        if key in self._storages:
            return

        def freed(_) -> None:
            if self._storages.pop(key, None) is not None:
                self.live -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


class _Unchecked(Guard):
    """A guard of networks whose values do not exist."""

    def _finite(self, name: str, network: nn.Module, run: Callable[[], tuple], again: Callable | None = None) -> tuple:
        return run()

    def upcast(self, network: nn.Module) -> None:
        _give_weights(network, torch.float32, next(network.parameters()).device)


def _count(
    run: Callable[[], Tensor],
    pulled: Callable[[], tuple[Tensor, PullBack]] | None,
    weights: list[Tensor],
    network: nn.Module,
) -> Footprint:
    copied = max((w.numel() * w.element_size() for w in network.parameters() if w.ndim == 4), default=0)
    with LiveBytes() as count, torch.no_grad():
        count.leave_out(weights)
        if pulled is None:
            run()
            return Footprint(0, count.peak + copied)
        value, pull = pulled()
        held = count.live
        pull(torch.empty_like(value))
        return Footprint(held, count.peak + copied)


def _fake_tensors():
    """PyTorch has no public name for these; where it moves them, nothing is predicted, and all else goes on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _tensors(value) -> Iterator[Tensor]:
    """The tensors in a tensor, dict, list or tuple."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _emptied(value, device: torch.device):
    """The same dict, list or tuple with tensors of the same shapes that are on a device."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device=device)
    if isinstance(value, dict):
        return {name: _emptied(item, device) for name, item in value.items()}
    return type(value)(_emptied(item, device) for item in value) if isinstance(value, (list, tuple)) else value


def _piece(vae: nn.Module, plan: Plan, shape: tuple) -> tuple[tuple, float]:
    """The shape of what the VAE's decoder takes at once, and how often an entry is taken, on average."""
    batch, c, *latent = shape
    if plan.by_image or getattr(vae, "use_slicing", False):
        batch = 1
    if plan.tiles is None and not getattr(vae, "use_tiling", False):
        return (batch, c, *latent), 1.0
    tile = vae.tile_latent_min_size // (plan.tiles or 1)
    if tile >= max(latent):
        return (batch, c, *latent), 1.0
    step, overlap = int(tile * (1 - vae.tile_overlap_factor)), 1.0
    for n in latent:
        overlap *= sum(min(tile, n - i) for i in range(0, n, step)) / n
    return (batch, c, *(min(n, tile) for n in latent)), overlap


def _stride(vae: nn.Module) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _skeleton(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network of the same configuration and state, without its values, hooks or adapters."""
    network = getattr(network, "_orig_mod", network)  # below torch.compile
    options = inspect.signature(type(network)).parameters
    config = {name: value for name, value in network.config.items() if name in options}
    if config.get("encoder_hid_dim_type") == "ip_image_proj":  # an IP-Adapter, loaded later
        config["encoder_hid_dim_type"] = None
    with torch.device("meta"):
        skeleton = type(network)(**config).eval()
    _give_weights(skeleton, dtype, device)
    if is_checkpointed(network):
        skeleton.enable_gradient_checkpointing()
    skeleton._supports_gradient_checkpointing = can_checkpoint(network)
    if sliced := _sliced(network):
        own = {name: SlicedAttnProcessor(size) for name, size in sliced.items()}
        skeleton.set_attn_processor({**skeleton.attn_processors, **own})
    return skeleton


def _give_weights(skeleton: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    for module in skeleton.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(
                module, name, nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=device), requires_grad=False)
            )
        for name, buffer in module.named_buffers(recurse=False):
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            setattr(module, name, torch.empty(buffer.shape, dtype=kind, device=device))


def _identity(network: nn.Module) -> tuple:
    """What a skeleton depends on."""
    checkpointing = is_checkpointed(network), can_checkpoint(network)
    return type(network), repr(dict(network.config)), network.dtype, *checkpointing, repr(_sliced(network))


def _sliced(network: nn.Module) -> dict[str, int]:
    """The size of the slices, by name, of those attentions that are sliced."""
    processors = getattr(network, "attn_processors", {}).items()
    return {name: p.slice_size for name, p in processors if isinstance(p, SlicedAttnProcessor)}


def _away(network: nn.Module, device: torch.device) -> int:
    """Bytes of the weights that hooks will bring to the device."""
    return sum(p.numel() * p.element_size() for p in network.parameters() if p.device.type != device.type)
