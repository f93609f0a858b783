#!/usr/bin/env bash
# All weights, with DeepSpeed ZeRO-3 on several GPUs (6 billion weights with Adam need about 100 GB in all):
#     bash scripts/train_full.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
set -euo pipefail
here=$(dirname "$0")/..
exec torchrun --nproc_per_node "${NUM_GPUS:-gpu}" "$here"/run_chatglm_lora.py --deepspeed "$here"/ds_zero3.json \
    --model_name_or_path "$1" --train_file "$2" --output_dir "$3" --do_train --no_use_lora --bf16 \
    --gradient_checkpointing --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --learning_rate 1e-5 \
    --warmup_steps 0.05 --logging_steps 10 --save_steps 500 --save_total_limit 2 --resume_from_checkpoint last "${@:4}"
