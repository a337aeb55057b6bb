"""What the inpainting pipelines share: the stock call or ours, the known pixels as a measurement, the paste."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import PIL.Image
import torch
from diffusers import AsymmetricAutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from torch.nn.functional import interpolate

from vml_ldm.adapters.diffusers import GuidedPrior, SchedulerLevels, draws_parts, parse_memory
from vml_ldm.closeup import Part, parts_near
from vml_ldm.images import seamless
from vml_ldm.measuring import check_std, groups_of, measure_known, put_in, tell
from vml_ldm.metering import Metered
from vml_ldm.operators import Mask, own
from vml_ldm.pipelines._common import check_generators, check_numbers, check_one_of, count_prompts, each
from vml_ldm.pipelines._grouping import can_be_split, rows_of, solve_by_group
from vml_ldm.pipelines._pixels import crop_pair, read_frame
from vml_ldm.pipelines._solving import VMLPipelineOutput, is_explicit, start_noise
from vml_ldm.presets import EXPLICIT, STARTS, Settings, settings, spread_levels
from vml_ldm.solve import Level, Levels, Solution, conclude

SOLVERS = ("vml", "none")


class _Frame(NamedTuple):
    """What is solved for: pixels (B, 3, H, W) in [0, 1], known (B, 1, H, W), and how to lay it over the original."""

    pixels: Tensor
    known: Tensor
    overlay: Callable[[list[PIL.Image.Image]], list[PIL.Image.Image]] | None

    @property
    def painted(self) -> Tensor:
        """(B, 1, H, W), the mask as diffusers' networks take it: 1 where more than half is painted."""
        return (self.known < 0.5).to(self.known)

    def told(self) -> dict[str, Tensor]:
        """See `GuidedPrior.told`."""
        return {"image": 2 * self.pixels - 1, "mask": self.painted}


