"""scripts/upstream.py diff: stand-ins for run_clm.py held against ours and against each other."""

import ast
import re

import pytest
import upstream
from following import grafting, reading, tables
from stand_in import NEWEST, OLDEST, SHAPES, stand_in
from tiny import ROOT


@pytest.fixture
def diff(tmp_path, capsys):
    """Exit status and table of a comparison with ours of text, or of two texts with each other."""

    def compared(text, newer=None):
        (tmp_path / "run_clm.py").write_text(text)
        words = [str(tmp_path / "run_clm.py")]
        if newer:
            (tmp_path / "newer.py").write_text(newer)
            words = ["--old", *words, "--new", str(tmp_path / "newer.py")]
        status = upstream.main(["diff", *words])
        # A row may be wrapped onto several lines.
        return status, re.sub(r"\n {8}", " ", capsys.readouterr().out)

    return compared


@pytest.mark.parametrize("date", [*SHAPES[::6], NEWEST])
def test_nothing_is_to_be_ported_from_any_shape_until_today(date, diff):
    status, table = diff(stand_in(date))
    assert status == 0 and not re.search(r"^    to port", table, re.M)
    assert re.search(r"\nNothing to port: \d+ facts are the same, .*\n$", table)


def test_table_says_which_side_has_something_alone_and_which_entry_explains_it(diff):
    _, table = diff(stand_in(NEWEST))
    stages = re.findall(r"^(\w[\w ]*)$", table, re.M)
    order = [stage.name for stage in tables.STAGES]
    assert stages == sorted(stages, key=order.index) and {"data", "arguments", "metrics"} < set(stages)
    assert "    only upstream [Model]: AutoModelForCausalLM.from_pretrained(from_tf)\n" in table
    assert re.search(r"only here \[Arguments\]: .*--prompt_column, .*--use_lora", table)
    assert "    different [Encoding]: its place in main\n" in table
    assert "    different [Versions]: transformers>=4.57.0.dev0 (here: 5.17), datasets" in table
    assert "ours" not in table and "same:" not in table


@pytest.mark.parametrize(
    "old, new, row",
    [
        (
            "    streaming: bool = field(default=False",
            "    shuffle: bool = field(default=False)\n    streaming: bool = field(default=False",
            "--shuffle",
        ),
        (
            '| None = field(default=5, metadata={"help": "held',
            '| None = field(default=10, metadata={"help": "held',
            "--validation_split_percentage is int, 10 upstream (here: int, 5)",
        ),
        ('"float16", "float32"]', '"float16", "float32", "float8"]', "--dtype is str, None, one of"),
        ("block_size: int", "block_size: float", "--block_size is float, None upstream (here: int, None)"),
        ('check_min_version("4.57.0.dev0")', 'check_min_version("5.40.0")', "transformers>=5.40.0 (here: 5.17)"),
        ('"use_fast": ', '"gguf_file": None,\n        "use_fast": ', "AutoTokenizer.from_pretrained(gguf_file)"),
        (
            "trainer.save_state()",
            'trainer.save_state()\n        trainer.save_metrics("speed", metrics)',
            "save_metrics speed",
        ),
        ('metrics["perplexity"] = ', 'metrics["bits_per_byte"] = metrics["perplexity"] = ', "metric bits_per_byte"),
        (
            "    # Only where ids",
            '    if training_args.fp16 and training_args.bf16:\n        raise TypeError("both")\n    # Only where ids',
            "TypeError over bf16 fp16",
        ),
        ("    set_seed(", "    datasets.disable_caching()\n    set_seed(", "datasets.disable_caching"),
        (
            "    set_seed(",
            "    torch.use_deterministic_algorithms(True)\n    set_seed(",
            "torch.use_deterministic_algorithms",
        ),
        (
            "import evaluate\n",
            "import evaluate\nfrom accelerate import Accelerator\nA = Accelerator()\n",
            "Accelerator",
        ),
        ("    set_seed(", "    training_args.bf16 = True\n    set_seed(", "training_args.bf16 = ..."),
        ("    set_seed(", "    setattr(training_args, 'bf16', True)\n    set_seed(", "training_args.bf16 = ..."),
        ("    set_seed(", '    os.environ["A"] = "1"\n    set_seed(', "os.environ['A'] = ..."),
        ("logger = logging", "torch.backends.cuda.matmul.allow_tf32 = True\nlogger = logging", "torch.backends.cuda"),
        ("def main():", "def helper():\n    torch.compile(1)\n\n\ndef main():", "torch.compile"),
        ("def main():\n", "def helper():\n    pass\n\n\ndef main():\n    helper()\n", "def helper"),
        ("trainer = Trainer(", "trainer = transformers.Seq2SeqTrainer(", "transformers.Seq2SeqTrainer"),
        ("def main():\n", "class Mine(Trainer):\n    pass\n\n\ndef main():\n    Mine\n", "class Mine(Trainer)"),
        ("    overwrite_cache: bool", "    anew: bool", "--overwrite_cache is gone upstream"),
    ],
)
def test_what_only_upstream_has_is_to_be_ported(old, new, row, diff):
    text = stand_in(NEWEST)
    assert text.count(old) == 1
    status, table = diff(text.replace(old, new))
    assert status == 1 and re.search(r"to port: .*" + re.escape(row), table)
    assert re.search(r"\nTo port: \d+, at [a-z, ]+\.\n$", table)


