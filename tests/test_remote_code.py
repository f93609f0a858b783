"""Checkpoints that bring their own code: only with the flag, and it is written down what ran."""

import hashlib
import json
import textwrap

import pytest
import torch
from processes import forked_program
from tiny import COMMON, losses
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from run_chatglm_lora import model_class


CODE = textwrap.dedent(
    """
    from transformers import LlamaConfig, LlamaForCausalLM


    class HouseConfig(LlamaConfig):
        model_type = "house"


    class HouseForConditionalGeneration(LlamaForCausalLM):
        config_class = HouseConfig
    """
)


@pytest.fixture
def checkpoint(tmp_path, llama):
    """A Llama with code of its own that, as ChatGLM-6B's, offers AutoModel but no AutoModelForCausalLM."""
    folder = tmp_path / "house"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(llama)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "house"
    config["auto_map"] = {
        "AutoConfig": "modeling_house.HouseConfig",
        "AutoModel": "modeling_house.HouseForConditionalGeneration",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_house.py").write_text(CODE)
    return folder


@pytest.fixture
def flags(checkpoint, text_files):
    return [
        "--model_name_or_path", checkpoint, "--train_file", text_files / "train.txt", "--block_size", 32,
        "--do_train", "--max_steps", 2,
    ]  # fmt: skip


def test_checkpoint_code_is_refused_without_the_flag(run, flags, checkpoint):
    with pytest.raises(ValueError, match=f"{checkpoint} brings its own Python code. .* pass --trust_remote_code"):
        run(flags)


def test_checkpoint_code_runs_with_the_flag_and_its_hash_is_stored_beside_the_adapter(run, flags, checkpoint):
    folder = run(flags, "--trust_remote_code")
    record = json.loads((folder / "provenance.json").read_text())
    digest = hashlib.sha256((checkpoint / "modeling_house.py").read_bytes()).hexdigest()
    assert record["checkpoint_code"] == {"file": "modeling_house.py", "sha256": digest, "commit": None}
    assert (record["base_model"], record["revision"]) == (str(checkpoint), "main")
    assert (folder / "adapter_model.safetensors").is_file() and len(losses(folder)) == 2


def test_own_code_of_a_chatglm_checkpoint_runs_when_it_is_asked_for(flags, checkpoint, tmp_path):
    """In a process of its own: in this one ChatGLM is known already."""
    for name in ("config.json", "modeling_house.py"):
        text = (checkpoint / name).read_text()
        (checkpoint / name).write_text(text.replace('"house"', '"chatglm"'))
    words = [*flags, *COMMON.split(), "--output_dir", tmp_path / "out", "--lora_target_modules", "q_proj"]
    words = ["run_chatglm_lora.py", *words, "--use_checkpoint_code"]
    ended = forked_program(*words, "--trust_remote_code")
    assert ended.returncode == 0, ended.stderr
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["checkpoint_code"]["file"] == "modeling_house.py"
    refused = forked_program(*words)
    assert refused.returncode == 2 and "pass --trust_remote_code" in refused.stderr


def test_class_follows_what_the_checkpoint_offers(checkpoint, llama, chatglm3):
    own = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    assert model_class(own) is AutoModel
    own.auto_map["AutoModelForCausalLM"] = "modeling_house.HouseForConditionalGeneration"
    assert model_class(own) is AutoModelForCausalLM
    for installed in (llama, chatglm3):  # the ChatGLM checkpoint has an auto_map as well, but its class is known here
        assert model_class(AutoConfig.from_pretrained(installed)) is AutoModelForCausalLM
