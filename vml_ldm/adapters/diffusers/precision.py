"""Networks in their own precision, on their own device, checked: what is not finite is run once more in float32."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers
from torch import Tensor, nn
from torch.autograd import graph
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from ...objective import NonFiniteError, PullBack, T, at_unit_size, pullback

_HALF = (torch.float16, torch.bfloat16)
_CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")  # what diffusers sets in modules
_LAYERS = ("resnets", "attentions", "upsamplers")  # the lists of a decoder's block


class Guard:
    """Runs networks and checks what they give. It owns their state while a prior is in use: gradient flags,
    checkpointing, precision, the scale of LoRA layers.

    Attributes:
        retries: how often a network was run once more in float32, by name.
    """

    def __init__(self):
        self.retries = Counter()
        self._upcast: dict[nn.Module, dict[str, torch.dtype]] = {}
        self._thawed: list[tuple[nn.Module, str]] = []
        # of frozen networks, what would take a walk through all of their modules at every pass
        self._hooked: dict[nn.Module, bool] = {}
        self._dtypes: dict[nn.Module, torch.dtype] = {}
        self._checkpointed = 0
        self._checkpointing: list[tuple[nn.Module, tuple[str, ...], dict]] = []
        self._scalings: list[tuple[dict, dict]] = []
        # within `checked`: of each call its name, its network, and whether what it gave is finite, on the device
        self._given: list[tuple[str, nn.Module, Tensor]] | None = None

    def freeze(self, *networks: nn.Module) -> None:
        """Switch off the weights' gradients, so that graphs keep what the state's gradient needs and no more.

        Not under gradient checkpointing where hooks move or cast the weights: what it runs again keeps the values of
        those weights alone that require a gradient.
        """
        self._hooked |= {n: _is_hooked(n) for n in networks}
        self._dtypes |= {n: n.dtype for n in networks if not self._hooked[n]}
        kept = [n for n in networks if not (self._hooked[n] and is_checkpointed(n))]
        owners = {module for network in kept for module in network.modules()}
        thawed = [(m, name) for m in owners for name, p in m.named_parameters(recurse=False) if p.requires_grad]
        for module, name in thawed:
            module.get_parameter(name).requires_grad_(False)
        self._thawed += thawed

    def checkpoint(self, times: int, *networks: nn.Module) -> None:
        """Switch gradient checkpointing, where networks have it; what has it on is left alone.

        A VAE's decoder is checkpointed layer by layer: its own way, block by block, keeps all of the last and largest
        block at once when it runs that again. Twice is both, a layer inside a block.

        Args:
            times: 0, 1 or 2.
        """
        if times == self._checkpointed:
            return
        self._leave_checkpointing()
        self._checkpointed = times
        for network in networks if times else ():
            if not can_checkpoint(network) or is_checkpointed(network):
                continue
            self._note(_CHECKPOINTING, network.modules())
            network.enable_gradient_checkpointing()
            if layers := _layers(getattr(network, "decoder", None)):
                network.decoder.gradient_checkpointing = times == 2
                self._note(("forward",), layers)
                for layer in layers:
                    layer.forward = partial(_checkpointed, layer.forward)

    def _note(self, names: tuple[str, ...], modules: Iterable[nn.Module]) -> None:
        """Remember what is about to be set in modules."""
        kept = lambda module: {name: vars(module)[name] for name in names if name in vars(module)}  # noqa: E731
        self._checkpointing += [(module, names, kept(module)) for module in modules]

    def _leave_checkpointing(self) -> None:
        for module, names, found in self._checkpointing:
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(found)
        self._checkpointing, self._checkpointed = [], 0

    def scale_lora(self, network: nn.Module, scale: float) -> None:
        """Scale the network's LoRA layers until `restore`.

        A network's own forward pass does so for its own duration only: what a backward pass runs again misses it.
        """
        if scale == 1.0 or not USE_PEFT_BACKEND:
            return
        found = (vars(module).get("scaling") for module in network.modules())
        self._scalings += [(scaling, dict(scaling)) for scaling in found if isinstance(scaling, dict)]
        scale_lora_layers(network, scale)

    def restore(self) -> None:
        """Leave the networks as they came: gradients' flags, checkpointing, LoRA, and precision if it was lifted."""
        for scaling, before in reversed(self._scalings):
            scaling.update(before)
        self._scalings.clear()
        self._leave_checkpointing()
        for module, name in self._thawed:  # by name: offloading may have put other parameters there
            module.get_parameter(name).requires_grad_(True)
        self._thawed.clear()
        self._hooked.clear()
        self._dtypes.clear()
        for network, dtypes in self._upcast.items():
            for name, tensor in _floats(network) if not _is_recast(network) else ():
                tensor.data = tensor.data.to(dtypes[name])
        self._upcast.clear()

    def upcast(self, network: nn.Module) -> None:
        """Run a network in float32 from here on, until `restore`.

        Its weights are float32 meanwhile, unless hooks put other ones there at every pass: then they are cast as they
        are used.
        """
        self._upcast[network] = {name: tensor.dtype for name, tensor in _floats(network)}
        for _, tensor in _floats(network) if not _is_recast(network) else ():
            tensor.data = tensor.data.float()

    def dtype(self, network: nn.Module) -> torch.dtype:
        """The precision to hand the network its inputs in."""
        return torch.float32 if network in self._upcast else self._dtypes.get(network) or network.dtype

    def place(self, network: nn.Module, x: Tensor) -> Tensor:
        """x as the network takes it: in its precision and on its device."""
        return x.to(device_of(network, x), self.dtype(network))

    def run(self, name: str, network: nn.Module, function: Callable[[], Tensor]) -> Tensor:
        """``function()``, which calls `network`; `name` is what warnings and errors call it.

        Raises:
            NonFiniteError: NaN or infinity in float32.
        """
        return self._finite(name, network, lambda: (function(),))[0]

    def checked(self, work: Callable[[], T]) -> T:
        """``work()``, whose network calls are looked at all together when it ends, by one wait for the device.

        Where a network gave what is not finite, it goes on in float32 and the work is done again.

        Raises:
            NonFiniteError: NaN or infinity in float32.
        """
        if self._given is not None:  # within another's work
            return work()
        while True:
            self._given, failed = [], None
            try:
                result = work()
            except NonFiniteError as error:  # of what such a network gave
                failed = error
            finally:
                given, self._given = self._given, None
            wrong = _first_wrong(given)
            if wrong is not None:
                self._lift(*wrong)
            elif failed is not None:
                raise failed
            else:
                return result

    def pullback(
        self,
        name: str,
        network: nn.Module,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        rerun: str = "",
    ) -> tuple[Tensor, PullBack]:
        """`pullback` with both passes checked; the cotangent goes in at unit size, image by image.

        Args:
            rerun: "" keeps the graph from one pass to the other. "whole" runs the function again, with a graph, when
                it is pulled; "parts" says that parts of the network do so by themselves.
        """

        def run() -> tuple[Tensor, PullBack]:
            with self.weights_kept(network):
                return pullback(function, x)

        def run_first() -> tuple[Tensor, PullBack]:
            with torch.no_grad():
                return function(x), lambda cotangent: run()[1](cotangent)

        value, pull = self._finite(name, network, run_first if rerun == "whole" else run)

        def checked(cotangent: Tensor) -> Tensor:
            first = lambda: (at_unit_size(pull)(cotangent),)  # noqa: E731
            again = lambda: (at_unit_size(run()[1])(cotangent),)  # noqa: E731
            in_parts = self._has_hooks(network) and (rerun == "parts" or is_checkpointed(network))
            with _fetched(network, cotangent.device) if in_parts else nullcontext():
                return self._finite(f"the backward pass of {name}", network, first, again)[0]

        return value, checked

    def weights_kept(self, network: nn.Module) -> AbstractContextManager:
        """Graphs made inside keep the weights as they are, for networks whose hooks move or cast them after each pass.

        Offloading and layerwise casting exchange a parameter's data in place, so that a backward pass would find them
        on another device, in another precision or, offloaded to a disk, overwritten. Kept weights stay where the pass
        had them until its graph is gone.
        """
        return saved_tensors_hooks(Tensor.detach, lambda kept: kept) if self._has_hooks(network) else nullcontext()

    def _has_hooks(self, network: nn.Module) -> bool:
        """As `_is_hooked`, of a frozen network as it was then."""
        return self._hooked[network] if network in self._hooked else _is_hooked(network)

    def _finite(self, name: str, network: nn.Module, run: Callable[[], tuple], again: Callable | None = None) -> tuple:
        """run(), a tuple whose first item must be finite; otherwise `again` (the same, if None) in float32."""
        with self._precision(network):
            result = run()
        if self._given is not None:
            self._given.append((name, network, torch.isfinite(result[0]).all()))
            return result
        if _is_finite(result[0]):
            return result
        self._lift(name, network)
        with self._precision(network):
            result = (again or run)()
        if not _is_finite(result[0]):
            raise NonFiniteError(_message(name))
        return result

    def _precision(self, network: nn.Module) -> AbstractContextManager:
        return _InFloat32() if network in self._upcast and _is_recast(network) else nullcontext()

    def _lift(self, name: str, network: nn.Module) -> None:
        """Move a half-precision network to float32 for the rest of the call, with a warning; otherwise raise."""
        if self.dtype(network) not in _HALF:
            raise NonFiniteError(_message(name))
        warnings.warn(f"{name} gave non-finite values in {network.dtype}; it goes on in float32.", stacklevel=2)
        self.retries[name] += 1
        self.upcast(network)


