# Read by the launch scripts: what all of them do. A script says what is its own, and then calls `start`.
set -euo pipefail
here=$(dirname "$0")/..

# Too few arguments: the comment at the top of the script, which is its usage.
if [ $# -lt "${needed:-3}" ]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

# With --use_cpu among the flags: one process, unless NUM_GPUS says otherwise, and float32.
case " $* " in
    *" --use_cpu "*) processes=${NUM_GPUS:-1} precision=(--dtype float32) && export DS_ACCELERATOR=cpu ;;
    *) processes=${NUM_GPUS:-gpu} precision=(--dtype bfloat16 --bf16) ;;
esac
torchrun=(torchrun --nproc_per_node "$processes")

# How LoRA is trained; a flag of the user's comes later and wins.
lora=(--per_device_train_batch_size 4 --gradient_accumulation_steps 4 --learning_rate 2e-4 --warmup_steps 0.05
      --save_steps 100 --save_total_limit 3)

# start LAUNCHER... -- FLAGS... -- MODEL DATA OUTPUT [further flags]
start() {
    local launcher=() flags=()
    while [ "$1" != -- ]; do launcher+=("$1"); shift; done; shift
    while [ "$1" != -- ]; do flags+=("$1"); shift; done; shift
    exec "${launcher[@]}" "$here"/run_chatglm_lora.py --model_name_or_path "$1" --train_file "$2" --output_dir "$3" \
        --do_train --logging_steps 10 --resume_from_checkpoint last "${precision[@]}" "${flags[@]}" "${@:4}"
}
