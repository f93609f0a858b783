import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from goldens_io import GOLDENS, recorded_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import chatglm  # noqa: F401


GENERATIONS = {"v2": "chatglm2", "v3": "chatglm3", "glm4": "glm4"}
TOKENIZERS = {"v2": "ChatGLMTokenizer", "v3": "ChatGLMTokenizer", "glm4": "ChatGLM4Tokenizer"}
VOCABULARIES = {"v2": "v2_tok.model", "v3": "v2_tok.model", "glm4": "glm4_tok.model"}


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS


@pytest.fixture(scope="session", params=sorted(GENERATIONS))
def version(request) -> str:
    return request.param


def write_published_folder(folder: Path, version: str) -> Path:
    """Weights, vocabulary and configuration files as a released checkpoint has them."""
    shutil.copytree(GOLDENS / "model" / f"{version}_s0", folder, ignore=shutil.ignore_patterns("goldens.*"))
    shutil.copy(GOLDENS / "tokenizer" / VOCABULARIES[version], folder / "tokenizer.model")
    config = json.loads((folder / "config.json").read_text())
    auto_classes = ["AutoModel", "AutoModelForCausalLM"]
    config["auto_map"] = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    config["auto_map"].update((name, "modeling_chatglm.ChatGLMForConditionalGeneration") for name in auto_classes)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = {
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": TOKENIZERS[version],
        "auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{TOKENIZERS[version]}", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.fixture(scope="session")
def folder(version, tmp_path_factory) -> Path:
    return write_published_folder(tmp_path_factory.mktemp("published") / "checkpoint", version)


@pytest.fixture(scope="session")
def v2_folder(tmp_path_factory) -> Path:
    return write_published_folder(tmp_path_factory.mktemp("published") / "checkpoint", "v2")


@pytest.fixture(scope="session")
def v3_folder(tmp_path_factory) -> Path:
    return write_published_folder(tmp_path_factory.mktemp("published") / "checkpoint", "v3")


@pytest.fixture(scope="session")
def glm4_folder(tmp_path_factory) -> Path:
    return write_published_folder(tmp_path_factory.mktemp("published") / "checkpoint", "glm4")


@pytest.fixture(scope="session")
def v1_folder(tmp_path_factory) -> Path:
    """ChatGLM-6B as released, with the vocabulary of the token goldens and the special ids of the model goldens."""
    folder = tmp_path_factory.mktemp("published") / "checkpoint"
    shutil.copytree(GOLDENS / "model" / "v1_s0", folder, ignore=shutil.ignore_patterns("goldens.*"))
    shutil.copy(GOLDENS / "tokenizer" / "v1_tok.model", folder / "ice_text.model")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    }
    (folder / "config.json").write_text(json.dumps(config))
    recorded = recorded_texts("tok_v1")
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**recorded["tokenizer_config"], "auto_map": auto_map}))
    return folder


@pytest.fixture(scope="module", params=["v1", "v2", "v3", "glm4"])
def model(request):
    """The language model of every generation, one after the other."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids(model):
    """A prompt [1, S], which ChatGLM-6B needs its two tokens in."""
    config = model.config
    prompt = [5, 9, 7, 11, 6, 8]
    prompt += [config.gmask_token_id, config.bos_token_id] if hasattr(config, "position_encoding_2d") else []
    return torch.tensor([prompt])


# --- for modules that have a fixture `sdpa`, a model, or `published`, a tokenizer


@pytest.fixture
def fresh(sdpa):
    """A copy that a test may change."""
    return copy.deepcopy(sdpa)


@pytest.fixture(scope="module")
def saved_folder(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    published.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(saved_folder):
    return AutoTokenizer.from_pretrained(saved_folder)


@pytest.fixture(params=["published", "saved"])
def tokenizer(request):
    return request.getfixturevalue(request.param)
