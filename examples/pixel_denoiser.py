"""A photograph without half of its pixels, filled in with a denoiser of another library: no network, no latents.

    pip install scikit-image
    python examples/pixel_denoiser.py     # writes pixel_denoiser.png: the truth, what was measured, the answer

`CallablePrior` takes any ``denoise(x, sigma)``. This one is total variation denoising from scikit-image, which works in
numpy and knows no gradient, so the steps are Jacobian-free.
"""

import torch
from PIL import Image
from skimage.data import chelsea
from skimage.restoration import denoise_tv_chambolle

from vml_ldm import CallablePrior, Levels, Mask, Measurement, karras_scales, vml_map
from vml_ldm.evaluation.metrics import psnr
from vml_ldm.images import from_pil, to_pil


def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] with noise of standard deviation sigma -> clean ones."""
    clean = [denoise_tv_chambolle(image.numpy(), weight=1.5 * sigma, channel_axis=0) for image in x]
    return torch.stack([torch.from_numpy(image) for image in clean]).to(x)


draw = torch.Generator().manual_seed(0)
truth = from_pil(Image.fromarray(chelsea()).resize((192, 128)))  # (1, 3, 128, 192) in [0, 1]
known, sigma_y = (torch.rand(1, 1, 128, 192, generator=draw) < 0.5).float(), 0.02
y = known * (truth + sigma_y * torch.randn(truth.shape, generator=draw))

levels = Levels(karras_scales(12, sigma_max=1.0, sigma_min=0.02), renoise=0.0)
solution = vml_map(
    torch.randn(truth.shape, generator=draw),
    prior=CallablePrior(denoise, low=0.0, high=1.0),
    measurement=Measurement(Mask(known), y, sigma_y),
    schedule=levels,
    inner_steps=4,
    jacobian="free",
    generator=draw,
)
print(solution.report().text())
print(f"{psnr(solution.image, truth).item():.1f} dB")

sheet = Image.new("RGB", (3 * 192, 128))
for place, image in enumerate((truth, y.clamp(0, 1), solution.image)):
    sheet.paste(to_pil(image)[0], (192 * place, 0))
sheet.save("pixel_denoiser.png")
