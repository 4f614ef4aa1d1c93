"""What the tests of the evaluation are given."""

import pytest
from transformers import PreTrainedTokenizerBase

from tests.conftest import SmolLM2


@pytest.fixture(scope="module")
def tokenizer(smollm2: SmolLM2) -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer."""
    return smollm2[1]
