"""Which paths could be hub ids; the hub's own rules are the oracle."""

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from align_cli import hub

IDS = ["gpt2", "HuggingFaceH4/ultrafeedback_binarized", "mistralai/Mistral-7B-v0.1", "a/b.c-d_e", "Qwen/Qwen2.5-0.5B"]
PATHS = ["a b", "a/b/c", "./a", "../a", "/a", "~/a", "a/", "-a/b", "a..b/c", "a/.b", "a.", "data/*.jsonl", "é/x", ""]


@pytest.mark.parametrize("name", IDS)
def test_ids(name):
    validate_repo_id(name)
    assert hub.is_id(name)


@pytest.mark.parametrize("path", PATHS)
def test_what_the_hub_refuses_is_a_path(path):
    with pytest.raises(HFValidationError):
        validate_repo_id(path)
    assert not hub.is_id(path)
