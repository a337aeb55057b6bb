#!/usr/bin/env bash
# A folder of pictures by several processes, each a share: here two on one CPU; on GPUs, one for each.
#
#     bash examples/several_processes.sh PICTURES RESULTS
#     accelerate launch --multi_gpu --num_processes 4 -m vml_ldm.cli batch PICTURES -o RESULTS --task sr4
#
# The files do not depend on how many processes there are. Interrupted, the same command goes on.
set -euo pipefail
accelerate launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
  -m vml_ldm.cli batch "$1" -o "$2" --task sr4
