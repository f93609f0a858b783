"""provenance.json: what a result was made from."""

import json


def test_installed_code_has_no_code_entry_but_the_prompt_format_is_stored(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--train_file", chats, "--do_train", "--max_steps", 1]
    folder = run(flags, "--prompt_column", "prompt", "--response_column", "response")
    record = json.loads((folder / "provenance.json").read_text())
    assert record["checkpoint_code"] is None
    assert record["prompt_format"] == "[gMASK]sop<|user|>\n ...<|assistant|>"
