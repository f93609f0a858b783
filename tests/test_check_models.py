"""The causal models whose users come here: none is trained wrongly without a word."""

import check_models
import pytest
from miniatures import verdicts


END_TO_END = "ChatGLM-6B ChatGLM2-6B ChatGLM3-6B GLM-4-9B glm glm4 glm4_moe glm4_moe_lite llama mistral qwen2 qwen3"
END_TO_END += " qwen3_moe gpt2 gemma2 gemma3_text phi3 deepseek_v3 opt"
PADDED = "qwen3_next gpt_oss falcon_h1 mamba bloom minimax"
EITHER = "nemotron lfm2"  # as the version of transformers has it
REFUSED = {"bert": "sees the tokens that it should predict", "bart": "is not that of the next token"}


@pytest.mark.parametrize("name", END_TO_END.split())
def test_rows_lie_end_to_end(name):
    found = verdicts.verdict(name)
    assert (found.batches, found.answers) == ("end to end", "yes"), found


@pytest.mark.parametrize("name", PADDED.split())
def test_rows_are_padded_where_they_would_not_be_kept_apart(name):
    found = verdicts.verdict(name)
    assert (found.batches, found.answers) == ("padded", "yes") and found.why, found


@pytest.mark.parametrize("name", EITHER.split())
def test_losses_are_right_in_whichever_batches(name):
    found = verdicts.verdict(name)
    assert found.batches in ("end to end", "padded") and found.answers == "yes", found


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_learn_something_else_are_refused(name):
    found = verdicts.verdict(name)
    assert found.batches == "refused" and REFUSED[name] in found.why


def test_batches_that_change_the_loss_are_called_wrong(monkeypatch, capsys, caplog):
    settled = verdicts.settled_collator

    def overruled(model):
        collator, results = settled(model)
        collator.end_to_end = True
        return collator, results

    monkeypatch.setattr(verdicts, "settled_collator", overruled)
    monkeypatch.setattr("sys.argv", ["check_models.py", "gpt_oss"])
    caplog.set_level("ERROR", logger="run_chatglm_lora")  # as main() does; the level before comes back
    with pytest.raises(SystemExit, match="1"):
        check_models.main()
    assert "| gpt_oss | WRONG | yes | the loss is off by" in capsys.readouterr().out
