"""What a result is made from: base, code, prompt format and versions, for provenance.json."""

import hashlib
import inspect
from pathlib import Path

import datasets
import peft
import torch
import transformers


def record(model, tokenizer, model_args, row_format):
    """What the result is made from: base, revision, code, prompt format and versions."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    question, prompt = [{"role": "user", "content": "..."}], None
    if row_format:
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    return {
        "base_model": model_args.model_name_or_path,
        "revision": model_args.model_revision,
        "commit": getattr(model.config, "_commit_hash", None),
        "checkpoint_code": code_revision(model),
        "prompt_format": prompt,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft, datasets)},
    }


def code_revision(model):
    """File, hash and commit of the checkpoint code that a model runs on; None for installed code."""
    if not type(model).__module__.startswith("transformers_modules."):
        return None
    source = Path(inspect.getsourcefile(type(model)))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return {"file": source.name, "sha256": digest, "commit": getattr(model.config, "_commit_hash", None)}
