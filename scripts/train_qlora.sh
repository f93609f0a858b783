#!/usr/bin/env bash
# LoRA on a base in 4 bits, for one GPU of 8 GB or more (pip install bitsandbytes):
#     bash scripts/train_qlora.sh MODEL DATA OUTPUT [further flags of run_chatglm_lora.py]
source "$(dirname "$0")"/launch.sh
targets=(--lora_target_modules all-linear)
case " $* " in *" --adapter_name_or_path"*) targets=() ;; esac  # an adapter has its own
start python -- "${lora[@]}" --load_in_4bit --gradient_checkpointing "${targets[@]}" \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 16 -- "$@"
