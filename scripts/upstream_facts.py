"""What a run_clm.py does, as facts that can be compared: for scripts/upstream.py.

A fact belongs to a stage and is a flag, a version floor, a library call, a keyword of one, a result or an error. Two
versions of upstream are also compared step by step: statements, without their messages. Nothing is run or imported.
"""

import ast
import difflib
import re
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


SAME, OURS, TO_PORT = "same", "ours", "upstream only: to port"


class NotRunClm(ValueError):
    """The file is not a run_clm.py; the text says why."""


@dataclass(frozen=True)
class Fact:
    stage: str
    kind: str
    name: str
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """A line of a table: facts of one stage with the same verdict, and the entry of docs/modifications.md on them."""

    stage: str
    verdict: str
    what: str
    entry: str = ""


# --------------------------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Stage:
    """A stage of main: the names that upstream assigns, defines or calls in it, our functions, their entry."""

    name: str
    marks: str
    ours: str
    entry: str


STAGES = [
    Stage("versions", "", "", "Versions"),
    Stage(
        "arguments",
        "parser parser.parse_json_file parser.parse_args_into_dataclasses",
        "parsed_arguments parsed_file file_arguments check_types builder_options listed_files argument ModelArguments "
        "DataTrainingArguments ChatArguments LoraArguments",
        "Arguments",
    ),
    Stage("logging", "send_example_telemetry logging.basicConfig log_level", "set_up_logging", "Logging"),
    Stage("last checkpoint", "last_checkpoint", "", "Dropped upstream"),
    Stage("seed", "set_seed", "main", "Seed"),
    Stage(
        "data",
        "raw_datasets load_dataset data_files split_streaming_dataset",
        "raw_datasets read_by_run_clm train_and_validation check_splits",
        "Data",
    ),
    Stage(
        "configuration",
        "config_kwargs config",
        "register_chatglm hub_options loaded_config",
        "Configuration and tokenizer",
    ),
    Stage(
        "tokenizer", "tokenizer_kwargs tokenizer", "loaded_tokenizer with_chat_template", "Configuration and tokenizer"
    ),
    Stage(
        "model",
        "torch_dtype dtype model embedding_size model.resize_token_embeddings",
        "loaded_model model_class quantization_options code_revision",
        "Model",
    ),
    Stage("adapter", "", "adapted_model adapter_config target_options checked_modules", "Adapter"),
    Stage(
        "encoding",
        "tokenize_function tokenized_datasets text_column_name column_names tok_logger max_pos_embeddings block_size "
        "group_texts lm_datasets train_dataset eval_dataset",
        "chats_as_ids text_blocks check_text column_names mapped capped chosen_block_size sample_limits "
        "requested_splits within_positions EncodedChats encoded_chats encoded_split encoding_fingerprint encoded_rows "
        "encoded_prompts examples_of encoded_conversations without_oldest_turns marked_ids examples_by_turn reply_ids "
        "answers_apart templated",
        "Encoding",
    ),
    Stage(
        "metrics",
        "preprocess_logits_for_metrics metric compute_metrics",
        "TokenAccuracy best_tokens masked_accuracy scoring",
        "Metrics",
    ),
    Stage(
        "trainer",
        "trainer Trainer",
        "make_trainer trainer_options chat_collator padding_id block_collator",
        "Trainer",
    ),
    Stage(
        "training",
        "checkpoint train_result trainer.train",
        "train record_training with_sample_counts sample_count record",
        "Training",
    ),
    Stage("evaluation", "trainer.evaluate", "evaluate_loss complete", "Evaluation"),
    Stage("prediction", "", "answer", "Prediction"),
    Stage("publishing", "kwargs trainer.push_to_hub trainer.create_model_card", "publish", "Publishing"),
]
ENTRY = {stage.name: stage.entry for stage in STAGES}
FUNCTIONS = {stage.name: stage.ours.split() for stage in STAGES}
STAGE_OF_MARK = {mark: stage.name for stage in STAGES for mark in stage.marks.split()}
STAGE_OF_FUNCTION = {function: stage.name for stage in STAGES for function in stage.ours.split()}
STAGE_OF_FUNCTION["split_streaming_dataset"] = "data"
# Where ours calls a library under another name.
ALIASES = {"model_class().from_pretrained": "AutoModelForCausalLM.from_pretrained"}

