from pathlib import Path

import pytest

from meshd.errors import InvalidRequest, UnknownModel
from meshd.models.store.catalogue import CATALOGUE, FileSource, HubSource, PackageSource, quantised, resolve


def test_a_short_name_has_several_sources_and_one_hash() -> None:
    entry = resolve("smollm2:135m")
    assert resolve("SmolLM2:135M") is entry
    assert {type(source) for source in entry.sources} == {PackageSource, HubSource}
    assert entry.sha256 is not None
    assert len(entry.sha256) == 64


def test_a_licence_with_special_terms_has_its_address() -> None:
    assert "ai.google.dev/gemma/terms" in resolve("gemma3:270m").licence


def test_every_source_of_the_catalogue_can_be_written_and_read_back() -> None:
    for entry in CATALOGUE.values():
        for source in entry.sources:
            again = resolve(str(source)).sources[0]
            assert again == source
            assert resolve(str(source)).name == str(source)
            assert resolve(str(source)).sha256 == entry.sha256


@pytest.mark.parametrize(
    ("ref", "source"),
    [
        ("hf:org/name", HubSource("org/name")),
        ("hf:org/name@v1.0:a b/c-Q4.gguf", HubSource("org/name", "v1.0", "a b/c-Q4.gguf")),
        ("hf:org/name:x.gguf", HubSource("org/name", None, "x.gguf")),
        ("pypi:some_package==1.0.post1", PackageSource("some_package", "1.0.post1")),
        ("file:/a/b.gguf", FileSource(Path("/a/b.gguf"))),
    ],
)
def test_a_reference_names_its_one_source(ref: str, source: object) -> None:
    found = resolve(ref)
    assert found.sources == (source,)
    assert found.name == ref
    assert found.sha256 is None


def test_a_tilde_is_the_home_folder() -> None:
    assert resolve("file:~/m.gguf").name == f"file:{Path.home() / 'm.gguf'}"


def test_a_relative_path_is_relative_to_the_working_directory() -> None:
    assert resolve("file:x.gguf").name == f"file:{Path.cwd() / 'x.gguf'}"


@pytest.mark.parametrize(
    "ref",
    [
        "hf:",
        "hf:name",
        "hf:org/name:model.bin",
        "hf:org/../x",
        "hf:org/name:../../x.gguf",
        "hf:org/name@../x",
        "hf:/org/name",
        "pypi:name",
        "pypi:name>=1",
        "pypi:../name==1",
        "pypi:name==1/2",
        "file:",
        "file:a\0b",
        "hf:" + "a" * 2000,
    ],
)
def test_a_malformed_reference_is_refused_with_the_forms(ref: str) -> None:
    with pytest.raises(InvalidRequest, match="hf:ORG/NAME") as caught:
        resolve(ref)
    assert len(caught.value.message) < 1200


@pytest.mark.parametrize("name", ["smolm2", "smollm2", "smollm2:360m", "gpt-17", "", "x" * 5000, "http://x/y"])
def test_an_unknown_name_lists_the_nearest(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolve(name)
    assert "smollm2:135m" in caught.value.hint


def test_a_quantised_reference_is_a_separate_model() -> None:
    assert str(resolve("hf:org/name@v1+q4").sources[0]) == resolve("hf:org/name@v1+q4").name == "hf:org/name@v1+q4"
    assert resolve("file:/a/b+q8").sources[0] != resolve("file:/a/b").sources[0]
    assert quantised("hf:org/name", "q4") == quantised("hf:org/name+q4", "q4") == "hf:org/name+q4"
    assert quantised("smollm2:135m", None) == "smollm2:135m"
    for ref in ("smollm2:135m", "pypi:x==1", "hf:org/name+q8"):
        with pytest.raises(InvalidRequest, match="can't be quantised"):
            quantised(ref, "q4")
    with pytest.raises(InvalidRequest):
        resolve("file:+q4")
