#!/usr/bin/env bash
# Answer the questions of a file with a tuned model; the answers are in OUTPUT/generated_predictions.jsonl:
#     bash scripts/predict.sh MODEL ADAPTER DATA OUTPUT [further flags of run_chatglm_lora.py]
needed=4
source "$(dirname "$0")"/launch.sh
exec python "$here"/run_chatglm_lora.py --model_name_or_path "$1" --adapter_name_or_path "$2" --test_file "$3" \
    --output_dir "$4" --do_predict "${precision[@]:0:2}" --per_device_eval_batch_size 8 "${@:5}"
