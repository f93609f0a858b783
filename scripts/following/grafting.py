"""Our additions put into a run_clm.py, at places found by what stands there; refused where they would break something.

`main` of the result goes through the stages of run_chatglm_lora.py's own, with upstream's lines where it has any.
"""

import ast
import difflib
import io

import libcst as cst
import libcst.matchers as m

from .binding import unbound
from .editing import PlaceNotFound, Refused, Script, called, code
from .reading import OURS, class_fields, parsed, source_text


ADDED_NAMES = ("lora", "chat_args", "lora_args", "row_format", "guards")
ADDED_CLASSES = ("ChatArguments", "LoraArguments")
# What makes an adapter or quantises, which a script may not do beside us.
ADAPTERS = ("get_peft_model", "add_adapter", "load_adapter", "prepare_model_for_kbit_training", "BitsAndBytesConfig")
READ_OF_MODEL = (
    "model_name_or_path",
    "model_revision",
    "cache_dir",
)  # by our functions, beside all of the data
TRAINER_KEYWORDS = (
    "model", "args", "train_dataset", "eval_dataset", "processing_class", "tokenizer", "data_collator",
    "compute_metrics", "preprocess_logits_for_metrics", "callbacks", "optimizers",
)  # fmt: skip
# What upstream's own functions call. Ours take their place: any other call means that the owner changed them.
METRIC_CALLS = {
    "preprocess_logits_for_metrics": {"isinstance", "argmax"},
    "compute_metrics": {"reshape", "compute"},
}
CHECK_CALLS = {"require_version", "ValueError", "split"}
CHECKED = {"dataset_name", "train_file", "validation_file", "streaming"}
FILE_TYPES = {"csv", "json", "txt", "jsonl", "parquet"}


class Grafting(Script):
    """A script, and the names that it has for what our lines use."""

    def __init__(self, path, tree):
        super().__init__(path)
        self.names = {name: name for name in ADDED_NAMES}
        self.tree = tree  # for questions about names, which LibCST answers in more words

    def lines_of(self, *lines):
        """Our lines with the script's own names."""
        return [line.format(**self.names) for line in lines]


def last_part(func) -> str:
    return func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")


def calls_in(node) -> list[ast.Call]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Call)]


# ------------------------------------------------------------------------------------------------- before any edit


def check_free_names(tree):
    """None of the names that we add may be in use."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "asname", None)
        name = name or (node.name if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias) else None)
        if name in ADDED_NAMES and not isinstance(node, ast.keyword):
            raise Refused(node.lineno, f"the name {name} is taken, which our lines need: call it something else")


def check_adapters(tree):
    """An adapter or quantisation of the script's own would meet ours."""
    for node in ast.walk(tree):
        modules = [getattr(node, "module", None) or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.partition(".")[0] == "peft" for name in modules):
            raise Refused(node.lineno, "the script uses peft, and ours makes the adapter: take its own out")
        name = last_part(node.func) if isinstance(node, ast.Call) else getattr(node, "name", None)
        if name in ADAPTERS:
            raise Refused(node.lineno, f"the script has a {name} of its own, and ours makes the adapter: take it out")


def check_flags(script, classes):
    """No flag may be defined twice, and what our functions read must be there. `classes` are those of the parser."""
    ours, theirs = parsed(OURS), {}
    added = {field.target.id: field for name in ADDED_CLASSES for field in class_fields(ours, name)}
    taken = {spelled: name for name, field in added.items() for spelled in spellings(field)}
    for name in classes:
        theirs[name] = {field.target.id: field for field in class_fields(script.tree, name)}
        for field in theirs[name].values():
            for spelled in spellings(field):
                if spelled in taken:
                    flag = f"--{spelled}"
                    raise Refused(field.lineno, f"{flag} of {name} is a flag of ours too: rename it, or take it out")
    data = [field.target.id for field in class_fields(ours, "DataTrainingArguments")]
    for name, needed in {"ModelArguments": READ_OF_MODEL, "DataTrainingArguments": data}.items():
        for flag in needed:
            if flag not in theirs[name]:
                line = next(node.lineno for node in script.tree.body if getattr(node, "name", None) == name)
                raise Refused(line, f"{name} has no {flag}, which our lines read: put the flag back")


