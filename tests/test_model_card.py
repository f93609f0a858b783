"""README.md of a result names its data, base and metrics, and nothing of this machine."""

import json
import subprocess

import pytest
from tiny import CHAT_FLAGS, ROOT
from transformers import AutoConfig

from finetuning import __version__, provenance


@pytest.mark.parametrize("options", [[], ["--no_use_lora"]])
def test_card_and_record_tell_what_the_result_was_made_from(run, chatglm3, chats, tmp_path, options):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, "--validation_file", chats, CHAT_FLAGS]
    folder = run(flags, "--do_train", "--do_eval", "--max_steps", 2, "--save_strategy", "steps", options)
    card = (folder / "README.md").read_text()
    assert "fine-tuned on chats.jsonl." in card and "of **chatglm3**" in card and "generator" not in card
    cards = list(folder.rglob("README.md"))
    assert (folder / "checkpoint-2/README.md" in cards) == (options == [])  # PEFT's, in whose place ours stands
    assert not [path for path in cards if str(tmp_path) in path.read_text() or chatglm3 in path.read_text()]
    results = json.loads((folder / "all_results.json").read_text())
    assert f"* perplexity: {results['perplexity']:.4g}\n" in card
    assert ('PeftModel.from_pretrained(base, "out")' in card) == (options == [])
    assert "import chatglm  # of this project" in card and f"chatglm-lora {__version__}, commit " in card
    record = json.loads((folder / "provenance.json").read_text())
    assert record["project"] == {"version": __version__, "commit": provenance.project_commit()}
    assert record["model_code"].startswith(f"chatglm/ of chatglm-lora {__version__}, commit ")
    assert record["base_content"]["architecture"] == AutoConfig.from_pretrained(chatglm3).generation


def test_commit_is_that_of_the_clone(monkeypatch, tmp_path):
    if (ROOT / ".git").exists():
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        assert provenance.project_commit() in (head, f"{head}-dirty")
    monkeypatch.setattr(provenance, "PROJECT", tmp_path)
    assert provenance.project_commit() is None


def test_push_without_network_is_a_sentence(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, CHAT_FLAGS, "--push_to_hub"]
    with pytest.raises(ValueError, match="^--push_to_hub: Cannot reach .* offline mode is enabled"):
        run(flags, "--do_train", "--max_steps", 1)
