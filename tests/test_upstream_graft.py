"""A grafted run_clm.py: what is changed in it, and that it gives what run_chatglm_lora.py gives."""

import difflib
import importlib.util
import json
import re
import sys

import pytest
import upstream
from processes import forked_program
from stand_in import NEWEST, RUNS_TODAY, SHAPES, stand_in
from tiny import CHAT_FLAGS, COMMON, LINES, flat, losses, results, write_jsonl


def graft(*words):
    """Exit status of `upstream.py graft`."""
    return upstream.main(["graft", *map(str, words)])


@pytest.fixture(scope="session")
def grafted(tmp_path_factory):
    """The grafted stand-in of a date, as a file."""

    def grafted_file(date=NEWEST):
        folder = tmp_path_factory.mktemp("graft")
        (folder / "run_clm.py").write_text(stand_in(date))
        assert graft(folder / "run_clm.py", "-o", folder / f"grafted_{date}.py") == 0
        return folder / f"grafted_{date}.py"

    return grafted_file


@pytest.fixture
def run_grafted(tmp_path, monkeypatch, grafted):
    """Runs a grafted script's main() on a command line, like the fixture `run`."""

    def run_script(*flags, date=NEWEST):
        folder = tmp_path / f"grafted_{date}"
        spec = importlib.util.spec_from_file_location(f"grafted_{date}", grafted(date))
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, script)
        monkeypatch.setattr(sys, "path", sys.path[:])
        spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [spec.name, *COMMON.split(), "--output_dir", str(folder), *flat(flags)])
        script.main()
        return folder

    return run_script


def outcome(folder):
    """All that two runs must have in common: losses, metrics without timings, weights, answers, record."""
    weights = [folder / name for name in ("adapter_model.safetensors", "model.safetensors")]
    files = ("generated_predictions.jsonl", "generated_evaluations.jsonl", "provenance.json")
    timed = ("runtime", "per_second", "total_flos", "peak_memory_gib")
    return {
        "losses": losses(folder) if (folder / "trainer_state.json").exists() else None,
        "metrics": {
            name: {key: value for key, value in results(folder, name).items() if not key.endswith(timed)}
            for name in ("train", "eval", "predict", "all")
            if (folder / f"{name}_results.json").exists()
        },
        "weights": [path.read_bytes() for path in weights if path.exists()],
        **{name: untimed((folder / name).read_text()) for name in files if (folder / name).exists()},
    }


def untimed(text):
    """Without the seconds that the self-check took."""
    return re.sub(r'"seconds": [\d.]+', "", text)


@pytest.mark.parametrize("date", SHAPES)
def test_graft_changes_at_most_40_lines_of_every_shape_and_compiles(date, tmp_path, capsys):
    source, out = tmp_path / "run_clm.py", tmp_path / "out.py"
    source.write_text(stand_in(date))
    assert graft(source, "-o", out) == 0
    before, after = source.read_text().splitlines(), out.read_text().splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line[:2] in ("- ", "+ ")]
    assert len(changed) == 40
    assert f"40 lines changed of {len(before)}, at 14 places" in capsys.readouterr().out
    compile(out.read_text(), "out.py", "exec")


@pytest.fixture
def text_flags(llama, text_files):
    files = ["--train_file", text_files / "train.txt", "--validation_file", text_files / "valid.txt"]
    return ["--model_name_or_path", llama, *files, "--block_size", 16, "--do_train", "--do_eval", "--max_steps", 3]


@pytest.fixture
def chat_flags(llama, chats):
    files = ["--train_file", chats, "--validation_file", chats, "--test_file", chats, "--max_predict_samples", 2]
    lengths = ["--max_source_length", 64, "--max_target_length", 16]
    stages = ["--do_train", "--do_eval", "--do_predict", "--max_steps", 3]
    return ["--model_name_or_path", llama, *files, *CHAT_FLAGS, *lengths, *stages]


@pytest.mark.parametrize("lora", [[], ["--no_use_lora"]])
def test_grafted_script_equals_ours_on_text(lora, run, run_grafted, text_flags):
    ours = outcome(run(text_flags, lora))
    assert len(ours["losses"]) == 3 and ours["metrics"]["eval"]["perplexity"] > 1
    assert outcome(run_grafted(text_flags, lora)) == ours


