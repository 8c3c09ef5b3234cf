"""For every architecture, three real daemons import a model from a folder and answer with the same tokens as transformers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from meshd.models.store.store import Store
from real_daemons.cluster import Cluster, make_cluster
from tiny.models import MODELS, TinyModel

PROMPT = np.random.default_rng(2).integers(3, 160, 40).tolist()
TOKENS = 16
WORDS = ["<unk>", "<s>", "</s>", *(a + b for a in "abcdefg" for b in "abcdefghijklmnopqrstuvwxyz")][:160]
"""A different word for each token, so that a test can tell the tokens from the text."""
STAGES = "b:0-1,a:1-3,c:3-4"


def tokenizer_of(words: list[str]) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(models.BPE({word: id_ for id_, word in enumerate(words)}, [], unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    return bpe


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("three")
    for cluster in make_cluster(root, shared_cache):
        cluster.start("a", "b", "c", flags=("--exact", "on", "--models-dir", str(root / "models")))
        cluster.see_each_other()
        yield cluster


def answer(cluster: Cluster, model: str) -> list[int]:
    cluster.place("a", model=model, stages=STAGES, context=64)
    body = {
        "model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0,
        "mesh": {"stages": STAGES, "context": 64},
    }  # fmt: skip
    status, document, headers = cluster["c"].post_raw("/v1/completions", body)
    assert status == 200, document
    assert headers["x-meshd-plan"] == STAGES
    tokens: list[str] = document["choices"][0]["logprobs"]["tokens"]
    return [WORDS.index(token) for token in tokens]


def expected(model: TinyModel) -> list[int]:
    """Return the token ids of the greedy answer of transformers."""
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(model.reference(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("name", MODELS)
def test_three_peers_answer_as_transformers_does(three: Cluster, tmp_path: Path, name: str) -> None:
    model = TinyModel.make(name, tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_of(WORDS).to_str())
    ref = f"file:{tmp_path}"
    asyncio.run(Store(three.root / "models").pull(ref))
    assert answer(three, ref) == expected(model)
