#!/usr/bin/env bash
# LoRA with DeepSpeed ZeRO-2, which shares out gradients and optimizer states among the GPUs:
#     bash scripts/train_zero2.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
start "${torchrun[@]}" -- --deepspeed "$here"/ds_zero2.json "${lora[@]}" -- "$@"
