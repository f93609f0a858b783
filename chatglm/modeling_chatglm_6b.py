"""The first ChatGLM-6B: a prefix language model, which reads the prompt in both directions and then writes.

Shapes: B batch, S tokens, K keys, H hidden size, n heads, d head size, P prefix length, L layers, V vocabulary rows,
T position streams (2: place in the text and place in the answer, or 1 with position_encoding_2d=false), N rows that
lie end to end in a batch [1, S].
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, GradientCheckpointingLayer, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import eager_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chat import ChatMixin, generated_ids
from .configuration_chatglm_6b import ChatGLM6BConfig
from .language_model import CausalLMMixin, PrefixEncoder, PrefixTunedMixin, refuse_unknown
from .library_names import CACHE, for_peft, takes_cache
from .quantization import linear


RESIDUAL_SCALE = 56**0.5  # sqrt(2 * 28) at any num_layers: the published blocks never learn the model's depth


def rotary_tables(
    position_ids: torch.Tensor, config: ChatGLM6BConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B, S, T, d/T] for positions [B, T, S] or [B, S], all worked out in `dtype`.

    The frequencies are rounded to float16 in float32 models too: exact ones move logits by 3e-3 in short texts.
    """
    if not config.position_encoding_2d:
        position_ids = position_ids[:, None]
    channels = config.head_dim // position_ids.shape[1]
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=position_ids.device) / channels
    frequencies = (1.0 / 10000.0**exponents).half().to(dtype)
    angles = position_ids.transpose(1, 2)[..., None].to(dtype) * frequencies  # [B, S, T, d/2T]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def first_index(flags: torch.Tensor) -> torch.Tensor:
    """Where the first True of each row is, [B, S] -> [B, 1]; S where there is none."""
    length = flags.shape[1]
    return torch.where(flags.any(-1), flags.int().argmax(-1), length)[:, None]


class FlattenedRows(NamedTuple):
    """Rows laid end to end: a token of a prompt sees the whole prompt, one of an answer what stands before it."""

    number: torch.Tensor  # of the row of each token, [S]
    in_prompt: torch.Tensor  # [1, S]
    part_bounds: torch.Tensor  # where prompts and answers begin in turn, and the end, [2N + 1]

    @classmethod
    def of(cls, own: torch.Tensor, context_end: torch.Tensor, bounds: torch.Tensor) -> "FlattenedRows":
        """From the tokens `own` [N, S] of each row, where its prompt ends [N, 1], and its bounds [N + 1]."""
        starts = bounds[:-1, None]
        context_end = torch.where(context_end < own.shape[1], context_end, starts)  # without <sop>: all in order
        in_prompt = own & (torch.arange(own.shape[1], device=own.device) < context_end)  # [N, S]
        parts = torch.cat((starts, context_end), dim=1).flatten()
        part_bounds = torch.cat((parts, bounds[-1:])).to(bounds.dtype)
        return cls(own.int().argmax(dim=0), in_prompt.any(dim=0, keepdim=True), part_bounds)

    def sees(self, batch, head, query, key):
        """Which keys a query sees, as the library's `mask_function`."""
        return (self.number[query] == self.number[key]) & ((key <= query) | self.in_prompt[batch, key])


