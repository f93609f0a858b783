"""Follow upstream: compare this project with any run_clm.py, and graft its additions onto one.

    python scripts/upstream.py diff transformers/examples/pytorch/language-modeling/run_clm.py
    python scripts/upstream.py diff --old OLD/run_clm.py --new NEW/run_clm.py
    python scripts/upstream.py graft transformers/examples/pytorch/language-modeling/run_clm.py -o run_clm_lora.py

docs/upstream.md says how to read what they print. Exit status of diff: 0 if there is nothing to port, 1 if there is,
2 if the file is no run_clm.py; of graft: 0 if the file is written, 1 if a place was not found, 2 as above.
"""

import argparse
import difflib
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from upstream_facts import SAME, TO_PORT, NotRunClm, changes, comparison, parsed


PROJECT = Path(__file__).resolve().parent.parent
OURS = PROJECT / "run_chatglm_lora.py"


# ----------------------------------------------------------------------------------------------------------- graft


class PlaceNotFound(Exception):
    """A graft point that the script lacks: (line where it was looked for, what was looked for)."""


@dataclass
class Edit:
    """Text for the characters between two places (line from 1, column from 0); for nothing, if they are equal."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


def called(name):
    """Matcher of a call by its dotted name."""
    *owner, last = name.split(".")
    return m.Call(func=m.Attribute(value=m.Name(owner[0]), attr=m.Name(last)) if owner else m.Name(last))


def assigned(name, value):
    """Matcher of an assignment to one name, or to a tuple of names that ends with it."""
    names = m.Tuple(elements=[m.ZeroOrMore(), m.Element(value=m.Name(name))])
    return m.Assign(targets=[m.AssignTarget(target=m.Name(name) | names)], value=value)


class Script:
    """A run_clm.py whose parts are found by what they do, and the edits that are made to it."""

    def __init__(self, path):
        parsed(path)  # it is a run_clm.py
        self.source = Path(path).read_bytes()
        wrapper = MetadataWrapper(cst.parse_module(self.source), unsafe_skip_copy=True)
        self.module, self.positions = wrapper.module, wrapper.resolve(PositionProvider)
        self.text = self.source.decode(self.module.encoding)
        self.lines = list(io.StringIO(self.text, newline=""))  # as Python counts them, with the ends that they have
        self.nodes, self.spans, self.edits = [], {}, []  # spans: the part of nodes that belongs to a node
        self.collect(self.module)
        self.main = self.find(self.module, m.FunctionDef(name=m.Name("main")), "the function main")

    def collect(self, node):
        start = len(self.nodes)
        self.nodes.append(node)
        for child in node.children:
            self.collect(child)
        self.spans[node] = (start, len(self.nodes))

    def within(self, scope, matcher) -> list:
        """The nodes in the scope that match, in the order of the text."""
        start, end = self.spans[scope]
        kind = type(matcher).__name__
        return [node for node in self.nodes[start:end] if type(node).__name__ == kind and m.matches(node, matcher)]

    def line(self, node) -> int:
        return self.positions[node].start.line

    def find(self, scope, matcher, what):
        """The first node in the scope that matches; else PlaceNotFound with the line where the scope begins."""
        found = self.within(scope, matcher)
        if not found:
            raise PlaceNotFound(1 if scope is self.module else self.line(scope), what)
        return found[0]

    def stage(self, matcher, what):
        """The statement of main, of the first level, in which something is done."""
        self.find(self.main, matcher, what)
        return next(statement for statement in self.main.body.body if self.within(statement, matcher))

    def statement_of(self, scope, matcher, what):
        """The line of code that holds the match."""
        place = self.spans[self.find(scope, matcher, what)][0]
        lines = self.within(scope, m.SimpleStatementLine())
        return next(line for line in lines if self.spans[line][0] <= place < self.spans[line][1])

    # How a place is edited. New lines take the indentation of the statement that they stand next to.

    def insert(self, line, column, new_lines):
        text = "".join(" " * column + new + self.module.default_newline for new in new_lines)
        self.edits.append(Edit((line, 0), (line, 0), text))

    def before(self, statement, *new_lines):
        start = self.positions[statement].start
        self.insert(start.line, start.column, new_lines)

    def after(self, statement, *new_lines):
        place = self.positions[statement]
        last = place.end.line if place.end.column else place.end.line - 1
        self.insert(last + 1, place.start.column, new_lines)

    def replace(self, node, text):
        place = self.positions[node]
        self.edits.append(Edit((place.start.line, place.start.column), (place.end.line, place.end.column), text))

    def insert_before(self, node, text):
        start = self.positions[node].start
        self.edits.append(Edit((start.line, start.column), (start.line, start.column), text))

    def insert_after(self, node, text):
        end = self.positions[node].end
        self.edits.append(Edit((end.line, end.column), (end.line, end.column), text))

    def delete_lines(self, node, what):
        place = self.positions[node]
        before = self.lines[place.start.line - 1][: place.start.column]
        behind = self.lines[place.end.line - 1][place.end.column :]
        if before.strip() or behind.partition("#")[0].strip() not in ("", ","):
            raise PlaceNotFound(place.start.line, f"{what} on lines of its own")
        self.edits.append(Edit((place.start.line, 0), (place.end.line + 1, 0), ""))

    def edited(self) -> str:
        """The text with all edits; what no edit touches stays as it is, to the byte."""
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line))
        text = self.text
        # From the end, so that places before an edit stay true; of two in one place the later stands behind.
        for edit in sorted(self.edits, key=lambda edit: edit.start)[::-1]:
            start, end = (starts[line - 1] + column for line, column in (edit.start, edit.end))
            text = text[:start] + edit.text + text[end:]
        return text


def graft_imports(script, folder):
    """The import, and where it is found if the grafted file lies in another folder."""
    statement = m.SimpleStatementLine(body=[m.Import() | m.ImportFrom()])
    imports = [line for line in script.module.body if m.matches(line, statement)]
    script.find(script.module, m.Import(names=[m.ImportAlias(name=m.Name("sys"))]), "import sys")
    path = [f"sys.path.insert(0, {str(PROJECT)!r})"] if folder != PROJECT else []
    script.after(imports[-1], *path, "import run_chatglm_lora as lora")
    return imports[-1]


def graft_arguments(script, folder):
    """Two more dataclasses, our file types, and `no_x: true` in a file of arguments."""
    data_class = m.ClassDef(name=m.Name("DataTrainingArguments"))
    data_class = script.find(script.module, data_class, "class DataTrainingArguments")
    script.find(data_class, m.FunctionDef(name=m.Name("__post_init__")), "DataTrainingArguments.__post_init__")
    last = m.Element(value=m.Name("TrainingArguments"))
    classes = m.Call(func=m.Name("HfArgumentParser"), args=[m.Arg(m.Tuple([m.ZeroOrMore(), last])), m.ZeroOrMore()])
    parser = script.statement_of(script.main, classes, "HfArgumentParser((..., TrainingArguments))")
    script.before(
        parser, "DataTrainingArguments.__post_init__ = lora.DataTrainingArguments.__post_init__  # file types"
    )
    script.insert_before(script.find(parser, last, "TrainingArguments"), "*lora.ADDED_ARGUMENTS, ")
    for parse in ("parser.parse_json_file", "parser.parse_args_into_dataclasses"):
        place = script.find(script.main, assigned("training_args", called(parse)), f"training_args = {parse}()")
        last = script.find(place, m.Element(value=m.Name("training_args")), "training_args")
        script.insert_before(last, "chat_args, lora_args, ")
        if parse == "parser.parse_json_file":
            script.replace(place.value, "lora.parsed_file(parser, sys.argv[1])")
    return parser


def graft_logging(script, folder):
    """Our messages at the level of the script's."""
    seed = script.statement_of(script.main, called("set_seed"), "set_seed()")
    script.after(seed, "lora.logger.setLevel(training_args.get_process_log_level())")
    return seed


