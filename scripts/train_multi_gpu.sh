#!/usr/bin/env bash
# LoRA on all GPUs of a machine, or NUM_GPUS of them, a copy of the model on each:
#     bash scripts/train_multi_gpu.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
start "${torchrun[@]}" -- "${lora[@]}" -- "$@"