@pytest.mark.parametrize("date", [RUNS_TODAY, NEWEST])
def test_grafted_script_equals_ours_on_conversations(date, run, run_grafted, chat_flags):
    ours = outcome(run(chat_flags, "--predict_with_generate", "--max_eval_samples", 2))
    assert ours["metrics"]["eval"]["eval_samples"] == 2 and ours["generated_predictions.jsonl"].count("\n") == 2
    assert outcome(run_grafted(chat_flags, "--predict_with_generate", "--max_eval_samples", 2, date=date)) == ours


@pytest.mark.parametrize(
    "flags",
    [
        ["--streaming"],
        ["--streaming", "--no_use_lora", "--max_train_samples", 3, "--pack_to_length", 96],
    ],
)
def test_grafted_script_equals_ours_on_streamed_and_packed_conversations(flags, run, run_grafted, chat_flags):
    assert outcome(run_grafted(chat_flags, flags)) == outcome(run(chat_flags, flags))


def test_grafted_script_equals_ours_on_chatglm(run, run_grafted, chatglm2, chats, text_files):
    model = ["--model_name_or_path", chatglm2, "--do_train", "--max_steps", 2]
    flags = [*model, "--train_file", chats, *CHAT_FLAGS, "--max_source_length", 64, "--max_target_length", 16]
    ours = outcome(run(flags, "--max_train_samples", 6))
    assert ours["metrics"]["train"]["train_samples"] > 6  # a row makes an example for each of its answers
    assert outcome(run_grafted(flags, "--max_train_samples", 6)) == ours
    flags = [*model, "--train_file", text_files / "train.txt", "--block_size", 24, "--overwrite_cache"]
    assert outcome(run_grafted(flags)) == outcome(run(flags))  # its tokenizer counts positions


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
def test_grafted_script_reads_text_that_upstream_does_not(streaming, run, run_grafted, llama, tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"text": line} for line in LINES])
    source = ["--dataset_name", tmp_path / "data"] if streaming else ["--train_file", tmp_path / "data/train.jsonl"]
    flags = ["--model_name_or_path", llama, *source, *streaming, "--block_size", 16, "--do_train", "--do_eval"]
    ours = outcome(run(flags, "--max_steps", 2))
    assert ("train_samples" in ours["metrics"]["train"]) is not bool(streaming)
    assert outcome(run_grafted(flags, "--max_steps", 2)) == ours


def test_grafted_script_only_answers(run, run_grafted, llama, chats):
    flags = [
        "--model_name_or_path",
        llama,
        "--test_file",
        chats,
        *CHAT_FLAGS,
        "--do_predict",
        "--max_target_length",
        8,
    ]
    ours = outcome(run(flags, "--max_source_length", 64))
    assert outcome(run_grafted(flags, "--max_source_length", 64)) == ours and ours["generated_predictions.jsonl"]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (["--train_file", "a.pdf"], "--train_file a.pdf: the file must end in"),
        (["--do_predict", "--test_file", "VALID"], "--do_predict answers questions"),
        (["--block_size", 0], "--block_size must be at least 1"),
        (["--lora_target_modules", "q_prj"], "the model has no layer 'q_prj'"),
        (["--adapter_name_or_path", "x", "--peft_type", "LORRA"], "--peft_type LORRA is not one of"),
    ],
)
def test_mistake_is_the_same_sentence_in_a_grafted_script(change, sentence, run_grafted, text_flags, text_files):
    change = [str(text_files / "valid.txt") if word == "VALID" else word for word in change]
    with pytest.raises(ValueError, match=sentence):
        run_grafted(text_flags, change)