def graft_data(script, folder):
    """Our reading of conversations, and of text that run_clm.py's lines do not read; the rest stays with them."""
    loads = script.stage(assigned("raw_datasets", called("load_dataset")), "raw_datasets = load_dataset()")
    if not m.matches(loads, m.If(test=m.Comparison(left=m.Attribute(attr=m.Name("dataset_name"))))):
        raise PlaceNotFound(script.line(loads), "if data_args.dataset_name is not None, with raw_datasets below it")
    script.before(
        loads,
        "raw_datasets, row_format = lora.raw_datasets(model_args, data_args, chat_args, training_args)",
        "if not lora.read_by_run_clm(row_format, data_args):",
        "    pass",
    )
    script.insert_before(loads, "el")
    return loads


def graft_configuration(script, folder):
    """ChatGLM, known to the Auto classes before they are asked for it."""
    place = script.stage(called("AutoConfig.from_pretrained"), "AutoConfig.from_pretrained()")
    script.before(place, "lora.register_chatglm(lora_args)")
    return place


def graft_encoding(script, folder):
    """Conversations as ids, which the maps of run_clm.py leave alone; before the weights are loaded."""
    place = script.stage(called("AutoTokenizer.from_pretrained"), "AutoTokenizer.from_pretrained()")
    script.after(
        place,
        "tokenizer = lora.with_chat_template(tokenizer, chat_args)",
        "raw_datasets = lora.chats_as_ids("
        "raw_datasets, row_format, tokenizer, config, chat_args, data_args, training_args)",
    )
    return place


