"""Models from a hub: what is fetched, from where it resumes, what is refused before its weights come, and every error."""

import asyncio
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from fake_api.hub import COMMIT, TINY, Hub, serving
from meshd.errors import DownloadError, ModelFileError, StorageError
from meshd.models.files.disk import size_of
from meshd.models.store.progress import PullPhase, PullProgress
from meshd.models.store.store import Store
from tiny.gguf_file import write_gguf
from tiny.hf_folders import write_folder


@pytest.fixture
def hub(make_llama: Callable[..., Any]) -> Iterator[Hub]:
    with serving(Hub(repositories={TINY: {"README.md": b"tiny", "tiny.gguf": make_llama().build()}})) as hub:
        yield hub


@pytest.fixture
def store(tmp_path: Path, hub: Hub, instant_clock: Any) -> Store:
    return Store(tmp_path / "models", tmp_path / "hf", hf_endpoint=hub.url, clock=instant_clock)


async def test_a_file_is_fetched_into_the_shared_cache(store: Store, hub: Hub, tmp_path: Path) -> None:
    steps: list[PullProgress] = []
    model = await store.pull("hf:org/tiny@main:tiny.gguf", steps.append)
    content = hub.files["tiny.gguf"]
    assert model.path.is_relative_to(tmp_path / "hf")
    assert (model.sha256, model.size_bytes, model.in_place) == (hashlib.sha256(content).hexdigest(), len(content), True)
    downloaded = [step for step in steps if step.phase is PullPhase.DOWNLOADING]
    assert (downloaded[-1].done_bytes, downloaded[-1].total_bytes) == (len(content), len(content))
    with store.open(model) as file:
        assert "token_embd.weight" in file


async def test_a_repository_with_one_model_needs_no_file_name(store: Store, hub: Hub) -> None:
    assert (await store.pull("hf:org/tiny")).name == "hf:org/tiny"
    hub.files["other.gguf"] = b""
    with pytest.raises(DownloadError, match=r"other\.gguf, tiny\.gguf; name one, as in hf:org/tiny@main:other\.gguf"):
        await store.pull("hf:org/tiny@main")


async def test_a_file_in_the_cache_is_not_fetched_again(store: Store, hub: Hub, tmp_path: Path) -> None:
    await store.pull("hf:org/tiny:tiny.gguf")
    other = Store(tmp_path / "other", tmp_path / "hf", hf_endpoint=hub.url)
    await other.pull("hf:org/tiny:tiny.gguf")
    assert hub.served == ["tiny.gguf"]
    assert other.remove("hf:org/tiny:tiny.gguf") == 0


async def test_a_failed_fetch_is_an_error_of_one_line(store: Store, hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"missing\.gguf") as caught:
        await store.pull("hf:org/tiny:missing.gguf")
    assert "\n" not in str(caught.value)
    with pytest.raises(DownloadError, match="org/nothing"):
        await store.pull("hf:org/nothing:x.gguf")
    hub.files["bad.gguf"] = b"not a model"
    with pytest.raises(ModelFileError):
        await store.pull("hf:org/tiny:bad.gguf")


async def test_safetensors_are_fetched_with_their_other_files_and_imported(store: Store, hub: Hub, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "made", dtype="BF16", shards=2)
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"tiny", "pytorch_model.bin": b"pickle"}
    steps: list[PullProgress] = []
    model = await store.pull("hf:org/tiny", steps.append)
    assert {path.name for path in folder.iterdir()} == set(hub.served)
    total = sum(len(hub.files[name]) for name in hub.served if name.endswith(".safetensors"))
    downloading = [step for step in steps if step.phase is PullPhase.DOWNLOADING]
    assert {step.total_bytes for step in downloading} == {total}
    assert [step.done_bytes for step in downloading] == sorted(step.done_bytes for step in downloading)
    assert downloading[-1].done_bytes == total
    assert (model.name, model.in_place, model.path.parent) == ("hf:org/tiny", False, tmp_path / "models")
    local = await store.pull(f"file:{folder}")
    assert local.id == model.id
    served = list(hub.served)
    small = await store.pull("hf:org/tiny+q8")
    assert small.size_bytes < model.size_bytes
    assert hub.served == served
    assert await store.pull("hf:org/tiny") == model


