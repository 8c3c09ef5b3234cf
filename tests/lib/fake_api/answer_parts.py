"""Parts of invented answers, for tests of the renderers."""

from typing import Any

import msgspec

from meshd.agents.service import Finished, TokenText
from meshd.types import FinishReason

HEAD: dict[str, Any] = {"created": 1, "model": "m", "system_fingerprint": "fp_0"}
END = Finished(reason=FinishReason.STOP, prompt_tokens=3, completion_tokens=2, ttft_s=0.1, tpot_s=0.01)


def token(text: str) -> TokenText:
    return TokenText(token=text, token_id=1, logprob=-0.5, bytes=tuple(text.encode()))


def plain(body: object) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(body))
