"""Answers by generation: the stages --do_predict and --predict_with_generate of run_chatglm_lora.py."""

import json
import logging
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from operator import itemgetter
from pathlib import Path

import peft
import torch
from accelerate.utils import broadcast_object_list, gather_object
from packaging.version import Version
from peft import PeftModel, get_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .mistakes import did_you_mean


logger = logging.getLogger("run_chatglm_lora.prediction")

SPEEDS = ("runtime", "samples_per_second", "steps_per_second")  # of each evaluation, by Trainer
SCORES = ("exact_match", "bleu-4", "rouge-1", "rouge-2", "rouge-l")


def left_padded(rows, value) -> torch.Tensor:
    """Lists of ids as one tensor [B, S]; the padding stands before the ids, so that generation goes on after them."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])


def search_options(chat_args) -> dict:
    """How `generate` chooses tokens: greedily without flags, whatever the checkpoint's own configuration says."""
    options = {"num_beams": chat_args.num_beams, "do_sample": chat_args.do_sample, "top_k": None}
    drawn = {"temperature": chat_args.temperature, "top_p": chat_args.top_p, "top_k": 0}
    return {**options, **(drawn if chat_args.do_sample else {"temperature": None, "top_p": None})}


def with_cache_for_peft(model: PeftModel) -> PeftModel:
    """The model, in whose generation PEFT finds the cache.

    transformers 5.24 hands it on as `cache`; PEFT below 0.22 looks for `past_key_values` and, finding none, puts its
    prompt or prefix before every step: the text is wrong, without an error. The library's forwards take both names
    until 5.40. To be dropped once PEFT 0.22 is the oldest that requirements.txt allows.
    """
    if model.active_peft_config.is_prompt_learning and Version(peft.__version__) < Version("0.22"):
        prepare = model.base_model_prepare_inputs_for_generation
        model.base_model_prepare_inputs_for_generation = partial(inputs_under_the_old_name, prepare)
    return model


def inputs_under_the_old_name(prepare, *args, **kwargs) -> dict:
    inputs = prepare(*args, **kwargs)
    if "cache" in inputs:
        inputs["past_key_values"] = inputs.pop("cache")
    return inputs


@torch.no_grad()
def generated_ids(model, prompts, max_new_tokens, pad_token_id, **search) -> list[list[int]]:
    """Continuations, without the prompts, of prompts (lists of ids) that may differ in length; greedy by default."""
    was_training = model.training
    model.eval()
    ids = left_padded(prompts, pad_token_id).to(model.device)  # [B, S]
    mask = left_padded([[1] * len(prompt) for prompt in prompts], 0).to(model.device)  # [B, S]
    search = search or {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, use_cache=True,
        **search,
    )  # [B, S + T]  # fmt: skip
    model.train(was_training)
    return output[:, ids.shape[1] :].tolist()


