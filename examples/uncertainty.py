"""What several seeds agree on, and where they differ: there the answer comes from the model and not from y.

    python examples/uncertainty.py        # writes uncertainty.png: what is known, the mean, the spread (white is 0.3)

It runs offline with the small checkpoint in the box.
"""

import torch
from PIL import Image

from vml_ldm import VMLInpaintPipeline, bundled_model, over_seeds
from vml_ldm.assets import example_images
from vml_ldm.images import from_pil, load_image, to_pil

path, prompt = example_images("held_out")[1]
picture = from_pil(load_image(path).resize((128, 128)))
mask = torch.zeros(1, 1, 128, 128)
mask[..., 64:] = 1  # the right half is repainted

pipe = VMLInpaintPipeline.from_pretrained(bundled_model())
pipe.set_progress_bar_config(disable=True)
call = {"image": picture, "mask_image": mask, "guidance_scale": 1.0, "preset": "fast", "output_type": "pt"}
mean, std = over_seeds(lambda generator: pipe(prompt, **call, generator=generator).images, range(4))
print(f"spread over seeds: {std[..., :64].mean():.4f} where pixels are known, {std[..., 64:].mean():.4f} where not")

sheet = Image.new("RGB", (3 * 128, 128))
for place, image in enumerate((picture * (1 - mask) + 0.5 * mask, mean, (std / 0.3).clamp(0, 1))):
    sheet.paste(to_pil(image)[0], (128 * place, 0))
sheet.save("uncertainty.png")