def spellings(field) -> set[str]:
    """The names that a field takes on the command line: its own, no_x of a true one, and its aliases."""
    name, texts = field.target.id, [each.value for each in ast.walk(field) if isinstance(each, ast.Constant)]
    aliases = {text[2:] for text in texts if isinstance(text, str) and text.startswith("--") and " " not in text}
    return {name, *aliases, *({f"no_{name}"} if True in texts and "bool" in ast.unparse(field.annotation) else ())}


def check_own_checks(script, data_class):
    """DataTrainingArguments.__post_init__ is replaced: it may hold nothing but upstream's checks of files."""
    node = next(each for each in script.tree.body if getattr(each, "name", None) == "DataTrainingArguments")
    check = next(each for each in node.body if getattr(each, "name", None) == "__post_init__")
    for each in ast.walk(check):
        attribute = isinstance(each, ast.Attribute) and getattr(each.value, "id", None) == "self"
        own = attribute and (each.attr not in CHECKED or not isinstance(each.ctx, ast.Load))
        own = own or isinstance(each, ast.Call) and last_part(each.func) not in CHECK_CALLS
        own = own or isinstance(each, ast.List | ast.Tuple | ast.Set) and not known_types(each)
        if own:
            what = f"{ast.unparse(each)} in DataTrainingArguments.__post_init__ would be replaced"
            raise Refused(each.lineno, f"{what}, which ours checks anew: move it into main, behind the arguments")


def known_types(node) -> bool:
    return {getattr(each, "value", None) for each in node.elts} <= FILE_TYPES


def check_own_metrics(script):
    """The metrics of text are replaced: they must be upstream's."""
    main = next(each for each in script.tree.body if getattr(each, "name", None) == "main")
    for name, known in METRIC_CALLS.items():
        for function in [each for each in ast.walk(main) if getattr(each, "name", None) == name]:
            for call in calls_in(function):
                if last_part(call.func) not in known:
                    own = f"{ast.unparse(call.func)}() in {name}"
                    raise Refused(call.lineno, f"{own} would be replaced, with all of it, by ours: take it out")
            returned = [each.value for each in ast.walk(function) if isinstance(each, ast.Return)]
            if not all(isinstance(each, ast.Call) and last_part(each.func) in known for each in returned):
                raise Refused(function.lineno, f"{name} returns something of its own, and ours would replace it")


# ------------------------------------------------------------------------------------------------------ the points


def graft_imports(script, folder):
    """The import, and where it is found if the grafted file lies in another folder."""
    statement = m.SimpleStatementLine(body=[m.Import() | m.ImportFrom()])
    above = script.module.body[: script.module.body.index(script.main)]
    imports = [line for line in above if m.matches(line, statement)]
    script.find(script.module, m.Import(names=[m.ImportAlias(name=m.Name("sys"), asname=None)]), "import sys")
    path = [f"sys.path.insert(0, {ascii(str(OURS.parent))})"] if folder != OURS.parent else []
    script.after(imports[-1], *path, "import run_chatglm_lora as lora")
    return imports[-1]