class ChatGLM6BAttention(nn.Module):
    def __init__(self, config: ChatGLM6BConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = 1
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # never by itself: the mask says it all

        size, bits = config.hidden_size, config.quantization_bit
        self.query_key_value = linear(size, 3 * size, bias=True, quantization_bit=bits)
        self.dense = linear(size, size, bias=True, quantization_bit=bits)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: FlattenedRows | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        refuse_unknown(kwargs, self)
        heads = self.query_key_value(hidden_states).unflatten(-1, (self.config.num_attention_heads, -1))
        query, key, value = heads.transpose(1, 2).chunk(3, dim=-1)  # [B, n, S, d] each
        streams = position_embeddings[0].shape[-2:]
        query, key = apply_rotary_pos_emb(
            query.unflatten(-1, streams), key.unflatten(-1, streams), *position_embeddings
        )  # [B, n, S, T, d/T]
        query, key = query.flatten(-2), key.flatten(-2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)
        if prefix is not None:  # not in the cache, which gradient checkpointing would take away
            key, value = (torch.cat(pair, dim=2) for pair in zip(prefix, (key, value), strict=True))

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attend = partial(attend, self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling)
        if rows is None or attention_mask is not None:
            context, weights = attend(**kwargs)  # [B, S, n, d]
        else:
            # A kernel that knows rows by their bounds is called twice: a causal call is right for the answers, one in
            # which all of a part see one another for the prompts. Half is thrown away, but nothing has to be gathered:
            # attention is 1 % of the work at rows of 256 tokens.
            context, weights = attend(**kwargs, is_causal=True)
            parts = {"cu_seq_lens_q": rows.part_bounds, "cu_seq_lens_k": rows.part_bounds, "row_ends": None}
            prompts, _ = attend(**{**kwargs, **parts}, is_causal=False)
            context = torch.where(rows.in_prompt[..., None, None], prompts, context)
        return self.dense(context.flatten(2)), weights  # [B, S, H]


class ChatGLM6BMLP(nn.Module):
    def __init__(self, config: ChatGLM6BConfig):
        super().__init__()
        size, inner, bits = config.hidden_size, config.inner_hidden_size, config.quantization_bit
        self.dense_h_to_4h = linear(size, inner, bias=True, quantization_bit=bits)
        self.dense_4h_to_h = linear(inner, size, bias=True, quantization_bit=bits)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLM6BBlock(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM6BConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLM6BAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLM6BMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)  # [B, S, H], as everything here
        attended, _ = self.attention(normed, **kwargs)
        normed = self.post_attention_layernorm(RESIDUAL_SCALE * normed + attended)
        return RESIDUAL_SCALE * normed + self.mlp(normed)


class ChatGLM6BPreTrainedModel(PrefixTunedMixin, PreTrainedModel):
    config: ChatGLM6BConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "word_embeddings"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLM6BBlock"]
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # in every published file, computed here
    _can_record_outputs = {"hidden_states": ChatGLM6BBlock, "attentions": ChatGLM6BAttention}


class ChatGLM6BModel(ChatGLM6BPreTrainedModel):
    """The blocks without the output layer; hidden states are [B, S, H]."""

    def __init__(self, config: ChatGLM6BConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLM6BBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.prefix_encoder = None
        if config.pre_seq_len:
            heads = (config.num_attention_heads, config.head_dim)
            self.prefix_encoder = PrefixEncoder(config, heads, projected_size=config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()
        self.freeze_untrained()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        refuse_unknown(kwargs, self)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0

        starts = self.is_token(self.config.bos_token_id, input_ids, inputs_embeds)
        bounds = kwargs.get("cu_seq_lens_q")
        rows = None
        if bounds is not None and attention_mask is None and len(inputs_embeds) == 1 and not past_length:
            if self.config.pre_seq_len:
                raise ValueError("With pre_seq_len, rows cannot be flattened into one; pad them instead.")
            own = tokens_of_rows(bounds, inputs_embeds.shape[1])  # [N, S]
            rows = FlattenedRows.of(own, first_index(starts & own), bounds)
        if position_ids is None or position_ids.dim() == 2 and self.config.position_encoding_2d:
            # The library's plain 0, 1, 2, ... say nothing about where the answer begins.
            if rows is not None:
                position_ids = self.flattened_position_ids(input_ids, inputs_embeds, own)
            else:
                real = real_tokens(attention_mask, past_length, inputs_embeds.shape[1])
                position_ids = self.derived_position_ids(input_ids, inputs_embeds, real) + past_length
        mask = self.layer_mask(inputs_embeds, attention_mask, past_key_values, first_index(starts), rows)
        position_embeddings = rotary_tables(position_ids, self.config, inputs_embeds.dtype)
        prefixes = [None] * len(self.layers)
        if self.prefix_encoder is not None:
            prefixes = self.prefix_encoder(len(inputs_embeds), inputs_embeds.dtype)

        hidden_states = inputs_embeds
        for layer, prefix in zip(self.layers, prefixes, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                prefix=prefix,
                rows=rows,
                use_cache=use_cache,
                **{CACHE: past_key_values},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_states), **{CACHE: past_key_values}
        )

    def is_token(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor:
        """Where a special token stands, [B, S]; among embeddings it is known by its own."""
        if input_ids is not None:
            return input_ids == token_id
        return (inputs_embeds == self.word_embeddings.weight[token_id]).all(-1)

    def derived_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        checked: bool = False,
    ) -> torch.Tensor:
        """Positions [B, 2, S] (or [B, S]) of whole rows, counted from the first token that `real` [B, S] marks.

        Up to <sop> the first stream counts; from there it stays at the [gMASK] or [MASK] that is being filled in,
        and the second one counts. Raises ValueError for a row without <sop>, or with neither of the two masks, unless
        the rows are `checked`.
        """
        special = (self.config.gmask_token_id, self.config.mask_token_id, self.config.bos_token_id)
        is_gmask, is_mask, is_start = (self.is_token(each, input_ids, inputs_embeds) for each in special)
        if real is not None:
            is_gmask, is_mask, is_start = is_gmask & real, is_mask & real, is_start & real
        is_filled = torch.where(is_gmask.any(-1, keepdim=True), is_gmask, is_mask)
        context_length = first_index(is_start)  # [B, 1]
        filled = first_index(is_filled)  # [B, 1]
        length = is_mask.shape[1]
        if not checked and not torch.compiler.is_compiling():
            check_special_tokens(context_length.lt(length).all(), filled.lt(length).all())

        index = torch.arange(length, device=is_mask.device)  # [S]
        start = first_index(real) if real is not None else torch.zeros_like(context_length)
        counted = (index - start).clamp(min=0)  # [B, S]
        stopped = torch.where(index < context_length, counted, filled - start)
        if self.config.position_encoding_2d:
            return torch.stack((stopped, (index - context_length + 1).clamp(min=0)), dim=1)
        return torch.where(is_gmask.any(-1, keepdim=True), counted, stopped)

    def flattened_position_ids(
        self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor, own: torch.Tensor
    ) -> torch.Tensor:
        """Positions [1, 2, S] (or [1, S]) of rows end to end, of which `own` [N, S] marks the tokens."""
        input_ids = None if input_ids is None else input_ids.expand(len(own), -1)
        # A look at the ids would make each step of a training wait for the GPU; an evaluation has looked at the first.
        checked = self.training and own.is_cuda
        positions = self.derived_position_ids(input_ids, inputs_embeds.expand(len(own), -1, -1), own, checked)
        return (positions * own.view(len(own), *[1] * (positions.dim() - 2), -1)).sum(dim=0, keepdim=True)

    def layer_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        context_length: torch.Tensor,
        rows: FlattenedRows | None,
    ):
        """The mask of all layers, in the form that the attention kernel in use wants.

        Shapes: inputs_embeds [B, S, H], attention_mask [B, K] or [B, 1, S, K] as in `forward`, context_length [B, 1].
        """
        if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
            return attention_mask  # a flex BlockMask
        batch_size, length = inputs_embeds.shape[:2]
        if rows is not None:
            return self.kernel_mask(inputs_embeds, length, rows.sees, None)
        past_length, key_length = 0, length
        if past_key_values is not None:
            past_length, key_length = past_key_values.get_seq_length(), past_key_values.get_mask_sizes(length, 0)[0]
            if length == 1 and attention_mask is None and not past_key_values.is_compileable:
                return None  # one new token sees everything
        if attention_mask is not None and attention_mask.dim() == 4:
            seen = shown_keys(attention_mask, key_length).expand(batch_size, -1, -1)  # [B, S, K]
        else:
            query = torch.arange(length, device=inputs_embeds.device)[:, None] + past_length  # [S, 1]
            key = torch.arange(key_length, device=inputs_embeds.device)  # [K]
            context_end = torch.where(context_length < length, context_length + past_length, 0)  # [B, 1]
            seen = (key <= query) | (key < context_end[:, None])  # [B, S, K]
            if attention_mask is not None:
                later = max(0, key_length - attention_mask.shape[1])
                seen = seen & nn.functional.pad(attention_mask.bool(), (0, later))[:, None]
        seen = nn.functional.pad(seen, (self.config.pre_seq_len or 0, 0), value=True)
        sees = lambda batch, head, query, key: seen[batch, query, key]  # noqa: E731
        return self.kernel_mask(inputs_embeds, seen.shape[-1], sees, seen.any(dim=1))

    def kernel_mask(self, inputs_embeds: torch.Tensor, key_length: int, sees: Callable, real: torch.Tensor | None):
        """What the interface makes of a `mask_function`; None of `real` keys [B, K] tells that rows lie end to end."""
        return ALL_MASK_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            batch_size=len(inputs_embeds),
            q_length=inputs_embeds.shape[1],
            kv_length=key_length,
            mask_function=sees,
            attention_mask=real,
            is_causal=False,  # for row by row attention, which else takes every row as causal
            allow_is_causal_skip=False,
            dtype=inputs_embeds.dtype,
            device=inputs_embeds.device,
            config=self.config,
        )


