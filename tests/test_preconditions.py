"""What cannot be done is found before anything is loaded."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError

from finetuning import launching, preconditions
from finetuning.mistakes import is_for_the_user


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "There is nothing to do: add --do_train, --do_eval or --do_predict."),
        ("--do_train --streaming", "--streaming needs --max_steps"),
        ("--do_train --report_to wandb", "--report_to wandb needs a package: pip install wandb, or --report_to none."),
        ("--do_train --use_liger_kernel", "--use_liger_kernel needs a package: pip install liger-kernel"),
        (
            "--do_train --optim schedule_free_adamw",
            "--optim schedule_free_adamw needs a package: pip install schedulefree",
        ),
        (
            "--do_train --optim galore_adamw",
            "--optim galore_adamw needs layers: add --optim_target_modules all-linear and --no_use_lora.",
        ),
        (
            "--do_train --no_use_lora --optim apollo_adamw --optim_target_modules all-linear",
            "--optim apollo_adamw needs a package: pip install apollo-torch, or take adamw_torch.",
        ),
        ("--do_train --optim paged_adamw_8bit", "--optim paged_adamw_8bit needs a package: pip install bitsandbytes"),
        ("--do_train --report_to tensorbord", "tensorboard, trackio, wandb. Did you mean 'tensorboard'?"),
        ("--do_train --load_best_model_at_end", "--load_best_model_at_end compares evaluations: add --eval_strategy"),
        ("--do_train --save_strategy best --eval_strategy steps", "and --metric_for_best_model loss, say."),
        ("--do_train --eval_on_start", "--eval_on_start evaluates before the training: add --do_eval, or drop it."),
        (
            "--do_train --streaming --max_steps 1 --train_sampling_strategy group_by_length",
            "group_by_length needs all rows, and a stream comes in its own order: drop it, or --streaming.",
        ),
        (
            '--do_train --gradient_checkpointing --gradient_checkpointing_kwargs {"a":1}',
            "--gradient_checkpointing_kwargs {'a': 1}: Unexpected keyword arguments: a",
        ),
        ("--do_eval --label_names foo", "--label_names: what is trained is called labels here, and nothing else"),
        ("--do_train --model_name_or_path ./nothere", "--model_name_or_path: there is no folder ./nothere."),
        ("--do_train --lora_target_modules [", "--lora_target_modules [ is no regular expression: unterminated"),
        ("--do_train --adapter_name_or_path ./nothere", "--adapter_name_or_path: there is no folder ./nothere."),
        (
            "--do_train --lr_scheduler_type cosine_with_min_lr",
            "cosine_with_min_lr --lr_scheduler_kwargs None: One of min_lr",
        ),
        ('--do_train --lr_scheduler_kwargs {"x":1}', "unexpected keyword argument 'x'"),
        (
            "--do_train --optim_args nonsense",
            "--optim_args nonsense: 'nonsense' is no name=value, such as momentum=0.9.",
        ),
        (
            "--do_train --optim_args momentum=1",
            "--optim adamw_torch_fused does not read momentum, and would pass over it",
        ),
        ("--do_train --optim sgd --optim_args momentum=-1", "sgd refuses that: Invalid momentum value: -1.0"),
        ("--do_train --optim sgd --optim_args momentum=0.9,nesterov=true", "There is no file x.jsonl"),
        (f"--do_train --cache_dir {__file__}", f"--cache_dir {__file__} is a file: name a folder."),
        ("--do_train --push_to_hub --hub_model_id a/b/c", "--hub_model_id a/b/c: Repo id must be in the form"),
        ("--do_train --model_name_or_path some/where", "there is no folder some/where, and HF_HUB_OFFLINE is set."),
    ],
)
def test_what_cannot_be_done_is_said_at_once(run, monkeypatch, words, sentence):
    monkeypatch.setattr(preconditions, "installed", lambda module: False)
    with pytest.raises((ValueError, OSError)) as error:
        run(words.split(), "--train_file", "x.jsonl")
    assert sentence in str(error.value)


def test_what_a_library_cannot_load_is_named_and_no_trace_stays_in_the_output_folder(run, chatglm3, chats, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(chatglm3, broken)
    (broken / "model.safetensors").write_text("cut short")
    shutil.copytree(chatglm3, tmp_path / "cloned")
    (tmp_path / "cloned/tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "a.jinja").write_text("{% for")
    common = ["--do_train", "--train_file", chats, "--model_name_or_path"]
    for words, sentence in {
        (tmp_path / "cloned",): "cloned/tokenizer.model is a pointer of git-lfs and not the file: run `git lfs pull`",
        (broken,): f"The weights of {broken} cannot be loaded: Error while deserializing",
        (tmp_path, "--tokenizer_name", chatglm3): f"The configuration of {tmp_path}: Unrecognized model",
        (chatglm3, "--tokenizer_name", chats): f"The tokenizer of {chats}: It looks like the config file",
        (chatglm3, "--chat_template", tmp_path / "a.jinja"): "a.jinja: unexpected 'end of template'",
        (chatglm3, "--chat_template", "b.jinja"): "--chat_template b.jinja: .* No such file",
        (chatglm3, "--peft_config", "b.json"): "--peft_config b.json: .* No such file",
        (chatglm3, "--dataset_name", "./nothere"): "--dataset_name ./nothere cannot be loaded: Couldn't reach",
    }.items():
        with pytest.raises((ValueError, OSError), match=sentence) as error:
            run(common, words)
        assert is_for_the_user(error.value)
        launching.release_folder()  # at the end of a process
    assert not list((tmp_path / "out").iterdir())


def test_every_optimizer_that_trainer_imports_from_elsewhere_has_its_package():
    from transformers.training_args import OptimizerNames

    own = {"adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adafactor", "sgd", "adagrad", "rmsprop"}
    named = {name.value for name in OptimizerNames if any(part in name.value for part, *_ in preconditions.OPTIMIZERS)}
    assert {name.value for name in OptimizerNames} - named == own


def test_base_that_is_an_adapter_and_adapter_that_is_a_base_are_named(run, tmp_path, chatglm3):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=f"--model_name_or_path {adapter} is an adapter: pass it as --adapter_name_or"
    ):
        run("--do_train", "--model_name_or_path", adapter)
    base = ["--do_train", "--model_name_or_path", chatglm3, "--adapter_name_or_path"]
    with pytest.raises(ValueError, match=f"--adapter_name_or_path {chatglm3} is a model and no adapter"):
        run(base, chatglm3)
    (tmp_path / "run/checkpoint-5").mkdir(parents=True)
    (tmp_path / "run/checkpoint-5/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no adapter_config.json. It holds checkpoint-5: pass one of these."):
        run(base, tmp_path / "run")


@pytest.fixture
def hub(monkeypatch):
    """Says what the hub answers, an exception or None; counts the questions."""
    asked = []

    def answering(answer):
        monkeypatch.setattr(preconditions.constants, "HF_HUB_OFFLINE", False)

        def model_info(self, name, revision, timeout):
            asked.append((name, timeout))
            if answer:
                raise answer

        monkeypatch.setattr(preconditions.HfApi, "model_info", model_info)
        return asked

    return answering


ARGUMENTS = SimpleNamespace(token=None, model_revision="main", cache_dir=None)


def test_hub_that_cannot_be_reached_is_asked_once_for_five_seconds(hub):
    asked = hub(HTTPError("no network"))
    sentence = (
        "--model_name_or_path: there is no folder some/where, and https://.* cannot be reached. Set HF_ENDPOINT to a "
        "mirror, or pass the folder of a download, from ModelScope say: modelscope download --model some/where"
    )
    with pytest.raises(OSError, match=sentence):
        preconditions.check_name("--model_name_or_path", "some/where", ARGUMENTS)
    assert asked == [("some/where", 5)]


def test_model_in_the_cache_is_taken_from_there_without_network(hub, monkeypatch):
    hub(HTTPError("no network"))
    monkeypatch.setattr(preconditions, "try_to_load_from_cache", lambda *args, **options: "/cache/config.json")
    preconditions.check_name("--model_name_or_path", "some/where", ARGUMENTS)
    assert preconditions.constants.is_offline_mode()


def test_model_that_the_hub_has_and_folder_that_is_there_pass(hub):
    asked = hub(None)
    preconditions.check_name("--model_name_or_path", str(Path(__file__).parent), ARGUMENTS)
    preconditions.check_name("--model_name_or_path", "some/where", ARGUMENTS)
    assert len(asked) == 1


def test_attention_that_nobody_knows_is_refused_with_the_nearest_name():
    preconditions.check_attention("kernels-community/flash-attn2")
    with pytest.raises(
        ValueError, match=r"--attn_implementation flash_attention2 is none of auto, .* mean 'flash_att"
    ):
        preconditions.check_attention("flash_attention2")
