#!/usr/bin/env bash
# Answer the questions of a file with a tuned model; the answers are in OUTPUT/generated_predictions.jsonl:
#     bash scripts/predict.sh MODEL ADAPTER DATA OUTPUT [further flags of run_chatglm_lora.py]
set -euo pipefail
exec python "$(dirname "$0")"/../run_chatglm_lora.py --model_name_or_path "$1" --adapter_name_or_path "$2" \
    --test_file "$3" --output_dir "$4" --do_predict --dtype bfloat16 --per_device_eval_batch_size 8 "${@:5}"