def graft_arguments(script, folder):
    """Two more dataclasses, our file types, and `no_x: true` in a file of arguments."""
    data_class = m.ClassDef(name=m.Name("DataTrainingArguments"))
    data_class = script.find(script.module, data_class, "class DataTrainingArguments")
    script.find(data_class, m.FunctionDef(name=m.Name("__post_init__")), "DataTrainingArguments.__post_init__")
    check_own_checks(script, data_class)
    parser = script.only(script.main, called("HfArgumentParser"), "HfArgumentParser()")
    listed = parser.args[0].value if parser.args else None
    if not isinstance(listed, cst.Tuple | cst.List):
        raise PlaceNotFound(script.line(parser), "HfArgumentParser((..., TrainingArguments))")
    classes = [code(element.value) for element in listed.elements]
    missing = {"ModelArguments", "DataTrainingArguments"} - set(classes)
    places = [place for place, name in enumerate(classes) if is_training_arguments(script, name)]
    if missing or len(places) != 1:
        raise PlaceNotFound(script.line(parser), "HfArgumentParser((ModelArguments, ..., TrainingArguments))")
    check_flags(script, classes)
    script.before(
        script.statement_of(parser),
        "DataTrainingArguments.__post_init__ = lora.DataTrainingArguments.__post_init__  # file types",
    )
    script.insert_before(listed.elements[places[0]], "*lora.ADDED_ARGUMENTS, ")
    graft_parsing(script, script.name_given_to(parser), classes, places[0])
    return parser


def is_training_arguments(script, name) -> bool:
    """Whether a class is transformers' TrainingArguments, or one that the script derives from it."""
    bases = {node.name: list(map(ast.unparse, node.bases)) for node in script.tree.body if hasattr(node, "bases")}
    return name == "TrainingArguments" or any(is_training_arguments(script, base) for base in bases.get(name, []))


def graft_parsing(script, parser, classes, place):
    """Every assignment of what the parser returns gets two more targets, before those of TrainingArguments."""
    kinds = {"parse_json_file", "parse_yaml_file", "parse_dict", "parse_args_into_dataclasses"}
    call = m.Call(func=m.Attribute(value=m.Name(parser), attr=m.Name()))
    calls = [each for each in script.within(script.main, call) if each.func.attr.value in kinds]
    for needed in ("parse_json_file", "parse_args_into_dataclasses"):
        if needed not in [each.func.attr.value for each in calls]:
            raise PlaceNotFound(script.line(script.main), f"{parser}.{needed}()")
    for call in calls:
        statement = script.statement_of(call).body[0]
        targets = getattr(statement, "targets", [None])[0]
        targets = targets.target.elements if targets and isinstance(targets.target, cst.Tuple) else []
        if statement.value is not call or len(targets) < len(classes):
            raise Refused(script.line(call), f"{code(call.func)}() is not assigned to one variable for each class")
        roles = {"ModelArguments": "model_args", "DataTrainingArguments": "data_args", classes[place]: "training_args"}
        for name, element in zip(classes, targets, strict=False):
            if not isinstance(element.value, cst.Name):
                raise Refused(script.line(call), f"{code(element.value)} is given by {code(call.func)}(): use a name")
            if name in roles and script.names.setdefault(roles[name], code(element.value)) != code(element.value):
                raise Refused(script.line(call), f"{name} is {script.names[roles[name]]} above: give it one name")
        script.insert_before(targets[place], "chat_args, lora_args, ")
        kind = call.func.attr.value
        if kind in ("parse_json_file", "parse_yaml_file"):
            script.replace(call, f"lora.parsed_file({parser}, {code(call.args[0].value)})")
        elif kind == "parse_args_into_dataclasses" and not call.args:
            script.replace(call, f"lora.parsed_words({parser})")


def graft_logging(script, folder):
    """Our messages at the level of the script's, and a look at how it was launched."""
    seed = script.statement_of(script.find(script.main, called("set_seed"), "set_seed()"))
    script.after(seed, *script.lines_of("lora.prepare_launch({model_args}, {data_args}, lora_args, {training_args})"))
    return seed


