"""Answers by generation: what is written, in which order, after a stop, and with which scores."""

import json
import math

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny import CHAT_FLAGS, CHATS, results, write_jsonl
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import chatglm  # noqa: F401
from finetuning import prediction
from finetuning.prediction import answer_scores
from run_chatglm_lora import ChatArguments, encoded_chats


def lines(folder, name="generated_predictions.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def flags(chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--test_file", chats, CHAT_FLAGS, "--do_predict"]
    return [*flags, "--max_target_length", 4, "--per_device_eval_batch_size", 3]


def test_stopped_run_keeps_its_answers_and_the_same_command_goes_on(run, flags, monkeypatch, tmp_path):
    whole = lines(run(flags, output="whole"))
    generated, calls = prediction.generated_ids, []

    def stopped_after_two_batches(model, prompts, *args, **kwargs):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generated(model, prompts, *args, **kwargs)

    monkeypatch.setattr(prediction, "generated_ids", stopped_after_two_batches)
    with pytest.raises(KeyboardInterrupt):
        run(flags, output="stopped")
    folder = tmp_path / "stopped"
    assert len(lines(folder)) == 6 and all(line in whole for line in lines(folder))
    with open(folder / "generated_predictions.jsonl", "a") as file:
        file.write('{"prompt": "half a li')
    run(flags, output="stopped")
    assert lines(folder) == whole and sum(calls) == 3 + len(CHATS)
    assert sorted(path.name for path in folder.glob("generated*")) == ["generated_predictions.jsonl"]


def test_other_flags_begin_anew(run, flags, monkeypatch, tmp_path):
    monkeypatch.setattr(prediction.AnswerFile, "finish", lambda self, lines: None)
    run(flags)
    seen = []
    monkeypatch.setattr(prediction.logger, "info", seen.append)
    run(flags)
    assert any("16 of 16 rows were answered before" in message for message in seen)
    seen.clear()
    run(flags, "--num_beams", 2)
    assert not any("answered before" in message for message in seen)


def test_sampling_flags_reach_generate(run, flags):
    greedy, drawn, again = (
        lines(run(flags, "--seed", 5, more, output=f"out{i}"))
        for i, more in enumerate([[], *[["--do_sample", "--temperature", 50, "--top_p", 1]] * 2])
    )
    assert drawn != greedy and drawn == again


