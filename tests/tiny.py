"""Data, flags and readers that the tests share."""

import json
from pathlib import Path


ROOT = Path(__file__).parent.parent
WORDS = "the a baker clerk ferry heron counts paints follows seven lamps blue door before dawn under bridge"
WORDS = WORDS.split()
LINES = [" ".join(WORDS[(i * k + k) % len(WORDS)] for k in range(1, 12)) for i in range(120)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = [
    {"prompt": "who paints the door", "response": "the baker paints"},
    {"prompt": "and the bridge", "response": "a heron", "history": [["who follows", "the clerk"]]},
    {"prompt": "seven lamps", "response": "before dawn", "history": []},
    {"prompt": "the ferry", "response": "under the blue bridge", "history": None},
] * 4


def said(*contents):
    """Messages of user and assistant in turn, as rows are read: answers are trained."""
    return [{"role": ("user", "assistant")[i % 2], "content": text, "loss": i % 2 == 1}
            for i, text in enumerate(contents)]  # fmt: skip


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


CHAT_FLAGS = ["--prompt_column", "prompt", "--response_column", "response", "--history_column", "history"]
COMMON = "--use_cpu --report_to none --disable_tqdm True --logging_steps 1 --learning_rate 1e-2 --save_strategy no"
COMMON += " --no_plot_loss"  # half of the time of a run of a few steps


def flat(words):
    """The words of a command line that is given in nested lists."""
    for word in words:
        yield from flat(word) if isinstance(word, (list, tuple)) else [str(word)]


def losses(folder):
    """The logged training losses of a run."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def results(folder, stage):
    return json.loads((folder / f"{stage}_results.json").read_text())
