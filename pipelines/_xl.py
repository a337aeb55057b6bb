"""What Stable Diffusion XL's pipelines share: two text encoders, pooled embeddings and sizes as conditions."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from vml_ldm.adapters.diffusers import GuidedPrior, StableDiffusionXLPrior
from vml_ldm.pipelines._solving import SolvingMixin, sides


class XLMixin(SolvingMixin):
    """The steps of a solve on a Stable Diffusion XL pipeline, which gives `_time_ids`."""

    _prior_class = StableDiffusionXLPrior

    def _check(self, a: SimpleNamespace, channels: tuple[int, ...]) -> None:
        for embeds, pooled in (("prompt", "pooled_prompt"), ("negative_prompt", "negative_pooled_prompt")):
            if getattr(a, f"{embeds}_embeds") is not None and getattr(a, f"{pooled}_embeds") is None:
                raise ValueError(f"`{embeds}_embeds` came without `{pooled}_embeds`; expected both, from one prompt.")
        for name in ("denoising_start", "denoising_end"):
            if getattr(a, name, None) is not None:
                raise ValueError(
                    f"{name} is {getattr(a, name)}; expected None: the solver goes through all levels itself. For a "
                    "chain of base and refiner pass solver='none', or refine the solver's image at a low strength."
                )
        super()._check(a, channels)

    def _remember(self, a: SimpleNamespace) -> None:
        super()._remember(a)
        self._guidance_rescale = getattr(a, "guidance_rescale", 0.0)
        self._denoising_start, self._denoising_end = None, None

    def _time_ids(self, a: SimpleNamespace, projection: int) -> tuple[Tensor, Tensor]:
        """(1, 6) or (1, 5), float32: sizes, crop and perhaps an aesthetic score, and the same for the negative prompt.

        Args:
            projection: the pooled embeddings' length, which the stock pipeline checks beside theirs.
        """
        raise NotImplementedError

    def _embed(self, a: SimpleNamespace) -> dict[str, Tensor]:
        encoder = self.text_encoder_2
        time_ids = self._time_ids(
            a, a.pooled_prompt_embeds.shape[-1] if encoder is None else encoder.config.projection_dim
        )
        positive, negative, pooled, negative_pooled = self._encode_prompt(a)
        ids, negative_ids = (rows.to(positive).expand(len(positive), -1) for rows in time_ids)
        return {
            "prompt_embeds": self._rows(negative, positive),
            "add_text_embeds": self._rows(negative_pooled, pooled).to(positive.device),
            "add_time_ids": self._rows(negative_ids, ids),
        }

    def _condition(self, prior: GuidedPrior, tensors: dict) -> None:
        super()._condition(prior, tensors)
        for ours, stock in (("text_embeds", "add_text_embeds"), ("time_ids", "add_time_ids")):
            for condition, rows in sides(prior, tensors[stock]):
                condition.setdefault("added_cond_kwargs", {})[ours] = rows

    def _screen(self, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, None]:
        """Images with the watermark, if the pipeline has one."""
        if getattr(self, "watermark", None) is not None:
            image = self.watermark.apply_watermark(2 * image - 1).to(image) / 2 + 0.5
        return image, None
