"""The model as lm-evaluation-harness asks it, and the harness's tasks on data in a folder: for evaluate_model.py."""

import dataclasses
from pathlib import Path

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from chatglm.tokenization_parts import PartsTokenizer
from finetuning import encoding
from finetuning.adapters import stop_ids


def find_special_tokens(tokenizer):
    """Let the tokenizer find special tokens in text: the harness hands a prompt on as text."""
    if isinstance(tokenizer, PartsTokenizer):
        tokenizer.split_special_tokens = False
        if tokenizer.suffix:  # ChatGLM-6B's [gMASK] is an ordinary piece of its vocabulary
            tokenizer.add_special_tokens({"additional_special_tokens": tokenizer.suffix})


def answer_beginning(tokenizer) -> str:
    r"""What stands between the cue and an answer: "\n " with ChatGLM3, "\n" with GLM-4.

    The harness scores the choices right behind the cue, where a tuned model never says them. Raises ValueError where
    the text of a conversation gives other tokens than the training has.
    """
    messages = [{"role": "user", "content": "1 + 1 = ?"}, {"role": "assistant", "content": "X"}]
    prompt = encoding.templated(tokenizer, messages[:1], tokenize=False, add_generation_prompt=True)
    text = encoding.templated(tokenizer, messages, tokenize=False)
    begins = text.removeprefix(prompt).partition("X")[0]
    trained = encoding.prompt_ids(tokenizer, messages[:1]), encoding.conversation_ids(tokenizer, messages)
    read = [tokenizer.encode(each, add_special_tokens=False) for each in (prompt, text)]
    if not text.startswith(prompt) or read != list(trained):
        raise ValueError("The prompt of this model, written as text, gives other tokens than in training.")
    return begins


class Evaluated(HFLM):
    """The harness's model, with the prompts of the training to the last token."""

    def __init__(self, model, tokenizer, batch_size: int):
        find_special_tokens(tokenizer)
        self.begins = answer_beginning(tokenizer)
        model.generation_config.eos_token_id = stop_ids(tokenizer, model.generation_config.eos_token_id)
        super().__init__(model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        pairs = [request.args for request in requests]
        begun = [
            dataclasses.replace(request, arguments=(context, self.begins + answer))
            for request, (context, answer) in zip(requests, pairs, strict=True)
        ]
        return super().loglikelihood(begun, disable_tqdm=disable_tqdm)


def task_with_data_in(folder: Path, name: str, manager: TaskManager) -> dict:
    """A task or group of the harness, in a group of its own, where it may have its data in another place than the hub.

    Raises ValueError for what is not known.
    """
    if name not in manager.all_tasks:
        raise ValueError(f"lm-evaluation-harness has no task {name!r}: lm_eval ls tasks lists them.")
    kind = "group" if name in manager.all_groups else "task"
    return {"group": str(folder), "task": [{kind: name, "dataset_path": str(folder)}]}
