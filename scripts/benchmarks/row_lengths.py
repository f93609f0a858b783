"""How long rows are that people fine-tune ChatGLM on: for measurements that need neither the data nor a download."""

import numpy as np


# Tokens of AdvertiseGen's prompts and answers at these percentiles of its 1,070 development rows (GLM-4's vocabulary)
PERCENTILES = (0, 10, 25, 50, 75, 90, 100)
PROMPT_TOKENS = (7, 20, 27, 35, 44, 52, 99)
ANSWER_TOKENS = (36, 53, 62, 72, 83, 96, 154)


def advertisegen_lengths(random: np.random.Generator) -> list[int]:
    """Tokens of one row's prompt and answer, drawn from AdvertiseGen's distribution."""
    return [round(np.interp(random.uniform(0, 100), PERCENTILES, tokens)) for tokens in (PROMPT_TOKENS, ANSWER_TOKENS)]
