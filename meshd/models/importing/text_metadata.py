"""Convert the tokenizer and chat template of a Hugging Face folder to metadata of a GGUF file.

tokenizer.huggingface.json          all of tokenizer.json, without the spaces between its items: Gemma's has 33 MB with them
tokenizer.chat_template             from chat_template.jinja, chat_template.json or tokenizer_config.json, in this order
tokenizer.chat_template.tool_use    the separate template for conversations with tools, if tokenizer_config.json has one
tokenizer.ggml.bos_token_id         from tokenizer_config.json, config.json or generation_config.json
tokenizer.ggml.eos_token_id         the first token that ends an answer: if possible tokenizer_config.json's, which templates use
tokenizer.ggml.eot_token_id         the second token that ends an answer
meshd.eos_token_ids                 all tokens that end an answer, in the same order
general.sampling.*                  the recommended sampling parameters, from generation_config.json
tokenizer.ggml.add_bos_token        from tokenizer_config.json, if it has this key; add_eos_token likewise
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.files.json_files import read_bytes, read_json, whole_number
from meshd.models.sampling import sampling_metadata

MAX_TOKENIZER_BYTES = 48 << 20
"""Largest tokenizer.json. It becomes part of a GGUF header, which may have 64 MiB."""
MAX_TEMPLATE_BYTES = 1 << 20
_MAX_TOKEN_ID = (1 << 31) - 1
_TEMPLATE = "tokenizer.chat_template"
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that `text_metadata` reads, if they exist."""


class _Added(msgspec.Struct, frozen=True):
    """An entry of tokenizer.json's `added_tokens`."""

    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct, frozen=True):
    """The fields of tokenizer.json that this module reads."""

    model: msgspec.Raw
    added_tokens: list[_Added] = []


def text_metadata(folder: Path, config: Mapping[str, Any], end_of_answer: frozenset[str]) -> dict[str, MetadataValue]:
    """Read a folder's tokenizer and chat template.

    `end_of_answer`: names of control tokens that end an answer even if no configuration file lists them.

    Raises: ModelFileError.
    """
    text, added = _tokenizer(folder)
    generation = _optional(folder / "generation_config.json")
    options = _optional(folder / "tokenizer_config.json")
    found: dict[str, MetadataValue] = {"tokenizer.huggingface.json": text}
    bos_ids = _id_by_text(options, "bos_token", added) or _ids(config, "bos_token_id") or _ids(generation, "bos_token_id")
    if bos_ids:
        found["tokenizer.ggml.bos_token_id"] = bos_ids[0]
    from_names = [token.id for token in added if token.special and token.content in end_of_answer]
    configured = [*_id_by_text(options, "eos_token", added), *_ids(generation, "eos_token_id"), *_ids(config, "eos_token_id")]
    ends = list(dict.fromkeys([*configured, *from_names]))
    if ends:
        found["tokenizer.ggml.eos_token_id"] = ends[0]
        found["meshd.eos_token_ids"] = tuple(ends)
    if len(ends) > 1:
        found["tokenizer.ggml.eot_token_id"] = ends[1]
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(value := options.get(key), bool):
            found[f"tokenizer.ggml.{key}"] = value
    return found | sampling_metadata(generation) | _templates(folder, options)


def _tokenizer(folder: Path) -> tuple[str, list[_Added]]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = "write it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        beside = ", only a tokenizer.model, which isn't read" if (folder / "tokenizer.model").is_file() else ""
        raise ModelFileError(f"{folder} can't be used: it has no tokenizer.json{beside}", hint=hint)
    data = read_bytes(path, most_bytes=MAX_TOKENIZER_BYTES)
    try:
        added = msgspec.json.decode(data, type=_Tokenizer).added_tokens
        return msgspec.json.format(data, indent=-1).decode(), added
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError) as error:
        raise ModelFileError(f"{path} can't be used: {error}", hint="the file is damaged: fetch it again") from error


def _templates(folder: Path, options: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Read the chat template, and the separate one for conversations with tools if there is one: GGUF key -> template."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        try:
            return {_TEMPLATE: read_bytes(plain, most_bytes=MAX_TEMPLATE_BYTES).decode()}
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{plain} can't be used: it is not UTF-8 ({error.reason})") from error
    given = _optional(folder / "chat_template.json").get("chat_template", options.get("chat_template"))
    if isinstance(given, str):
        return {_TEMPLATE: given}
    listed = [item for item in given if isinstance(item, dict)] if isinstance(given, list) else []
    keys = {"default": _TEMPLATE, "tool_use": f"{_TEMPLATE}.tool_use"}
    return {
        keys[item["name"]]: item["template"]
        for item in listed
        if item.get("name") in ("default", "tool_use") and isinstance(item.get("template"), str)
    }


def _id_by_text(options: Mapping[str, Any], key: str, added: list[_Added]) -> list[int]:
    """Find a token that tokenizer_config.json names by its text. Returns: a list of its id; empty if there is no such token."""
    value = options.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    return [token.id for token in added if token.content == text][:1]


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _ids(config: Mapping[str, Any], key: str) -> list[int]:
    """Read the value of `key`, one token id or a list of them, as a list. Invalid ids are dropped."""
    value = config.get(key)
    found = (whole_number(item, _MAX_TOKEN_ID) for item in (value if isinstance(value, list) else [value]))
    return [item for item in found if item is not None]
