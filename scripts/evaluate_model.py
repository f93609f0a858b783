"""Evaluate a model or an adapter on a published set of questions: lm-evaluation-harness, with the prompt of training.

    hf download openai/gsm8k --repo-type dataset --local-dir gsm8k
    python scripts/evaluate_model.py out --task gsm8k gsm8k

FOLDER is the data set as the hub has it; nothing is fetched. MODEL is an adapter folder, a model folder or a hub name.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from chat import add_model_flags, loaded

from chatglm.tokenization_parts import PartsTokenizer
from finetuning import encoding
from finetuning.adapters import stop_ids


if importlib.util.find_spec("lm_eval") is None:
    sys.exit("evaluate_model.py needs lm-evaluation-harness: pip install lm_eval")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table


TASKS = {"ceval": "ceval-valid", "cmmlu": "cmmlu", "gsm8k": "gsm8k"}  # as lm-evaluation-harness calls them


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
    name = TASKS.get(name, name)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that the data set was downloaded to.")
    if name not in manager.all_tasks:
        raise ValueError(f"lm-evaluation-harness has no task {name!r}: lm_eval ls tasks lists them.")
    kind = "group" if name in manager.all_groups else "task"
    return {"group": str(folder), "task": [{kind: name, "dataset_path": str(folder)}]}


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the data set, downloaded")
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or any name that lm_eval knows")
    parser.add_argument("--num_fewshot", type=int, help="examples in the prompt (default: the task's)")
    parser.add_argument("--limit", type=int, help="questions of each task, for a look")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    return parser.parse_args()


def main():
    arguments = parsed_arguments()
    transformers.utils.logging.set_verbosity_error()
    try:
        manager = TaskManager()
        task = task_with_data_in(arguments.folder.resolve(), arguments.task, manager)
        model = Evaluated(*loaded(arguments), arguments.batch_size)
    except (OSError, ValueError) as error:
        sys.exit(f"evaluate_model.py: {error}")
    results = lm_eval.simple_evaluate(
        model,
        tasks=[task],
        task_manager=manager,
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=True,
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if arguments.output:
        text = json.dumps(results["results"], ensure_ascii=False, indent=2, default=handle_non_serializable)
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