def graft_data(script, folder):
    """Our reading of conversations, and of text that run_clm.py's lines do not read; the rest stays with them."""
    load = script.find(script.main, called("load_dataset"), "raw_datasets = load_dataset()")
    script.names["raw_datasets"] = script.name_given_to(load)
    stage = script.stage(called("load_dataset"), "load_dataset()")
    by_name = m.Comparison(left=m.Attribute(value=m.Name(script.names["data_args"]), attr=m.Name("dataset_name")))
    if not m.matches(stage, m.If(test=by_name)):
        raise PlaceNotFound(script.line(stage), "if data_args.dataset_name is not None, with load_dataset() below it")
    script.before(
        stage,
        *script.lines_of(
            "{raw_datasets}, row_format = lora.raw_datasets({model_args}, {data_args}, chat_args, {training_args})",
            "if not lora.read_by_run_clm(row_format, {data_args}):",
        ),
        script.module.default_indent + "pass",
    )
    script.insert_before(stage, "el")
    return stage


def graft_configuration(script, folder):
    """ChatGLM, known to the Auto classes before they are asked for it, its own prefix, an adapter's own tokenizer."""
    calls = called("AutoConfig.from_pretrained")
    script.names["config"] = script.name_given_to(script.find(script.main, calls, "AutoConfig.from_pretrained()"))
    stage = script.stage(calls, "AutoConfig.from_pretrained()")
    own = "{model_args}.tokenizer_name = lora.tokenizer_name({model_args}, lora_args.adapter_name_or_path)"
    script.before(stage, "lora.register_chatglm(lora_args)", *script.lines_of(own))
    script.after(stage, *script.lines_of("{config} = lora.prefix_tuning.with_prefix({config}, lora_args)"))
    return stage


def graft_encoding(script, folder):
    """Conversations as ids, which the maps of run_clm.py leave alone; before the weights are loaded."""
    calls = called("AutoTokenizer.from_pretrained")
    call = script.find(script.main, calls, "AutoTokenizer.from_pretrained()")
    script.names["tokenizer"] = script.name_given_to(call)
    stage = script.stage(calls, "AutoTokenizer.from_pretrained()")
    script.after(
        stage,
        *script.lines_of(
            "{tokenizer} = lora.with_chat_template({tokenizer}, chat_args)",
            "{raw_datasets} = lora.chats_as_ids({raw_datasets}, row_format, {tokenizer}, {config}, chat_args, "
            "{data_args}, {training_args})",
        ),
    )
    return stage


def graft_model(script, folder):
    """The class for checkpoint code, and quantised loading."""
    what = "AutoModelForCausalLM.from_pretrained()"
    first = script.find(script.main, called(what[:-2]), what)
    script.names["model"] = script.name_given_to(first)
    for call in script.within(script.main, called(what[:-2])):
        for keyword in call.args:
            if keyword.keyword and keyword.keyword.value in ("quantization_config", "device_map"):
                given = f"{code(keyword.keyword)}= of {what}"
                raise Refused(script.line(keyword), f"{given} would be given twice, here and by --load_in_4bit")
        script.replace(call.func.value, "lora.model_class({config})".format(**script.names))
        own_line = script.line(call.args[-1]) > script.line(call)
        newline = script.module.default_newline + script.indentation(call.args[-1]) if own_line else " "
        options = "**lora.loading_options(lora_args, {training_args})".format(**script.names)
        script.insert_after(call.args[-1].value, f",{newline}{options}")
    return first


def graft_adapter(script, folder):
    """LoRA or another adapter, around the model in its final size, which ZeRO-3 does not show in the weight."""
    model = script.names["model"]
    weight = m.Attribute(value=called(f"{model}.get_input_embeddings"), attr=m.Name("weight"))
    rows = m.Subscript(value=m.Attribute(value=weight, attr=m.Name("shape")), slice=[m.SubscriptElement()])
    sizes = script.within(script.main, rows)
    for size in sizes:
        script.replace(size, f"{model}.get_input_embeddings().num_embeddings")
    if len(script.within(script.main, weight)) > len(sizes):
        line = script.line(script.within(script.main, weight)[-1])
        raise Refused(line, "the size of the embedding is read in another way than by .weight.shape[0]")
    stage = script.stage(called(f"{model}.resize_token_embeddings"), f"{model}.resize_token_embeddings()")
    script.after(stage, *script.lines_of("{model} = lora.adapted_model({model}, lora_args, {training_args})"))
    return stage


