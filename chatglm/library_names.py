"""The cache under the name that transformers gives it: `past_key_values` up to 5.23, `cache` from 5.24 on.

Needed while transformers 5.17 to 5.23 are supported beside 5.24 and later, and PEFT below 0.22 beside these. Once 5.24
is the oldest, our parameters `past_key_values` become `cache`, `**{CACHE: x}` becomes `cache=x` and `takes_cache` is
dropped; once PEFT 0.22 is the oldest, so is `for_peft`, and this file can go.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import is_peft_available


RENAMED = "cache" in BaseModelOutputWithPast.__dataclass_fields__
CACHE = "cache" if RENAMED else "past_key_values"  # for calls of the library, and for what they give back
PEFT_READS_OLD_NAME = RENAMED and is_peft_available() and Version(version("peft")) < Version("0.22")


def takes_cache(method: Callable) -> Callable:
    """The method, whose parameter `past_key_values` the library may also call `cache`. TypeError for two caches.

    Up to 5.23 `cache` is something else, the paged cache of continuous batching: there the method stays as it is.
    """
    if not RENAMED:
        return method

    @wraps(method)
    def renamed(*args, cache=None, **kwargs):
        if cache is not None:
            if kwargs.get("past_key_values") not in (None, cache):
                raise TypeError(f"{method.__qualname__}() got two caches, as cache and as past_key_values.")
            kwargs["past_key_values"] = cache
        return method(*args, **kwargs)

    # `generate` looks for "cache" among the parameters, PEFT below 0.22 for "past_key_values".
    *parameters, rest = inspect.signature(method).parameters.values()
    new_name = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    renamed.__signature__ = inspect.signature(method).replace(parameters=[*parameters, new_name, rest])
    return renamed


def for_peft(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the next step of `generate`, with the cache where the installed PEFT looks for it.

    PEFT below 0.22 looks for `past_key_values`. Finding none, it puts its prompt or prefix before every step, where
    the library then prefers `cache`: the text is wrong, without an error.
    """
    if PEFT_READS_OLD_NAME and "cache" in inputs:
        inputs["past_key_values"] = inputs.pop("cache")
    return inputs


def with_cache_for_peft(adapted: nn.Module) -> nn.Module:
    """A prompt or prefix of PEFT on any causal model of the library, which prepares its inputs with `for_peft`.

    The library's forwards take the old name until 5.40. The models here need it not: they do so themselves.
    """
    prepare = adapted.base_model_prepare_inputs_for_generation
    adapted.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: for_peft(prepare(*args, **kwargs))
    return adapted
