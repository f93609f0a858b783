#!/usr/bin/env bash
# LoRA on one GPU: bash scripts/train_lora.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
start python -- "${lora[@]}" --gradient_checkpointing -- "$@"
