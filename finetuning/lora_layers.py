"""Which layers of a model an adapter goes into, and the PEFT configuration that says so.

Layers are chosen by what a model is made of. Tables say only what cannot be seen there: PEFT's own, the one below for
the GLM models, and the names of layers that a causal model has but does not train.
"""

import copy
import json
import logging
import re
import warnings
from dataclasses import fields
from pathlib import Path

import peft
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_TARGETS
from peft.utils import TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING as NORM_TARGETS
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from . import adapters, mistakes


logger = logging.getLogger("run_chatglm_lora.lora_layers")

# Query, key and value, as in ChatGLM's query_key_value; the latter two models make them in two steps each.
QUERY_KEY_VALUE = ["q_proj", "k_proj", "v_proj"]
LATENT_QUERY_KEY_VALUE = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
TARGETS = {
    **PEFT_TARGETS,
    **dict.fromkeys(["glm", "glm4", "glm4_moe"], QUERY_KEY_VALUE),
    **dict.fromkeys(["glm4_moe_lite", "glm_moe_dsa"], LATENT_QUERY_KEY_VALUE),
}
# Attention to an encoder that a causal model has not (BART, BERT), a pooler for classifiers (BigBird), and choices
# that no gradient passes: of keys (DeepSeek V3.2), of experts. Zamba 2 lists an adapter for every layer in each block,
# Phi-4 keeps its towers in the embedding.
UNTRAINED = {"encoder_attn", "crossattention", "cross_attn", "pooler", "indexer", "router", "gate"}
UNTRAINED |= {"gate_up_proj_adapter_list", "embed_tokens_extend"}
# A state-space mixer, known by its A_log, hands the weights of these to one kernel, past the layers' own forward.
MIXER_WEIGHTS = {"x_proj", "dt_proj", "out_proj", "conv1d"}

NEEDED_FIELDS = {  # without a default that works
    "ADAPTION_PROMPT": ["adapter_len", "adapter_layers"],
    "CPT": ["cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"],
    "TRAINABLE_TOKENS": ["token_indices"],
    "XLORA": ["hidden_size", "adapters"],
}
PASSED_ON = ["lora_alpha", "lora_dropout", "use_rslora", "use_dora", "num_virtual_tokens", "prefix_projection"]
BOOLEANS = {"true": True, "false": False}
LAYER_FLAGS = ["lora_target_modules", "lora_exclude_modules", "lora_layers_to_transform"]
CHOOSING = {*NEEDED_FIELDS, "SHADOW"}  # go elsewhere than into linear layers, and know where
MULTITASK = {"MULTITASK_PROMPT_TUNING", "POLY"}
SAVED_FIELDS = {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}


def adapter_config(model, lora_args, max_steps=-1) -> peft.PeftConfig:
    """The PEFT configuration of --peft_type: our flags that it has a field for, overridden by --peft_config.

    `max_steps` (0 or less: unknown) is the length of the training. Raises ValueError with the missing flag or field.
    """
    kind, config_class = lora_args.peft_type, peft.PEFT_TYPE_TO_CONFIG_MAPPING[lora_args.peft_type]
    accepted = {f.name for f in fields(config_class) if f.init}
    own = own_fields(lora_args.peft_config, kind, accepted)
    check_needs(kind, own, max_steps)
    options = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.name_or_path,
        **{name: getattr(lora_args, name) for name in PASSED_ON},
        "r": lora_args.lora_r,
        "bias": lora_args.lora_bias,
        "init_lora_weights": BOOLEANS.get(lora_args.init_lora_weights.lower(), lora_args.init_lora_weights),
        # --lora_r in every layer: with rho above 1 the ranks move to where the data vary
        "eva_config": peft.EvaConfig(rho=1.0) if lora_args.init_lora_weights == "eva" else None,
        "modules_to_save": checked_modules(model, lora_args.lora_modules_to_save, "--lora_modules_to_save"),
        **target_options(model, lora_args, accepted - own.keys()),
        **type_options(kind, lora_args.lora_r, max_steps),
        **own,
    }
    try:
        config = config_class(**{name: value for name, value in options.items() if name in accepted})
    except (TypeError, ValueError) as error:
        raise ValueError(f"--peft_type {kind}: {sentence(error)} Fields are set with --peft_config.") from error
    return without_dropout_of_experts(model, config) if kind == "LORA" and has_experts(model) else config


def adapted(model, config) -> peft.PeftModel:
    """The model inside a new adapter. Raises ValueError where PEFT refuses the pair."""
    try:
        return peft.get_peft_model(model, config)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"PEFT cannot put {config.peft_type.value} into this {model.config.model_type} model: {sentence(error)} "
            "Choose other layers with --lora_target_modules, or set fields of its configuration with --peft_config."
        ) from error


