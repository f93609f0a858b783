"""Two processes, with and without DeepSpeed, train what one process trains; and what would go wrong silently."""

import json
import os
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from peft import PeftModel
from processes import finished, forked_ranks, forked_run, signal_rank_1, spoil_loss_of_rank_1
from safetensors.torch import load_file
from tiny import CHAT_FLAGS, COMMON, ROOT, flat, losses
from transformers import AutoModelForCausalLM

import chatglm  # noqa: F401
from finetuning.launching import (
    check_deepspeed,
    check_extension_locks,
    check_parallelism,
    check_processes,
    check_strategy,
    on_one_processor,
    prepared_words,
)
from finetuning.safeguards import STOPPED_EARLY


STAGES = {
    "DDP": [],
    "ZeRO-2": ["--deepspeed", ROOT / "ds_zero2.json"],
    "ZeRO-3": ["--deepspeed", ROOT / "ds_zero3.json"],
}


def command(model, chats, *more, adapter=("--lora_dropout", 0)):
    flags = ["--model_name_or_path", model, "--train_file", chats, CHAT_FLAGS, "--do_train", "--max_steps", 6]
    saves = ["--save_strategy", "steps", "--save_steps", 3, "--log_level", "warning"]
    return [*COMMON.split(), *flat([flags, saves, adapter, more])]


@pytest.fixture(scope="module")
def alone(chatglm3, chats, tmp_path_factory):
    """Output folder of one process that takes the batches of both."""
    folder = tmp_path_factory.mktemp("alone")
    words = command(chatglm3, chats, "--per_device_train_batch_size", 4, "--output_dir", folder / "out")
    code, log = finished(forked_run(words, folder / "log"), folder / "log")
    assert code == 0, log
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())
def test_two_processes_train_and_resume_as_one(alone, chatglm3, chats, tmp_path, stage):
    words = command(chatglm3, chats, "--per_device_train_batch_size", 2, stage)
    for output, more in {"out": [], "again": ["--resume_from_checkpoint", tmp_path / "out/checkpoint-3"]}.items():
        folder = tmp_path / output
        for code, log in forked_ranks([*words, "--output_dir", folder, *more], tmp_path):
            assert code == 0, log
        assert losses(folder) == pytest.approx(losses(alone), abs=2e-6)
        adapter, expected = (load_file(path / "adapter_model.safetensors") for path in (folder, alone))
        assert adapter.keys() == expected.keys()
        assert all(torch.allclose(adapter[name], expected[name], rtol=0, atol=1e-6) for name in expected)
    assert losses(tmp_path / "again") == losses(tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatglm3), tmp_path / "out")
    if not stage:  # one process instead of two
        log = tmp_path / "one.log"
        resume = ["--resume_from_checkpoint", tmp_path / "out/checkpoint-3", "--output_dir", tmp_path / "one"]
        code, text = finished(forked_run([*words, *map(str, resume)], log), log)
        assert code == 1 and "was made with the number of processes 2, this run has 1" in text


