"""README.md of a result: data, base, metrics and how to load it, without the paths of this machine."""

import json
from pathlib import Path

import peft
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import Trainer

from . import data_files, provenance
from .mistakes import named


METRICS = ("eval_loss", "eval_token_loss", "eval_accuracy", "perplexity", "eval_exact_match", "eval_bleu-4",
           "eval_rouge-1", "eval_rouge-2", "eval_rouge-l")  # fmt: skip
TEXT = """\
# {name}

{what} of **{base}**, fine-tuned on {data}.

## Results

{results}

## How to load it

```python
{loading}
```

## How it was made

* learning rate {learning_rate:g} ({schedule}), batches of {batch}, {steps} steps, seed {seed}
* {project}; versions and prompt format: `provenance.json`
"""
LOADING_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
LOADING_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
CHATGLM = "import chatglm  # of this project: makes ChatGLM known to the Auto classes\n"


def public_name(path_or_name: str) -> str:
    """A hub name as it is; of a folder, its own name."""
    path = Path(path_or_name)
    return path.resolve().name if path.is_absolute() or path.exists() else path_or_name


def names_of_data(data_args, chat_args) -> str:
    """The data set, or the names of the files, for a sentence."""
    if data_args.dataset_name is not None:
        return " ".join(filter(None, (public_name(data_args.dataset_name), data_args.dataset_config_name)))
    given = (data_args.train_file, data_args.validation_file, chat_args.test_file)
    return ", ".join(
        dict.fromkeys(Path(file).name for name in given if name for file in data_files.listed_files(name))
    )


class DocumentedTrainer(Trainer):
    """A Trainer whose model card is ours, also where Trainer itself writes it, as each save to the hub does."""

    base_name = data_names = "unknown"

    def init_hf_repo(self, *args, **kwargs):
        with named("--push_to_hub", OfflineModeIsEnabled, HfHubHTTPError):
            super().init_hf_repo(*args, **kwargs)

    def create_model_card(self, model_name=None, **kwargs):
        self.write_card(self.args.output_dir, model_name)

    def save_model(self, output_dir=None, _internal_call=False):
        """PEFT writes a card beside each adapter, with the path of the base: ours takes its place."""
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if (folder / "README.md").exists():
            self.write_card(folder)

    def write_card(self, folder, name=None):
        if self.is_world_process_zero():
            card = card_text(self, name or Path(self.args.output_dir).resolve().name)
            card.save(Path(folder, "README.md"))


def name_sources(trainer, model_args, data_args, chat_args):
    """Tell the trainer what its card should say of base and data."""
    trainer.base_name = model_args.model_name_or_path or f"a new {trainer.model.config.model_type}"
    trainer.data_names = names_of_data(data_args, chat_args)


def card_text(trainer, name) -> ModelCard:
    """The card of what a trainer has trained, with what all_results.json has measured."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    adapted = isinstance(model, peft.PeftModel)
    weights = "All weights" if all(p.requires_grad for p in model.parameters()) else "Part of the weights"
    base = public_name(trainer.base_name)
    path = Path(args.output_dir, "all_results.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    measured = [f"* {key.removeprefix('eval_')}: {results[key]:.4g}" for key in METRICS if key in results]
    loading = (LOADING_ADAPTER if adapted else LOADING_MODEL).format(name=name, base=base)
    inner = model.get_base_model() if adapted else model
    text = TEXT.format(
        name=name,
        what=f"{model.active_peft_config.peft_type.value} adapter" if adapted else weights,
        base=base,
        data=trainer.data_names,
        results="\n".join(measured) or "Not evaluated.",
        loading=(CHATGLM if type(inner).__module__.startswith("chatglm.") else "") + loading,
        learning_rate=args.learning_rate,
        schedule=args.lr_scheduler_type.value,
        batch=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        steps=trainer.state.global_step,
        seed=args.seed,
        project=provenance.project_in_words(),
    )
    on_hub = base == trainer.base_name and "/" in base
    data = ModelCardData(
        base_model=base if on_hub else None, library_name="peft" if adapted else "transformers",
        pipeline_tag="text-generation",
    )  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