def graft_model(script, folder):
    """The class for checkpoint code, and quantised loading."""
    call = called("AutoModelForCausalLM.from_pretrained")
    call = script.find(script.main, call, "AutoModelForCausalLM.from_pretrained()")
    script.replace(call.func.value, "lora.model_class(config)")
    own_line = script.line(call.args[-1]) > script.line(call)
    column = script.positions[call.args[-1]].start.column
    newline = script.module.default_newline + " " * column if own_line else " "
    script.insert_after(call.args[-1].value, f",{newline}**lora.quantization_options(lora_args, training_args)")
    return call


def graft_adapter(script, folder):
    """LoRA or another adapter, around the model in its final size."""
    place = script.stage(called("model.resize_token_embeddings"), "model.resize_token_embeddings()")
    script.after(place, "model = lora.adapted_model(model, lora_args, training_args)")
    return place


def graft_metric(script, folder):
    """Accuracy without a visit to the hub."""
    place = script.find(script.main, assigned("metric", called("evaluate.load")), "metric = evaluate.load()")
    script.replace(place.value, "lora.scores.TokenAccuracy(keep_in_memory=True)")
    return place


def graft_trainer(script, folder):
    """Our collator, checks and masked metrics in place of Trainer's arguments of these names."""
    place = script.statement_of(script.main, assigned("trainer", called("Trainer")), "trainer = Trainer()")
    call = script.find(place, called("Trainer"), "Trainer()")
    for name in ("data_collator", "compute_metrics", "preprocess_logits_for_metrics"):
        keyword = script.find(call, m.Arg(keyword=m.Name(name)), f"{name}= of Trainer()")
        if name == "data_collator":
            options = "**lora.trainer_options(model, tokenizer, row_format, lm_datasets, chat_args, training_args),"
            script.before(keyword, options)
        script.delete_lines(keyword, f"{name}= of Trainer()")
    script.after(place, "data_args = lora.with_sample_counts(data_args, trainer)")
    return place


def graft_training(script, folder):
    """A look at what was saved, a record of what it was made from, and no counts that are not known."""
    stage = script.stage(called("trainer.train"), "trainer.train()")
    saves = script.statement_of(stage, called("trainer.save_model"), "trainer.save_model()")
    script.after(saves, "lora.record_training(trainer, tokenizer, model_args, row_format)")
    logs = script.statement_of(stage, called("trainer.log_metrics"), 'trainer.log_metrics("train")')
    script.before(logs, "metrics = lora.complete(metrics)")
    return stage