def test_grafted_file_runs_as_a_script_with_a_file_of_arguments(grafted, run, text_flags, tmp_path):
    ours = outcome(run(text_flags, "--no_use_lora"))
    names = [str(word)[2:] for word in text_flags if str(word).startswith("--")]
    values = dict.fromkeys(names, True)
    for name, value in zip(text_flags, text_flags[1:], strict=False):
        if str(name).startswith("--") and not str(value).startswith("--"):
            values[name[2:]] = value if isinstance(value, int) else str(value)
    values |= {"no_use_lora": True, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1}
    values |= {"learning_rate": 1e-2, "save_strategy": "no", "output_dir": str(tmp_path / "by_file")}
    (tmp_path / "arguments.json").write_text(json.dumps(values))
    ended = forked_program(grafted(), tmp_path / "arguments.json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert outcome(tmp_path / "by_file") == ours


def renamed(**names):
    """The newest stand-in with other names for its variables; keywords of calls keep theirs."""
    text = stand_in(NEWEST)
    for old, new in names.items():
        text = re.sub(rf"(?<!\.)\b{old}\b(?!=[^=])", new, text)
    return text


def changed(*changes):
    """The newest stand-in with (old, new) texts of an owner."""
    text = stand_in(NEWEST)
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


NAMES = {
    "model_args": "margs", "data_args": "dargs", "training_args": "targs", "raw_datasets": "rows", "config": "conf",
    "tokenizer": "tok", "model": "net", "trainer": "coach", "metrics": "scores", "parser": "reader",
    "train_dataset": "train_rows", "train_result": "result",
}  # fmt: skip
TRAINER = "    trainer = Trainer(\n"
PARSED = "        model_args, data_args, training_args = parser.parse_args_into_dataclasses()\n"
YAML = """    elif sys.argv[1].endswith(".yaml"):
        model_args, data_args, training_args = parser.parse_yaml_file(sys.argv[1])
"""
LOAD = "        model = AutoModelForCausalLM.from_pretrained("
CARD = "        trainer.create_model_card(**kwargs)\n"
LOGS = '        trainer.log_metrics("train", metrics)\n        trainer.save_metrics("train", metrics)\n'


@pytest.mark.parametrize(
    "text, line",
    [
        (renamed(**NAMES), "    coach, guards = lora.guarded_trainer(Trainer, margs, chat_args, lora_args, rows, "),
        (renamed(data_args="d"), "    d = lora.with_sample_counts(d, trainer)"),
        (renamed(model_args="margs"), "        lora.saved(trainer, guards, margs, row_format)"),
        (renamed(config="conf"), "    conf = lora.prefix_tuning.with_prefix(conf, lora_args)"),
        (renamed(tokenizer="tok"), "    tok = lora.with_chat_template(tok, chat_args)"),
        (renamed(metrics="numbers"), "        numbers = lora.complete(numbers)"),
        (changed((TRAINER, TRAINER + "        callbacks=[Mine()],\n")), "        callbacks=[Mine()],"),
        (changed(("    else:\n" + PARSED, YAML + "    else:\n" + PARSED)), "lora.parsed_file(parser, sys.argv[1])"),
        (
            changed(("json_file=os.path.abspath(sys.argv[1])", "sys.argv[1], allow_extra_keys=True")),
            "lora_args, training_args = lora.parsed_file(parser, sys.argv[1])",
        ),
        (
            changed(
                ("def main():", "@dataclass\nclass Own:\n    own: int = 1\n\n\ndef main():"),
                ("DataTrainingArguments, TrainingArguments))", "DataTrainingArguments, Own, TrainingArguments))"),
                ("data_args, training_args = parser.parse_args", "data_args, own, training_args = parser.parse_args"),
                ("data_args, training_args = parser.parse_json", "data_args, own, training_args = parser.parse_json"),
            ),
            "own, chat_args, lora_args, training_args = lora.parsed_words(parser)",
        ),
        (
            changed(
                ("def main():", "@dataclass\nclass Mine(TrainingArguments):\n    mine: int = 1\n\n\ndef main():"),
                ("DataTrainingArguments, TrainingArguments))", "DataTrainingArguments, Mine))"),
            ),
            "HfArgumentParser((ModelArguments, DataTrainingArguments, *lora.ADDED_ARGUMENTS, Mine))",
        ),
        (
            changed((LOAD, f"        if training_args.bf16:\n    {LOAD}'a')\n{LOAD}")),
            "            model = lora.model_class(config).from_pretrained('a', **lora.loading_options(",
        ),
        (changed((LOGS, LOGS.replace("metrics)", "scores)")), ("metrics = train_result", "scores = train_result")),
         "        scores = lora.complete(scores)"),
        (changed(("        data_collator=default_data_collator,\n", "")), "lora.guarded_trainer("),
        (changed(("    # Training\n", "    trainer.own = 1\n    # Training\n")), "    trainer.own = 1"),
        (stand_in(NEWEST).replace("    ", "\t"), "\tconfig = lora.prefix_tuning.with_prefix(config, lora_args)"),
        ("\ufeff" + stand_in(NEWEST), "lora.launching.end_processes()"),
        (changed((CARD, CARD + "    return 0\n")),
         "    lora.launching.end_processes()\n    return 0"),
    ],
)  # fmt: skip
def test_what_an_owner_changed_is_taken_over(text, line, tmp_path):
    (tmp_path / "run_clm.py").write_text(text, encoding="utf-8")
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 0
    result = (tmp_path / "out.py").read_text(encoding="utf-8")
    compile(result.removeprefix("\ufeff"), "out.py", "exec")
    assert line in result and result.startswith("\ufeff") == text.startswith("\ufeff")
    assert f"\n{line}" in result or line[0] not in " \t"


FIELD = "    keep_linebreaks: bool = field(default=True"
CHECK = "    def __post_init__(self):\n        if self.streaming:\n"
METRIC = 'metric = evaluate.load("accuracy", cache_dir=model_args.cache_dir)'


@pytest.mark.parametrize(
    "changes, what",
    [
        ([(TRAINER, TRAINER + "        compute_loss_func=mine,\n")], "compute_loss_func="),
        ([("data_collator=default_data_collator", "data_collator=Padder()")], "data_collator=Padder()"),
        ([("compute_metrics=compute_metrics if", "compute_metrics=f1 if")], "compute_metrics=f1"),
        ([(METRIC, 'metric = evaluate.load("f1")')], 'evaluate.load("f1")'),
        ([("metric.compute(predictions=preds, references=labels)", "my_scores(preds, labels)")], "my_scores"),
        ([("logits.argmax(dim=-1)", "torch.softmax(logits, -1)")], "torch.softmax"),
        ([(CHECK, CHECK.replace("        if", "        self.suffix = self.train_file\n        if"))], "self.suffix"),
        ([(CHECK, CHECK.replace("        if", "        look(self.train_file)\n        if"))], "look(self.train_file)"),
        ([(FIELD, "    prompt_column: str = None\n" + FIELD)], "prompt_column"),
        ([(FIELD, "    no_use_lora: bool = False\n" + FIELD)], "no_use_lora"),
        ([(FIELD, '    rank: int = field(default=8, metadata={"aliases": ["--lora_r"]})\n' + FIELD)], "--lora_r"),
        ([("    overwrite_cache: bool", "    anew: bool")], "class DataTrainingArguments"),
        ([("    # Logging\n", "    lora = 1\n    # Logging\n")], "lora = 1"),
        ([("    # Logging\n", "    lora_args = {}\n    # Logging\n")], "lora_args = {}"),
        ([("def main():", "def helper(guards):\n    return guards\n\n\ndef main():")], "def helper(guards)"),
        ([("import evaluate\n", "import evaluate\nfrom peft import LoraConfig\n")], "from peft"),
        ([("def main():", "def get_peft_model(model):\n    return model\n\n\ndef main():")], "def get_peft_model"),
        ([("    # The Trainer\n", "    model.add_adapter(1)\n    # The Trainer\n")], "model.add_adapter"),
        ([("config=config,", "config=config,\n            device_map='auto',")], "device_map="),
        ([("trainer.save_model()", 'trainer.save_model("there")')], "save_model("),
        ([("resume_from_checkpoint=checkpoint", "trial=None")], "trial=None"),
        ([(TRAINER, "    trainer = Trainer(model)\n" + TRAINER)], "    trainer = Trainer("),
        ([("model=model,\n        args=training_args,", "model,\n        training_args,")], "   model,"),
        ([("s = trainer.evaluate()\n", "s = trainer.evaluate()\n        trainer.evaluate()\n")], "   trainer"),
        ([(PARSED, PARSED.replace("model_args, data_args, training_args", "arguments"))], "arguments = parser"),
        ([(PARSED, PARSED.replace("model_args", "m_args"))], "m_args, data_args"),
        ([('raise ValueError("no tokenizer")', 'print("no tokenizer")')], "lora.with_chat_template"),
        ([("    # The Trainer\n", "    del tokenizer\n    # The Trainer\n")], "lora.answer"),
        ([("model.get_input_embeddings().weight.shape[0]", "len(model.get_input_embeddings().weight)")], "len(model."),
        ([('trainer.log_metrics("eval", metrics)', 'trainer.log_metrics("eval", dict(metrics))')], "dict(metrics)"),
    ],
)  # fmt: skip
def test_what_would_break_or_be_replaced_is_refused_by_name_and_line(changes, what, tmp_path, capsys):
    text = changed(*changes)
    (tmp_path / "run_clm.py").write_text(text)
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 1 and not (tmp_path / "out.py").exists()
    message = capsys.readouterr().err
    line = int(re.match(r".*run_clm.py, line (\d+): ", message)[1])
    assert message.endswith(". Nothing is written.\n") and message.count("\n") == 1
    if what.startswith("lora."):  # the line at which ours would stand, and the name that is missing there
        assert "tokenizer need not be bound here" in message
    else:
        assert what in text.splitlines()[line - 1]


@pytest.mark.parametrize(
    "old, new, place",
    [
        ("HfArgumentParser((", "MyParser((", "'arguments': HfArgumentParser"),
        ("train_dataset=train_dataset if", "data=train_dataset if", None),
        ("        args=training_args,\n", "", "'trainer': args= of Trainer"),
        ("trainer = Trainer(", "trainer = Seq2SeqTrainer(", "'trainer': trainer = Trainer"),
        ("model.resize_token_embeddings(", "model.resize(", "'adapter': model.resize_token_embeddings"),
        ("metrics = trainer.evaluate()", "metrics = {}", "'evaluation': trainer.evaluate"),
    ],
)
def test_place_that_is_not_found_is_named_and_nothing_is_written(old, new, place, tmp_path, capsys):
    text = stand_in(NEWEST)
    (tmp_path / "run_clm.py").write_text(text.replace(old, new))
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 1
    message = capsys.readouterr().err
    pattern = "data= of Trainer" if place is None else "not found from here on: the place " + re.escape(place)
    line = int(re.search(r"run_clm.py, line (\d+): " + pattern, message)[1])
    broken = text[: text.index(old)].count("\n") + 1
    assert broken - 130 < line <= broken and not (tmp_path / "out.py").exists()


def test_encoding_that_a_file_names_is_kept(tmp_path):
    text = "# -*- coding: latin-1 -*-\n" + stand_in(NEWEST).replace("# Evaluation", "# Auswertung, g\u00e4nzlich")
    (tmp_path / "run_clm.py").write_bytes(text.encode("latin-1"))
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 0
    after = (tmp_path / "out.py").read_bytes()
    assert "g\u00e4nzlich".encode("latin-1") in after and compile(after, "out.py", "exec")


@pytest.mark.parametrize(
    "source, words",
    [
        (stand_in(NEWEST).replace("# Evaluation", "# \u00e4").encode("latin-1"), "line {line}: "),
        (stand_in(NEWEST).encode("utf-16"), "line 1: "),
        (b"# coding: nonsense\n" + stand_in(NEWEST).encode(), "unknown encoding: nonsense"),
        (stand_in(NEWEST).replace("# Evaluation", "if:").encode(), "line {line}: this is no Python"),
    ],
)
def test_file_that_python_cannot_read_is_refused_with_the_line(source, words, tmp_path, capsys):
    line = stand_in(NEWEST)[: stand_in(NEWEST).index("# Evaluation")].count("\n") + 1
    (tmp_path / "run_clm.py").write_bytes(source)
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 2 and not (tmp_path / "out.py").exists()
    assert words.format(line=line) in capsys.readouterr().err


@pytest.fixture
def run_owned(tmp_path, monkeypatch):
    """Runs the grafted main() of a script that its owner changed, like `run`."""

    def run_script(text, *flags, output="owned"):
        source, out = tmp_path / "run_clm.py", tmp_path / "owned.py"
        source.write_text(text)
        assert graft(source, "-o", out) == 0
        spec = importlib.util.spec_from_file_location("owned", out)
        script = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "owned", script)
        monkeypatch.setattr(sys, "path", sys.path[:])
        spec.loader.exec_module(script)
        words = ["owned", *COMMON.split(), "--output_dir", str(tmp_path / output), *flat(flags)]
        monkeypatch.setattr(sys, "argv", words)
        script.main()
        return tmp_path / output

    return run_script