def graft_metric(script, folder):
    """Accuracy without a visit to the hub."""
    call = script.only(script.main, called("evaluate.load"), "metric = evaluate.load()")
    if not (call.args and m.matches(call.args[0].value, m.SimpleString()) and "accuracy" in call.args[0].value.value):
        raise Refused(script.line(call), f"{code(call)} would be replaced by our accuracy: take it out")
    check_own_metrics(script)
    script.replace(call, "lora.scores.TokenAccuracy(keep_in_memory=True)")
    return call


def graft_trainer(script, folder):
    """Our collator, checks, safeguards and masked metrics in place of Trainer's arguments of these names."""
    call = script.only(script.main, called("Trainer"), "trainer = Trainer()")
    keywords = {code(each.keyword): each.value for each in call.args if each.keyword}
    for each in call.args:
        if not each.keyword or keywords[code(each.keyword)] is not each.value:
            raise Refused(script.line(each), f"{code(each)} of Trainer() has no name: write model=, args= and so on")
        check_keyword(script, each, code(each.keyword))
    for needed in ("model", "args", "train_dataset"):
        if needed not in keywords:
            raise PlaceNotFound(script.line(call), f"{needed}= of Trainer()")
    script.names["trainer"] = script.name_given_to(call)
    targets = script.statement_of(call).body[0]
    script.insert_after(targets.targets[0].target, ", guards")
    script.replace(call.func, "lora.guarded_trainer")
    arguments = "Trainer, {model_args}, chat_args, lora_args, {raw_datasets}, row_format"
    script.insert_arguments(call, arguments.format(**script.names))
    script.after(
        script.statement_of(call), *script.lines_of("{data_args} = lora.with_sample_counts({data_args}, {trainer})")
    )
    return call


def check_keyword(script, keyword, name):
    """An argument of Trainer must be one that we leave as it is, or what upstream gives for one that we replace."""
    given = keyword.value.body if isinstance(keyword.value, cst.IfExp) else keyword.value
    upstreams = {"data_collator": "default_data_collator", **{function: function for function in METRIC_CALLS}}
    if name not in TRAINER_KEYWORDS:
        raise Refused(script.line(keyword), f"{name}= of Trainer() is not known here: take it out")
    if code(given) != upstreams.get(name, code(given)):
        own = f"{name}={code(given)} of Trainer()"
        raise Refused(script.line(keyword), f"{own} would be replaced by ours: take it out, or graft upstream's file")


def graft_training(script, folder):
    """Safeguards, a look at what was saved, a record of what it was made from, and no counts that are not known."""
    trainer = script.names["trainer"]
    train = script.only(script.main, called(f"{trainer}.train"), f"{trainer}.train()")
    stage = script.stage(called(f"{trainer}.train"), f"{trainer}.train()")
    for each in train.args:
        if not each.keyword or each.keyword.value != "resume_from_checkpoint":
            raise Refused(script.line(train), f"{code(each)} of {trainer}.train() is not known here: take it out")
    script.replace(train.func, "lora.trained")
    script.insert_arguments(train, f"{trainer}, guards")
    save = script.only(stage, called(f"{trainer}.save_model"), f"{trainer}.save_model()")
    if save.args:
        raise Refused(script.line(save), f"{code(save)} saves elsewhere than in --output_dir: take that out")
    script.replace(save, "lora.saved({trainer}, guards, {model_args}, row_format)".format(**script.names))
    graft_metrics(script, stage, "train")
    return stage


