#!/usr/bin/env bash
# LoRA with DeepSpeed ZeRO-3, which shares out the weights too and loads each GPU's part only:
#     bash scripts/train_zero3.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
start "${torchrun[@]}" -- --deepspeed "$here"/ds_zero3.json "${lora[@]}" -- "$@"
