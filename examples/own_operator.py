"""A camera of your own: rows are read at different times while the picture moves, and every other row is lost.

    python examples/own_operator.py       # writes own_operator.png: the truth, what was measured, the answer

Any function of images that torch can differentiate is an operator. This one is linear and says so: torch finds its
adjoint, the solver begins from the smoothest picture that agrees with y, and ends with a step in pixels.
"""

import torch
from PIL import Image

from vml_ldm import LinearCustom, VMLRestorePipeline, bundled_model
from vml_ldm.assets import example_images
from vml_ldm.evaluation.metrics import psnr
from vml_ldm.images import from_pil, load_image, to_pil

SHIFT = 8  # pixels that the picture moves while all of it is read


def read(image: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, H / 2, W): row i is moved by SHIFT i / H, and every other row is kept."""
    rows = [row.roll(SHIFT * i // image.shape[2], dims=-1) for i, row in enumerate(image.unbind(2))]
    return torch.stack(rows[::2], dim=2)


path, prompt = example_images("held_out")[5]
truth = from_pil(load_image(path).resize((128, 128)))
operator, sigma_y = LinearCustom(read, size=(128, 128)), 0.02
y = operator(truth) + sigma_y * torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(0))

pipe = VMLRestorePipeline.from_pretrained(bundled_model())
call = {"y": y, "operator": operator, "sigma_y": sigma_y, "output_type": "pt"}
image = pipe(prompt, **call, generator=torch.Generator().manual_seed(0)).images
lines = y.repeat_interleave(2, dim=2)
print(f"{psnr(image, truth).item():.1f} dB; each row of y twice: {psnr(lines, truth).item():.1f} dB")

sheet = Image.new("RGB", (3 * 128, 128))
for place, part in enumerate((truth, lines.clamp(0, 1), image)):
    sheet.paste(to_pil(part)[0], (128 * place, 0))
sheet.save("own_operator.png")
