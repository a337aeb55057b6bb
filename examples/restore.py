"""Restore a picture that was made smaller and then compressed, by VML-MAP and by RED-diff.

    python examples/restore.py            # writes restored.png: the truth, what was measured, RED-diff, VML-MAP

It runs offline with the small checkpoint in the box.
"""

import torch
from PIL import Image

from vml_ldm import JPEG, Downsample, VMLRestorePipeline, bundled_model
from vml_ldm.assets import example_images
from vml_ldm.evaluation.metrics import psnr
from vml_ldm.images import from_pil, load_image, to_pil

path, prompt = example_images("held_out")[3]
truth = from_pil(load_image(path).resize((128, 128)))  # (1, 3, 128, 128) in [0, 1]
operator = JPEG(40) @ Downsample(4)
y = operator(truth)

pipe = VMLRestorePipeline.from_pretrained(bundled_model())
shown = [truth, torch.nn.functional.interpolate(y, scale_factor=4)]
for solver in ("red-diff", "vml"):
    call = {"y": y, "operator": operator, "sigma_y": 0.02, "solver": solver, "output_type": "pt"}
    out = pipe(prompt, **call, generator=torch.Generator().manual_seed(0), return_report=True)
    print(f"{solver}: {psnr(out.images, truth).item():.1f} dB")
    print(out.report.text())
    shown.append(out.images)

sheet = Image.new("RGB", (4 * 128, 128))
for place, image in enumerate(shown):
    sheet.paste(to_pil(image)[0], (128 * place, 0))
sheet.save("restored.png")
