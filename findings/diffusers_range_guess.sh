#!/usr/bin/env bash
# One value of -1e-6 in a picture in [0, 1] washes the whole picture out: diffusers then takes it for one in [-1, 1].
#
# Guessed: values out of range are clamped, or an error says so; a rounding error below 0 changes nothing.
# Found, diffusers 0.42.1: `VaeImageProcessor.preprocess` brings [0, 1] to [-1, 1] unless the least value is negative.
# Then it passes the picture on as it is, with a warning: mean -0.004 becomes 0.498, black becomes mid-grey. Any bicubic
# resize of a tensor makes such values. So stock pipelines, image-to-image and inpainting, are given a pale picture.
#
# It installs into a temporary folder, and fails if that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diffusers==0.42.1 torch==2.11.0 numpy pillow transformers
"$folder/venv/bin/python" -W ignore - <<'EOF'
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor

processor = VaeImageProcessor(vae_scale_factor=8)
picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
touched = picture.clone()
touched[0, 0, 0, 0] = -1e-6
low = F.interpolate((picture > 0.5).float(), scale_factor=2, mode="bicubic")
right, wrong, after = (processor.preprocess(x).mean().item() for x in (picture, touched, low))
print(f"mean as the VAE gets it: {right:.3f}; with one value of -1e-6: {wrong:.3f}")
print(f"black and white, resized bicubically (least value {low.min():.3f}): {after:.3f}, expected about 0")
assert abs(right) < 0.02 and abs(wrong - 0.498) < 0.01 and abs(after - 0.5) < 0.02
EOF
