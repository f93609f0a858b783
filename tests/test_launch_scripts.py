"""Each launch script starts a run that trains the tiny checkpoint; what belongs to a CPU comes from outside."""

import json
import os
import subprocess
import sys

import pytest
from processes import finished, forked_ranks, forked_run
from safetensors.torch import load_file
from tiny import CHAT_FLAGS, ROOT, flat, losses


ON_CPU = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True"]
RECORD = '#!/bin/sh\nfor word in "$(basename "$0")" "$@"; do printf "%s\\n" "$word"; done > "$RECORDED"\n'


@pytest.fixture
def commands(tmp_path):
    """What a script would start: programs that write down their command line stand in for the launchers."""

    def recorded(script, *words, **environment):
        programs = tmp_path / "programs"
        programs.mkdir(exist_ok=True)
        for name in ("python", "torchrun", "deepspeed"):
            (programs / name).write_text(RECORD)
            (programs / name).chmod(0o755)
        path = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORDED": str(tmp_path / "recorded")}
        command = ["bash", str(ROOT / "scripts" / script), *flat(words)]
        subprocess.run(command, env={**os.environ, **path, **environment}, check=True)
        words = (tmp_path / "recorded").read_text().splitlines()
        start = next(i for i, word in enumerate(words) if word.endswith("run_chatglm_lora.py"))
        return words[:start], words[start + 1 :]

    return recorded


@pytest.fixture
def train(commands, chatglm3, chats, tmp_path):
    """Runs what a script starts; returns the launcher's words, the folder, and exit codes and logs."""

    def trained(script, processes, *more, **environment):
        short = ["--max_steps", 2, "--logging_steps", 1, "--gradient_accumulation_steps", 1]
        further = [CHAT_FLAGS, ON_CPU, short, more]
        launcher, words = commands(script, chatglm3, chats, tmp_path / "out", further, **environment)
        if processes > 1:
            return launcher, tmp_path / "out", forked_ranks(words, tmp_path, processes)
        log = tmp_path / "log"
        return launcher, tmp_path / "out", [finished(forked_run(words, log), log)]

    return trained


SCRIPTS = {
    "train_lora.sh": (1, "python", "adapter_model.safetensors"),
    "train_ptuning.sh": (1, "python", "model.safetensors"),
    "train_multi_gpu.sh": (2, "torchrun --nproc_per_node 2", "adapter_model.safetensors"),
    "train_zero2.sh": (2, "torchrun --nproc_per_node 2", "adapter_model.safetensors"),
    "train_zero3.sh": (2, "torchrun --nproc_per_node 2", "adapter_model.safetensors"),
    "train_full.sh": (2, "torchrun --nproc_per_node 2", "model.safetensors"),
    "train_multi_node.sh": (
        2,
        "torchrun --nnodes 2 --nproc_per_node 2 --rdzv_id chatglm --rdzv_backend c10d --rdzv_endpoint first:29500",
        "adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize(
    "script", sorted(path.name for path in (ROOT / "scripts").glob("train_*.sh")) + ["predict.sh"]
)
def test_script_without_arguments_prints_its_usage(script):
    ended = subprocess.run(["bash", str(ROOT / "scripts" / script), "model"], capture_output=True, text=True)
    assert ended.returncode == 2 and f"bash scripts/{script} MODEL " in ended.stderr
    assert "source" not in ended.stderr and "#" not in ended.stderr


def test_precision_and_processes_follow_use_cpu(commands):
    launcher, words = commands("train_zero3.sh", "model", "data", "out")
    assert launcher == ["torchrun", "--nproc_per_node", "gpu"] and "--bf16" in words
    launcher, words = commands("train_zero3.sh", "model", "data", "out", "--use_cpu")
    assert launcher == ["torchrun", "--nproc_per_node", "1"] and "--bf16" not in words
    assert words[words.index("--dtype") + 1] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_and_saves(train, script):
    processes, launcher, result = SCRIPTS[script]
    started, folder, ended = train(script, processes, NUM_GPUS="2", NUM_NODES="2", MASTER_ADDR="first")
    assert [code for code, _ in ended] == [0] * processes, ended
    assert " ".join(started) == launcher
    assert load_file(folder / result) and len(losses(folder)) == 2
    assert (folder / "checkpoint-2/complete.json").exists()


def test_hostfile_goes_to_the_deepspeed_launcher(commands):
    launcher, words = commands("train_multi_node.sh", "model", "data", "out", HOSTFILE="hosts")
    assert launcher == ["deepspeed", "--hostfile", "hosts"] and words[words.index("--deepspeed") + 1].endswith(
        "ds_zero2.json"
    )


def test_fsdp_is_refused_on_a_cpu(train):
    _, _, ended = train("train_fsdp.sh", 1)
    assert ended[0][0] == 1 and "--fsdp would be passed over" in ended[0][1]


@pytest.mark.slow
def test_qlora_trains_where_bitsandbytes_is_installed(train):
    pytest.importorskip("bitsandbytes")
    _, folder, ended = train("train_qlora.sh", 1)
    assert ended[0][0] == 0, ended
    assert len(losses(folder)) == 2


@pytest.mark.slow
def test_predict_answers_with_the_trained_adapter(train, commands, chatglm3, chats, tmp_path):
    train("train_lora.sh", 1)
    questions = [CHAT_FLAGS, ON_CPU, "--max_predict_samples", 2, "--max_target_length", 4]
    _, words = commands("predict.sh", chatglm3, tmp_path / "out", chats, tmp_path / "answers", questions)
    code, log = finished(forked_run(words, tmp_path / "log"), tmp_path / "log")
    assert code == 0, log
    answers = (tmp_path / "answers/generated_predictions.jsonl").read_text().splitlines()
    assert len([json.loads(line) for line in answers]) == 2


@pytest.mark.slow
def test_signal_to_a_script_reaches_the_processes_of_torchrun(chatglm3, chats, tmp_path):
    """torchrun itself then ends with 1.

    It signals the workers of the data loader too, and so does timeout, as schedulers do that signal a whole group.
    """
    words = ["timeout", "--signal", "KILL", 240, "bash", ROOT / "scripts/train_multi_gpu.sh", chatglm3, chats]
    steps = ["--max_steps", 100000, "--logging_steps", 1, "--gradient_accumulation_steps", 1]
    workers = ["--dataloader_num_workers", 1, "--per_device_train_batch_size", 1]
    programs = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "NUM_GPUS": "2", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [str(word) for word in flat([words, tmp_path / "out", CHAT_FLAGS, ON_CPU, steps, workers])],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        log = []
        for line in process.stdout:
            log.append(line)
            if "'loss'" in line and "'loss'" not in "".join(log[:-1]):
                process.terminate()
    log = "".join(log)
    assert process.returncode == 1 and log.count("Stopped early, by a signal") == 1, log
    assert list((tmp_path / "out").glob("checkpoint-*/complete.json"))
