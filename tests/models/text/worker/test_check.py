"""The check of a model's text before the model is fetched."""

from pathlib import Path

import pytest

from meshd.models.text.worker import check as module
from meshd.models.text.worker.check import check_text
from texts.headers import hostile_tokenizer, text_header

LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2


def test_a_model_that_can_answer_has_no_problem(tmp_path: Path) -> None:
    assert check_text(text_header()) == ""
    path = tmp_path / "m.gguf"
    path.write_bytes(text_header(None))
    assert check_text(path) == ""


def test_a_model_that_can_not_answer_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CPU_S", 1.0)
    assert "chat template can't be used" in check_text(text_header("{% for m in %}"))
    assert "'gemma4' can't be used" in check_text(text_header(tokenizer__ggml__pre="gemma4"))
    assert "tokenizer kind 't5'" in check_text(text_header(tokenizer__ggml__model="t5"))
    assert "takes more than 1 s" in check_text(text_header(LOOP))
    assert "takes more than" in check_text(hostile_tokenizer())
    assert check_text(b"GGUF") != ""