class InpaintingMixin:
    """A stock inpainting pipeline's call, solved by VML-MAP. Mixed in before the family's solving mixin."""

    def _inpaint(self, stock_call: Callable, given: dict) -> VMLPipelineOutput | tuple:
        """The stock pipeline's result with solver="none", otherwise ours.

        Args:
            stock_call: the stock pipeline's, bound.
            given: our call's arguments by name, of which the stock ones go on to `stock_call`.
        """
        parameters = inspect.signature(stock_call).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        more = given.get("kwargs", {})
        stock = {name: own(given[name]) for name in names} | more
        chosen, preset = self._choose(SimpleNamespace(**given)), given["preset"]
        self._tell_ignored(given)
        if given["solver"] == "none":
            return stock_call(**stock)
        unknown = set(more) - {"callback", "callback_steps"}
        if unknown:
            raise TypeError(f"__call__() got unexpected arguments: {', '.join(sorted(unknown))}.")
        a = SimpleNamespace(
            **stock, **{name: given[name] for name in ("start", "use_gradient_vae", "jacobian", "memory", "close_up")}
        )
        with torch.inference_mode(False), torch.no_grad():
            images, flagged, report = self._solve(a, chosen, preset, given["sigma_y"], given["paste"])
        return self._give_back(images, flagged, report if given["return_report"] else None, a.return_dict)

    def _choose(self, a: SimpleNamespace) -> Settings:
        """The settings of a call, whose choices are checked."""
        check_one_of("solver", a.solver, SOLVERS)
        if a.solver == "vml":
            check_numbers(a)
        check_one_of("start", a.start, STARTS)
        explicit = {name: getattr(a, name) for name in EXPLICIT}
        about = {"inpaints": True, "guided": a.guidance_scale > 1, "drafts": self._has_draft(a)}
        chosen = settings(a.preset, **about, **explicit)
        parse_memory(a.memory)
        if a.solver == "none" and a.return_report:
            raise ValueError("return_report=True came with solver='none'; expected solver='vml'. Stock has none.")
        return chosen

    def _tell_ignored(self, given: dict) -> None:
        """Warn of arguments that were given and that this solver does not look at."""
        parameters = inspect.signature(type(self).__call__).parameters.values()
        if given["solver"] == "none":
            looked_at = ("solver", "return_report")
            theirs = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in looked_at]
        else:
            theirs = [p for p in parameters if p.name == "eta"]
        ignored = [f"{p.name}={given[p.name]!r}" for p in theirs if not _is_same(given[p.name], p.default)]
        if ignored:
            warnings.warn(f"solver={given['solver']!r} does not look at {', '.join(ignored)}.", stacklevel=5)

    def _solve(self, a: SimpleNamespace, chosen: Settings, preset: str, sigma_y, paste: bool):
        """Images in the output type, safety flags, and the report."""
        started, channels = time.perf_counter(), self.vae.config.latent_channels
        self._check(a, (channels, 2 * channels + 1))
        a.frame, batch = self._frame(a)
        frame = a.frame
        groups = groups_of(frame.known.flatten(1).any(1).tolist())  # by whether anything was measured
        if len(groups) > 1 and can_be_split(a):
            noise_std = check_std(sigma_y, batch, self._execution_device)
            given = [{"image": frame.pixels[rows], "mask_image": 1 - frame.known[rows]} for rows in groups]
            parts = [rows_of(a, rows, **own, noise=noise_std[rows]) for rows, own in zip(groups, given, strict=True)]
            solve = lambda part: self._solve(part, chosen, preset, part.noise, paste)  # noqa: E731
            return solve_by_group(parts, groups, solve, self)
        if not frame.known.any():
            chosen = replace(chosen, inner_steps=0, fixed=True, proximal=None)  # nothing was measured: levels alone
        levels, inner_steps = self._levels(a, chosen)
        chosen = replace(chosen, inner_steps=inner_steps)
        noise_std = check_std(sigma_y, batch, self._execution_device)
        tensors = self._embed(a)
        dtype = tensors["prompt_embeds"].dtype
        prior = self._prior(a, tensors, batch)
        prior.told = frame.told()
        fit = lambda parts: self._fit(a, prior, chosen, Mask(frame.known), frame.pixels, parts)  # noqa: E731
        parts = self._parts(a, chosen)
        solved, fitted = fit(parts)
        if parts is not None and prior.plan.tiles is not None:  # each tile has norms of its own, so a part has too
            parts = None
            solved, fitted = fit(parts)
        chosen = solved
        with prior:
            metered = Metered(prior)
            measured = measure_known(frame.pixels, frame.known, noise_std, metered, parts)
            a.measurement = measured.measurement
            x_T = self._start(a, levels, frame, measured.latent, metered)
            self._add_mask(tensors, a, frame, prior)
            end = (
                None
                if chosen.proximal is None
                else lambda image: put_in(image, a.frame.pixels, a.frame.known, noise_std)
            )
            solving = self._vml(a, x_T, metered, measured.measurement, levels, chosen, measured.view, end)
            passes = self._passes(levels, chosen)
            latent, trace, image = self._follow(a, solving, passes, levels.timesteps, tensors, metered, measured.latent)
            solution = conclude(latent, trace, metered, measured.measurement, started, image=image)
        about = {"levels": len(levels), "inner_steps": inner_steps, "jacobian": chosen.jacobian, "preset": preset}
        about |= {"last_steps": chosen.last_steps, "correct_steps": chosen.corrections(a.num_inference_steps)}
        about |= {"interrupted": self.interrupt}
        about |= {"memory": fitted.as_run(prior.steps).to_dict()}
        report = tell(solution, measured, noise_std, prior.retries, **about)
        return *self._finish(a, solution, paste, dtype), report

    def _parts(self, a: SimpleNamespace, chosen: Settings) -> list[Part] | None:
        """The parts of the picture that steps draw, see `vml_ldm.closeup`; None: all of it.

        All of it too where the holes may grow, where the VAE's decoder is told what the whole picture is, and where it
        does not draw a part as in the whole (`draws_parts`).
        """
        may_grow = a.callback_on_step_end is not None and "mask" in a.callback_on_step_end_tensor_inputs
        draws = chosen.inner_steps > 0 or chosen.proximal is not None
        if not a.close_up or may_grow or not draws or isinstance(self.vae, AsymmetricAutoencoderKL):
            return None
        stride = self.vae_scale_factor
        if not draws_parts(self.vae, tuple(n // stride for n in a.frame.known.shape[2:])):
            return None
        return parts_near(a.frame.known, stride)

    def _frame(self, a: SimpleNamespace) -> tuple[_Frame, int]:
        """Pixels and mask for every image of the batch, and the batch's size; one prompt serves several images."""
        size = {"height": a.height, "width": a.width}
        overlay = None
        if a.padding_mask_crop is not None:
            a.cropped = {"resize_mode": "fill", "crops_coords": self._crop(a)}
            size |= a.cropped
            overlay = self._overlay(a, size["crops_coords"])
        pixels, known = read_frame(self._decoded(a), a.mask_image, self._processor(), **size)
        if pixels.shape[2:] != known.shape[2:]:
            raise ValueError(
                f"`image` has {tuple(pixels.shape[2:])} pixels and `mask_image` {tuple(known.shape[2:])}; "
                "expected the same. Resize one of them."
            )
        prompts = count_prompts(a, max(len(pixels), len(known)))
        pixels = each(pixels, prompts, a.num_images_per_prompt, "image").to(self._execution_device)
        known = each(known, prompts, a.num_images_per_prompt, "mask_image").to(self._execution_device)
        batch = len(pixels)
        check_generators(a.generator, batch)
        return _Frame(pixels, known, overlay), batch

    def _processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_normalize=False)

    def _decoded(self, a: SimpleNamespace):
        """Image latents, which stock takes too, as pixels; any other image as it is."""
        image, stride = a.image, self.vae_scale_factor
        shape = (self.vae.config.latent_channels, a.height // stride, a.width // stride)
        if not (isinstance(image, Tensor) and image.ndim == 4 and image.shape[1:] == shape):
            return image
        if not image.isfinite().all():
            raise ValueError("`image` is latents, with values that are not finite; expected finite ones.")
        with self._new_prior([{}]) as prior:
            return prior.decode(image.to(self._execution_device, torch.float32)).clamp(0, 1)

    def _crop(self, a: SimpleNamespace) -> tuple[int, int, int, int] | None:
        """The part of the image that `padding_mask_crop` solves for; None (all of it) when nothing is painted."""
        if not all(isinstance(image, PIL.Image.Image) for image in (a.image, a.mask_image)):
            raise ValueError(
                f"`padding_mask_crop` came with an image that is {type(a.image).__name__} and a mask that is "
                f"{type(a.mask_image).__name__}; expected PIL images, one of each."
            )
        a.image, a.mask_image = crop_pair(a.image, a.mask_image)
        if a.mask_image.getbbox() is None:
            return None
        return self.mask_processor.get_crop_region(a.mask_image, a.width, a.height, pad=a.padding_mask_crop)

    def _overlay(self, a: SimpleNamespace, crop):
        return lambda images: [self.image_processor.apply_overlay(a.mask_image, a.image, i, crop) for i in images]

    def _levels(self, a: SimpleNamespace, chosen: Settings) -> tuple[SchedulerLevels, int]:
        """The levels, and the inner steps at each. Proximal ones are some of the scheduler's.

        At strength s < 1 the levels span the lower s of the scheduler's noise, and s of the budget pays for them, to
        the nearest step. (Stock rounds down, so that 0.9999 leaves the first step out: little of 50, much of 5.)
        Levels at the caller's `timesteps` or `sigmas` share the budget.
        """
        steps, explicit = round(a.num_inference_steps * a.strength), is_explicit(a)
        if not explicit and steps < 1:
            raise ValueError(
                f"strength {a.strength} of {a.num_inference_steps} steps leaves none; expected one at least. "
                "Raise strength or num_inference_steps."
            )
        count, inner_steps = chosen.split(steps)
        if chosen.proximal is not None and not explicit:
            levels = self._plan(a, a.num_inference_steps, chosen.renoise)
            levels = levels.last(max(1, round(len(levels) * a.strength)))
            levels = levels.at(spread_levels(levels.noise, count))
            self._num_timesteps = len(levels)
            return levels, inner_steps
        levels = self._plan(a, round(count / a.strength) if a.strength > 0 else count, chosen.renoise)
        self._num_timesteps = round(len(levels) * a.strength)
        if self._num_timesteps < 1:
            raise ValueError(f"strength {a.strength} leaves none of the levels; expected one at least. Raise strength.")
        if explicit:
            inner_steps = chosen.inner_steps_of(self._num_timesteps, steps)
        return levels.last(self._num_timesteps), inner_steps

    def _start(self, a: SimpleNamespace, levels: Levels, frame: _Frame, z_y: Tensor, prior: Metered) -> Tensor:
        """x_T (B, c, h, w) float32: noise, or the image's or the measurement's latents noised to the first level."""
        if a.strength == 1.0 and a.start == "noise":
            return self._noise(a, z_y)
        alpha, sigma = levels.scales(0)
        return alpha * (z_y if a.strength == 1.0 else prior.encode(frame.pixels)) + sigma * start_noise(a, z_y)

    def _add_mask(self, tensors: dict, a: SimpleNamespace, frame: _Frame, prior: GuidedPrior) -> None:
        """Mask and masked latents where callbacks ask for them or an inpainting checkpoint is fed them."""
        inpainting = self._denoiser.config.in_channels != self.vae.config.latent_channels
        asked = {"mask", "masked_image_latents"} & set(a.callback_on_step_end_tensor_inputs)
        if not (inpainting or (a.callback_on_step_end is not None and asked)):
            return
        painted = frame.painted
        latents = self._masked_latents(a, frame.pixels * (1 - painted) + 0.5 * painted, prior)
        for name, rows in (("mask", interpolate(painted, size=latents.shape[2:])), ("masked_image_latents", latents)):
            rows = rows.to(tensors["prompt_embeds"])
            tensors[name] = self._rows(rows, rows)
        if inpainting:
            _set_inpainting(prior, tensors)

    def _masked_latents(self, a: SimpleNamespace, masked: Tensor, prior: GuidedPrior) -> Tensor:
        """(B, c, h, w), of the image with its painted part grey, or `masked_image_latents`: latents, or such images."""
        given = a.masked_image_latents
        if given is None:
            return prior.encode(masked)
        copies = a.num_images_per_prompt
        given = each(given.to(masked), len(masked) // copies, copies, "masked_image_latents")
        return given if given.shape[1] == self.vae.config.latent_channels else prior.encode(given / 2 + 0.5)

    def _condition(self, prior: GuidedPrior, tensors: dict) -> None:
        super()._condition(prior, tensors)
        if prior.inpainting is not None:
            _set_inpainting(prior, tensors)

    def _call_back(self, a: SimpleNamespace, step: int, t: Tensor, level: Level, tensors: dict, prior) -> None:
        before = tensors["mask"].clone() if "mask" in tensors else None
        super()._call_back(a, step, t, level, tensors, prior)
        if before is not None and step + 1 < self.num_timesteps:  # no level is left to see a later edit
            batch = len(level.z0_hat)
            _edit_known(a, before[-batch:], tensors["mask"][-batch:])
            prior.told = a.frame.told()

    def _finish(self, a: SimpleNamespace, solution: Solution, paste: bool, dtype: torch.dtype):
        """Paste, safety check, output type: (images, flags)."""
        frame = a.frame
        if a.output_type == "latent":
            return solution.latent, None
        image = seamless(frame.pixels, solution.image, frame.known) if paste else solution.image
        images, flagged = self._hand_out(image, a.output_type, dtype)
        laid_over = frame.overlay is not None and a.output_type not in ("pt", "np")
        return (frame.overlay(images) if laid_over else images), flagged


def _is_same(value, default) -> bool:
    return value is default or (isinstance(value, (str, int, float)) and value == default)


def _edit_known(a: SimpleNamespace, before: Tensor, after: Tensor) -> None:
    """What is measured, and pasted, from here on: where a callback edited the mask, what its edit leaves known.

    Args:
        before, after: (B, 1, h, w), the mask as callbacks see it, 1 = painted.
    """
    if torch.equal(before, after):
        return
    known = a.frame.known
    edited, painted = (interpolate(rows.to(known), size=known.shape[2:]) for rows in (before != after, after))
    known = torch.where(edited > 0, 1 - painted.clamp(0, 1), known)
    a.frame, operator = a.frame._replace(known=known), Mask(known)
    a.measurement.operator, a.measurement.y = operator, operator(a.frame.pixels)


def _set_inpainting(prior: GuidedPrior, tensors: dict) -> None:
    """Mask and masked latents for an inpainting checkpoint; they come twice under guidance."""
    channels = torch.cat([tensors["mask"], tensors["masked_image_latents"]], dim=1)
    prior.inpainting = channels if prior.negative is None else channels.chunk(2)[1]
