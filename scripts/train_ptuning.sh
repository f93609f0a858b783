#!/usr/bin/env bash
# P-Tuning v2 as published with ChatGLM (for any other model: --peft_type PREFIX_TUNING), on one GPU:
#     bash scripts/train_ptuning.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
set -euo pipefail
exec python "$(dirname "$0")"/../run_chatglm_lora.py --model_name_or_path "$1" --train_file "$2" --output_dir "$3" \
    --do_train --pre_seq_len 128 --dtype bfloat16 --bf16 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-2 \
    --logging_steps 10 --save_steps 100 --save_total_limit 3 --resume_from_checkpoint last "${@:4}"
