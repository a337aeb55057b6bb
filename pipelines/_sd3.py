"""What Stable Diffusion 3's pipelines share: the flow's prior and levels, three text encoders, pooled embeddings."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint import (
    calculate_shift,
    retrieve_timesteps,
)
from torch import Tensor

from vml_ldm.adapters.diffusers import FlowPrior, GuidedPrior, SchedulerLevels, check_flow_scheduler, flow_levels
from vml_ldm.pipelines._solving import SolvingMixin, sides

_POOLED = "pooled_prompt_embeds"


class SD3Mixin(SolvingMixin):
    """The steps of a solve on a Stable Diffusion 3 or 3.5 pipeline."""

    _denoiser_name, _prior_class = "transformer", FlowPrior
    _check_scheduler = staticmethod(check_flow_scheduler)

    def _remember(self, a: SimpleNamespace) -> None:
        self._joint_attention_kwargs = a.joint_attention_kwargs

    def _plan(self, a: SimpleNamespace, count: int, renoise: float) -> SchedulerLevels:
        options, config = {} if a.mu is None else {"mu": a.mu}, self.scheduler.config
        if a.mu is None and config.use_dynamic_shifting:
            stride = self.vae_scale_factor * self.patch_size
            limits = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            options["mu"] = calculate_shift((a.height // stride) * (a.width // stride), *limits)
        retrieve_timesteps(self.scheduler, count, self._execution_device, sigmas=a.sigmas, **options)
        return flow_levels(self.scheduler, self.scheduler.timesteps, renoise)

    def _embed(self, a: SimpleNamespace) -> dict[str, Tensor | None]:
        positive, negative, pooled, negative_pooled = self._encode_prompt(a)
        return {
            "prompt_embeds": self._rows(negative, positive),
            "negative_prompt_embeds": negative,
            "negative_pooled_prompt_embeds": negative_pooled,
            _POOLED: self._rows(negative_pooled, pooled),
        }

    def _conditions(self, a: SimpleNamespace, batch: int) -> list[dict]:
        conditions = [
            {"joint_attention_kwargs": dict(a.joint_attention_kwargs or {})}
            for _ in range(1 + self.do_classifier_free_guidance)
        ]
        asked = a.ip_adapter_image is not None and self.is_ip_adapter_active
        if asked or a.ip_adapter_image_embeds is not None:
            embeds = self._ip_adapter_embeds(a, batch)
            for condition, own in zip(conditions, embeds.chunk(len(conditions)), strict=True):
                condition["joint_attention_kwargs"]["ip_adapter_image_embeds"] = own
        return conditions

    def _condition(self, prior: GuidedPrior, tensors: dict) -> None:
        super()._condition(prior, tensors)
        for condition, rows in sides(prior, tensors[_POOLED]):
            condition["pooled_projections"] = rows

    def _screen(self, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
        return image, None