def tokens_of_rows(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """Which tokens belong to each of the rows that lie end to end, [N + 1] -> [N, S]."""
    index = torch.arange(length, device=bounds.device)
    return (bounds[:-1, None] <= index) & (index < bounds[1:, None])


def check_special_tokens(all_have_sop: torch.Tensor, all_have_mask: torch.Tensor):
    if not all_have_sop:
        raise ValueError(
            "A row of input_ids has no <sop> (bos_token_id), which divides prompt and answer; encode prompts with "
            "add_special_tokens=True, or pass position_ids along with cached keys."
        )
    if not all_have_mask:
        raise ValueError(
            "A row of input_ids has neither [gMASK] nor [MASK], the place that the answer fills in; encode prompts "
            "with add_special_tokens=True, or pass position_ids."
        )


def real_tokens(attention_mask: torch.Tensor | None, past_length: int, length: int) -> torch.Tensor | None:
    """Which of the `length` new tokens are not padding, [B, S], from either form of mask."""
    if not isinstance(attention_mask, torch.Tensor):
        return None
    if attention_mask.dim() == 4:
        attention_mask = ~attention_mask.bool().all(dim=-2)[:, 0]  # what no token sees is padding
    return attention_mask[:, past_length : past_length + length].bool()


def shown_keys(hidden: torch.Tensor, key_length: int) -> torch.Tensor:
    """[B, 1, S, K] with True = hidden as [B, S, key_length] with True = seen; keys still to come are not seen.

    Padding, from which everything is hidden, sees everything instead: no kernel then makes NaN of it.
    """
    shown = ~hidden.bool()[:, 0]
    shown = shown | ~shown.any(-1, keepdim=True)
    return nn.functional.pad(shown, (0, key_length - shown.shape[-1]))


def grown_mask(hidden: torch.Tensor, length: int) -> torch.Tensor:
    """A prompt's mask [B, 1, S, S], True = hidden, for a text that has become `length` tokens long.

    New tokens see what the last token of the prompt saw, and one another in order; older tokens do not see them.
    """
    extra = length - hidden.shape[-1]
    hidden = nn.functional.pad(hidden, (0, extra), value=True)
    last = hidden[:, :, -1:].expand(-1, -1, extra, -1)  # [B, 1, extra, length]
    later = torch.ones(extra, length, dtype=torch.bool, device=hidden.device).triu(length - extra + 1)
    new = torch.arange(length, device=hidden.device) >= length - extra
    return torch.cat((hidden, torch.where(new, later, last)), dim=2)


class ChatGLM6BForConditionalGeneration(ChatMixin, CausalLMMixin, ChatGLM6BPreTrainedModel, GenerationMixin):
    """The language model, its output layer tied to the embeddings.

    `attention_mask` is [B, K], 1 = real token, or the published [B, 1, S, K], True = hidden; `position_ids` are
    [B, 2, S] ([B, S] with position_encoding_2d=false). What is left out follows from the ids: everything before the
    first <sop> is seen by all tokens, the rest in order. With `past_key_values`, pass `position_ids` too. Raises
    ValueError for a row without <sop> or without [gMASK] and [MASK].
    """

    chat_defaults = {"max_length": 2048, "num_beams": 1, "do_sample": True, "top_p": 0.7, "temperature": 0.95}
    history_of_pairs = True
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ChatGLM6BConfig):
        super().__init__(config)
        self.transformer = ChatGLM6BModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.freeze_untrained()

    def tie_weights(self, missing_keys: set[str] | None = None, **options):
        """Ties output layer and embeddings, unless the checkpoint that is being loaded holds two that differ.

        Those were trained apart. The library leaves them as they are, and says so, but ties them at the next call, as
        of `resize_token_embeddings`, unless the configuration says what was found.
        """
        super().tie_weights(missing_keys=missing_keys, **options)
        if missing_keys is not None and "lm_head.weight" not in self.all_tied_weights_keys:
            self.config.tie_word_embeddings = False

    def fallback_token_id(self, tokenizer) -> int:
        return tokenizer.convert_tokens_to_ids("▁")  # 5, or 20005 in the first release

    # --- generation: a prompt's own mask and positions are kept as given and grow with the text

    def generate(self, *args, **kwargs):
        """The library's generate, which also takes the published mask [B, 1, S, S] and positions [B, 2, S]."""
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            kwargs["prompt_mask"] = mask.bool()
            kwargs["attention_mask"] = (~mask.bool())[:, 0, -1].long()  # the last token sees all real ones
        positions = kwargs.pop("position_ids", None)
        if positions is not None and positions.dim() == (3 if self.config.position_encoding_2d else 2):
            kwargs["prompt_position_ids"] = positions
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_mask: torch.Tensor | None = None,
        prompt_position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict:
        kwargs.pop("position_ids", None)  # the library's own
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs_embeds is not None:
            inputs_embeds = torch.cat((inputs_embeds, self.get_input_embeddings()(input_ids)), dim=1)
            input_ids = None
        length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        real = real_tokens(attention_mask, 0, length)
        positions = self.transformer.derived_position_ids(input_ids, inputs_embeds, real)  # [B, 2, length]
        if prompt_position_ids is not None:
            prompt_position_ids = prompt_position_ids.expand(len(positions), *prompt_position_ids.shape[1:])
            given = prompt_position_ids.shape[-1]
            later = positions[..., given:] + prompt_position_ids[..., -1:] - positions[..., given - 1 : given]
            positions = torch.cat((prompt_position_ids, later), dim=-1)

        fed = inputs["input_ids"] if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
        inputs["position_ids"] = positions[..., -fed.shape[1] :]
        if prompt_mask is not None and fed.shape[1] > 1:
            inputs["attention_mask"] = grown_mask(prompt_mask, length)[:, :, -fed.shape[1] :]
        return for_peft(inputs)

    @staticmethod
    @takes_cache
    def create_masks_for_generate(attention_mask: torch.Tensor | None, past_key_values: Cache, **kwargs):
        """The 2-D mask in one size for all steps with a static cache; `forward` makes the rest of it."""
        if attention_mask is None:
            return None
        return nn.functional.pad(
            attention_mask, (0, past_key_values.get_mask_sizes(1, 0)[0] - attention_mask.shape[1])
        )

    def stream_generate(self, input_ids: torch.Tensor, **kwargs) -> Iterator[torch.Tensor]:
        """The ids of one row so far, [1, S + 1], [1, S + 2], ..., up to the token before the end token."""
        stop_ids = kwargs.get("eos_token_id", self.generation_config.eos_token_id)
        stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
        for token in generated_ids(self, input_ids=input_ids, **kwargs):
            if token in stop_ids:
                return
            input_ids = torch.cat((input_ids, input_ids.new_tensor([[token]])), dim=-1)
            yield input_ids

    def stream_chat(self, tokenizer, query: str, history: list[tuple[str, str]] | None = None, **options):
        """Yields (reply so far, history) token by token, the end token left out."""
        messages = self.chat_messages(query, history)
        inputs = self.chat_inputs(tokenizer, messages)
        length = inputs["input_ids"].shape[1]
        for ids in self.stream_generate(**inputs, **self.chat_options(tokenizer, options)):
            yield self.chat_reply(tokenizer, ids[0, length:].tolist(), query, history, messages)

    def process_response(self, output: str, history: list[dict]) -> tuple[str, list[dict]]:
        """A reply as it is shown: full-width punctuation again where a Chinese character is next to it."""
        text, history = super().process_response(output, history)
        for half, full in (",，", "!！", ":：", ";；", "?？"):
            text = re.sub(rf"(?<=[\u4e00-\u9fff])\{half}|\{half}(?=[\u4e00-\u9fff])", full, text)
        return text, history
