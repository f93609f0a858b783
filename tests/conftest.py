"""Tiny models, tokenizers and data, and the script as a function of its command line."""

import json
import os
import shutil
import sys
import tempfile


# Before any library is imported: nothing is downloaded, and caches are thrown away with the run. A lock that a killed
# compilation left in the user's own folder of extensions would stop every run with DeepSpeed.
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=tempfile.mkdtemp(prefix="hf_home_"), TOKENIZERS_PARALLELISM="false")
os.environ.update(TORCH_EXTENSIONS_DIR=os.environ["HF_HOME"] + "/torch_extensions")

import merge_lora
import pytest
import torch
from merging import comparing
from safetensors.torch import load_file
from tiny import CHATML, CHATS, COMMON, LINES, ROOT, flat, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from trained import script
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import run_chatglm_lora


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE with a ChatML template that has no generation marks."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML,
        model_max_length=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def llama(tmp_path_factory, tokenizer):
    """Folder of a random Llama of two layers."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_chatglm(folder, generation):
    words = [str(folder), "--generation", generation, "--text", str(ROOT / "examples/teahouse.jsonl")]
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.setattr(sys, "argv", ["tiny_chatglm.py", *words])
        script("tiny_chatglm").main()
    return str(folder)


@pytest.fixture(scope="session")
def chatglm3(tmp_path_factory):
    return tiny_chatglm(tmp_path_factory.mktemp("checkpoints") / "chatglm3", "chatglm3")


@pytest.fixture(scope="session")
def chatglm2(tmp_path_factory):
    return tiny_chatglm(tmp_path_factory.mktemp("checkpoints") / "chatglm2", "chatglm2")


@pytest.fixture(scope="session")
def chatglm1(tmp_path_factory):
    return tiny_chatglm(tmp_path_factory.mktemp("checkpoints") / "first", "chatglm")


@pytest.fixture(scope="session")
def glm4_checkpoint(tmp_path_factory):
    return tiny_chatglm(tmp_path_factory.mktemp("checkpoints") / "glm-4", "glm4")


@pytest.fixture(scope="session")
def text_files(tmp_path_factory):
    """train.txt and valid.txt."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train.txt").write_text("\n".join(LINES[:100]) + "\n")
    (folder / "valid.txt").write_text("\n".join(LINES[100:]) + "\n")
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A file of short English conversations."""
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", CHATS)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script's main() on a command line and returns the output folder."""

    def run_script(*flags, output="out"):
        folder = tmp_path / output
        # A flag that is given twice has its last value: a test may override the common ones.
        words = list(flat(flags))
        common = [word for word in COMMON.split() if word != "--no_plot_loss" or "--plot_loss" not in words]
        monkeypatch.setattr(sys, "argv", ["run_chatglm_lora.py", *common, "--output_dir", str(folder), *words])
        run_chatglm_lora.main()
        return folder

    return run_script


@pytest.fixture
def merge(tmp_path, monkeypatch, capsys):
    """Runs main() on a command line; returns the folder that it wrote and what it printed.

    The merged model is opened in this process, by the program that otherwise runs in one of its own: it costs 5 s.
    """

    def same_process(folder, package):
        out = tmp_path / "logits.safetensors"
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", ["-c", str(folder), json.dumps(comparing.MESSAGES), str(out), ""])
            exec(comparing.FRESH_PROCESS, {})
        return load_file(out)

    def run(adapter, *flags, out="merged", fresh_process=False):
        if not fresh_process:
            monkeypatch.setattr(comparing, "logits_in_fresh_process", same_process)
        monkeypatch.setattr(sys, "argv", ["merge_lora.py", str(adapter), str(tmp_path / out), *map(str, flags)])
        merge_lora.main()
        return tmp_path / out, capsys.readouterr().out

    return run
