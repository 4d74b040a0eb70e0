#!/usr/bin/env bash
# DeepSpeed 0.19.8 with torch 2.13.0: what `deepspeed.zero.Init` does to tensors that are no parameters.
#
# Guessed: it partitions parameters as modules make them. Buffers keep the dtype that the code asks for, all the more where
# it asks in words (torch.arange(..., dtype=torch.float64)).
# Seen: while it is on, torch.arange, tensor, zeros, ones, full, eye, empty and randn give tensors in the dtype of the
# weights whatever dtype they are asked for: float32 in an fp32 run, and in bf16 arange(1000, dtype=float64) ends at 1000
# where it should end at 999. torch.linspace is left alone. So sine-cosine tables of positions that a constructor computes
# in float64 come out rounded, under ZeRO-3 only, and without a word.
# Output, 2026-12-01 (AMD64 CPU):
#   fp32: arange torch.float32 ends at 999.0, tensor torch.float32, linspace torch.float64
#   bf16: arange torch.bfloat16 ends at 1000.0, tensor torch.bfloat16, linspace torch.float64
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip --disable-pip-version-check --quiet"
$pip install torch==2.13.0
$pip install deepspeed==0.19.8 torch==2.13.0

cat >"$folder/shown.py" <<'PYTHON'
import os

os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29571")
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled
deepspeed.init_distributed("gloo", verbose=False)
for name, bf16 in (("fp32", False), ("bf16", True)):
    config = {"train_batch_size": 1, "bf16": {"enabled": bf16}, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        numbers = torch.arange(1000, dtype=torch.float64)
        third = torch.tensor([1 / 3], dtype=torch.float64)
        line = torch.linspace(0, 1, 5, dtype=torch.float64)
    print(f"{name}: arange {numbers.dtype} ends at {numbers[-1].item()}, tensor {third.dtype}, linspace {line.dtype}")
torch.distributed.destroy_process_group()
PYTHON

expected='fp32: arange torch.float32 ends at 999.0, tensor torch.float32, linspace torch.float64
bf16: arange torch.bfloat16 ends at 1000.0, tensor torch.bfloat16, linspace torch.float64'
found=$("$folder/venv/bin/python" -P "$folder/shown.py" 2>/dev/null | grep -E '^(fp32|bf16): ')
printf '%s\n' "$found"
[ "$found" = "$expected" ] || { echo "changed: another DeepSpeed or torch behaves otherwise" >&2; exit 1; }
