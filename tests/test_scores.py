"""Scores of an evaluation."""

import pytest
import torch
from tiny import results, write_jsonl

from finetuning.scores import TokenScores, row_scores


@pytest.mark.parametrize("name", ["chatglm1", "chatglm3", "llama"])
def test_scores_of_an_evaluation_do_not_depend_on_its_batches(run, name, request, tmp_path):
    rows = [{"prompt": "who", "response": "the baker paints " * (i % 3 + 1)} for i in range(7)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--model_name_or_path", request.getfixturevalue(name), "--validation_file", path, "--do_eval"]
    flags += ["--max_target_length", 40, "--max_source_length", 40]
    ways = [["--per_device_eval_batch_size", 1], ["--per_device_eval_batch_size", 4]]
    ways += [[*ways[1], "--no_padding_free"], [*ways[1], "--pad_to_max_length"]]
    scores = [results(run(flags, way, output=f"way{i}"), "eval") for i, way in enumerate(ways)]
    for key in ("eval_token_loss", "eval_accuracy", "perplexity"):
        assert [each[key] for each in scores] == pytest.approx([scores[0][key]] * 4, rel=1e-5)


def test_scores_are_sums_over_rows_and_padding_of_other_processes_is_no_row():
    logits = torch.zeros(1, 6, 4)
    logits[0, 0, 2], logits[0, 1, 1] = 9.0, 9.0
    labels = torch.tensor([[-100, 2, 3, -100, 0, -100]])
    scores = row_scores(logits, labels, flattened=True)
    assert scores[:, :2].tolist() == [[1, 2], [1, 1]]
    metric = TokenScores()
    evaluation = type("Evaluation", (), {"predictions": scores})
    assert metric(evaluation, compute_result=False) == {}
    summed = metric(evaluation, compute_result=True)
    assert summed["accuracy"] == pytest.approx(2 / 3)
    assert summed["token_loss"] == pytest.approx(scores[:, 2].sum().item() / 3)
