"""A measurement that deepinv describes, restored here: its physics is the operator.

pip install deepinv
python examples/deepinv_physics.py    # writes deepinv_physics.png: the truth, what was measured, the answer
"""

import deepinv
import torch
from PIL import Image

from vml_ldm import VMLRestorePipeline, bundled_model, from_physics
from vml_ldm.assets import example_images
from vml_ldm.evaluation.metrics import psnr
from vml_ldm.images import from_pil, load_image, to_pil

path, prompt = example_images("held_out")[7]
truth = from_pil(load_image(path).resize((128, 128)))
kernel = deepinv.physics.functional.blur.gaussian_blur(sigma=(2.0, 2.0))
physics = deepinv.physics.Blur(filter=kernel, padding="circular", noise_model=deepinv.physics.GaussianNoise(0.02))
torch.manual_seed(0)
y = physics(truth)

pipe = VMLRestorePipeline.from_pretrained(bundled_model())
call = {"y": y, "operator": from_physics(physics), "sigma_y": 0.02, "output_type": "pt"}
image = pipe(prompt, **call, generator=torch.Generator().manual_seed(0)).images
print(f"{psnr(image, truth).item():.1f} dB; what was measured: {psnr(y.clamp(0, 1), truth).item():.1f} dB")

sheet = Image.new("RGB", (3 * 128, 128))
for place, part in enumerate((truth, y.clamp(0, 1), image)):
    sheet.paste(to_pil(part)[0], (128 * place, 0))
sheet.save("deepinv_physics.png")
