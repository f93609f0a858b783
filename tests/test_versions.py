"""The tested range of transformers."""

import pytest

from finetuning.versions import NEWEST, untested_transformers


@pytest.mark.parametrize("version", ["5.17.0", f"{NEWEST}.0", f"{NEWEST}.9"])
def test_tested_transformers_is_not_worth_a_word(version):
    assert untested_transformers(version) is None


@pytest.mark.parametrize("version", ["5.99.0.dev0", "5.100.0", "6.0.0rc1"])
def test_newer_transformers_is_named_with_the_command_that_tests_it(version):
    sentence = untested_transformers(version)
    assert version in sentence and NEWEST in sentence and "bash scripts/test.sh --newest" in sentence