def sentence(error) -> str:
    return " ".join(str(error).split()).rstrip(".") + "."


def own_fields(path, kind, accepted) -> dict:
    """Fields of the PEFT configuration in a JSON file; those that describe a saved adapter only are passed over.

    Raises ValueError for a field that the configuration of this type has not.
    """
    if path is None:
        return {}
    try:
        with mistakes.named(f"--peft_config {path}", OSError):
            own = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--peft_config {path}, line {error.lineno}: {error.msg}.") from error
    if not isinstance(own, dict):
        raise ValueError(f'--peft_config {path}: an object of fields is expected, such as {{"r": 16}}.')
    if (named := own.pop("peft_type", kind)) != kind:
        raise ValueError(f"--peft_config {path} is for {named}: pass --peft_type {named}, or another file.")
    own = {name: value for name, value in own.items() if name not in SAVED_FIELDS}
    adapters.check_init(own)
    for name in own.keys() - accepted:
        hint = mistakes.did_you_mean(name, accepted) or f" It has {', '.join(sorted(accepted - SAVED_FIELDS))}."
        raise ValueError(f"--peft_config {path}: {kind} has no field '{name}'.{hint}")
    return own


def check_needs(kind, own, max_steps):
    """Raise a ValueError that names what a type needs and has not got."""
    if kind in MULTITASK:
        raise ValueError(f"--peft_type {kind} trains with a task id for each row, which conversations have not.")
    if missing := [name for name in NEEDED_FIELDS.get(kind, []) if name not in own]:
        raise ValueError(f"--peft_type {kind} needs {', '.join(missing)}: set them in a file, with --peft_config.")
    if kind == "ADALORA" and max_steps < 1 and "total_step" not in own:
        raise ValueError("--peft_type ADALORA plans its ranks over the whole training: pass --max_steps.")


def type_options(kind, rank, max_steps) -> dict:
    """What one type calls by another name, or must not be told."""
    return {
        "ADALORA": {"r": 8, "target_r": rank, "init_r": rank * 3 // 2, "total_step": max_steps},  # r is not used
        "OFT": {"oft_block_size": 0},  # which follows from the number of blocks, r
    }.get(kind, {})


def target_options(model, lora_args, accepted) -> dict:
    """target_modules, exclude_modules and target_parameters for PEFT, as --lora_target_modules and the like ask."""
    if "target_modules" not in accepted:
        if flags := [f"--{name}" for name in LAYER_FLAGS if getattr(lora_args, name)]:
            raise ValueError(f"{flags[0]}: --peft_config {lora_args.peft_config} names the layers already.")
        return {}
    flag, excluded = lora_args.lora_target_modules, excluded_modules(model, lora_args.lora_exclude_modules)
    if flag is None:
        options = default_targets(model, lora_args.peft_type)
    elif flag == "all-linear":
        unfit = {name for name, module in model.named_modules() if is_linear(module)} - set(linear_layers(model))
        options, excluded = {"target_modules": flag}, sorted({*excluded, *unfit})
    elif not is_list(flag):
        options = {"target_modules": flag}
    else:
        experts = [name for name in flag.split(",") if is_expert_weight(model, name)]
        layers = ",".join(name for name in flag.split(",") if name not in experts)
        layers = checked_modules(model, layers, "--lora_target_modules")
        options = {"target_modules": layers or [], "target_parameters": experts or None}
    if lora_args.lora_layers_to_transform:
        options["target_modules"] = in_layers(model, options.get("target_modules"), lora_args.lora_layers_to_transform)
    return {**options, "exclude_modules": excluded or None}


def default_targets(model, kind) -> dict:
    """The layers of the tables, else all linear layers of the text decoder, but never experts."""
    own_table, model_type = {"IA3": IA3_TARGETS, "LN_TUNING": NORM_TARGETS}.get(kind, {}), model.config.model_type
    if model_type in own_table or kind in CHOOSING:
        return {}
    if kind == "LN_TUNING":
        norms = {type(module) for module in model.modules() if "Norm" in type(module).__name__}
        return {"target_modules": [name for name, module in model.named_modules() if type(module) in norms]}
    listed = TARGETS.get(model_type)
    if isinstance(listed, str):
        return {"target_modules": listed}
    layers = [name for name in linear_layers(model) if "experts" not in name.split(".")]
    chosen = [name for name in layers if named(name, listed or [])]
    if not chosen and kind == "LORA" and has_experts(model):
        chosen = taken_as_modules(model, layers)
    if not chosen:
        logger.info(f"PEFT lists no layers for {model_type}: the adapter goes into all linear ones that take one.")
    return {"target_modules": shortest(model, chosen or layers), "feedforward_modules": []}


def linear_layers(model) -> list[str]:
    """Names of the linear layers in the text decoder that can be trained; the output layer is none of them."""
    head, decoder = model.get_output_embeddings(), set(model.get_decoder().modules())
    mixers = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name.endswith(".A_log")}

    def is_trained(name):
        parent, _, leaf = name.rpartition(".")
        return not UNTRAINED.intersection(name.split(".")) and not (parent in mixers and leaf in MIXER_WEIGHTS)

    layers = {name: module for name, module in model.named_modules() if is_linear(module) and module is not head}
    trained = {name: module for name, module in layers.items() if is_trained(name)}
    return [name for name, module in trained.items() if module in decoder] or list(trained)  # some call a head decoder


