#!/usr/bin/env bash
# LoRA with ZeRO-2 on several machines that share OUTPUT. Start the same line on each of them:
#     NUM_NODES=2 MASTER_ADDR=first.machine bash scripts/train_multi_node.sh MODEL DATA OUTPUT [further flags]
# or, with passwordless ssh and a file of lines such as "machine slots=8", once:
#     HOSTFILE=hosts bash scripts/train_multi_node.sh MODEL DATA OUTPUT [further flags]
source "$(dirname "$0")"/launch.sh
if [ -n "${HOSTFILE:-}" ]; then
    launch=(deepspeed --hostfile "$HOSTFILE")
else
    launch=(torchrun --nnodes "$NUM_NODES" --nproc_per_node "$processes" --rdzv_id "${JOB_ID:-chatglm}"
            --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}")
fi
start "${launch[@]}" -- --deepspeed "$here"/ds_zero2.json "${lora[@]}" -- "$@"