@dataclass
class AnswerFile:
    """A file with a line for each row, appended as answers come, and put into the order of the rows at the end.

    While it is not whole, a file beside it says what it is made with. A run with the same model, rows and flags goes
    on where it ends; any other begins anew.
    """

    path: Path
    made_with: str

    def __post_init__(self):
        self.unfinished = self.path.with_suffix(".unfinished")

    def lines_kept(self) -> list[dict]:
        """The lines that an unfinished run with the same settings left; the file then holds these and no half line."""
        kept = []
        if self.path.exists() and self.unfinished.exists() and self.unfinished.read_text() == self.made_with:
            whole, _, _ = self.path.read_bytes().rpartition(b"\n")  # bytes, whose lines do not end at U+2028
            kept = [json.loads(line) for line in whole.splitlines()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished.write_text(self.made_with)
        self.write(kept, "w")
        return kept

    def write(self, lines, mode):
        write_lines(self.path, lines, mode)

    def finish(self, lines):
        whole = replace(self, path=self.path.with_suffix(".sorted"))
        whole.write(lines, "w")
        whole.path.replace(self.path)
        self.unfinished.unlink()


def write_lines(path, lines, mode):
    """Objects as lines of JSON, into a new file ("w") or behind what is there ("a")."""
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def made_with(model, rows, settings) -> str:
    """What answers depend on, as a hash: the rows, the flags, the base and the adapter (of a full model: its name)."""
    digest = sha256(json.dumps([rows, settings, model.name_or_path], ensure_ascii=False).encode())
    if isinstance(model, PeftModel):
        for name, tensor in sorted(get_peft_model_state_dict(model).items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def answered(trainer, tokenizer, batch, chat_args, pad_token_id) -> list[dict]:
    """Prompt, reference and prediction of each row of a batch, which the processes share out among them."""
    with trainer.accelerator.split_between_processes(batch) as share:
        prompts, length = [row["input_ids"] for row in share], chat_args.max_target_length
        search = search_options(chat_args)
        answers = generated_ids(trainer.model, prompts, length, pad_token_id, **search) if prompts else []
    texts = gather_object([tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers])
    return [
        {"prompt": row["prompt"], "reference": row["reference"], "prediction": text}
        for row, text in zip(batch, texts, strict=True)
    ]


class AnswersWhileTraining(TrainerCallback):
    """With --predict_with_generate, answers the validation rows at every --eval_generate_every-th evaluation of a
    training and scores them.

    Trainer reads --metric_for_best_model from the metrics that it hands to this callback.
    """

    def __init__(self, trainer, *how):
        self.trainer, self.how = trainer, how  # how: tokenizer, rows, flags, id of the padding

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self.trainer.is_in_train:  # after training, predict() answers them
            return
        tokenizer, rows, chat_args, pad_token_id = self.how
        if sum("eval_loss" in entry for entry in state.log_history) % chat_args.eval_generate_every:
            return
        rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
        size = args.per_device_eval_batch_size * args.world_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        lines = [
            line for batch in batches for line in answered(self.trainer, tokenizer, batch, chat_args, pad_token_id)
        ]
        scored = {f"eval_{name}": value for name, value in answer_scores(lines).items()}
        metrics.update(scored)
        self.trainer.log(dict(scored))  # Trainer adds the epoch; trackers get it too


def check(row_format, chat_args, training_args):
    """Raise a ValueError if text is to be answered, or the best model told by what no evaluation has."""
    if chat_args.predict_with_generate and not row_format:
        raise ValueError(
            "--predict_with_generate answers questions, of which plain text has none: name their column with "
            "--prompt_column, or drop the flag."
        )
    if not training_args.do_train or training_args.metric_for_best_model is None:
        return
    metric = training_args.metric_for_best_model.removeprefix("eval_")
    if metric in SCORES and not (chat_args.predict_with_generate and training_args.do_eval):
        raise ValueError(f"--metric_for_best_model {metric} scores answers: add --do_eval --predict_with_generate.")
    if metric in SCORES and chat_args.eval_generate_every > 1:
        raise ValueError(
            f"--metric_for_best_model {metric} needs answers at each evaluation: leave --eval_generate_every out."
        )
    scored = () if training_args.prediction_loss_only else ("accuracy", "token_loss") if row_format else ("accuracy",)
    known = ("loss", "perplexity", *scored, *SPEEDS, *(SCORES if row_format else ()))
    if metric not in known:
        raise ValueError(
            f"--metric_for_best_model {metric}: an evaluation here has no such number, but {', '.join(known)}."
            f"{did_you_mean(metric, known)}"
        )


def predict(trainer, tokenizer, data, chat_args, pad_token_id, stage="predict"):
    """Answer every row of `data`, whose columns are input_ids, prompt and reference, and score the answers.

    Writes generated_predictions.jsonl or, for the stage "eval", generated_evaluations.jsonl, and adds the scores to
    the results of the stage. Rows of like length share a batch, the longest come first. Under torchrun each batch is
    shared out, and the main process writes.
    """
    args, rows = trainer.args, list(data)
    if not rows:
        raise ValueError(f"There is no row to answer: all of the {stage} stage's are bad.")
    steps = trainer.state.global_step  # tells weights apart that were trained in this run, all of them
    settings = {"max_new_tokens": chat_args.max_target_length, "seed": args.seed, "steps": steps}
    search = search_options(chat_args)
    name = {"predict": "generated_predictions.jsonl", "eval": "generated_evaluations.jsonl"}[stage]
    file = AnswerFile(Path(args.output_dir, name), made_with(trainer.model, rows, {**settings, **search}))
    lines = broadcast_object_list([file.lines_kept() if args.should_save else None])[0]
    if lines:
        logger.info(f"{len(lines)} of {len(rows)} rows were answered before the last run was stopped: going on.")
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
    batch_size = args.per_device_eval_batch_size * args.world_size
    hidden = args.disable_tqdm or not args.should_log
    bar = tqdm(desc="Answering", unit="row", total=len(rows), initial=len(lines), disable=hidden)
    for start in range(len(lines), len(rows), batch_size):
        batch = [rows[number] for number in order[start : start + batch_size]]
        new = answered(trainer, tokenizer, batch, chat_args, pad_token_id)
        lines += new
        if args.should_save:
            file.write(new, "a")
        bar.update(len(new))
    bar.close()
    if args.should_save:
        file.finish([line for _, line in sorted(zip(order, lines, strict=True), key=itemgetter(0))])
    metrics = {f"{stage}_{name}": value for name, value in answer_scores(lines).items()}
    metrics |= {"predict_samples": len(rows)} if stage == "predict" else {}
    trainer.log_metrics(stage, metrics)
    trainer.save_metrics(stage, {**results_so_far(args, stage), **metrics})


def results_so_far(args, stage) -> dict:
    """What --do_eval has written; predictions have no results before."""
    path = Path(args.output_dir, f"{stage}_results.json")
    return json.loads(path.read_text()) if stage == "eval" and path.exists() else {}


def answer_scores(lines) -> dict:
    """Means over the lines that have a reference: exact match as a share, BLEU-4 and ROUGE-1/2/L in percent.

    BLEU is over characters and smoothed (nltk's method 3), ROUGE the F1 over words that jieba finds, both as in the
    evaluation scripts published with ChatGLM.
    """
    pairs = [(line["prediction"], line["reference"].strip()) for line in lines if line["reference"]]
    if not pairs:
        return {}
    import jieba  # half a second that only predictions need
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    from rouge_chinese import Rouge

    jieba.setLogLevel(logging.WARNING)
    smoothing, rouge, totals = SmoothingFunction().method3, Rouge(), Counter()
    for prediction, reference in pairs:
        totals["exact_match"] += prediction == reference
        bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
        totals["bleu-4"] += 100 * bleu
        words = [" ".join(jieba.cut(text)) for text in (prediction, reference)]
        if all(text.strip() for text in words):  # Rouge refuses empty texts, which score nothing
            for name, score in rouge.get_scores(*words)[0].items():
                totals[name] += 100 * score["f"]
    return {name: totals[name] / len(pairs) for name in SCORES}