def test_grafted_script_with_other_names_gives_what_ours_gives(run, run_owned, chat_flags):
    assert outcome(run_owned(renamed(**NAMES), chat_flags)) == outcome(run(chat_flags))


STOPS = """class Stops(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and args.resume_from_checkpoint is None:
            os.kill(os.getpid(), 15)


def main():"""


def test_grafted_script_stops_on_a_signal_and_goes_on_with_the_last_checkpoint(run, run_owned, chat_flags):
    text = changed(("def main():", STOPS), (TRAINER, TRAINER + "        callbacks=[Stops()],\n"))
    flags = [*chat_flags, "--resume_from_checkpoint", "last"]
    with pytest.raises(SystemExit) as stopped:
        run_owned(text, flags)
    assert stopped.value.code == 75
    folder = run_owned(text, flags)
    ours = outcome(run(chat_flags))
    assert outcome(folder)["weights"] == ours["weights"] and outcome(folder)["losses"] == ours["losses"]
    assert not (folder / "training.lock").exists()


def test_grafted_script_trains_chatglms_own_prefix(run, run_grafted, chatglm2, chats):
    flags = ["--model_name_or_path", chatglm2, "--train_file", chats, *CHAT_FLAGS, "--do_train", "--max_steps", 2]
    flags += ["--max_source_length", 64, "--max_target_length", 16, "--pre_seq_len", 4]
    assert outcome(run_grafted(flags)) == outcome(run(flags))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_that_are_not_grafted_stay_as_they_are(newline, tmp_path):
    text = stand_in(NEWEST).replace("\n", newline).replace("# Evaluation", "# Evaluation \u00fc \u2028\t ")
    (tmp_path / "run_clm.py").write_bytes(text.encode())
    assert graft(tmp_path / "run_clm.py", "-o", tmp_path / "out.py") == 0
    before, after = (tmp_path / name for name in ("run_clm.py", "out.py"))
    before, after = before.read_bytes().split(b"\n"), after.read_bytes().split(b"\n")
    kept = difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_matching_blocks()
    assert len(before) + len(after) - 2 * sum(block.size for block in kept) == 40
    assert {line.endswith(b"\r") for line in after[:-1]} == {newline == "\r\n"}


@pytest.mark.parametrize(
    "text", ["def main(:", "x = 1", stand_in(NEWEST).replace("AutoModelForCausalLM", "AutoModel")]
)
def test_file_that_is_no_run_clm_is_refused(text, tmp_path, capsys):
    (tmp_path / "other.py").write_text(text)
    assert graft(tmp_path / "other.py", "-o", tmp_path / "out.py") == 2 and not (tmp_path / "out.py").exists()
    assert upstream.main(["diff", str(tmp_path / "other.py")]) == 2
    assert "other.py" in capsys.readouterr().err


def test_grafted_file_is_not_grafted_again_and_the_source_is_not_overwritten(grafted, tmp_path):
    once = grafted()
    assert (
        graft(once, "-o", tmp_path / "twice.py") == 2
        and graft(once.parent / "run_clm.py", "-o", once.parent / "run_clm.py") == 2
    )
    assert (once.parent / "run_clm.py").read_text() == stand_in(NEWEST)
