"""The toy model's text: each token is one letter."""

import random

from meshd.agents.text.model_texts import ModelText
from meshd.types import ModelCard
from sim.toy.mathematics import VOCAB


class ToyStream:
    """Implements `meshd.models.text.token_table.StreamDecoder`."""

    def push(self, token: int) -> str:
        return letter(token)

    def flush(self) -> str:
        return ""


class ToyTokenizer:
    """Implements the part of a tokenizer that answers use."""

    def stream(self, *, after: int | None = None) -> ToyStream:
        return ToyStream()

    def token_bytes(self, token: int) -> bytes:
        return letter(token).encode()


def letter(token: int) -> str:
    return chr(0x4E00 + token)


def toy_text(card: ModelCard) -> ModelText:
    return ModelText(card, ToyTokenizer(), False, None)  # type: ignore[arg-type]


def random_prompt(rng: random.Random, longest: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, longest)))
