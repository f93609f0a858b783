#!/usr/bin/env bash
# LoRA on one GPU: bash scripts/train_lora.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
set -euo pipefail
exec python "$(dirname "$0")"/../run_chatglm_lora.py --model_name_or_path "$1" --train_file "$2" --output_dir "$3" \
    --do_train --dtype bfloat16 --bf16 --gradient_checkpointing \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-4 --warmup_steps 0.05 \
    --logging_steps 10 --save_steps 100 --save_total_limit 3 --resume_from_checkpoint last "${@:4}"
