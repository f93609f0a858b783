#!/usr/bin/env bash
# P-Tuning v2 as published with ChatGLM (for any other model: --peft_type PREFIX_TUNING), on one GPU:
#     bash scripts/train_ptuning.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
start python -- --pre_seq_len 128 --per_device_train_batch_size 4 --gradient_accumulation_steps 4 \
    --learning_rate 2e-2 --save_steps 100 --save_total_limit 3 -- "$@"
