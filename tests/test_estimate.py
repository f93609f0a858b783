"""What a training will need, told without weights: held against real tensors, and against what libraries say."""

import re
import shutil
from types import SimpleNamespace

import bitsandbytes
import datasets
import peft
import pytest
import torch
from tiny import CHAT_FLAGS, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

import chatglm  # noqa: F401
from finetuning import estimate
from finetuning.estimate import LiveBytes, Memory, Setup


LORA = SimpleNamespace(
    load_in_4bit=False, load_in_8bit=False, use_lora=True, peft_type="LORA", pre_seq_len=None, init_lora_weights="true"
)


def options(**changes):
    """The fields of TrainingArguments that an estimate reads."""
    defaults = {"optim": "adamw_torch", "bf16": False, "fp16": False, "gradient_checkpointing": False}
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    return SimpleNamespace(**{**defaults, **sizes, "gradient_checkpointing_kwargs": None, **changes})


def adapted(folder, layers=2, dtype=torch.float32):
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    targets = ["query_key_value"] if config.model_type == "chatglm" else ["q_proj", "v_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets, lora_dropout=0.1))


def on_meta(*arguments):
    with torch.device("meta"):
        return adapted(*arguments)


def batch(rows=2, length=40):
    ids = torch.ones(rows, length, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("name, bf16", [("llama", False), ("chatglm3", False), ("chatglm3", True)])
def test_bytes_told_without_numbers_are_those_of_real_tensors(name, bf16, request):
    folder, dtype = request.getfixturevalue(name), torch.bfloat16 if bf16 else torch.float32
    told = estimate.memory_of_step(on_meta(folder, 2, dtype), batch(), options(bf16=bf16))
    model = adapted(folder, 2, dtype).train()
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch()).loss
        loss.backward()
        del loss
    # Some tensors without numbers live a little longer; what is told is never too little.
    assert 1e5 < live.peak <= told.activations + told.gradients <= 1.1 * live.peak
    trained = [p for p in model.parameters() if p.requires_grad]
    everything = [*model.parameters(), *model.buffers()]
    assert (told.adapter, told.gradients) == (sum(p.nbytes for p in trained), sum(p.nbytes for p in trained))
    assert told.weights + told.adapter == sum(t.nbytes for t in everything)
    assert told.optimizer == 8 * sum(p.numel() for p in trained)


def test_live_bytes_are_those_of_tensors_that_are_not_yet_gone():
    with LiveBytes([]) as live:
        first = torch.ones(100)
        second = first * 2
        first.add_(second)
        del second
        third = first[:50]
        del first
        assert (live.now, live.peak) == (400, 800)
        del third
        assert live.now == 0


def test_layers_that_are_alike_are_told_from_three(llama, monkeypatch):
    told = estimate.memory_of_step(on_meta(llama, 5), batch(), options())
    monkeypatch.setattr(estimate, "layers_alike", lambda model: torch.nn.ModuleList())
    assert estimate.memory_of_step(on_meta(llama, 5), batch(), options()) == told


def test_checkpointing_and_smaller_batches_need_less(llama):
    whole = estimate.memory_of_step(on_meta(llama), batch(4), options())
    checkpointed = estimate.memory_of_step(on_meta(llama), batch(4), options(gradient_checkpointing=True))
    single = estimate.memory_of_step(on_meta(llama), batch(1), options(gradient_checkpointing=True))
    assert whole.activations > 1.2 * checkpointed.activations and checkpointed.activations > 3 * single.activations
    assert whole.weights == checkpointed.weights == single.weights


def test_quantised_layers_have_the_bytes_that_bitsandbytes_stores(llama):
    values, state = bitsandbytes.functional.quantize_4bit(
        torch.randn(512, 512), compress_statistics=True, quant_type="nf4"
    )
    stored = values.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes  # beside tables of the size of nothing
    assert stored == 512 * 512 * estimate.QUANTISED[4]
    model = on_meta(llama)
    quantised = estimate.quantised_layers(model)
    assert len(quantised) == 2 * 7  # in two layers, without the output layer
    plain, told = (estimate.memory_of_step(on_meta(llama), batch(), options(), bits) for bits in (None, 4))
    saved = sum(layer.weight.nbytes - int(layer.weight.numel() * estimate.QUANTISED[4]) for layer in quantised)
    assert plain.weights - told.weights == saved and told.activations > 0


@pytest.mark.parametrize("processes", [1, 4])
def test_shares_of_a_full_training_are_those_that_deepspeed_estimates(processes):
    zero2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    zero3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    trained, layer = 1_000_000, 40_000
    memory = Memory(weights=2 * trained, adapter=0, gradients=2 * trained, optimizer=8 * trained, activations=500)
    shares = estimate.shared_out(memory, trained, 2 * layer, processes, half=True)
    _, second = zero2.estimate_zero2_model_states_mem_needs(trained, processes, cpu_offload=False)
    _, third, _ = zero3.estimate_zero3_model_states_mem_needs(
        trained, layer, processes, cpu_offload=False, cpu_offload_params=False
    )
    assert shares["ZeRO-2"] == second + 500 and shares["ZeRO-3"] == third + 500
    assert shares["FSDP"] == (2 + 2 + 8) * trained // processes + 4 * layer + 500


def test_weights_that_are_not_trained_are_shared_out_by_zero3_and_fsdp_alone():
    memory = Memory(weights=8000, adapter=400, gradients=400, optimizer=800, activations=0)
    shares = estimate.shared_out(memory, 100, 0, 4, half=True)
    assert shares == {"ZeRO-2": 8000 + 200 + 450, "ZeRO-3": (8000 + 1800) // 4, "FSDP": (8000 + 1600) // 4}


def test_flags_that_save_memory_come_one_after_the_other():
    asked = Setup("as asked", "", torch.float32, LORA, options(gradient_accumulation_steps=2))
    assert [setup.step for setup in estimate.setups(asked)] == [
        "as asked",
        "and --dtype bfloat16 --bf16",
        "and --gradient_checkpointing",
        "and --per_device_train_batch_size 1 --gradient_accumulation_steps 8",
        "and --load_in_4bit",
    ]
    args = options(gradient_checkpointing=True, per_device_train_batch_size=1, bf16=True)
    asked = Setup("as asked", "", torch.float16, LORA, args)
    found = [(setup.step, setup.added) for setup in estimate.setups(asked)]
    assert found == [
        ("as asked", ""),
        ("without --gradient_checkpointing", ""),
        ("and --dtype bfloat16", "--dtype bfloat16"),
        ("and --load_in_4bit", "--dtype bfloat16 --load_in_4bit"),
    ]


def test_each_card_has_the_first_flags_that_fit():
    def way(added, gib):
        return Setup("as asked", added, None, None, None), Memory(int(gib * 2**30), 0, 0, 0, 0)

    lines = estimate.about_cards([way("", 22.9), way("--a", 15.1), way("--a --b", 7.5)])
    assert [line.split(": ")[1] for line in lines[1:]] == [
        "none of these; several GPUs with ZeRO-3 or FSDP", "--a --b", "--a --b", "as asked", "as asked", "as asked",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes, steps",
    [({}, 9), ({"dataloader_drop_last": True}, 6), ({"gradient_accumulation_steps": 2, "num_train_epochs": 1.4}, 3)],
)
def test_steps_are_those_that_trainer_makes(changes, steps):
    args = {"train_batch_size": 7, "num_train_epochs": 3, "dataloader_drop_last": False, **changes}
    assert estimate.steps_of(15, options(**args)) == steps


def test_dry_run_reads_no_weights_and_leaves_nothing_behind(run, chatglm3, chats, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(chatglm3, base, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    flags = ["--model_name_or_path", base, "--train_file", chats, CHAT_FLAGS, "--do_train", "--dry_run"]
    flags += ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 8]
    launcher = ["--deepspeed", "ds_zero3.json", "--bf16", "--use_cpu", "False", "--num_train_epochs", 2]
    folder = run(flags, launcher)
    shown = capsys.readouterr().out
    assert not folder.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["base"]
    assert re.search(r"Trainable parameters: 3,072 of [\d,]+ \(", shown)
    assert "Training: 4 steps of 8 examples on one GPU" in shown
    for beginning in ("as asked", "and --gradient_checkpointing", "and --load_in_4bit", "ZeRO-2", "ZeRO-3", "FSDP"):
        assert re.search(rf"^{beginning}( +[\d.]+)+$", shown, re.M), beginning
    assert "    8 GiB: as asked\n" in shown


def test_dry_run_goes_on_from_an_adapter_and_asks_tensors_for_numbers_in_vain(run, chatglm1, chats, tmp_path, capsys):
    """ChatGLM-6B looks for its special tokens in each batch."""
    base = ["--model_name_or_path", chatglm1, "--train_file", chats, CHAT_FLAGS, "--do_train"]
    base += ["--per_device_train_batch_size", 1]
    adapter = run(base, "--max_steps", 1, "--lora_r", 4, output="adapter")
    capsys.readouterr()
    run(base, "--adapter_name_or_path", adapter, "--dry_run", "--gradient_checkpointing", "--load_in_8bit")
    shown = capsys.readouterr().out
    assert "Trainable parameters: 2,048 of 110,080 (" in shown and "without --gradient_checkpointing " in shown


def test_dry_run_says_what_it_needs_to_be_told(run, chatglm3, chats):
    with pytest.raises(ValueError, match="--dry_run says what a training needs: add --do_train"):
        run("--model_name_or_path", chatglm3, "--validation_file", chats, CHAT_FLAGS, "--do_eval", "--dry_run")


def test_bad_rows_are_told_and_no_file_is_written_of_them(run, chatglm3, tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": ["c"], "response": "d"}\n')
    rows = ["--train_file", tmp_path / "rows.jsonl", *CHAT_FLAGS[:4], "--skip_bad_rows"]
    folder = run("--model_name_or_path", chatglm3, rows, "--do_train", "--preview", 1)
    assert not folder.exists() and "1 of 2 train rows are bad and left out; the first: " in caplog.text


def test_rows_that_are_dropped_or_cut_are_counted(run, chatglm3, tmp_path, caplog):
    caplog.set_level("INFO", logger="run_chatglm_lora")
    rows = [("a", "b"), ("a", ""), ("who paints the door " * 9, "b"), ("a", "the baker paints " * 9)]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "response": answer} for prompt, answer in rows])
    limits = ["--max_source_length", 32, "--max_target_length", 16]
    run("--model_name_or_path", chatglm3, "--train_file", file, CHAT_FLAGS[:4], limits, "--do_train", "--preview", 1)
    assert "Limits of train: 1 rows dropped, 1 prompts and 1 answers cut" in caplog.text


def test_longest_rows_make_the_batch():
    data = datasets.Dataset.from_dict({"input_ids": [[1], [1] * 9, [1] * 5], "labels": [[1], [1] * 9, [1] * 5]})
    assert [len(row["input_ids"]) for row in estimate.longest_rows(data, 2)] == [9, 5]
    assert [len(row["input_ids"]) for row in estimate.longest_rows(data.select([0, 2]), 1)] == [5]
    assert [len(row["input_ids"]) for row in estimate.longest_rows(data.to_iterable_dataset(), 1)] == [9]
