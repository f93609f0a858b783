#!/usr/bin/env bash
# LoRA with ZeRO-2 on several machines that share OUTPUT. Start the same line on each of them:
#     NUM_NODES=2 MASTER_ADDR=first.machine bash scripts/train_multi_node.sh MODEL DATA OUTPUT [further flags]
# or, with passwordless ssh and a file of lines such as "machine slots=8", once:
#     HOSTFILE=hosts bash scripts/train_multi_node.sh MODEL DATA OUTPUT [further flags]
set -euo pipefail
here=$(dirname "$0")/..
if [ -n "${HOSTFILE:-}" ]; then
    launch=(deepspeed --hostfile "$HOSTFILE")
else
    launch=(torchrun --nnodes "$NUM_NODES" --nproc_per_node "${NUM_GPUS:-gpu}" --rdzv_id "${JOB_ID:-chatglm}"
            --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
fi
exec "${launch[@]}" "$here"/run_chatglm_lora.py --deepspeed "$here"/ds_zero2.json \
    --model_name_or_path "$1" --train_file "$2" --output_dir "$3" --do_train --dtype bfloat16 --bf16 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-4 --warmup_steps 0.05 \
    --logging_steps 10 --save_steps 100 --save_total_limit 3 --resume_from_checkpoint last "${@:4}"
