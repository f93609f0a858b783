"""Answers by generation: the --do_predict stage of run_chatglm_lora.py."""

import json
import logging
import os
from pathlib import Path

import torch
from accelerate.utils import gather_object


logger = logging.getLogger("run_chatglm_lora.prediction")


def left_padded(rows, value) -> torch.Tensor:
    """Lists of ids as one tensor [B, S]; the padding stands before the ids, so that generation goes on after them."""
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])


@torch.no_grad()
def generated_ids(model, prompts, max_new_tokens, pad_token_id) -> list[list[int]]:
    """Greedy continuations, without the prompts, of prompts (lists of ids) that may differ in length."""
    was_training = model.training
    model.eval()
    ids = left_padded(prompts, pad_token_id).to(model.device)  # [B, S]
    mask = left_padded([[1] * len(prompt) for prompt in prompts], 0).to(model.device)  # [B, S]
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
    output = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, **greedy
    )  # [B, S + T]
    model.train(was_training)
    return output[:, ids.shape[1] :].tolist()


def predict(trainer, tokenizer, data, max_new_tokens, pad_token_id):
    """Answer every row of `data`, whose columns are input_ids, prompt and reference, and count exact matches.

    The rows go to generated_predictions.jsonl in their order, batch by batch, so that a stopped run keeps what it has.
    Under torchrun each batch is shared out and the main process writes.
    """
    args, rows, matches = trainer.args, list(data), 0
    step = args.per_device_eval_batch_size * args.world_size
    path = Path(args.output_dir, "generated_predictions.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path if args.should_save else os.devnull, "w", encoding="utf-8") as file:
        for start in range(0, len(rows), step):
            batch = rows[start : start + step]
            with trainer.accelerator.split_between_processes(batch) as share:
                prompts = [row["input_ids"] for row in share]
                answers = generated_ids(trainer.model, prompts, max_new_tokens, pad_token_id) if prompts else []
            texts = gather_object([tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers])
            for row, text in zip(batch, texts, strict=True):
                matches += text == (row["reference"] or "").strip()
                line = {"prompt": row["prompt"], "reference": row["reference"], "prediction": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            logger.info(f"Answered {start + len(batch)} of {len(rows)} rows")
    metrics = {"predict_samples": len(rows)}
    if any(row["reference"] for row in rows):
        metrics["predict_exact_match"] = matches / len(rows)
    trainer.log_metrics("predict", metrics)
    trainer.save_metrics("predict", metrics)
