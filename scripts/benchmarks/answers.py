"""Ways of answering many questions: in batches, or with rows that take each other's place."""

from transformers import ContinuousBatchingConfig, GenerationConfig

from finetuning.prediction import generated_ids


PAGE = 32  # tokens


def prompts_of(rows) -> list[list[int]]:
    """The part of each row that is not trained."""
    return [[id for id, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in rows]


def in_batches(model, prompts, order, size, search) -> list[list[int]]:
    """The answers in the order of the prompts, generated in batches of the given order."""
    answers = [None] * len(prompts)
    for start in range(0, len(order), size):
        numbers = order[start : start + size]
        ids = generated_ids(model, [prompts[number] for number in numbers], pad_token_id=0, **search)
        answers = [ids[numbers.index(n)] if n in numbers else answers[n] for n in range(len(prompts))]
    return answers


def without_continuous_batching(way, model, prompts, size, search):
    order = list(range(len(prompts)))
    if way != "unsorted":
        order.sort(key=lambda number: -len(prompts[number]))
    more = {"cache_implementation": "static", "disable_compile": True} if way == "static" else {}
    return in_batches(model, prompts, order, size, {**search, **more})


def continuous(model, prompts, size, search):
    """The answers with `size` rows at a time; by default the library takes 60 % of a CPU's memory for their cache."""
    config = GenerationConfig(**search, pad_token_id=0, use_cache=True)
    pages = 2 + max(map(len, prompts)) // PAGE + search["max_new_tokens"] // PAGE  # of a row
    limits = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=size * pages, max_requests_per_batch=size, max_batch_tokens=1024
    )
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=limits)
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.split("_")[-1]))]


def up_to_end(ids, ends) -> list[int]:
    """An answer without what follows its end token."""
    return ids[: next((place for place, id in enumerate(ids, 1) if id in ends), len(ids))]
