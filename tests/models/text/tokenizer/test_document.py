"""tokenizer.json documents: what can't be used is one error."""

import pytest

from meshd.errors import ModelFileError
from meshd.models.text.tokenizer.files import tokenizer_from_gguf


def test_a_tokenizer_json_of_very_many_items_is_refused() -> None:
    with pytest.raises(ModelFileError, match="more than 4,194,304 items"):
        tokenizer_from_gguf({"tokenizer.huggingface.json": '{"model": [' + "[]," * 2_200_000 + "[]]}"})