def trained_by_one_and_two(words, folder, result):
    """Output folders and saved tensors of a run by one process and by two under ZeRO-3, which share its batches."""
    one, two = folder / "one", folder / "two"
    alone = [*words, "--per_device_train_batch_size", "4", "--output_dir", str(one)]
    code, log = finished(forked_run(alone, folder / "log"), folder / "log")
    assert code == 0, log
    together = [*words, "--per_device_train_batch_size", 2, "--output_dir", two, *STAGES["ZeRO-3"]]
    for code, log in forked_ranks(together, folder):
        assert code == 0, log
    tensors = [load_file(output / result) for output in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    return one, two, [(tensors[0][name], tensors[1][name]) for name in tensors[0]]


def test_all_weights_of_chatglm_6b_are_trained_under_zero_3_as_by_one_process(chatglm1, chats, tmp_path):
    """ChatGLM-6B's published code kept the model whole on every GPU; here each holds its part from loading on."""
    full = command(chatglm1, chats, "--learning_rate", 1e-3, adapter="--no_use_lora")
    one, two, weights = trained_by_one_and_two(full, tmp_path, "model.safetensors")
    assert losses(two) == pytest.approx(losses(one), abs=5e-6)
    assert all(torch.allclose(ours, expected, rtol=0, atol=1e-4) for expected, ours in weights)
    AutoModelForCausalLM.from_pretrained(two)


@pytest.mark.slow
def test_quantised_base_is_tuned_under_zero_3_as_by_one_process(chatglm3, chats, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantised = command(chatglm3, chats, "--load_in_8bit")
    one, two, weights = trained_by_one_and_two(quantised, tmp_path, "adapter_model.safetensors")
    assert losses(two) == pytest.approx(losses(one), abs=2e-6)
    assert all(torch.allclose(ours, expected, rtol=0, atol=1e-5) for expected, ours in weights)


def test_prefix_of_peft_is_refused_under_zero_3(chatglm3, chats, tmp_path):
    """Saving it, DeepSpeed would wait for ever."""
    prefix = ["--peft_type", "PREFIX_TUNING", "--num_virtual_tokens", 4, "--output_dir", tmp_path / "out"]
    words = command(chatglm3, chats, STAGES["ZeRO-3"], adapter=prefix)
    ((code, log),) = forked_ranks(words, tmp_path, count=1)
    assert code == 1 and "take ds_zero2.json, or ChatGLM's own prefix with --pre_seq_len" in log


@pytest.mark.slow
def test_signal_to_one_process_stops_both_after_the_same_step(chatglm3, chats, tmp_path):
    words = command(chatglm3, chats, "--output_dir", tmp_path / "out")
    ended = forked_ranks(words, tmp_path, before=signal_rank_1)
    assert [code for code, _ in ended] == [STOPPED_EARLY, STOPPED_EARLY], ended
    assert (tmp_path / "out/checkpoint-4/complete.json").exists() and "after step 4 of 6" in ended[0][1]


@pytest.mark.slow
def test_loss_that_is_not_finite_on_one_process_stops_both(chatglm3, chats, tmp_path):
    words = command(chatglm3, chats, "--output_dir", tmp_path / "out", "--save_steps", 2)
    ended = forked_ranks(words, tmp_path, before=spoil_loss_of_rank_1)
    assert [code for code, _ in ended] == [1, 1], ended
    assert "The loss of step 3 is not a finite number on another process (learning rate" in ended[0][1]
    assert re.search(
        r"The loss of step 3 is not a finite number \(learning rate 0[.]00[0-9]+\).*row 1 of", ended[1][1], re.S
    )
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*/complete.json")] == ["complete.json"]


# -------------------------------------------------------------------------------------- what was silent before


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_would_train_alone_are_refused(monkeypatch, name):
    way_out = "on CPUs add --use_cpu" if name == "WORLD_SIZE" else "start them with torchrun"
    args = SimpleNamespace(world_size=1, output_dir="out")
    check_processes(args)
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=f"{name}=2, but .* each would train alone .* {way_out}"):
        check_processes(args)
    check_processes(SimpleNamespace(world_size=2, output_dir="out"))


def test_fsdp_and_fp16_are_refused_where_they_do_nothing(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--do_train"]
    with pytest.raises(ValueError, match="--fsdp would be passed over: it needs accelerators and a launcher"):
        run(flags, "--fsdp", "full_shard")
    with pytest.raises(ValueError, match="--fp16 needs a GPU: use --bf16"):
        run(flags, "--fp16")
    on_gpus = SimpleNamespace(type="cuda")
    args = {"fsdp": True, "fp16": True, "fp16_full_eval": False, "world_size": 2, "device": on_gpus}
    check_strategy(SimpleNamespace(**args, parallel_mode=SimpleNamespace(value="distributed")))


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"sp_size": 2}])
def test_rows_that_would_be_cut_into_shares_are_refused(sizes, monkeypatch):
    config = ParallelismConfig(**sizes)
    with pytest.raises(ValueError, match=f"cp_size {config.cp_size}, sp_size {config.sp_size}.* set both to 1"):
        check_parallelism(SimpleNamespace(parallelism_config=config))
    given = SimpleNamespace(parallelism_config=None)
    check_parallelism(given)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    check_parallelism(given)
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{next(iter(sizes)).upper()}", "2")
    with pytest.raises(ValueError, match="give each process a share of every row"):
        check_parallelism(given)


@pytest.mark.parametrize(
    "config, sentence",
    [
        ({"zero_optimisation": {}}, "no key 'zero_optimisation' .* Did you mean 'zero_optimization'"),
        (
            {"zero_optimization": {"stag": 3}},
            "no key 'zero_optimization.stag' .* Did you mean 'zero_optimization.stage'",
        ),
        ({"gradient_cliping": 1.0}, "Did you mean 'gradient_clipping'"),
    ],
)
def test_unknown_key_of_a_deepspeed_configuration_is_named(config, sentence):
    pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=sentence):
        check_deepspeed(config)


def test_our_deepspeed_configurations_and_every_documented_section_are_known():
    pytest.importorskip("deepspeed")
    for stage in (2, 3):
        check_deepspeed(json.loads((ROOT / f"ds_zero{stage}.json").read_text()))
    offload = {"offload_optimizer": {"device": "cpu"}, "stage3_max_live_parameters": 1e9}
    sections = ["optimizer", "scheduler", "flops_profiler", "tensorboard", "wandb", "steps_per_print", "aio", "amp"]
    check_deepspeed({"zero_optimization": offload, **dict.fromkeys(sections)})


def test_lock_that_a_killed_compilation_left_is_named(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm/lock"
    lock.parent.mkdir()
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch takes it
    check_extension_locks()
    assert f"Process {os.getpid()} compiles an extension of DeepSpeed in {lock.parent}" in caplog.text
    assert "DeepSpeed may compile extensions into" in caplog.text
    os.close(descriptor)
    with pytest.raises(ValueError, match=f"{lock} is held by no process of this machine: .* Delete that file"):
        check_extension_locks()


def test_deepspeed_without_a_launcher_is_refused(run, chatglm3, chats):
    with pytest.raises(ValueError, match="--deepspeed needs a launcher: start with torchrun"):
        run("--model_name_or_path", chatglm3, "--deepspeed", ROOT / "ds_zero2.json")


def test_deepspeed_of_the_environment_or_of_a_file_needs_a_launcher(monkeypatch):
    with pytest.raises(ValueError, match="--deepspeed needs a launcher: start with torchrun"):
        on_one_processor({"deepspeed": "ds_zero2.json"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_DEEPSPEED needs a launcher: start with torchrun"):
        prepared_words([])


def test_bare_resume_flag_is_completed_and_other_words_stay():
    flag = "--resume_from_checkpoint"
    assert prepared_words([flag]) == [flag, "True"]
    assert prepared_words([flag, "--seed", "3"]) == [flag, "True", "--seed", "3"]
    assert prepared_words(["--seed", "3", flag, "last"]) == ["--seed", "3", flag, "last"]


def test_pickles_are_loaded_without_running_code(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    prepared_words([])
    torch.save(partial(print, "code"), tmp_path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=False)