async def test_all_parts_of_a_split_file_are_fetched_and_joined(store: Store, hub: Hub, make_llama: Callable[..., Any]) -> None:
    tensors = list(make_llama().tensors.items())
    common = {"split.count": (4, 2), "split.tensors.count": (4, len(tensors))}
    parts = [make_llama().metadata | common | {"split.no": (4, number)} for number in range(2)]
    hub.files = {
        f"tiny-{number + 1:05}-of-00002.gguf": type(make_llama())(
            metadata=parts[number], tensors=dict(tensors[:7] if number == 0 else tensors[7:])
        ).build()
        for number in range(2)
    }
    model = await store.pull("hf:org/tiny")
    with store.open(model) as file:
        assert list(file.tensors) == list(make_llama().tensors)
    assert hub.served == sorted(hub.files)
    del hub.files["tiny-00002-of-00002.gguf"]
    with pytest.raises(DownloadError, match="00002-of-00002"):
        await store.pull("hf:org/tiny:tiny-00001-of-00002.gguf")


BIG = {"layers": 40}
"""The weights of such a model are larger than its header and what a socket buffers."""


@pytest.fixture
def big(hub: Hub, tmp_path: Path) -> bytes:
    """A model of 34 MB in the repository `org/big`."""
    content = write_gguf(tmp_path / "big.gguf", **BIG).read_bytes()
    hub.repositories["org/big"] = {"m.gguf": content}
    return content


def wait_for_file_of(size_bytes: int, folder: Path) -> Path:
    for _ in range(6000):
        if found := [path for path in folder.rglob("*") if size_of(path) >= size_bytes]:
            return found[0]
        time.sleep(0.01)
    raise AssertionError(f"no file of {size_bytes} bytes arrives")


async def test_a_stopped_download_ends_at_once_and_the_next_one_fetches_only_the_rest(
    store: Store, hub: Hub, big: bytes, tmp_path: Path
) -> None:
    hub.stalls["org/big"] = 5_000_000
    partials = tmp_path / "models" / "partial"
    pull = asyncio.create_task(store.pull("hf:org/big"))
    partial = await asyncio.to_thread(wait_for_file_of, 5_000_000, partials)
    pull.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await pull
    assert partial.stat().st_size == 5_000_000
    hub.stalls.clear()
    hub.asked.clear()
    model = await store.pull("hf:org/big")
    assert model.sha256 == hashlib.sha256(big).hexdigest()
    assert [each for each in hub.asked if each[0] == "GET"] == [("GET", "m.gguf", "bytes=5000000-")]


async def test_what_was_fetched_is_where_other_tools_look_for_it(store: Store, hub: Hub, tmp_path: Path) -> None:
    model = await store.pull("hf:org/tiny:tiny.gguf")
    asked = len(hub.asked)
    found = huggingface_hub.hf_hub_download("org/tiny", "tiny.gguf", cache_dir=tmp_path / "hf", local_files_only=True)
    assert (Path(found), len(hub.asked)) == (model.path, asked)
    cached = huggingface_hub.try_to_load_from_cache("org/tiny", "tiny.gguf", cache_dir=tmp_path / "hf", revision=COMMIT)
    assert cached == str(model.path)


