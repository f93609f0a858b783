"""Which layers an adapter goes into: default flags train every kind of causal model, and what is named is found."""

import json
import logging

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT_FLAGS, losses
from tiny_models import write_tiny
from transformers import AutoModelForCausalLM

import chatglm  # noqa: F401
from finetuning.lora_layers import adapter_config
from run_chatglm_lora import LoraArguments


LATENT = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DEFAULT_LAYERS = {
    "deepseek_v3": {*LATENT, "o_proj"},
    "falcon_h1": {*ATTENTION, *MLP, "in_proj"},
    "gemma3_text": {"q_proj", "v_proj"},
    "glm": {"q_proj", "k_proj", "v_proj"},
    "glm4": {"q_proj", "k_proj", "v_proj"},
    "glm4_moe": {"q_proj", "k_proj", "v_proj"},
    "glm4_moe_lite": LATENT,
    "jamba": {*ATTENTION, *MLP, "in_proj"},
    "mamba": {"in_proj"},
    "mixtral": {"q_proj", "v_proj"},
    "qwen3_moe": ATTENTION,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """Tiny checkpoints by model type, each made once."""
    made = {}

    def folder(model_type):
        if model_type not in made:
            made[model_type] = write_tiny(tmp_path_factory.mktemp(model_type), model_type, tokenizer)
        return made[model_type]

    return folder


@pytest.fixture
def tuning(chats):
    """Four steps on the same batch of all rows."""
    return [
        "--train_file",
        chats,
        CHAT_FLAGS,
        "--do_train",
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        16,
        "--max_target_length",
        20,
    ]


def saved(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DEFAULT_LAYERS)
def test_default_flags_train(run, tuning, checkpoint, model_type):
    """Training itself checks that every tensor of the adapter has a gradient, and that the saved one is whole."""
    folder = run("--model_name_or_path", checkpoint(model_type), tuning)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in saved(folder)} == DEFAULT_LAYERS[model_type]
    assert config_of(folder)["lora_dropout"] == 0.1 and not config_of(folder)["target_parameters"]
    assert losses(folder)[-1] < losses(folder)[0]


def test_experts_are_trained_when_named_and_without_dropout(run, tuning, checkpoint, caplog):
    named = ["--lora_target_modules", "q_proj,experts.gate_up_proj,experts.down_proj", "--log_level", "info"]
    with caplog.at_level(logging.INFO):
        folder = run("--model_name_or_path", checkpoint("glm4_moe"), tuning, named)
    assert {name.split(".lora_")[0].split("layers.1.")[1] for name in saved(folder) if "layers.1." in name} == {
        "self_attn.q_proj", "mlp.experts", "mlp.experts.base_layer",
    }  # fmt: skip
    assert config_of(folder)["lora_dropout"] == 0
    assert "LoRA in the weights of experts has no dropout: --lora_dropout 0.1 becomes 0." in caplog.text
    assert losses(folder)[-1] < losses(folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["jamba", "qwen3_moe"])
def test_all_linear_leaves_out_what_cannot_be_trained(run, tuning, checkpoint, model_type):
    folder = run("--model_name_or_path", checkpoint(model_type), tuning, "--lora_target_modules", "all-linear")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in saved(folder)}
    assert layers >= {"in_proj"} if model_type != "qwen3_moe" else layers > ATTENTION
    assert not layers & {"x_proj", "dt_proj", "out_proj"}


def test_layers_are_chosen_by_number_and_left_out_by_name(run, tuning, llama):
    flags = ["--lora_target_modules", "all-linear", "--lora_layers_to_transform", "1"]
    folder = run("--model_name_or_path", llama, tuning, flags, "--lora_exclude_modules", "mlp.down_proj,o_proj")
    layers = {name.split(".lora_")[0].split("model.model.layers.")[1] for name in saved(folder)}
    kept = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"}
    assert layers == {f"1.{name}" for name in kept}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--lora_layers_to_transform", "1,7"], "--lora_layers_to_transform: there is no such layer as 7"),
        (["--lora_layers_to_transform", "last"], "--lora_layers_to_transform takes numbers"),
        (
            ["--lora_exclude_modules", "o_prj"],
            "--lora_exclude_modules: the model has no layer 'o_prj'. Did you mean 'o_proj'",
        ),
        (["--lora_exclude_modules", "(nothing)"], "--lora_exclude_modules: no module has a name like"),
        (
            ["--peft_type", "P_TUNING", "--lora_target_modules", "q_proj"],
            "--lora_target_modules says nothing to --peft_type P_TUNING",
        ),
        (["--peft_type", "ADALORA", "--max_steps", "-1"], "ADALORA plans its ranks .*: pass --max_steps"),
        (["--peft_type", "TRAINABLE_TOKENS"], "TRAINABLE_TOKENS needs token_indices: set them in a file"),
        (["--peft_type", "POLY"], "POLY trains with a task id for each row"),
        (["--peft_type", "C3A"], "PEFT cannot put C3A into this llama model: The block size .* --peft_config"),
    ],
)
def test_what_cannot_be_is_one_sentence_with_the_way_out(run, tuning, llama, flags, message):
    with pytest.raises(ValueError, match=message):
        run("--model_name_or_path", llama, tuning, flags)


