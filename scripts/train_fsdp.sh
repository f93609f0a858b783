#!/usr/bin/env bash
# LoRA with PyTorch's own sharding, FSDP2, on several GPUs:
#     bash scripts/train_fsdp.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
start "${torchrun[@]}" -- "${lora[@]}" --fsdp full_shard \
    --fsdp_config '{"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}' -- "$@"
