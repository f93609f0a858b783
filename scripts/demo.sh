#!/usr/bin/env bash
# From nothing to a tuned ChatGLM, on any machine: sets up .venv, makes a tiny random checkpoint in the layout of
# ChatGLM3-6B, teaches it the 36 answers of examples/teahouse.jsonl with LoRA, and asks it before and after.
#
#     bash scripts/demo.sh [OUTPUT_DIR]
#
# What an earlier run left in the output folder is used again; delete it to start over. With PYTHON=... in the
# environment that interpreter is used as it is, and nothing is installed; DEMO_FLAGS=--bf16 or so takes a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || bash scripts/setup.sh requirements.lock
export HF_HUB_OFFLINE=1 DS_ACCELERATOR=cpu

python=${PYTHON:-.venv/bin/python}
out=${1:-demo_output}
data=(--train_file examples/teahouse.jsonl --test_file examples/teahouse.jsonl
      --prompt_column prompt --response_column response --history_column history)
run() {
    "$python" run_chatglm_lora.py --model_name_or_path "$out/model" "${data[@]}" \
        ${DEMO_FLAGS:---use_cpu} --report_to none --log_level warning --per_device_eval_batch_size 36 "$@"
}

if [ ! -f "$out"/model/model.safetensors ]; then
    echo "== A tiny checkpoint"
    "$python" scripts/tiny_chatglm.py "$out"/model --text examples/teahouse.jsonl --hidden_size 128 --vocab_size 800
fi
if [ ! -f "$out"/before/predict_results.json ]; then
    echo "== Its answers before tuning"
    run --do_predict --output_dir "$out"/before
fi
if [ ! -f "$out"/adapter/all_results.json ]; then
    echo "== Tuning with LoRA"
    run --do_train --do_eval --validation_file examples/teahouse.jsonl --output_dir "$out"/adapter \
        --lora_target_modules all-linear --lora_r 16 --learning_rate 5e-3 --lr_scheduler_type cosine \
        --num_train_epochs 80 --per_device_train_batch_size 12 --logging_steps 10 --save_strategy no
fi
if [ ! -f "$out"/after/predict_results.json ]; then
    echo "== Its answers with the saved adapter"
    run --do_predict --adapter_name_or_path "$out"/adapter --output_dir "$out"/after
fi

"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = {
    when: [json.loads(line) for line in (out / when / "generated_predictions.jsonl").read_text("utf-8").splitlines()]
    for when in ("before", "after")
}
for before, after in list(zip(rows["before"], rows["after"]))[:3]:
    print(f"\nquestion  {after['prompt']}\nbefore    {before['prediction'][:60]!r}\nafter     {after['prediction']}")
share = json.loads((out / "after/predict_results.json").read_text())["predict_exact_match"]
print(f"\n{share:.0%} of the {len(rows['after'])} answers come back word for word. Loss curve: {out}/adapter/training_loss.png")
sys.exit(share < 0.9)
PYTHON
