"""The guidance methods of the library azula (https://github.com/probabilists/azula) on our prior, operator and levels.

    dps       `azula.guidance.DPSSampler`         diffpir   `azula.guidance.DiffPIRDenoiser`
    pigdm     `azula.guidance.PGDMSampler`        mmps      `azula.guidance.MMPSDenoiser`
    tmpd      `azula.guidance.TMPDenoiser`

The updates are azula's own code; here it is told what our denoiser, our levels and ``A o Dec`` are. Its vectors are
rows (B, D), its noise comes from torch's global generator, and DPS takes one length over a whole batch: so a call is of
one image, with a seed drawn from its generator. DiffPIR and TMPD are stated for linear operators, and a decoder maps 0
to grey: they are given ``z -> A(Dec(z)) - A(Dec(0))``, and y without that constant.

azula differentiates by itself. Its backward passes through a network are counted as ours are, but their time counts as
outside; a product with the decoder's Jacobian (mmps) counts as a decode.

Needs azula (``pip install --no-deps azula einops``: its plug-ins' requirements are not used).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance import DiffPIRDenoiser, DPSSampler, MMPSDenoiser, PGDMSampler, TMPDenoiser
from azula.linalg.covariance import IsotropicCovariance
from azula.sample import DDIMSampler, Sampler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from vml_ldm.metering import Metered
from vml_ldm.objective import Prior
from vml_ldm.operators import Measurement, is_linear
from vml_ldm.solve import Generators, Schedule, Solution, conclude

METHODS = ("dps", "pigdm", "mmps", "tmpd", "diffpir")
ONLY_LINEAR = ("pigdm",)


@dataclass(frozen=True)
class AzulaPeer:
    """One of `METHODS` with its settings, to be passed to `VMLRestorePipeline` as its `solver`.

    Attributes:
        settings: (name, value). dps: zeta. diffpir: lmbda, iterations. mmps: iterations. All but dps: eta, of the
            sampler's noise, 1 (DDPM) unless given.
    """

    name: str
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def __name__(self) -> str:
        return f"azula-{self.name}"

    def __call__(
        self,
        x_T: Tensor,
        *,
        prior: Prior,
        measurement: Measurement,
        schedule: Schedule,
        generator: Generators = None,
    ) -> Solution:
        """Solve image by image; arguments as for the solvers of `vml_ldm.solve`.

        Raises:
            ValueError: more than one image.
            TypeError: pigdm for an operator that is not linear.
        """
        if len(x_T) != 1:
            raise ValueError(f"{self.name} came with {len(x_T)} images; expected one. Call it for each.")
        if self.name in ONLY_LINEAR and not is_linear(measurement.operator):
            raise TypeError(f"{self.name} came with {measurement.operator!r}; expected a linear operator.")
        started, prior = time.perf_counter(), Metered(prior)
        problem = _Problem(prior, measurement, schedule, x_T.shape)
        source = generator[0] if isinstance(generator, Sequence) else generator
        seed = torch.randint(2**62, (), generator=source).item()
        with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), _InRows():  # forward mode lacks fused attention
            torch.manual_seed(seed)
            latent = _sampler(self.name, problem, dict(self.settings))(x_T.flatten(1)).reshape(x_T.shape)
        return conclude(latent, [], prior, measurement, started)


class _Problem:
    """A posed problem in azula's terms: rows in, rows out.

    Attributes:
        denoiser: E[z0 | x_t].
        y: (1, m), real.
        var_y: sigma_y^2.
    """

    def __init__(self, prior: Metered, measurement: Measurement, schedule: Schedule, shape: tuple[int, ...]):
        self.prior, self.operator, self.shape = prior, measurement.operator, shape
        self.denoiser = _Denoiser(prior, schedule, shape)
        self.y, self.var_y = _row(measurement.y), measurement.sigma_y.square().item()
        self.levels = len(schedule)

    def seen(self, z: Tensor) -> Tensor:
        """``A(Dec(z))``."""
        image = _counted(self.prior.decode(z.reshape(self.shape)), self.prior, "decode_vjp")
        return _row(self.operator(image))

    def invert(self, y: Tensor) -> Tensor:
        """``Enc(A^+ y)``, y a row."""
        like = self.operator(torch.zeros_like(self.prior.decode(torch.zeros(self.shape).to(y))))
        shaped = torch.view_as_complex(y.reshape(*like.shape, 2)) if like.is_complex() else y.reshape(like.shape)
        return self.prior.encode(self.operator.pinv(shaped)).flatten(1)


class _Denoiser(Denoiser):
    def __init__(self, prior: Metered, schedule: Schedule, shape: tuple[int, ...]):
        super().__init__()
        self.prior, self.levels, self.shape = prior, schedule, shape

    def schedule(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """azula's time runs from 1, our first level, to 0, no noise, evenly over the levels."""
        alpha, sigma = self.levels.scales(round((1 - t.item()) * len(self.levels)))
        return t.new_tensor(alpha), t.new_tensor(sigma)

    def forward(self, x_t: Tensor, t: Tensor, **kwargs) -> DiracPosterior:
        alpha, sigma = (scale.item() for scale in self.schedule(t))
        z0_hat = self.prior.denoise(x_t.reshape(self.shape), alpha, sigma)
        return DiracPosterior(mean=_counted(z0_hat, self.prior, "denoise_vjp").flatten(1))


def _sampler(name: str, problem: _Problem, settings: dict) -> Sampler:
    """azula's sampler of a method."""
    denoiser, y, walk = problem.denoiser, problem.y, {"steps": problem.levels, "silent": True}
    if name == "dps":
        return DPSSampler(denoiser, y, problem.seen, **settings, **walk)
    walk["eta"] = settings.pop("eta", 1.0)
    if name == "pigdm":
        return PGDMSampler(denoiser, y, problem.seen, problem.invert, **settings, **walk)
    if name == "mmps":
        noise = IsotropicCovariance(problem.var_y)
        return DDIMSampler(MMPSDenoiser(denoiser, y, problem.seen, noise, **settings), **walk)
    grey = problem.seen(torch.zeros(problem.shape).to(y))
    linear = lambda z: problem.seen(z) - grey  # noqa: E731
    kind = {"tmpd": TMPDenoiser, "diffpir": DiffPIRDenoiser}[name]
    return DDIMSampler(kind(denoiser, y - grey, linear, problem.var_y, **settings), **walk)


class _InRows(TorchFunctionMode):
    """Group norms take contiguous data: in forward mode, which mmps uses, they refuse channels-last networks'."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.group_norm:
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **kwargs or {})


def _counted(value: Tensor, prior: Metered, name: str) -> Tensor:
    """A network's value; each backward pass that goes through it counts."""
    if value.requires_grad:
        value.register_hook(lambda gradient: prior.calls.update([name]))
    return value


def _row(y: Tensor) -> Tensor:
    """(1, ...) -> (1, m), a complex number as two."""
    return (torch.view_as_real(y) if y.is_complex() else y).flatten(1)
