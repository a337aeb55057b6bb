"""A solve that is watched from another thread: a frame for each level, and an end that anyone may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import NamedTuple

import torch
from torch import Tensor

from vml_ldm.pipelines.vml_inpaint import VMLInpaintPipeline
from vml_ldm.pipelines.vml_restore import VMLRestorePipeline
from vml_ldm.posing import model_sizes
from vml_ldm.report import Report
from vml_ldm.solve import Level


class Frame(NamedTuple):
    """A solve as it stands.

    Attributes:
        image: (1, 3, h, w) in [0, 1].
        residuals: rms residual of each level that has ended.
        count: levels in all.
        report: at the end, otherwise None.
    """

    image: Tensor
    residuals: list[float]
    count: int
    report: Report | None = None


class Solver:
    """Both pipelines on one checkpoint's components; one solve at a time.

    Args:
        pipe: an inpaint pipeline; its progress bar is switched off.
    """

    def __init__(self, pipe: VMLInpaintPipeline):
        self.inpaint, self.restore = pipe, VMLRestorePipeline.from_pipe(pipe)
        self._stopping = Event()
        for each in (self.inpaint, self.restore):
            each.set_progress_bar_config(disable=True)

    @property
    def sizes(self) -> dict[str, int]:
        return model_sizes(self.inpaint)

    def stop(self) -> None:
        """End a solve before its next network call, with what it has: also one that was asked for a moment ago."""
        self._stopping.set()
        for pipe in (self.inpaint, self.restore):
            pipe._interrupt = True  # which a call that is about to begin forgets; its first level then sees the other

    def frames(self, pipe, seed: int, **arguments) -> Iterator[Frame]:
        """Run the pipeline beside the caller: a frame for each level, then one with the report.

        A caller that goes away stops the solve, and so does `stop` from this call on. Errors of the pipeline are raised
        here.
        """
        self._stopping.clear()
        return self._frames(pipe, seed, arguments)

    def _frames(self, pipe, seed: int, arguments: dict) -> Iterator[Frame]:
        events = SimpleQueue()
        thread = Thread(target=self._run, args=(pipe, events.put, seed, arguments), daemon=True)
        thread.start()
        try:
            while not isinstance(event := events.get(), Exception):
                yield event
                if event.report is not None:
                    return
            raise event
        finally:
            self.stop()
            thread.join()

    def _run(self, pipe, tell: Callable, seed: int, arguments: dict) -> None:
        residuals = []

        def show(pipe, step, timestep, tensors):
            residuals.append(pipe.level.residual.mean().item())
            tell(Frame(self._draw(pipe.level), list(residuals), pipe.num_timesteps))
            pipe._interrupt |= self._stopping.is_set()  # a call forgets what was asked for before it began
            return {}

        try:
            generator = torch.Generator().manual_seed(seed)
            common = {"output_type": "pt", "return_report": True, "callback_on_step_end": show}
            out = pipe(generator=generator, **common, **arguments)
            tell(Frame(out.images.float().cpu(), residuals, pipe.num_timesteps, out.report))
        except Exception as error:  # it belongs to the caller, on the other thread
            tell(error)

    @torch.no_grad()
    def _draw(self, level: Level) -> Tensor:
        """A level as a picture: what it drew for its last step, or, where it took none, its clean estimate."""
        image = level.image
        if image is None:
            vae = self.inpaint.gradient_vae or self.inpaint.vae
            z = (level.z0_hat / vae.config.scaling_factor).to(vae.device, vae.dtype)
            image = vae.decode(z, return_dict=False)[0].float() / 2 + 0.5
        return image.clamp(0, 1).cpu()