def is_linear(module) -> bool:
    return isinstance(module, (torch.nn.Linear, Conv1D))


def has_experts(model) -> bool:
    """Whether the weights of experts are parameters side by side, and not layers."""
    return any(name.split(".")[-2:-1] == ["experts"] for name, _ in model.named_parameters())


def is_expert_weight(model, target) -> bool:
    return any(name.split(".")[-2:-1] == ["experts"] and named(name, [target]) for name, _ in model.named_parameters())


def named(name, targets) -> bool:
    """Whether one of the targets is a name, or the end of it, as PEFT understands targets."""
    return any(name == target or name.endswith("." + target) for target in targets)


def tried_targets(model, config) -> tuple[list[str], list[str]]:
    """Names of the modules and of the parameters that PEFT adapts, tried on a copy of the model without weights."""
    where = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{name: copy.copy(getattr(config, name)) for name in where})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the adapter itself will warn again
        tuner = adapted(type(model)(copy.deepcopy(model.config)), config).base_model
    return tuner.targeted_module_names, tuner.targeted_parameter_names


def taken_as_modules(model, layers) -> list[str]:
    """Those layers that PEFT does not take for experts: in some models it does so with each gate_proj and the like."""
    return tried_targets(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=layers))[0]


def without_dropout_of_experts(model, config):
    """The configuration, without dropout if it adapts the weights of experts, for which PEFT has none."""
    if config.lora_dropout and tried_targets(model, config)[1]:
        logger.info(f"LoRA in the weights of experts has no dropout: --lora_dropout {config.lora_dropout} becomes 0.")
        config.lora_dropout = 0.0
    return config


def shortest(model, chosen) -> list[str]:
    """Last parts of the chosen names where they mean these modules and no others, else the whole names."""
    leaves = sorted({name.rpartition(".")[2] for name in chosen})
    meant = [name for name, _ in model.named_modules() if named(name, leaves)]
    return leaves if sorted(meant) == sorted(chosen) else chosen


def is_list(flag_value) -> bool:
    return re.fullmatch(r"[\w.,-]+", flag_value) is not None


def excluded_modules(model, flag_value) -> list[str]:
    """The modules of --lora_exclude_modules, which is names with commas or a regular expression."""
    if flag_value is None or is_list(flag_value):
        return checked_modules(model, flag_value, "--lora_exclude_modules") or []
    found = [name for name, _ in model.named_modules() if re.fullmatch(flag_value, name)]
    if not found:
        raise ValueError(f"--lora_exclude_modules: no module has a name like {flag_value}.")
    return found


def in_layers(model, targets, flag_value) -> list[str]:
    """The modules that targets name in the layers of --lora_layers_to_transform, which is numbers with commas."""
    if not targets or not re.fullmatch(r"\d+(,\d+)*", flag_value):
        raise ValueError("--lora_layers_to_transform takes numbers, such as 0,1,2, beside --lora_target_modules.")
    modules = linear_layers(model) if targets == "all-linear" else [name for name, _ in model.named_modules()]
    if targets != "all-linear":
        is_target = re.compile(targets).fullmatch if isinstance(targets, str) else lambda name: named(name, targets)
        modules = [name for name in modules if is_target(name)]
    numbers = {name: next(filter(str.isdigit, name.split(".")), None) for name in modules}
    wanted = set(flag_value.split(","))
    if missing := wanted - set(numbers.values()):
        raise ValueError(f"--lora_layers_to_transform: there is no such layer as {', '.join(sorted(missing))}.")
    return [name for name in modules if numbers[name] in wanted]


def checked_modules(model, flag_value, flag) -> list[str] | None:
    """Names with commas as a list. PEFT passes over a name that no module has; here it is a ValueError."""
    names = flag_value.split(",") if flag_value else None
    modules = [name for name, _ in model.named_modules()]
    for name in names or []:
        if not any(named(module, [name]) for module in modules):
            known = sorted({module.rpartition(".")[2] for module in modules} - {""})
            raise ValueError(f"{flag}: the model has no layer '{name}'. {mistakes.way_out(name, known)}")
    return names


class RankAllocation(TrainerCallback):
    """AdaLoRA's ranks are dealt out anew after each step, from its gradients."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.base_model.update_and_allocate(state.global_step + 1)
