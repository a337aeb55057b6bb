"""What the pipelines share around a solver: checks, prompt, prior, start, progress and callbacks, report, output.

A call's arguments travel as a namespace `a`, under their names in the call. What the network is conditioned on travels
as a dict `tensors`, under the names by which the stock pipeline's callbacks read and change it; under guidance the
negative prompts' rows come first.

`SolvingMixin` serves Stable Diffusion 1.x and 2.x. A family of models differs in, and its mixin overrides:

    _denoiser_name, _prior_class        the network's name in the pipeline, and the prior made of it
    _check_scheduler                    which schedulers it takes
    _plan(a, count, renoise)            the scheduler's levels
    _remember(a)                        what the stock pipeline's properties tell callbacks
    _embed(a)                           prompts -> tensors
    _conditions(a, batch)               what else the network takes, which callbacks do not change
    _condition(prior, tensors)          tensors -> prior
    _screen(image, dtype)               what is done to images before they are handed out
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderTiny, ConsistencyDecoderVAE
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import is_xformers_available
from torch import Tensor, nn

from vml_ldm.adapters.diffusers import (
    Chosen,
    Fitted,
    Footprints,
    GuidedPrior,
    Plan,
    SchedulerLevels,
    StableDiffusionPrior,
    StepDown,
    check_count,
    check_scheduler,
    choose,
    free_bytes,
    graph_bytes,
    parse_memory,
    plans,
    scheduler_levels,
)
from vml_ldm.closeup import Part, drawn_size, whole
from vml_ldm.images import to_pil
from vml_ldm.metering import Metered, Passes, Stopped
from vml_ldm.objective import Prior
from vml_ldm.operators import Measurement, is_linear
from vml_ldm.presets import THROUGHOUT, Settings
from vml_ldm.proximal import Settle
from vml_ldm.report import Report, memory_text
from vml_ldm.solve import Level, Levels, noise_like, passes_of, record, vml_levels

logger = logging.getLogger(__name__)
GRADIENT_VAE = "gradient_vae"


@dataclass
class VMLPipelineOutput(StableDiffusionPipelineOutput):
    """The stock output, and `report` (None unless `return_report=True`)."""

    nsfw_content_detected: list[bool] | None = None
    report: Report | None = None


class SolvingMixin:
    """The steps of a solve on the components and methods of the Stable Diffusion pipeline that it is mixed into.

    Attributes:
        gradient_vae: None, or a small decoder of the same latents (an `AutoencoderTiny`), with which the solver draws
            at all levels but the last. Unless one (or None) is set or passed to a `from_...` method, it is the folder's
            that the pipeline was loaded from, whoever loaded it. It is saved and handed on by `from_pipe` with the
            pipeline, and follows the VAE's device and precision, but is none of `components`, which stay the stock
            pipeline's.
        level: the `Level` that has just ended, for callbacks; None outside a solve.
        free_memory: bytes that ``memory="auto"`` counts on; None: what a CPU has free at each call, and on a GPU all
            that it has. Processes that are to make the same plan are given the same.
    """

    level: Level | None = None
    free_memory: int | None = None
    _denoiser_name, _prior_class = "unet", StableDiffusionPrior
    _check_scheduler = staticmethod(check_scheduler)

    def __init_subclass__(cls, **options):
        """The stock pipeline's `encode_prompt`, with `clip_skip` also for transformers' newer text encoders."""
        super().__init_subclass__(**options)
        stock = [base for base in cls.__mro__ if "encode_prompt" in vars(base) and not issubclass(base, SolvingMixin)]
        if stock:
            cls.encode_prompt = _with_text_model(stock[0].encode_prompt)

    @property
    def _denoiser(self) -> nn.Module:
        return getattr(self, self._denoiser_name)

    @property
    def gradient_vae(self) -> AutoencoderTiny | None:
        if "_gradient_vae" not in vars(self):  # diffusers' loaders make pipelines themselves, and then name the folder
            loaded_from = self.config.get("_name_or_path")
            folder = Path(loaded_from) / GRADIENT_VAE if loaded_from else None
            self._gradient_vae = AutoencoderTiny.from_pretrained(folder) if folder and folder.is_dir() else None
        return self._gradient_vae

    @gradient_vae.setter
    def gradient_vae(self, vae: AutoencoderTiny | None) -> None:
        self._gradient_vae = vae

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load as `DiffusionPipeline.from_pretrained` does.

        Pass `gradient_vae` (an `AutoencoderTiny`, or None) to take another than a local folder's own, or none.
        """
        return _with_small(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path, **kwargs):
        """Load as `FromSingleFileMixin.from_single_file` does; a file has no `gradient_vae`, which may be passed."""
        return _with_small(super().from_single_file, pretrained_model_link_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As `DiffusionPipeline.from_pipe`; `gradient_vae` is the given one's unless another is passed."""
        if isinstance(pipeline, SolvingMixin):
            kwargs.setdefault(GRADIENT_VAE, pipeline.gradient_vae)
        return _with_small(super().from_pipe, pipeline, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `DiffusionPipeline.save_pretrained`, and `gradient_vae` into a folder of its own."""
        if self.gradient_vae is not None:
            self.gradient_vae.save_pretrained(Path(save_directory) / GRADIENT_VAE)
        super().save_pretrained(save_directory, *args, **kwargs)

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable | None = None) -> None:
        """As the stock method; without xformers or CUDA a warning says so, and PyTorch's own attention goes on."""
        found, cuda = is_xformers_available(), torch.cuda.is_available()
        if found and cuda:
            return super().enable_xformers_memory_efficient_attention(attention_op)
        missing = "CUDA is not available" if found else "xformers is not installed (pip install 'vml-ldm[xformers]')"
        warnings.warn(
            f"{missing}; PyTorch's scaled_dot_product_attention goes on, which saves the same memory.", stacklevel=2
        )
        return None

    def check_choices(self, **arguments) -> None:
        """Refuse arguments of a call that are wrong whatever it solves: no such choice, a number out of its range.

        A call does so by itself; this is for those who will make many. Arguments that are left out have their defaults.

        Raises:
            ValueError, TypeError: as the call.
        """
        defaults = {p.name: p.default for p in inspect.signature(type(self).__call__).parameters.values()}
        self._choose(SimpleNamespace(**defaults | arguments))

    def _check(self, a: SimpleNamespace, channels: tuple[int, ...]) -> None:
        """Refuse what cannot work before any network runs, and fill in the defaults that depend on the model.

        Args:
            channels: of the denoisers that the pipeline can use.
        """
        if isinstance(a.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            a.callback_on_step_end_tensor_inputs = a.callback_on_step_end.tensor_inputs
        config = self._denoiser.config
        a.height = a.height or config.sample_size * self.vae_scale_factor
        a.width = a.width or config.sample_size * self.vae_scale_factor
        a.num_images_per_prompt = a.num_images_per_prompt or 1
        a.callback, a.callback_steps = getattr(a, "callback", None), getattr(a, "callback_steps", None)
        self._check_as_stock(a)
        self._check_scheduler(self.scheduler)
        if config.in_channels not in channels:
            network = {"unet": "UNet"}.get(self._denoiser_name, self._denoiser_name)
            raise ValueError(
                f"the {network} takes {config.in_channels} channels; expected "
                f"{channels[0]}{''.join(f', or {n} (inpainting)' for n in channels[1:])}."
            )
        if isinstance(self.vae, ConsistencyDecoderVAE):
            raise ValueError(
                "`vae` is a ConsistencyDecoderVAE, which draws with noise of its own, so no gradient is the image's; "
                "expected AutoencoderKL, AsymmetricAutoencoderKL or AutoencoderTiny. Or, to inpaint, solver='none'."
            )
        self._check_gradient_vae(a)
        a.memory = parse_memory(a.memory)
        self._guidance_scale, self._clip_skip = a.guidance_scale, a.clip_skip
        self._interrupt = getattr(a, "interrupted", False)  # in a group of images before this one
        self._remember(a)

    def _check_as_stock(self, a: SimpleNamespace) -> None:
        """Refuse what the stock pipeline refuses."""
        self.check_inputs(**{name: getattr(a, name) for name in inspect.signature(self.check_inputs).parameters})

    def _check_gradient_vae(self, a: SimpleNamespace) -> None:
        """Refuse a small decoder of other latents, and one that was asked for and is not there."""
        if self.gradient_vae is None:
            if a.use_gradient_vae:
                raise ValueError(
                    f"use_gradient_vae={a.use_gradient_vae!r} came without a `gradient_vae`; expected one, for example "
                    "from_pretrained(..., gradient_vae=AutoencoderTiny.from_pretrained('madebyollin/taesd'))."
                )
            return
        small, full = self.gradient_vae.config.latent_channels, self.vae.config.latent_channels
        stride = 2 ** (len(self.gradient_vae.config.decoder_block_out_channels) - 1)
        if (small, stride) != (full, self.vae_scale_factor):
            raise ValueError(
                f"`gradient_vae` has {small} latent channels and stride {stride}; expected {full} and "
                f"{self.vae_scale_factor}, those of `vae`. Take the one that was trained for this VAE's latents."
            )

    def _plan(self, a: SimpleNamespace, count: int, renoise: float) -> SchedulerLevels:
        """`count` levels of the scheduler's, or those at the caller's `timesteps` or `sigmas`."""
        if not is_explicit(a):
            check_count(self.scheduler, count)
        retrieve_timesteps(self.scheduler, count, self._execution_device, a.timesteps, a.sigmas)
        return scheduler_levels(self.scheduler, self.scheduler.timesteps, renoise)

    def _remember(self, a: SimpleNamespace) -> None:
        """What the stock pipeline's properties tell whoever calls back."""
        self._cross_attention_kwargs = a.cross_attention_kwargs

    def _embed(self, a: SimpleNamespace) -> dict[str, Tensor | None]:
        """What the prompts give the network."""
        positive, negative = self._encode_prompt(a)
        return {"prompt_embeds": self._rows(negative, positive), "negative_prompt_embeds": negative}

    def _encode_prompt(self, a: SimpleNamespace) -> tuple[Tensor | None, ...]:
        """What the stock pipeline makes of the prompts, for every image."""
        given = {
            **vars(a),
            "device": self._execution_device,
            "do_classifier_free_guidance": self.do_classifier_free_guidance,
            "lora_scale": (getattr(a, "cross_attention_kwargs", None) or {}).get("scale"),
        }
        return self.encode_prompt(**{name: given[name] for name in inspect.signature(self.encode_prompt).parameters})

    def _rows(self, negative: Tensor | None, positive: Tensor) -> Tensor:
        """As the stock pipelines concatenate them: under guidance the negative ones first."""
        return torch.cat([negative, positive]) if self.do_classifier_free_guidance else positive

    def _prior(self, a: SimpleNamespace, tensors: dict, batch: int) -> GuidedPrior:
        prior = self._new_prior(self._conditions(a, batch))
        self._condition(prior, tensors)
        return prior

    def _conditions(self, a: SimpleNamespace, batch: int) -> list[dict]:
        """What else the network takes: for the negative prompt under guidance, and for the prompt."""
        shared = {"cross_attention_kwargs": a.cross_attention_kwargs}
        if self.unet.config.time_cond_proj_dim is not None:
            scale = torch.tensor(self.guidance_scale - 1).repeat(batch)
            embedding = self.get_guidance_scale_embedding(scale, self.unet.config.time_cond_proj_dim)
            shared["timestep_cond"] = embedding.to(self._execution_device, self.unet.dtype)
        conditions = [dict(shared) for _ in range(1 + self.do_classifier_free_guidance)]
        if a.ip_adapter_image is not None or a.ip_adapter_image_embeds is not None:
            embeds = self._ip_adapter_embeds(a, batch)
            for condition, *own in zip(conditions, *(e.chunk(len(conditions)) for e in embeds), strict=True):
                condition["added_cond_kwargs"] = {"image_embeds": own}
        return conditions

    def _ip_adapter_embeds(self, a: SimpleNamespace, batch: int):
        """What the IP-Adapter gives for every image; under guidance the negative ones first."""
        given, guided = (a.ip_adapter_image, a.ip_adapter_image_embeds), self.do_classifier_free_guidance
        return self.prepare_ip_adapter_image_embeds(*given, self._execution_device, batch, guided)

    def _new_prior(self, conditions: list[dict]) -> GuidedPrior:
        """The prior of this pipeline's networks; two conditions are the negative prompt's and the prompt's."""
        return self._prior_class(
            **{self._denoiser_name: self._denoiser},
            vae=self.vae,
            scheduler=self.scheduler,
            condition=conditions[-1],
            negative=conditions[0] if len(conditions) > 1 else None,
            guidance_scale=self.guidance_scale,
            guidance_rescale=getattr(self, "_guidance_rescale", 0.0),
        )

    def _condition(self, prior: GuidedPrior, tensors: dict) -> None:
        """Give the prior what callbacks may have changed."""
        for condition, embeds in sides(prior, tensors["prompt_embeds"]):
            condition["encoder_hidden_states"] = embeds

    def _fit(
        self,
        a: SimpleNamespace,
        prior: GuidedPrior,
        chosen: Settings,
        operator: Callable,
        image: Tensor,
        parts: list[Part] | None = None,
    ) -> tuple[Settings, Fitted]:
        """Give the prior the plans by which it stays within `memory`, and say which; the settings may be changed by it.

        Args:
            prior: not entered yet.
            operator, image: A, and an image (B, 3, H, W) to run it on.
            parts: what of it steps draw; None: all.
        """
        shape = (len(image), self.vae.config.latent_channels, *(n // self.vae_scale_factor for n in image.shape[2:]))
        steps = chosen.inner_steps > 0
        decoder = chosen.takes_gradients(a.num_inference_steps)
        decoder = decoder or (chosen.proximal is not None and not is_linear(operator))  # which has no step in pixels
        denoiser = steps and chosen.jacobian == "exact"
        draft = self.gradient_vae if self._has_draft(a) else None
        draft_last = chosen.use_gradient_vae == THROUGHOUT or (chosen.proximal is not None and draft is not None)

        @cache
        def footprints() -> Footprints:  # where something is to be predicted
            held = graph_bytes(operator, image) if decoder else 0
            through = {"denoiser": denoiser, "decoder": decoder, "draft_last": draft_last}
            cells = None if parts is None else drawn_size(parts)
            return Footprints(prior, shape, draft, self._execution_device, **through, operator=held, drawn=cells)

        free = free_bytes(self._execution_device) if self.free_memory is None else self.free_memory
        latents = shape[0] * shape[2] * shape[3]

        def ladder(vae: nn.Module, small: bool = False, through: bool = decoder) -> list[Plan]:
            tile = getattr(vae, "tile_latent_min_size", None)
            kind = {"denoiser": denoiser, "decoder": through, "may_free": a.jacobian is None, "small": small}
            return list(plans(len(image), shape[2:], tile, **kind))

        def pick(vae: nn.Module, taken: int = 0) -> Chosen:
            drafting = vae is draft
            way = ladder(vae, drafting, decoder and (drafting or not draft_last))
            return choose(a.memory, way, lambda plan: footprints().need(plan, drafting), free, latents, taken)

        if a.memory not in ("fast", "low"):
            ways = ladder(self.vae)  # parts are not drawn in tiles
            prior.steps = StepDown(ways if parts is None else [plan for plan in ways if plan.tiles is None])
        full = pick(self.vae)
        fitted = Fitted.of(full, None if draft is None else pick(draft, full.predicted or 0))
        prior.plan, prior.draft_plan = fitted.full.plan, fitted.draft and fitted.draft.plan
        _say(fitted, a.memory)
        return (replace(chosen, jacobian="free") if prior.plan.free else chosen), fitted

    def _has_draft(self, a: SimpleNamespace) -> bool:
        """Whether levels draw with the small decoder."""
        if getattr(a, "solver", "vml") != "vml":
            return False
        return self.gradient_vae is not None if a.use_gradient_vae is None else bool(a.use_gradient_vae)

    def _noise(self, a: SimpleNamespace, like: Tensor) -> Tensor:
        """x_T (B, c, h, w) float32 of noise alone, in the scaling of the scheduler's first level."""
        return start_noise(a, like) * float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def _vml(
        self,
        a: SimpleNamespace,
        x_T: Tensor,
        prior: Metered,
        measurement: Measurement,
        levels: Levels,
        chosen: Settings,
        view: Callable[[Prior], Prior] = whole,
        settle: Settle | None = None,
    ) -> Iterator[Level]:
        """VML-MAP, level by level, with what `view` makes of the prior and of its draft."""
        return vml_levels(
            x_T,
            prior=view(prior),
            measurement=measurement,
            schedule=levels,
            inner_steps=chosen.inner_steps,
            last_steps=chosen.last_steps,
            jacobian=chosen.jacobian,
            stop_at=chosen.stop_at,
            generator=a.generator,
            draft=view(prior.drafting(self._draft(prior.prior))) if self._has_draft(a) else None,
            draft_last=chosen.use_gradient_vae == THROUGHOUT,
            correct_steps=chosen.corrections(a.num_inference_steps),
            settle=settle,
            proximal=chosen.proximal,
        )

    def _passes(self, levels: Levels, chosen: Settings) -> list[int]:
        """Of the denoiser, at each level at the most."""
        return passes_of(
            levels, chosen.inner_steps, chosen.last_steps, self.do_classifier_free_guidance, chosen.proximal
        )

    def _draft(self, prior: GuidedPrior) -> Prior:
        """The prior with the small decoder, which is moved to where the VAE is."""
        return prior.draft(nn.Module.to(self.gradient_vae, self._execution_device, self.vae.dtype))

    def _follow(
        self,
        a: SimpleNamespace,
        solving: Iterator[Level],
        passes: list[int],
        timesteps: Tensor,
        tensors: dict,
        prior: Metered,
        first: Tensor,
    ) -> tuple[Tensor, list[dict], Tensor | None]:
        """The solver's last latent and its trace, with a progress bar of passes, callbacks and interruption.

        An interrupted solve ends before its next network call. It gives the clean estimate of the last level that
        ended, or the latents as a callback changed them, or, where none ended, `first`. One that was interrupted within
        a level, not by a callback, gives the image that the last level drew, so that nothing has to be drawn any more.

        Args:
            solving: the levels as they end.
            passes: of the denoiser, of each level at the most.
            tensors: what callbacks may read and change beside the latents.
            prior: whose calls the solver makes.
            first: (B, c, h, w), the measurement's latent.
        """
        trace, level, own = [], None, None
        prior.stopped = lambda: self.interrupt
        try:
            with self.progress_bar(total=sum(passes)) as bar:
                made = Passes(bar, passes)
                prior.told = made.called
                for step, level in enumerate(solving):
                    self.level, t, own = level, timesteps[level.index], level.x_next.clone()
                    trace.append(record(level))
                    if a.callback_on_step_end is not None:
                        self._call_back(a, step, t, level, tensors, prior.prior)
                    made.ended()
                    if a.callback is not None and step % (a.callback_steps or 1) == 0:
                        a.callback(step, t, level.x_next)
                    if self.interrupt:
                        return (level.z0_hat if torch.equal(level.x_next, own) else level.x_next), trace, None
            return level.x_next, trace, None
        except Stopped:
            if level is None:
                return first, trace, None
            changed = not torch.equal(level.x_next, own)
            return (level.x_next, trace, None) if changed else (level.z0_hat, trace, level.image)
        finally:
            self.level = prior.stopped = prior.told = None

    def _call_back(self, a: SimpleNamespace, step: int, t: Tensor, level: Level, tensors: dict, prior) -> None:
        """Hand the tensors that were asked for to the user's callback, and take back what it changed."""
        given = {"latents": level.x_next, **tensors}
        wanted = {name: given[name] for name in a.callback_on_step_end_tensor_inputs}
        changed = a.callback_on_step_end(self, step, t, wanted) or {}
        level.x_next = changed.get("latents", level.x_next)
        tensors.update({name: changed[name] for name in tensors if name in changed})
        self._regard_guidance(prior, tensors, len(level.z0_hat))
        self._condition(prior, tensors)

    def _regard_guidance(self, prior: GuidedPrior, tensors: dict, batch: int) -> None:
        """Guidance as a callback left it: its scale, and whether the negative prompt's rows are still there.

        Raises:
            ValueError: a number of rows that is of neither, or guidance without a negative prompt.
        """
        prior.guidance_scale = self.guidance_scale
        if len(tensors["prompt_embeds"]) <= batch:
            prior.negative = None
        if prior.negative is None and self.do_classifier_free_guidance:
            raise ValueError(
                f"guidance_scale is {self.guidance_scale} after the callback, and `prompt_embeds` has no rows of a "
                "negative prompt; expected guidance_scale <= 1. To change it later, start with guidance_scale > 1."
            )
        for name, rows in tensors.items():
            if rows is not None and not name.startswith("negative"):
                tensors[name] = _rows_of(name, rows, batch, 1 if prior.negative is None else 2)

    def _screen(self, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[bool] | None]:
        """Images (B, 3, H, W) in [0, 1] after the safety check, and its flags."""
        _, flagged = self.run_safety_checker(2 * image - 1, image.device, dtype)
        if flagged is not None:  # flagged images come back black, as stock returns them; the others stay as they are
            image = image * (1 - torch.as_tensor(flagged).to(image).reshape(-1, 1, 1, 1))
        return image, flagged

    def _hand_out(self, image: Tensor, output_type: str, dtype: torch.dtype) -> tuple:
        """Images (B, 3, H, W) in [0, 1], screened, in the output type; and the safety check's flags."""
        image, flagged = self._screen(image, dtype)
        if output_type == "pt":
            return image, flagged
        if output_type == "np":
            return image.cpu().permute(0, 2, 3, 1).numpy(), flagged
        return to_pil(image), flagged

    def _give_back(self, images, flagged, report: Report | None, return_dict: bool) -> VMLPipelineOutput | tuple:
        """The call's result, with a report if there is one, after the networks' hooks are done."""
        self.maybe_free_model_hooks()
        if return_dict:
            return VMLPipelineOutput(images=images, nsfw_content_detected=flagged, report=report)
        result = (images, flagged) if hasattr(self, "run_safety_checker") else (images,)
        return result if report is None else (*result, report)


def _with_small(load: Callable, source, **kwargs):
    """The pipeline that `load` makes, with the `gradient_vae` that it is called with, if it is."""
    given, small = GRADIENT_VAE in kwargs, kwargs.pop(GRADIENT_VAE, None)
    pipe = load(source, **kwargs)
    pipe.gradient_vae = small if given else pipe.gradient_vae  # loaded now, while the folder is there
    return pipe


def _say(fitted: Fitted, memory: str | int) -> None:
    """To the log; as a warning, which shows by default, where images change that nobody asked to change."""
    changed = fitted.is_over or not (fitted.is_exact or memory == "low")
    logger.log(logging.WARNING if changed else logging.INFO, "memory: %s", memory_text(fitted.to_dict()))


def sides(prior: GuidedPrior, rows: Tensor) -> Iterator[tuple[dict, Tensor]]:
    """The prior's conditions, each with its rows of a tensor: under guidance the negative ones come first."""
    conditions = [prior.condition] if prior.negative is None else [prior.negative, prior.condition]
    return zip(conditions, rows.chunk(len(conditions)), strict=True)


def is_explicit(a: SimpleNamespace) -> bool:
    """Whether the caller names the levels."""
    return getattr(a, "timesteps", None) is not None or a.sigmas is not None


def _rows_of(name: str, rows: Tensor, batch: int, sides: int) -> Tensor:
    """A callback's tensor with `sides` rows for each image: the negative ones are left out where nothing is guided."""
    kept = rows[-batch:] if len(rows) == 2 * batch and sides == 1 else rows
    if len(kept) != sides * batch:
        raise ValueError(
            f"`{name}` has {len(rows)} rows after the callback, for {batch} images; expected {batch}, or {2 * batch} "
            "under guidance, the negative ones first, as many as the others have."
        )
    return kept


def _with_text_model(encode_prompt: Callable) -> Callable:
    @wraps(encode_prompt)
    def wrapped(self, *args, **kwargs):
        with _text_model_reachable(getattr(self, "text_encoder", None)):
            return encode_prompt(self, *args, **kwargs)

    return wrapped


@contextmanager
def _text_model_reachable(text_encoder: nn.Module | None) -> Iterator[None]:
    """diffusers finds the final layer norm below `text_model`; newer text encoders are that model themselves."""
    if text_encoder is None or hasattr(text_encoder, "text_model"):
        yield
        return
    object.__setattr__(text_encoder, "text_model", text_encoder)  # past nn.Module, which would make it a child
    try:
        yield
    finally:
        object.__delattr__(text_encoder, "text_model")


def start_noise(a: SimpleNamespace, like: Tensor) -> Tensor:
    """N(0, I) of a latent's shape, or the caller's `latents`.

    Raises:
        ValueError: `latents` of another shape.
    """
    if a.latents is None:
        return noise_like(like, a.generator)
    if a.latents.shape != like.shape:
        raise ValueError(f"`latents` has shape {tuple(a.latents.shape)}; expected {tuple(like.shape)}.")
    return a.latents.to(like)
