"""Paint something new into a picture: the known pixels stay, the prompt says what comes.

    python examples/inpaint.py            # writes inpainted.png: the picture, what is known, stock's result, ours

It runs offline with the small checkpoint in the box. For your own pictures put a Stable Diffusion 1.x or 2.x checkpoint
in place of `bundled_model()`, a folder or a name on the hub, and move both pipelines to your GPU.
"""

import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from vml_ldm import VMLInpaintPipeline, bundled_model
from vml_ldm.assets import example_images

path, name = example_images("held_out")[0]
picture = Image.new("RGB", (128, 128), "white")
original = Image.open(path).convert("RGBA").resize(picture.size)
picture.paste(original, mask=original)
mask = Image.new("L", picture.size)  # white is repainted
mask.paste(255, (32, 32, 96, 96))

ours = VMLInpaintPipeline.from_pretrained(bundled_model())
stock = StableDiffusionInpaintPipeline(**ours.components)
ask = {"prompt": "red heart", "image": picture, "mask_image": mask, "height": 128, "width": 128}
results = [pipe(**ask, generator=torch.Generator().manual_seed(0)).images[0] for pipe in (stock, ours)]

known = Image.composite(Image.new("RGB", picture.size, "gray"), picture, mask)
sheet = Image.new("RGB", (4 * 128, 128))
for place, image in enumerate((picture, known, *results)):
    sheet.paste(image, (128 * place, 0))
sheet.save("inpainted.png")
print(f"inpainted.png: {name}; what is known; 'red heart' by stock inpainting; by vml_ldm")