def _layers(decoder: nn.Module | None) -> list[nn.Module]:
    """The layers of a VAE's decoder that are worth running again one by one."""
    if not hasattr(decoder, "up_blocks"):
        return []
    blocks = filter(None, (getattr(decoder, "mid_block", None), *decoder.up_blocks))
    found = [layer for block in blocks for name in _LAYERS for layer in getattr(block, name, None) or ()]
    return [layer for layer in found if layer is not None]  # a block without attention has None for each


def _checkpointed(forward: Callable, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


class _InFloat32(TorchFunctionMode):
    """What runs inside on float32 data stays float32, whatever precision the weights have that it meets.

    Half-precision operands beside float32 ones are cast as they are used, and a float32 tensor is not made a half one.
    What moves, casts or loads weights, as hooks do, has no float32 operands and goes through as it is.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.autograd.grad:
            return self._pull(*args, **kwargs)
        given = (args, kwargs or {})
        kinds = {leaf.dtype for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        if torch.float32 in kinds and func.__name__ not in ("__get__", "__set__"):
            given = tree_map(_lifted, given)
        return func(*given[0], **given[1])

    def _pull(self, outputs: tuple, inputs: tuple, grad_outputs: Tensor, **_) -> tuple[Tensor, ...]:
        """`torch.autograd.grad` as `pullback` calls it, but with this mode on, for what backward passes run again."""
        with self:
            run = graph._engine_run_backward  # torch.autograd.grad itself would leave the mode again
            return run(outputs, (grad_outputs,), False, False, inputs, False, accumulate_grad=False)


def _lifted(value):
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


def cast(value, like: Tensor):
    """The tensors in a tensor, dict, list or tuple on like's device, floats in its precision. Containers are copied."""
    if isinstance(value, Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, dict):
        return {name: cast(item, like) for name, item in value.items()}
    return type(value)(cast(item, like) for item in value) if isinstance(value, (list, tuple)) else value


@contextmanager
def _fetched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """An offloaded network brought back while a backward pass runs parts of it again, without what calls them."""
    hook, weight = getattr(network, "_hf_hook", None), next(network.parameters(), None)
    away = weight is not None and weight.device.type not in ("meta", device.type)  # on meta its layers have their own
    if away and hasattr(hook, "pre_forward"):
        hook.pre_forward(network)
    held = [(group, group.offload_leader) for group in _groups(network)]
    try:
        for group, _ in held:
            group.onload_()
            if group.stream is not None:
                group.stream.synchronize()
            group.offload_leader = None  # its pass, run again, would take it away before its parts are
        yield
    finally:
        for group, leader in held:
            group.offload_leader = leader
            group.offload_()


def _groups(network: nn.Module) -> list:
    """The groups of diffusers' group offloading that come with a call of more than the layer that has the weights."""
    registries = [m._diffusers_hook for m in network.modules() if hasattr(m, "_diffusers_hook")]
    hooks = filter(None, (registry.get_hook("group_offloading") for registry in registries))
    groups = {id(hook.group): hook.group for hook in hooks}.values()
    layer_alone = lambda g: g.modules == [g.offload_leader] and not any(g.offload_leader.children())  # noqa: E731
    return [group for group in groups if not layer_alone(group)]


def _floats(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its floating-point parameters and buffers (diffusers' own `to` warns of layers kept in float32, even of none)."""
    named = chain(network.named_parameters(), network.named_buffers())
    return ((name, tensor) for name, tensor in named if tensor.is_floating_point())


def _is_hooked(network: nn.Module) -> bool:
    """Whether accelerate or diffusers moves or casts the network's weights around its passes."""
    return any(hasattr(m, "_hf_hook") or hasattr(m, "_diffusers_hook") for m in network.modules())


def _is_recast(network: nn.Module) -> bool:
    """Whether diffusers' own hooks (group offloading, layerwise casting) put weights of their precision there."""
    return any(hasattr(m, "_diffusers_hook") for m in network.modules())


def is_checkpointed(network: nn.Module) -> bool:
    """Whether a backward pass runs parts of the network again."""
    return getattr(network, "is_gradient_checkpointing", False)


def can_checkpoint(network: nn.Module) -> bool:
    """Whether a backward pass may run parts of the network again."""
    return getattr(network, "_supports_gradient_checkpointing", False)


def device_of(network: nn.Module, x: Tensor) -> torch.device:
    """Where to hand the network its input x: parts of a pipeline may lie on different devices.

    A network that a host has hooked (offloading, ``device_map``) fetches inputs, or itself, to where it runs: x stays.
    """
    hooked = hasattr(network, "_hf_hook") or hasattr(network, "_diffusers_hook")
    return x.device if hooked else next(network.parameters(), x).device


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _first_wrong(given: list[tuple[str, nn.Module, Tensor]]) -> tuple[str, nn.Module] | None:
    """Name and network of the first call that gave what is not finite; what came after may be wrong by it."""
    flags = torch.stack([finite for *_, finite in given]).tolist() if given else []
    return next((call for (*call, _), finite in zip(given, flags, strict=True) if not finite), None)


def _message(name: str) -> str:
    return (
        f"{name} gave NaN or infinity in float32; expected finite values. Check the weights, the image and the prompt "
        "embeddings, or take a smaller guidance_scale."
    )