# What upstream has and ours has not, on purpose: kind, pattern of the name, entry of docs/modifications.md.
EXPLAINED = [
    ("flag", "--use_auth_token", "Dropped upstream"),
    ("flag", "--torch_dtype", "Dropped upstream"),
    ("flag", "--low_cpu_mem_usage", "Dropped upstream"),
    ("call", "send_example_telemetry", "Dropped upstream"),
    ("call", "get_last_checkpoint", "Dropped upstream"),
    ("call", "is_torch_tpu_available", "Dropped upstream"),
    ("keyword", "* use_auth_token=", "Dropped upstream"),
    ("keyword", "* torch_dtype=", "Dropped upstream"),
    ("keyword", "* low_cpu_mem_usage=", "Dropped upstream"),
    ("keyword", "Trainer tokenizer=", "Dropped upstream"),
    ("call", ".keys", "Dropped upstream"),
    ("call", "require_version", "Versions"),
    ("call", ".parse_json_file", "Arguments"),
    ("keyword", ".parse_json_file json_file=", "Arguments"),
    ("keyword", "load_dataset trust_remote_code=", "Data"),
    ("keyword", "load_dataset split=", "Data"),
    ("call", "IterableDataset*", "Data"),
    ("keyword", "IterableDataset*", "Data"),
    ("keyword", "AutoModelForCausalLM.from_pretrained from_tf=", "Model"),
    ("call", "CaptureLogger", "Encoding"),
    ("call", "transformers.utils.logging.get_logger", "Encoding"),
    ("call", "evaluate.load", "Metrics"),
    ("keyword", "evaluate.load cache_dir=", "Metrics"),
]
# Errors of upstream by stage and by what their innermost condition looks at: our function that raises one for the same
# mistake and, where it is another one or comes at another time, the entry of docs/modifications.md.
ERRORS = {
    "arguments: config_name config_overrides model_name_or_path": ("ModelArguments", ""),
    "arguments: dataset_name train_file validation_file": ("raw_datasets", "Arguments"),
    "arguments: extension train_file": ("file_builder", "Arguments"),
    "arguments: extension validation_file": ("file_builder", "Arguments"),
    "arguments: token": ("", "Dropped upstream"),
    "last checkpoint: last_checkpoint output_dir": ("", "Dropped upstream"),
    "data: validation_percentage": ("train_and_validation", "Data"),
    "tokenizer: model_name_or_path": ("loaded_tokenizer", ""),
    "encoding: tokenized_datasets": ("check_splits", "Data"),
}
# The modules of finetuning/ in which functions of the table lie.
ROOMS = {"argument_files", "data_files", "file_rows", "provenance", "scores", "screen"}
# Calls that are compared: of these libraries, and of the objects that upstream makes with them.
LIBRARIES = ("transformers", "datasets", "evaluate", "peft")
OBJECTS = ["parser", "training_args", "config", "tokenizer", "model", "metric", "trainer"]
OBJECTS += ["raw_datasets", "tokenized_datasets", "lm_datasets", "train_dataset", "eval_dataset"]


# ------------------------------------------------------------------------------------------------------ reading code


def parsed(path) -> ast.Module:
    """The syntax tree of a file; NotRunClm if it has not what makes a run_clm.py."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError) as error:
        raise NotRunClm(f"{path} cannot be read as Python: {error}") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    needed = {"ModelArguments", "DataTrainingArguments", "main"} - defined
    needed |= {"AutoModelForCausalLM", "load_dataset"} - words
    if "run_chatglm_lora" in {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }:
        raise NotRunClm(f"{path} is grafted already: take the run_clm.py that it was made from.")
    if needed:
        raise NotRunClm(f"{path} is no run_clm.py: it has no {', '.join(sorted(needed))}.")
    tree.body += definitions(Path(path).parent / "finetuning") if ROOMS & words else []
    return tree


def definitions(folder) -> list[ast.stmt]:
    """Imports, functions and classes of the modules in a folder: where our stages lie that are not in the script."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef
    trees = [ast.parse(path.read_bytes()) for path in sorted(folder.glob("*.py")) if path.stem in ROOMS]
    return [node for tree in trees for node in tree.body if isinstance(node, kinds)]


