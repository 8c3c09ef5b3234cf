"""The real models' tokenizers on 10,000 difficult texts: the same ids as the reference, and whole characters when streamed."""

import pytest
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import PreTrainedTokenizerFast

from meshd.models.files.gguf import GgufFile
from meshd.models.text.tokenizer.files import tokenizer_from_gguf
from texts.reference_tokenizers import STRINGS, check_ids, check_streams
from tiny import vocabularies as tiny_vocabularies


def test_smollm2(smollm2: GgufFile, smollm2_json: str) -> None:
    tokenizer = tokenizer_from_gguf(smollm2.metadata)
    reference = PreTrainedTokenizerFast(tokenizer_object=LibraryTokenizer.from_str(smollm2_json))
    ids = list(reference(STRINGS, add_special_tokens=False)["input_ids"])
    check_ids(tokenizer, ids)
    check_streams(tokenizer, ids)
    for some in ids[::10]:
        assert tokenizer.decode(some) == reference.decode(some, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.slow
def test_gemma3(gemma3: GgufFile) -> None:
    """The reference is the sentencepiece library.

    Texts with two of SentencePiece's space marks are left out: there sentencepiece differs from transformers, and meshd follows
    transformers, which matches the vocabulary's added tokens (runs of spaces) in the raw text.
    """
    tokenizer, model = tokenizer_from_gguf(gemma3.metadata), tiny_vocabularies.model_of(gemma3.metadata)
    plain = [text for text in STRINGS if "▁▁" not in text]
    assert len(plain) > 9900
    ids = [tokenizer.encode(text, add_special=False) for text in plain]
    assert [text for text, some in zip(plain, ids, strict=True) if some != model.encode(text)] == []
    assert [tokenizer.decode(some) for some in ids] == [model.decode(some) for some in ids]
    check_streams(tokenizer, ids)
