"""Priors whose denoiser, density and posterior are known in closed form, for the tests of the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor


class GaussianPrior:
    """z0 ~ N(mean, cov) in d dimensions, as (B, 1, 1, d) latents; the decoder is the identity."""

    def __init__(self, mean: Tensor, cov: Tensor):
        self.mean, self.cov = mean, cov

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[z0 | x_t] = mean + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha mean)."""
        return self.mean + (x_t - alpha * self.mean) @ self.jacobian(alpha, sigma).T

    def jacobian(self, alpha: float, sigma: float) -> Tensor:
        marginal = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean)).to(self.cov)
        return alpha * self.cov @ torch.linalg.inv(marginal)

    def log_prob(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """(B,): log p_t(x_t)."""
        marginal = alpha**2 * self.cov + sigma**2 * torch.eye(len(self.mean)).to(self.cov)
        return torch.distributions.MultivariateNormal(alpha * self.mean, marginal).log_prob(x_t.flatten(1))

    def posterior(self, x_t: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """Mean (B, 1, 1, d) and covariance (d, d) of p(z0 | x_t)."""
        return self.denoise(x_t, alpha, sigma), self.cov - alpha * self.jacobian(alpha, sigma) @ self.cov

    def measured(self, h: Tensor, y: Tensor, sigma_y: float) -> tuple[Tensor, Tensor]:
        """Mean (the MAP) and covariance of p(z0 | y) for y = h z0 + n."""
        precision = torch.linalg.inv(self.cov) + h.T @ h / sigma_y**2
        cov = torch.linalg.inv(precision)
        return (torch.linalg.solve(self.cov, self.mean) + y.reshape(-1, len(h)) @ h / sigma_y**2) @ cov, cov

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, z: Tensor) -> Tensor:
        return z


class MixturePrior:
    """z0 ~ sum_k w_k N(m_k, s_k^2 I), as (B, 1, 1, d) latents; the decoder is the identity."""

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor):
        self.weights, self.means, self.stds = weights, means, stds

    def log_prob(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        """(B,): log p_t(x_t)."""
        return torch.logsumexp(self._joint(x_t, alpha, sigma), dim=-1)

    def posterior(self, x_t: Tensor, alpha: float, sigma: float) -> MixturePrior:
        """p(z0 | x_t) for one x_t: a mixture again."""
        weights = torch.softmax(self._joint(x_t, alpha, sigma), dim=-1)[0]
        gain = (alpha * self.stds**2 / self._variance(alpha, sigma))[:, None]
        means = self.means + gain * (x_t.flatten() - alpha * self.means)
        return MixturePrior(weights, means, self.stds * sigma / self._variance(alpha, sigma).sqrt())

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 1, 1, d)."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        e = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return (self.means[which] + self.stds[which, None] * e)[:, None, None]

    def log_evidence(self, h: Tensor, y: Tensor, sigma_y: float) -> Tensor:
        """log p(y) for one y = h z0 + n."""
        noise = sigma_y**2 * torch.eye(len(h)).to(h)
        each = [
            torch.distributions.MultivariateNormal(h @ m, s**2 * h @ h.T + noise).log_prob(y.flatten())
            for m, s in zip(self.means, self.stds, strict=True)
        ]
        return torch.logsumexp(self.weights.log() + torch.stack(each), dim=0)

    def denoise(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        x = x_t.reshape(-1, self.means.shape[1])
        responsibility = torch.softmax(self._joint(x_t, alpha, sigma), dim=-1)
        gain = (alpha * self.stds**2 / self._variance(alpha, sigma))[:, None]
        each = self.means + gain * (x[:, None] - alpha * self.means)
        return (responsibility[..., None] * each).sum(1).reshape(x_t.shape)

    def encode(self, image: Tensor) -> Tensor:
        return image

    def decode(self, z: Tensor) -> Tensor:
        return z

    def _variance(self, alpha: float, sigma: float) -> Tensor:
        return alpha**2 * self.stds**2 + sigma**2

    def _joint(self, x_t: Tensor, alpha: float, sigma: float) -> Tensor:
        x = x_t.reshape(-1, 1, self.means.shape[1])
        variance, d = self._variance(alpha, sigma), self.means.shape[1]
        distance = (x - alpha * self.means).square().sum(-1)
        return self.weights.log() - distance / (2 * variance) - 0.5 * d * torch.log(2 * torch.pi * variance)


def mixture_problem():
    """A mixture prior of two Gaussians in 3 dimensions, a linear operator and a measurement: (prior, h, y), float64."""
    double = {"dtype": torch.float64}
    means, stds = torch.tensor([[1.0, -1, 0], [-1, 0.5, 1]], **double), torch.tensor([0.6, 0.4], **double)
    h = torch.tensor([[1.0, 0.5, -0.3], [0.0, 1.0, 0.2]], **double)
    prior = MixturePrior(torch.tensor([0.3, 0.7], **double), means, stds)
    return prior, h, torch.tensor([[[[0.4, -0.2]]]], **double)


class Linear:
    """y = h z for (B, 1, 1, d) latents: a linear operator given as a matrix."""

    linear = True

    def __init__(self, h: Tensor):
        self.h = h

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.h.T

    def adjoint(self, y: Tensor) -> Tensor:
        return y @ self.h


def random_problem(seed: int = 0, d: int = 6, m: int = 4, sigma_y: float = 0.1):
    """A Gaussian prior, a linear operator and a measurement: (prior, h, y), float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    root = draw(d, d) / d**0.5
    prior = GaussianPrior(draw(d), root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64))
    h = draw(m, d) / d**0.5
    truth = prior.mean + root @ draw(d)
    return prior, h, (h @ truth + sigma_y * draw(m)).reshape(1, 1, 1, m)