def dotted(node) -> str:
    """a.b.c of a name, an attribute, or a call (with brackets); an empty string of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Call):
        return f"{dotted(node.func)}()"
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def last_name(node) -> str:
    """c of a.b.c."""
    return dotted(node).rpartition(".")[2]


def own_text(node) -> str:
    """A statement in one line, without the words of its messages."""
    shortened = ast.parse(ast.unparse(node))
    for each in ast.walk(shortened):
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and " " in each.value:
            each.value = "..."
    return re.sub(r"\s+", " ", ast.unparse(shortened))


def assigned_names(statement) -> list[str]:
    """Names that a simple statement assigns to, or that a definition defines."""
    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    targets = [each for target in targets for each in getattr(target, "elts", [target])]
    bases = [target.value if isinstance(target, ast.Subscript) else target for target in targets]
    return [base.id for base in bases if isinstance(base, ast.Name)]


def calls_in(node) -> list[ast.Call]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Call)]


def leaves(statements, conditions=()):
    """(statement, conditions above it) for the simple statements and definitions in a body, and for the conditions."""
    for statement in statements:
        tests = [statement.test] if isinstance(statement, ast.If | ast.While) else []
        tests += [item.context_expr for item in getattr(statement, "items", [])] + [
            each for each in [getattr(statement, "iter", None)] if each
        ]
        bodies = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
        bodies += [handler.body for handler in getattr(statement, "handlers", [])]
        if isinstance(statement, ast.FunctionDef | ast.ClassDef) or not any(bodies):
            yield statement, conditions
            continue
        for test in tests:
            yield ast.copy_location(ast.Expr(test), test), conditions
        for body in bodies:
            yield from leaves(body, (*conditions, *tests))


def staged(tree):
    """(stage, statement, conditions) for all code of a script: by our function's stage, or by the marks in main."""
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if node.name != "main":
            stage = STAGE_OF_FUNCTION.get(node.name)
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            bodies = [node.body] if isinstance(node, ast.FunctionDef) else [method.body for method in methods]
            for body in bodies if stage else []:
                yield from ((stage, *leaf) for leaf in leaves(body))
            continue
        stage = "arguments"
        for statement, conditions in leaves(node.body):
            names = assigned_names(statement) + [dotted(call.func) for call in calls_in(statement)]
            stage = next((STAGE_OF_MARK[name] for name in names if name in STAGE_OF_MARK), stage)
            yield stage, statement, conditions