async def test_what_other_tools_fetched_is_not_fetched_again(
    store: Store, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    await asyncio.to_thread(
        huggingface_hub.hf_hub_download, "org/tiny", "tiny.gguf", cache_dir=tmp_path / "hf", endpoint=hub.url, token=False
    )
    hub.asked.clear()
    await store.pull("hf:org/tiny:tiny.gguf")
    assert hub.served == []


async def test_without_a_network_the_cache_is_used(store: Store, hub: Hub, tmp_path: Path, instant_clock: Any) -> None:
    await store.pull("hf:org/tiny")
    other = Store(tmp_path / "other", tmp_path / "hf", hf_endpoint="http://127.0.0.1:9", clock=instant_clock)
    assert (await other.pull("hf:org/tiny")).path.is_relative_to(tmp_path / "hf")
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9 can't be reached"):
        await other.pull("hf:org/tiny@v2")


async def test_a_model_that_could_not_answer_is_refused_before_its_weights_are_fetched(
    store: Store, hub: Hub, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", architecture="falcon", **BIG)
    hub.repositories["org/falcon"] = {"m.gguf": path.read_bytes()}
    with pytest.raises(ModelFileError, match="architecture 'falcon'") as caught:
        await store.pull("hf:org/falcon")
    assert f"{hub.url}/org/falcon" in str(caught.value)
    assert hub.sent_bytes <= 1 << 20
    assert not list((tmp_path / "hf").rglob("*.gguf"))


async def test_a_header_longer_than_the_first_bytes_is_read_whole(store: Store, hub: Hub, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", layers=1, general__description="x" * 3_000_000)
    hub.repositories["org/long"] = {"m.gguf": path.read_bytes()}
    assert (await store.pull("hf:org/long")).size_bytes == path.stat().st_size


async def test_a_folder_that_could_not_answer_is_refused_before_its_weights_are_fetched(
    store: Store, hub: Hub, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "made")
    config = (folder / "config.json").read_text()
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for old, new, message in (
        ("{", '{"quantization_config": {"quant_method": "awq", "bits": 4},', "quantised with awq"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 3', "tensor blk.2"),
    ):
        hub.files["config.json"] = config.replace(old, new, 1).encode()
        hub.commit = hashlib.sha256(new.encode()).hexdigest()[:40]
        with pytest.raises(ModelFileError, match=message):
            await store.pull("hf:org/tiny")
    hub.files["config.json"], hub.commit = config.encode(), COMMIT
    hub.files["tokenizer.json"] = b'{"model": {"type": "Unigram"}, "added_tokens": []}'
    with pytest.raises(ModelFileError, match="type 'Unigram'"):
        await store.pull("hf:org/tiny")
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


async def test_a_server_without_ranges_can_be_used(store: Store, hub: Hub, big: bytes) -> None:
    hub.ranges = False
    assert (await store.pull("hf:org/big")).size_bytes == len(big)


async def test_wrong_content_is_discarded(
    store: Store, hub: Hub, make_llama: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = hub.files["tiny.gguf"], make_llama().build()[:-1] + b"\1"
    digests = iter([hashlib.sha256(b"another").hexdigest()] * 2)
    monkeypatch.setattr("fake_api.hub.digest_of", lambda content: next(digests, hashlib.sha256(content).hexdigest()))
    hub.files["tiny.gguf"] = wrong
    with pytest.raises(DownloadError, match="its sha256 differs; pull it again"):
        await store.pull("hf:org/tiny")
    hub.files["tiny.gguf"] = right
    assert (await store.pull("hf:org/tiny")).sha256 == hashlib.sha256(right).hexdigest()


REFUSALS: dict[str, tuple[int, dict[str, str], str]] = {
    "gated": (
        403,
        {"X-Error-Code": "GatedRepo"},
        r"org/tiny on 127.* is gated by terms.*accept its terms at http.*/org/tiny, then set HF_TOKEN",
    ),
    "forbidden": (403, {}, "is gated by terms"),
    "no repository": (
        401,
        {"X-Error-Code": "RepoNotFound"},
        r"127\.0\.0\.1:\d+ has no repository org/tiny, or it is private; check the name",
    ),
    "no repository, for members": (404, {"X-Error-Code": "RepoNotFound"}, "has no repository org/tiny"),
    "no revision": (404, {"X-Error-Code": "RevisionNotFound"}, "org/tiny has no revision main; see "),
    "busy": (503, {}, r"127\.0\.0\.1:\d+ is busy \(HTTP status 503\); try again later"),
    "too many requests": (429, {"Retry-After": "2"}, r"is busy \(HTTP status 429, and asks to wait 2 s\); try again later"),
    "a long wait": (429, {"Retry-After": "3600"}, r"asks to wait 3,600 s"),
    "a teapot": (418, {}, "HTTP status 418"),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("ref", ["hf:org/tiny", "hf:org/tiny:tiny.gguf"])
async def test_a_refusal_names_the_host_or_repository_and_a_step_that_fits(
    store: Store, hub: Hub, case: str, ref: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    status, headers, message = REFUSALS[case]
    hub.refusals["org/tiny"] = (status, headers)
    with pytest.raises(DownloadError, match=message) as caught:
        await store.pull(ref)
    assert "; " in str(caught.value)


async def test_the_pause_that_a_server_asks_for_is_made(store: Store, hub: Hub, instant_clock: Any) -> None:
    hub.refusals["org/tiny"] = (429, {"Retry-After": "7"})
    with pytest.raises(DownloadError):
        await store.pull("hf:org/tiny")
    assert instant_clock.pauses == [7, 7, 7]


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("http://127.0.0.1:9", r"127\.0\.0\.1:9 can't be reached \(Connect"),
        ("http://nosuch.invalid", r"the name of nosuch\.invalid is not known"),
    ],
)
async def test_an_unreachable_hub_is_named(tmp_path: Path, instant_clock: Any, endpoint: str, message: str) -> None:
    store = Store(tmp_path / "models", tmp_path / "hf", hf_endpoint=endpoint, clock=instant_clock)
    with pytest.raises(DownloadError, match=message) as caught:
        await store.pull("hf:org/tiny:m.gguf")
    assert "check this device's network connection" in str(caught.value)
    assert "has no file" not in str(caught.value)


async def test_the_host_of_the_content_is_named_if_it_is_another(store: Store, hub: Hub) -> None:
    hub.moved["org/tiny"] = "http://127.0.0.1:9/data"
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9 can't be reached"):
        await store.pull("hf:org/tiny")


async def test_a_body_that_always_ends_early_is_an_error_that_says_so(store: Store, hub: Hub, big: bytes) -> None:
    hub.tears["org/big"] = 4_000_000
    with pytest.raises(DownloadError, match=r"m\.gguf can't be read: .*(broke|ended early)"):
        await store.pull("hf:org/big")


async def test_no_room_is_an_error_before_the_weights_are_fetched(
    store: Store, hub: Hub, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("meshd.models.files.disk._MARGIN_BYTES", 1 << 60)
    with pytest.raises(StorageError, match="too little room"):
        await store.pull("hf:org/big")
    assert hub.sent_bytes <= 1 << 20


PULL = """
import asyncio, resource, sys
from pathlib import Path
from meshd.errors import MeshdError
from meshd.models.store.store import Store
root = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))
try:
    asyncio.run(Store(root / "models", root / "hf", hf_endpoint=sys.argv[2]).pull("hf:org/big"))
except MeshdError as error:
    print(error.code, error)
"""


async def test_a_full_disk_is_one_error_and_keeps_what_has_come(store: Store, hub: Hub, big: bytes, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PULL, tmp_path, hub.url, stdout=asyncio.subprocess.PIPE)
    printed = (await process.communicate())[0].decode()
    assert printed.startswith("storage_error")
    assert printed.count("\n") == 1
    assert "free some disk space and pull again: what was downloaded is kept" in printed
    hub.asked.clear()
    assert (await store.pull("hf:org/big")).size_bytes == len(big)
    assert [each for each in hub.asked if each[0] == "GET"] == [("GET", "m.gguf", "bytes=5000000-")]