def graft_metrics(script, stage, name):
    """Before the metrics of a stage are logged, they are completed."""
    log = m.Call(func=m.Attribute(attr=m.Name("log_metrics")), args=[m.Arg(m.SimpleString()), m.Arg()])
    logs = [each for each in script.within(stage, log) if each.args[0].value.evaluated_value == name]
    if not logs:
        raise PlaceNotFound(script.line(stage), f'{script.names["trainer"]}.log_metrics("{name}", metrics)')
    metrics = logs[0].args[1].value
    if not isinstance(metrics, cst.Name):
        raise Refused(script.line(logs[0]), f'log_metrics("{name}", ...) is given no variable: use one')
    script.before(script.statement_of(logs[0]), f"{metrics.value} = lora.complete({metrics.value})")


def graft_evaluation(script, folder):
    """Perplexity over all trained tokens."""
    evaluate = f"{script.names['trainer']}.evaluate"
    script.only(script.main, called(evaluate), f"{evaluate}()")
    stage = script.stage(called(evaluate), f"{evaluate}()")
    graft_metrics(script, stage, "eval")
    return stage


def graft_prediction(script, folder):
    """Answers by generation, and the picture of the losses."""
    stage = script.stage(called(f"{script.names['trainer']}.evaluate"), "the evaluation")
    script.after(
        stage,
        *script.lines_of(
            "lora.answer({trainer}, {tokenizer}, {raw_datasets}, chat_args)",
            "lora.draw_losses({trainer}, lora_args)",
        ),
    )
    return stage


def graft_end(script, folder):
    """The processes leave together, and the lock of the output folder goes."""
    last = script.main.body.body[-1]
    returns = m.matches(last, m.SimpleStatementLine(body=[m.Return()]))
    (script.before if returns else script.after)(last, "lora.launching.end_processes()")
    return last


# In the order of the script. docs/modifications.md lists the same points.
GRAFT_POINTS = {
    "imports": graft_imports,
    "arguments": graft_arguments,
    "logging": graft_logging,
    "data": graft_data,
    "configuration": graft_configuration,
    "encoding": graft_encoding,
    "model": graft_model,
    "adapter": graft_adapter,
    "metric": graft_metric,
    "trainer": graft_trainer,
    "training": graft_training,
    "evaluation": graft_evaluation,
    "prediction": graft_prediction,
    "end": graft_end,
}


def grafted(path, folder) -> tuple[str, str, str]:
    """A run_clm.py, the same with our additions for a file in `folder`, and the encoding of both.

    Raises NotRunClm, Refused, PlaceNotFound.
    """
    parsed(path)  # it is a run_clm.py
    tree = ast.parse(source_text(path)[0])
    check_free_names(tree)
    check_adapters(tree)
    script, last = Grafting(path, tree), 1
    for point, graft_point in GRAFT_POINTS.items():
        try:
            last = max(last, script.line(graft_point(script, folder)))
        except PlaceNotFound as error:
            line, what = error.args
            raise PlaceNotFound(max(line, last), f"not found from here on: the place '{point}': {what}") from error
    new = script.edited()
    check_bound(script, new)
    return script.text, new, script.encoding


def check_bound(script, new):
    """Every name in our lines must be bound there, whatever flags are given."""
    tree = ast.parse(new)
    main = next(node for node in tree.body if getattr(node, "name", None) == "main")
    new_lines = list(io.StringIO(new, newline=""))  # as Python counts them
    blocks = difflib.SequenceMatcher(a=script.lines, b=new_lines, autojunk=False).get_opcodes()
    for number, name in unbound(main, set(script.names.values()) - {"lora"}):
        kind, line = next((kind, a) for kind, a, _, first, end in blocks if first <= number - 1 < end)
        if kind != "equal":
            raise Refused(line + 1, f"{name} need not be bound here, where our lines use it: assign it in every case")


def changed_lines(old, new) -> int:
    """Lines removed plus lines added."""
    matcher = difflib.SequenceMatcher(a=old.splitlines(), b=new.splitlines(), autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks())
    return len(matcher.a) + len(matcher.b) - 2 * kept