class Keywords:
    """The keyword arguments of calls, also of those that come from dicts which the script makes."""

    def __init__(self, tree):
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.dicts, self.owner = defaultdict(list), {}  # dicts: what is assigned to (function, name)
        for function in self.functions.values():
            for node in ast.walk(function):
                self.owner[node] = function
        for function in self.functions.values():
            for node in ast.walk(function):
                for target in getattr(node, "targets", []):
                    if isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
                        self.dicts[function.name, target.value.id].append(ast.Dict([target.slice], [node.value]))
                    elif isinstance(target, ast.Name):
                        self.dicts[function.name, target.id].append(node.value)

    def of(self, call) -> set[str]:
        named = {keyword.arg for keyword in call.keywords if keyword.arg}
        return named.union(*(self.keys(each.value, call) for each in call.keywords if not each.arg))

    def keys(self, value, place, seen=()) -> set[str]:
        """String keys of what `**value` unpacks."""
        if isinstance(value, ast.Dict):
            plain = {key.value for key in value.keys if isinstance(key, ast.Constant)}
            inner = [each for key, each in zip(value.keys, value.values, strict=True) if key is None]
            return plain.union(*(self.keys(each, place, seen) for each in inner))
        function = self.owner.get(place)
        if isinstance(value, ast.Name) and function and (function.name, value.id) not in seen:
            seen = (*seen, (function.name, value.id))
            made = [(each, place) for each in self.dicts[function.name, value.id]] + self.given(function, value.id)
            found = set().union(*(self.keys(each, where, seen) for each, where in made))
            return found | (self.passed(function) if getattr(function.args.kwarg, "arg", "") == value.id else set())
        name = last_name(value.func) if isinstance(value, ast.Call) else ""
        if name in self.functions:
            returns = [each for each in ast.walk(self.functions[name]) if isinstance(each, ast.Return)]
            return set().union(*(self.keys(each.value, each, seen) for each in returns))
        return set()

    def calls_of(self, function) -> list[ast.Call]:
        return [each for each in self.owner if isinstance(each, ast.Call) and dotted(each.func) == function.name]

    def given(self, function, name) -> list[tuple]:
        """What calls give for an argument of a function of the script, and where."""
        names = [argument.arg for argument in function.args.args]
        calls = self.calls_of(function) if name in names else []
        return [(call.args[names.index(name)], call) for call in calls if len(call.args) > names.index(name)]

    def passed(self, function) -> set[str]:
        """Keywords that calls give to the **options of a function of the script."""
        named = {argument.arg for argument in function.args.args}
        return {keyword.arg for call in self.calls_of(function) for keyword in call.keywords if keyword.arg} - named


# ------------------------------------------------------------------------------------------------------------- facts


def facts(path) -> list[Fact]:
    """All facts of a script, in its order. Raises NotRunClm."""
    tree = parsed(path)
    keywords, found = Keywords(tree), [*flags(tree), *floors(tree)]
    libraries = imported(tree)
    for stage, statement, conditions in staged(tree):
        found += call_facts(stage, statement, libraries, keywords)
        found += result_facts(stage, statement)
        found += error_facts(stage, statement, conditions)
    return list(dict.fromkeys(found))


def imported(tree) -> set[str]:
    """Names that come from the libraries that count here."""
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [(getattr(node, "module", None) or alias.name, alias) for node in nodes for alias in node.names]
    return {alias.asname or alias.name for module, alias in names if module.partition(".")[0] in LIBRARIES}


