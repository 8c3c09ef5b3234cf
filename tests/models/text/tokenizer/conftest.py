"""The tokenizer and the chat template of the real small model."""

import pytest

from meshd.models.files.gguf import GgufFile
from meshd.models.text.template import ChatTemplate, template_from_gguf
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from meshd.models.text.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(smollm2: GgufFile) -> Tokenizer:
    return tokenizer_from_gguf(smollm2.metadata)


@pytest.fixture(scope="module")
def template(smollm2: GgufFile) -> ChatTemplate:
    return template_from_gguf(smollm2.metadata)