def graft_evaluation(script, folder):
    """Perplexity over all trained tokens."""
    stage = script.stage(called("trainer.evaluate"), "trainer.evaluate()")
    logs = script.statement_of(stage, called("trainer.log_metrics"), 'trainer.log_metrics("eval")')
    script.before(logs, "metrics = lora.complete(metrics)")
    return stage


def graft_prediction(script, folder):
    """Answers by generation."""
    stage = script.stage(called("trainer.evaluate"), "trainer.evaluate()")
    script.after(stage, "lora.answer(trainer, tokenizer, raw_datasets, chat_args)")
    return stage


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
}


def grafted(path, folder) -> str:
    """The text of a run_clm.py with our additions, for a file in `folder`. Raises NotRunClm, PlaceNotFound."""
    script, last = Script(path), 1
    for point, graft_point in GRAFT_POINTS.items():
        try:
            last = max(last, script.line(graft_point(script, folder)))
        except PlaceNotFound as error:
            line, what = error.args
            raise PlaceNotFound(max(line, last), f"the place '{point}': {what}") from error
    return script.edited()


def changed_lines(old, new) -> int:
    """Lines removed plus lines added."""
    matcher = difflib.SequenceMatcher(a=old.splitlines(), b=new.splitlines(), autojunk=False)
    kept = sum(block.size for block in matcher.get_matching_blocks())
    return len(matcher.a) + len(matcher.b) - 2 * kept


def graft(arguments) -> int:
    path, out = Path(arguments.script), Path(arguments.output)
    if out.exists() and out.samefile(path):
        raise NotRunClm(f"{out} is the file to graft onto, which stays as it is: write to another one.")
    try:
        new = grafted(path, out.resolve().parent)
    except PlaceNotFound as error:
        line, what = error.args
        print(f"{path}, line {line}: not found from here on: {what}. Nothing is written.", file=sys.stderr)
        return 1
    compile(new, str(out), "exec")
    out.write_bytes(new.encode("utf-8"))
    old = path.read_bytes().decode("utf-8")
    print(f"{out}: {changed_lines(old, new)} lines changed of {len(old.splitlines())}, at {len(GRAFT_POINTS)} places.")
    return 0


# ------------------------------------------------------------------------------------------------------------ diff


def diff(arguments) -> int:
    if arguments.old and arguments.new:
        rows = changes(arguments.old, arguments.new)
        to_port = rows
    elif arguments.script:
        rows = comparison(arguments.script, arguments.against)
        to_port = [row for row in rows if row.verdict == TO_PORT]
    else:
        raise NotRunClm("Name a run_clm.py, or two of them with --old and --new.")
    print(table(rows))
    return int(bool(to_port))


def table(rows) -> str:
    """Rows under their stages, with the entry of docs/modifications.md that explains what is ours."""
    lines, stage = [], None
    for row in rows:
        if row.stage != stage:
            stage = row.stage
            lines.append("\n" + textwrap.fill(stage, 110, subsequent_indent="    "))
        entry = f" [{row.entry}]" if row.entry and row.verdict != SAME else ""
        lines.append(textwrap.fill(f"{row.verdict}{entry}: {row.what}", 110, **INDENTS))
    return "\n".join(lines or ["No change."]).strip()


INDENTS = {"initial_indent": "    ", "subsequent_indent": "        ", "break_long_words": False}


def main(words=None) -> int:
    """Run the command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("diff", help="compare by meaning")
    command.add_argument("script", nargs="?", help="a run_clm.py")
    command.add_argument("--against", default=OURS, help="what it is compared with; default: run_chatglm_lora.py")
    command.add_argument("--old", help="a run_clm.py, and")
    command.add_argument(
        "--new", help="a newer one: what changed between them, and which of our functions it concerns"
    )
    command.set_defaults(run=diff)
    command = commands.add_parser("graft", help="put our additions into a copy")
    command.add_argument("script", help="a run_clm.py")
    command.add_argument("-o", "--output", required=True, help="the file to write")
    command.set_defaults(run=graft)
    arguments = parser.parse_args(words)
    try:
        return arguments.run(arguments)
    except (NotRunClm, OSError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