def constant(node, tree):
    """The value of a literal, or of a constant of the script."""
    if isinstance(node, ast.Name):
        made = [each.value for each in tree.body if node.id in assigned_names(each)]
        node = made[0] if made else node
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def flags(tree):
    """--name with type, default and choices, of every field of the argument classes."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments")]
    for node in [each for cls in classes for each in cls.body if isinstance(each, ast.AnnAssign)]:
        kind = re.sub(r"Optional\[(.*)\]", r"\1", ast.unparse(node.annotation)).replace(" | None", "")
        options = {"default": node.value, "choices": None}
        if isinstance(node.value, ast.Call):
            options = {each.arg: each.value for each in node.value.keywords}
            metadata = options.get("metadata")
            if isinstance(metadata, ast.Dict):
                options |= {
                    constant(key, tree): each for key, each in zip(metadata.keys, metadata.values, strict=True)
                }
            if node.value.args:
                options["default"] = node.value.args[0]
        values = {name: constant(options[name], tree) for name in ("default", "choices") if options.get(name)}
        choices = f", one of {values['choices']}" if values.get("choices") else ""
        yield Fact("arguments", "flag", f"--{node.target.id}", f"{kind}, {values.get('default')}{choices}")


def floors(tree):
    """Library and lowest version, of check_min_version and require_version at the top of the script."""
    for call in [call for node in tree.body if isinstance(node, ast.Expr) for call in calls_in(node)]:
        if dotted(call.func) == "check_min_version":
            yield Fact("versions", "floor", "transformers", constant(call.args[0], tree))
        if dotted(call.func) == "require_version":
            requirement = Requirement(constant(call.args[0], tree))
            lowest = [each.version for each in requirement.specifier if each.operator == ">="]
            yield Fact("versions", "floor", requirement.name, lowest[0])


def call_facts(stage, statement, libraries, keywords):
    for call in calls_in(statement):
        name = ALIASES.get(dotted(call.func), dotted(call.func))
        root = name.partition(".")[0]
        if root not in libraries and name not in ALIASES.values():
            name = f".{name.rpartition('.')[2]}" if "." in name else ""
            if not name:
                continue
        kind = "call" if root in libraries or root in OBJECTS or name in ALIASES.values() else "other call"
        yield Fact(stage, kind, name)
        for keyword in sorted(keywords.of(call)):
            yield Fact(stage, "keyword" if kind == "call" else "other keyword", f"{name} {keyword}=")


def result_facts(stage, statement):
    """Files that Trainer is told to write, and metrics that the script adds."""
    for call in calls_in(statement):
        name = dotted(call.func).rpartition(".")[2]
        if name in ("log_metrics", "save_metrics") and isinstance(call.args[0], ast.Constant):
            yield Fact(stage, "result", f"{name} {call.args[0].value}")
    targets = [each for each in getattr(statement, "targets", []) if isinstance(each, ast.Subscript)]
    keys = [target.slice for target in targets if dotted(target.value) == "metrics"]
    dicts = [each for each in ast.walk(statement) if isinstance(each, ast.Dict)]
    keys += [key for each in dicts for key in each.keys if isinstance(key, ast.JoinedStr)]
    for key in keys:
        parts = key.values if isinstance(key, ast.JoinedStr) else [key]
        name = "".join(each.value if isinstance(each, ast.Constant) else "*" for each in parts)
        yield Fact(stage, "result", f"metric {name}")


def error_facts(stage, statement, conditions):
    if isinstance(statement, ast.Raise | ast.Assert):
        conditions = [*conditions[-1:], *([statement.test] if isinstance(statement, ast.Assert) else [])]
        kind = "AssertionError" if isinstance(statement, ast.Assert) else dotted(statement.exc).removesuffix("()")
        yield Fact(stage, "error", f"{stage}: {looked_at(conditions)}", kind)


def looked_at(conditions) -> str:
    """The arguments, else the variables, that conditions look at."""
    nodes = [node for condition in conditions for node in ast.walk(condition)]
    owners = {"self", "model_args", "data_args", "training_args"}
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute) and dotted(node.value) in owners}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)} - owners - {"os", "len"}
    return " ".join(sorted(names))


def raising_functions(tree) -> set[str]:
    """Functions and classes with an error of their own."""
    named = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name for node in named if any(isinstance(each, ast.Raise) for each in ast.walk(node))}


def stage_order(tree) -> list[str]:
    """The stages that main goes through, in its order, those of upstream only."""
    marked = {stage.name for stage in STAGES if stage.marks}
    main = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    names = [dotted(call.func) for call in sorted(calls_in(main), key=lambda call: call.lineno)]
    in_main = (
        [STAGE_OF_FUNCTION.get(name.rpartition(".")[2], STAGE_OF_MARK.get(name)) for name in names]
        if "raw_datasets" in names
        else []
    )
    in_main = in_main or [stage for stage, statement, _ in staged(tree) if statement.lineno > main.lineno]
    return [stage for stage in dict.fromkeys(in_main) if stage in marked]


# -------------------------------------------------------------------------------------------------------- comparison


def comparison(script, against) -> list[Row]:
    """A run_clm.py held against ours: rows by stage and verdict."""
    theirs, ours = facts(script), facts(against)
    raising = raising_functions(parsed(against))
    judged = [(fact, *verdict(fact, ours, raising)) for fact in theirs if not fact.kind.startswith("other")]
    known = {fact.name for fact in theirs}
    added = [fact for fact in ours if fact.name not in known and fact.kind in ("flag", "call", "keyword")]
    judged += [(fact, OURS, ENTRY[fact.stage], label(fact)) for fact in added]
    judged += order_facts(stage_order(parsed(script)), stage_order(parsed(against)))
    grouped = defaultdict(list)
    for fact, found, entry, text in judged:
        grouped[fact.stage, found, entry].append(text)
    places = [stage.name for stage in STAGES]
    verdicts = [TO_PORT, OURS, SAME]
    order = sorted(grouped, key=lambda key: (places.index(key[0]), verdicts.index(key[1]), key[2]))
    return [Row(stage, found, listed(grouped[stage, found, entry]), entry) for stage, found, entry in order]


def label(fact) -> str:
    return f"{fact.detail} over {fact.name.partition(': ')[2]}" if fact.kind == "error" else fact.name


def listed(texts) -> str:
    """Texts with commas, a call with the keywords that follow it: f(a, b)."""
    calls = defaultdict(list)
    for text in texts:
        name, _, keyword = text.partition(" ")
        calls[name if keyword.endswith("=") else text] += [keyword[:-1]] if keyword.endswith("=") else []
    return ", ".join(f"{name}({', '.join(found)})" if found else name for name, found in calls.items())


def verdict(fact, ours, raising) -> tuple[str, str, str]:
    """Verdict, entry of the docs and words on a fact of upstream."""
    explained = [entry for kind, name, entry in EXPLAINED if kind == fact.kind and fnmatch(fact.name, name)]
    like = [other for other in ours if other.kind.endswith(fact.kind) and fnmatch(fact.name, other.name)]
    if fact.kind == "error":
        function, entry = ERRORS.get(fact.name, (None, ""))
        known = function == "" or function in raising
        return (OURS if entry else SAME, entry, label(fact)) if known else (TO_PORT, "", label(fact))
    if fact.kind == "floor":
        lowest = like[0].detail if like else "0"
        found = TO_PORT if Version(fact.detail) > Version(lowest) else SAME if fact.detail == lowest else OURS
        return found, "Versions" if found == OURS else "", f"{fact.name}>={fact.detail} (ours: {lowest})"
    if fact.kind == "flag" and like and like[0].detail != fact.detail:
        return TO_PORT, "", f"{fact.name} is now {fact.detail} (ours: {like[0].detail})"
    if like:
        return SAME, "", label(fact)
    return (OURS, explained[0], label(fact)) if explained else (TO_PORT, "", label(fact))


def order_facts(theirs, ours):
    """The order of the stages: where ours does one earlier or later than the script."""
    common = [stage for stage in theirs if stage in ours]
    kept = difflib.SequenceMatcher(a=common, b=[stage for stage in ours if stage in common], autojunk=False)
    kept = {stage for block in kept.get_matching_blocks() for stage in common[block.a : block.a + block.size]}
    for stage in common:
        if stage not in kept:
            moved = stage in MOVED
            yield (
                Fact(stage, "order", ""),
                OURS if moved else TO_PORT,
                ENTRY[stage] if moved else "",
                "its place in main",
            )


MOVED = ("encoding",)  # before the model


# ------------------------------------------------------------------------------------------- two versions of upstream


def changes(old, new) -> list[Row]:
    """What a newer run_clm.py adds and removes, by stage; beside the stage stand our functions of it."""
    rows = []
    before, after = described(old), described(new)
    for stage in STAGES:
        first, second = before[stage.name], after[stage.name]
        for line in difflib.ndiff(first, second):
            if line[:2] in ("- ", "+ "):
                place = f"{stage.name} (ours: {', '.join(FUNCTIONS[stage.name]) or 'nothing'})"
                rows.append(Row(place, {"-": "removed", "+": "added"}[line[0]], line[2:]))
    return rows


def described(path) -> dict[str, list[str]]:
    """The facts and steps of a script as sentences, by stage."""
    tree, found = parsed(path), defaultdict(list)
    for fact in facts(path):
        text = fact.name if fact.kind not in ("flag", "floor") else f"{fact.name}: {fact.detail}"
        if fact.kind in ("flag", "floor", "result"):
            found[fact.stage].append(text)
    for stage, statement, _ in staged(tree):
        body = statement.body if isinstance(statement, ast.FunctionDef) else [statement]
        found[stage] += [own_text(step) for step, _ in leaves(body)]
    return found