def test_what_cannot_be_answered_or_compared_is_said_before_the_model_is_loaded(run, flags, chatglm3, chats, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": None, "response": "b"}] * 2)
    with pytest.raises(
        ValueError, match="All 2 test rows are bad; the first: .*bad.jsonl, line 1: there is no question"
    ):
        run(flags, "--test_file", bad, "--skip_bad_rows")
    training = ["--model_name_or_path", chatglm3, "--train_file", chats, "--do_train", "--max_steps", 2]
    with pytest.raises(ValueError, match="acuracy: an evaluation here has no such number, .* mean 'accuracy'"):
        run(training, CHAT_FLAGS, "--metric_for_best_model", "eval_acuracy")
    with pytest.raises(ValueError, match="--resume_from_checkpoint goes on with a training: add --do_train, or pass"):
        run(flags, "--resume_from_checkpoint", "last")


def test_answers_of_the_validation_rows_are_scored_with_the_evaluation(run, chatglm3, chats):
    flags = ["--model_name_or_path", chatglm3, "--validation_file", chats, CHAT_FLAGS, "--do_eval"]
    folder = run(flags, "--predict_with_generate", "--max_target_length", 4, "--max_eval_samples", 3)
    metrics = results(folder, "eval")
    assert {"eval_bleu-4", "eval_rouge-l", "eval_exact_match", "eval_token_loss", "perplexity"} <= metrics.keys()
    assert len(lines(folder, "generated_evaluations.jsonl")) == 3
    assert results(folder, "all")["eval_bleu-4"] == metrics["eval_bleu-4"]


@pytest.mark.parametrize("name", ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint", "llama"])
def test_one_prompt_for_training_evaluation_and_prediction(name, request, tmp_path):
    """The last answer's example begins with the very prompt that is answered, in every generation's format."""
    from finetuning import chat_rows
    from run_chatglm_lora import DataTrainingArguments, TrainingArguments

    rows = [{"messages": [
        {"role": "system", "content": "short"}, {"role": "user", "content": "who paints"},
        {"role": "assistant", "content": "the baker"}, {"role": "user", "content": "and then"},
        {"role": "assistant", "content": "a heron"},
    ]}]  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = ChatArguments(predict_with_generate=True)
    files = {split: [path] for split in ("train", "validation", "test")}
    raw, row_format = chat_rows.read(files, args, streaming=False, cache_dir=str(tmp_path))
    training_args = TrainingArguments(str(tmp_path), do_train=True, do_eval=True, do_predict=True, use_cpu=True)
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(name))
    data = encoded_chats(raw, row_format, tokenizer, args, DataTrainingArguments(), training_args)
    train, validation, test, questions = (data[split][-1] for split in ("train", "validation", "test", "questions"))
    prompt = test["input_ids"]
    assert questions["input_ids"] == prompt and validation["input_ids"] == train["input_ids"]
    assert train["input_ids"][: len(prompt)] == prompt
    assert set(train["labels"][len(prompt) - 1 : len(prompt)]) == {-100} and train["labels"][len(prompt)] != -100
    assert test["prompt"] == "and then" and test["reference"] == "a heron"
    assert "heron" not in tokenizer.decode(prompt)


def test_scores_are_known_values_in_chinese():
    right = {"prediction": "今天天气很好", "reference": "今天天气很好 "}
    other = {"prediction": "今天下雨", "reference": "今天天气很好"}
    empty = {"prediction": "", "reference": "好"}
    perfect = answer_scores([right])
    assert perfect["exact_match"] == 1
    assert all(math.isclose(perfect[name], 100, rel_tol=1e-6) for name in ("bleu-4", "rouge-1", "rouge-2", "rouge-l"))
    # jieba: 今天 下雨 against 今天天气 很 好, or 今天 天气 很 好; both share no pair of words
    scores = answer_scores([other])
    assert scores["exact_match"] == 0 and scores["rouge-2"] == 0 and 0 < scores["bleu-4"] < 40
    mixed = answer_scores([right, empty, {"prediction": "好", "reference": None}])
    assert mixed["exact_match"] == 0.5 and math.isclose(mixed["rouge-l"], 50, rel_tol=1e-6)
    assert answer_scores([{"prediction": "好", "reference": None}]) == {}


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_a_trained_prompt_or_prefix_reaches_generation_with_a_cache(kind):
    """PEFT below 0.22 lost it with transformers 5.24: the prefix was not seen at all, the prompt at every step."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).eval()
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    for weights in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(weights, std=2)
    adapted = prediction.with_cache_for_peft(adapted)
    expected = ids = torch.tensor([[5, 9, 7, 11]])
    for _ in range(6):
        with torch.no_grad():
            logits = adapted(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
        expected = torch.cat((expected, logits[:, -1:].argmax(-1)), dim=1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(adapted.generate(input_ids=ids, **options), expected)


@pytest.mark.parametrize("metric", ["perplexity", "bleu-4"])
def test_best_model_is_told_by_perplexity_or_by_answers(run, llama, chats, metric):
    flags = ["--model_name_or_path", llama, "--train_file", chats, "--validation_file", chats, CHAT_FLAGS]
    flags += ["--do_train", "--do_eval", "--max_steps", 4, "--max_target_length", 8, "--max_source_length", 60]
    flags += ["--eval_strategy", "steps", "--eval_steps", 2, "--save_strategy", "steps", "--save_steps", 2]
    flags += ["--load_best_model_at_end", "--metric_for_best_model", metric, "--max_eval_samples", 4]
    if metric == "bleu-4":
        with pytest.raises(ValueError, match="--metric_for_best_model bleu-4 scores answers: add --do_eval --predict"):
            run(flags, output="alone")
        flags += ["--predict_with_generate"]
    state = json.loads((run(flags) / "trainer_state.json").read_text())
    values = {entry["step"]: entry[f"eval_{metric}"] for entry in state["log_history"] if f"eval_{metric}" in entry}
    best = min if metric == "perplexity" else max
    assert set(values) >= {2, 4} and state["best_metric"] == best(values[2], values[4])


def test_answers_are_generated_at_every_nth_evaluation(run, llama, chats):
    flags = ["--model_name_or_path", llama, "--train_file", chats, "--validation_file", chats, CHAT_FLAGS]
    flags += ["--do_train", "--do_eval", "--max_steps", 4, "--max_target_length", 4, "--max_source_length", 60]
    flags += ["--eval_strategy", "steps", "--eval_steps", 1, "--predict_with_generate", "--max_eval_samples", 2]
    flags += ["--eval_generate_every", 2]
    log = json.loads((run(flags) / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_bleu-4" in entry] == [2, 4]
    with pytest.raises(ValueError, match="bleu-4 needs answers at each evaluation: leave --eval_generate_every out"):
        run(flags, "--metric_for_best_model", "bleu-4", output="best")
