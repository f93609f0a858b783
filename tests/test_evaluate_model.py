"""scripts/evaluate_model.py. Skipped without lm-evaluation-harness: too much for the lock of the tests."""

import json
import sys
from functools import cache

import pytest
import torch
from answering.opening import opened
from tiny import write_jsonl

from finetuning.encoding import conversation_ids, prompt_ids


pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")
pytestmark = pytest.mark.slow
import evaluate_model  # noqa: E402
import lm_eval.tasks  # noqa: E402
from answering.harness import Evaluated  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402


ROWS = [{"question": f"{i} and 1?", "answer": f"it is {i + 1}\n#### {i + 1}"} for i in range(1, 4)]
CHECKPOINTS = ["chatglm1", "chatglm2", "chatglm3", "glm4_checkpoint"]


@pytest.fixture(scope="module", autouse=True)
def one_list_of_tasks():
    """lm_eval's list of tasks is read once: that takes 13 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks, "TaskManager", cache(lm_eval.tasks.TaskManager))
        yield


def choice_scores(model, tokenizer, question, choices):
    """The log-probability of each choice as a trained answer."""
    asked = [{"role": "user", "content": question}]
    prompt, scores = prompt_ids(tokenizer, asked), []
    for choice in choices:
        ids = conversation_ids(tokenizer, [*asked, {"role": "assistant", "content": choice}])
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
        scores.append(sum(found[place - 1, ids[place]].item() for place in range(len(prompt), len(ids))))
    return scores


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_choices_are_scored_as_trained_answers(checkpoint, request):
    model, tokenizer = opened(request.getfixturevalue(checkpoint))
    expected = choice_scores(model, tokenizer, "1 + 1 = ?", "AB")
    harness = Evaluated(model, tokenizer, 1)
    text = harness.apply_chat_template([{"role": "user", "content": "1 + 1 = ?"}])
    requests = [Instance("loglikelihood", {}, (text, choice), number) for number, choice in enumerate("AB")]
    found = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    assert found == pytest.approx(expected, abs=1e-3)


def data_set(folder, config, **splits):
    """A data set in the form that the hub has it."""
    folder.mkdir()
    for name, rows in splits.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    files = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")
    return folder


def evaluated(monkeypatch, tmp_path, *words):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, words), "--output", str(out)])
    evaluate_model.main()
    return json.loads(out.read_text())


def test_folder_with_a_subject_of_ceval_gives_the_share_of_right_choices(chatglm3, tmp_path, monkeypatch, capsys):
    rows = [
        {"id": i, "question": f"{i} + 1 = ?", "A": str(i), "B": str(i + 1), "C": "0", "D": "7", "answer": "B"}
        for i in range(1, 6)
    ]
    folder = data_set(tmp_path / "ceval", "law", val=rows, dev=rows[:1], test=rows[:1])
    found = evaluated(monkeypatch, tmp_path, chatglm3, folder, "--task", "ceval-valid_law", "--num_fewshot", 0)
    model, tokenizer = opened(chatglm3)
    about = "以下是中国关于法学的单项选择题，请选出其中的正确答案。\n\n"
    texts = ["{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n答案：".format(**row) for row in rows]
    right = 0
    for text in texts:
        scores = choice_scores(model, tokenizer, about + text, "ABCD")
        right += scores.index(max(scores)) == 1
    assert found["ceval-valid_law"]["acc,none"] == right / 5
    assert "ceval-valid_law" in capsys.readouterr().out


def test_answers_to_gsm8k_are_generated_to_the_model_s_stop_ids(chatglm3, tmp_path, monkeypatch):
    folder = data_set(tmp_path / "gsm8k", "main", train=ROWS, test=ROWS)
    asked = []
    model, tokenizer = opened(chatglm3)

    def generate(self, *args, **options):
        asked.append(options["input_ids"][0].tolist())
        assert set(tokenizer.stop_token_ids) <= set(self.generation_config.eos_token_id)
        said = tokenizer.encode("#### 3", add_special_tokens=False)
        return torch.cat((options["input_ids"], torch.tensor([said])), dim=1)

    monkeypatch.setattr(type(model), "generate", generate)
    found = evaluated(monkeypatch, tmp_path, chatglm3, folder, "--task", "gsm8k", "--num_fewshot", 1)
    assert found["gsm8k"]["exact_match,strict-match"] == pytest.approx(1 / 3)
    question = {"role": "user", "content": "Question: 1 and 1?\nAnswer:"}
    assert any(
        ids[-len(prompt_ids(tokenizer, [question])) + 2 :] == prompt_ids(tokenizer, [question])[2:] for ids in asked
    )


@pytest.mark.parametrize(
    "folder, words, sentence",
    [
        ("nowhere", ["--task", "gsm8k"], "is no folder"),
        ("main", ["--task", "gsm8k", "--output", "nowhere/results.json"], "--output nowhere/results.json cannot be"),
        ("main", ["--task", "gsm9k"], "no task"),
        ("other", ["--task", "gsm8k"], "--task gsm8k with .*other: ValueError: BuilderConfig 'main' not found"),
        ("main", ["--task", "gsm8k", "--num_fewshot", "0"], "UndefinedError: 'question' is undefined"),
    ],
)
def test_what_does_not_fit_is_named(folder, words, sentence, chatglm3, tmp_path, monkeypatch):
    if folder != "nowhere":
        rows = ROWS if folder == "other" else [{"q": "1?"}]
        data_set(tmp_path / folder, folder, train=rows, test=rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", chatglm3, folder, *words])
    with pytest.raises(SystemExit, match=sentence):
        evaluate_model.main()