def test_fields_of_peft_config_override_the_flags(run, tuning, llama, tmp_path):
    fields = {"peft_type": "LORA", "r": 2, "rank_pattern": {"v_proj": 4}, "inference_mode": True, "peft_version": "0"}
    (tmp_path / "peft.json").write_text(json.dumps(fields))
    folder = run("--model_name_or_path", llama, tuning, "--lora_r", 16, "--peft_config", tmp_path / "peft.json")
    ranks = {name.split(".")[-3]: tensor.shape[0] for name, tensor in saved(folder).items() if "lora_A" in name}
    assert ranks == {"q_proj": 2, "v_proj": 4}
    assert config_of(folder)["lora_alpha"] == 32


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"rangpattern": {}}', "LORA has no field 'rangpattern'. Did you mean 'rank_pattern'"),
        ('{"r": 8', "peft.json, line 1: "),
        ("[8]", "an object of fields is expected"),
        ('{"peft_type": "IA3"}', "is for IA3: pass --peft_type IA3"),
        ('{"init_lora_weights": "loftq"}', "loftq needs a base that LoftQ has quantised"),
    ],
)
def test_mistakes_in_peft_config_are_named(run, tuning, llama, tmp_path, text, message):
    (tmp_path / "peft.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run("--model_name_or_path", llama, tuning, "--peft_config", tmp_path / "peft.json")


@pytest.mark.parametrize(
    "model, kind",
    [
        ("chatglm3", "ADALORA"),
        ("chatglm3", "IA3"),
        ("chatglm3", "LN_TUNING"),
        ("chatglm3", "OFT"),
        ("chatglm3", "VERA"),
        ("llama", "BOFT"),
        ("llama", "IA3"),
        ("llama", "OFT"),
    ],
)
def test_other_methods_of_peft_train_reopen_and_merge(run, tuning, request, kind, model):
    base = request.getfixturevalue(model)
    folder = run("--model_name_or_path", base, tuning, "--peft_type", kind)
    assert losses(folder)[-1] < losses(folder)[0]
    reopened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    assert reopened.peft_config["default"].peft_type == kind
    ids = torch.arange(5, 25)[None]
    logits = reopened.eval()(ids).logits
    assert not torch.allclose(logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits, atol=1e-3)
    torch.testing.assert_close(reopened.merge_and_unload()(ids).logits, logits, rtol=0, atol=1e-5)


def test_ranks_of_adalora_are_dealt_out(run, tuning, llama):
    """Of 2 x 2 layers with 12 values each, 8 a layer are kept at the end."""
    words = ["--model_name_or_path", llama, tuning, "--peft_type", "ADALORA", "--max_steps", 8]
    words += ["--save_strategy", "steps", "--save_steps", 4]
    folder = run(words)
    kept = sum(sum(mask) for mask in config_of(folder)["rank_pattern"].values())
    assert kept == 4 * 8
    with pytest.raises(ValueError, match="checkpoint-8 cannot be resumed from: AdaLoRA deals its ranks out by what"):
        run(words, "--resume_from_checkpoint", "last")


def test_layers_that_no_table_lists_are_all_linear_ones(llama):
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert adapter_config(model, LoraArguments()).target_modules == {"q_proj", "v_proj"}  # PEFT's entry for llama
    model.config.model_type = "brand_new"
    assert adapter_config(model, LoraArguments()).target_modules == {*ATTENTION, *MLP}


def test_layers_outside_the_text_decoder_are_left_out(llama):
    """As the vision tower of Gemma 3, whose layers have the same names."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.vision_tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2), "fc1": torch.nn.Linear(2, 2)})
    for model_type in ["llama", "brand_new"]:
        model.config.model_type = model_type
        targets = adapter_config(model, LoraArguments()).target_modules
        assert "model.layers.0.self_attn.q_proj" in targets and not any("vision" in name for name in targets)
