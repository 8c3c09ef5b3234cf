"""Headers of model files that have a tokenizer and a chat template, and no weights."""

import functools
import io
import json
from collections.abc import Mapping
from typing import Any

from meshd.models.files.gguf_writer import GgufWriter
from meshd.models.text.tokenizer.document import HUGGINGFACE_KEY
from tiny.hf_folders import tokenizer_json
from tiny.vocabularies import byte_level

_vocabulary = functools.cache(byte_level)
PLAIN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


def header_of(metadata: Mapping[str, Any]) -> bytes:
    """Write the header of a file with this metadata."""
    file = io.BytesIO()
    GgufWriter({"general.architecture": "llama", **metadata}, [], "header").write(file, lambda _: None)
    return file.getvalue()


def text_header(template: str | None = PLAIN, **more: Any) -> bytes:
    """Write the header of a model with a small vocabulary and this chat template. Replaces `.` in further keys by `__`."""
    chat = {} if template is None else {"tokenizer.chat_template": template}
    return header_of(_vocabulary("qwen2") | chat | {key.replace("__", "."): value for key, value in more.items()})


def hostile_tokenizer() -> bytes:
    """Write the header of a model whose tokenizer makes ten gigabytes of a text of one character."""
    document = json.loads(tokenizer_json())
    replace = {"type": "Replace", "pattern": {"Regex": "."}, "content": "." * 100_000}
    document["normalizer"] = {"type": "Sequence", "normalizers": [replace, replace]}
    return header_of({HUGGINGFACE_KEY: json.dumps(document)})
