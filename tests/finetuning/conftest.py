"""Rows and base models of the fine-tuning tests."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from grad_transformer.lab import make_lab_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Each digit is a token; white space is none."""
    return make_lab_tokenizer()
