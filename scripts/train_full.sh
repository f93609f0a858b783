#!/usr/bin/env bash
# All weights, with DeepSpeed ZeRO-3 on several GPUs (6 billion weights with Adam need about 100 GB in all):
#     bash scripts/train_full.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
precision=("${precision[@]:2}")  # --bf16 alone: the weights that are trained stay as they are stored
start "${torchrun[@]}" -- --deepspeed "$here"/ds_zero3.json --no_use_lora --gradient_checkpointing \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 1e-5 --warmup_steps 0.05 \
    --save_steps 500 --save_total_limit 2 -- "$@"
