"""LoRA under transformers' Trainer and PEFT alone, as guides write it: one of the tools of scripts/compare_tools.py.

    python scripts/benchmarks/plain_trainer.py --model_name_or_path FOLDER --train_file FILE.jsonl --output_dir OUT
        [--pad_to 1152] [--preprocessing_num_workers 2] [flags of TrainingArguments]

A row of the file has `messages`; the last one is trained. Nothing here is of this project.
"""

from dataclasses import dataclass

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    pad_to: int | None = None  # tokens of every row; without it, the longest of its batch
    preprocessing_num_workers: int = 2


def main():
    arguments, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype="float32")
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")

    def encoded(row):
        messages = row["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(messages, return_dict=False) + [tokenizer.eos_token_id]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]}

    rows = load_dataset("json", data_files=arguments.train_file, split="train")
    rows = rows.map(encoded, remove_columns=rows.column_names, num_proc=arguments.preprocessing_num_workers)
    padding = {"padding": "max_length", "max_length": arguments.pad_to} if arguments.pad_to else {}
    collator = DataCollatorForSeq2Seq(tokenizer, **padding)
    Trainer(get_peft_model(model, lora), training_args, data_collator=collator, train_dataset=rows).train()


if __name__ == "__main__":
    main()