def test_stage_that_upstream_moves_is_to_be_ported(diff):
    text = stand_in(NEWEST)
    seed = "    # Seed of all that follows.\n    set_seed(training_args.seed)\n"
    moved = text.replace(seed, "").replace("    # The Trainer\n", seed + "    # The Trainer\n")
    status, table = diff(moved)
    assert status == 1 and "seed\n    to port: its place in main" in table


def test_two_versions_are_compared_by_stage_with_our_functions(diff):
    status, table = diff(stand_in(20250729), stand_in(NEWEST))
    assert status == 1
    assert "versions" in table and "removed: transformers: 4.40.0.dev0\n    added: transformers: 4.57.0.dev0" in table
    assert re.search(r"added: --dtype: str, None, one of \['auto'", table) and "removed: --torch_dtype" in table
    assert "model (ours: loaded_model, model_class, " in table
    assert "training (ours: train, " in table and "removed: checkpoint = last_checkpoint" in table
    assert "grouping" not in table and "evaluation (" not in table


def test_changed_steps_belong_to_the_stage_that_they_stand_in(diff):
    _, table = diff(stand_in(OLDEST), stand_in(20230518))
    assert table.startswith("encoding (ours: chats_as_ids, text_blocks, ")
    assert re.findall(r"^    (?:added|removed).*", table, re.M) == ["    removed: total_length >= block_size"]


def test_words_and_layout_are_no_change_between_versions(diff):
    text = stand_in(NEWEST)
    other = text.replace("a new config", "a config that is new").replace("# The Trainer", "# Trainer")
    assert other != text and diff(text, other) == (0, "No change.\n")


def test_every_function_that_the_table_of_stages_names_is_there():
    tree = reading.parsed(ROOT / "run_chatglm_lora.py")
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(tables.STAGE_OF_FUNCTION) - defined == {"split_streaming_dataset"}
    assert {function for function, _ in tables.ERRORS.values()} - defined == {""}


def test_modifications_list_the_graft_points_in_the_order_of_the_graft():
    text = (ROOT / "docs/modifications.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", text.partition("## Graft points")[2].partition("\n## ")[0], re.M)
    assert listed == list(grafting.GRAFT_POINTS)


def test_every_entry_of_the_tables_is_a_section_of_modifications():
    sections = re.findall(r"^## ([\w ,]+)", (ROOT / "docs/modifications.md").read_text(), re.M)
    entries = {stage.entry for stage in tables.STAGES} | {entry for _, _, entry in tables.EXPLAINED}
    entries |= {entry for _, entry in tables.ERRORS.values() if entry}
    assert entries <= {section.strip() for section in sections}
