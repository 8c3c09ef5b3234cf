"""Run `meshd`, which sends garbage to other peers for some seconds after each SIGUSR1.

    python tests/lib/chaos/garbage_daemon.py up --state DIR ...

The file DIR/garbage describes the garbage and its duration: `{"kind": "nan" | "size" | "vocabulary" | "torn", "seconds": 4}`.
Messages that the peer sends to itself stay correct.
"""

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import msgpack
import msgspec
import numpy as np

from meshd.agents.links.links import Links
from meshd.cli import main
from meshd.protocol import codec
from meshd.protocol.messages import KvBlocks, Lane, Message, Steps, Tokens
from meshd.types import PeerId

_real_send, _real_encode = Links.send, codec.encode
_TORN_EVERY_S = 1.0


class _Garbage:
    """Replaces `Links.send` for `seconds` by a function that damages messages."""

    def __init__(self, kind: str, seconds: float) -> None:
        self._kind = kind
        self._until = time.monotonic() + seconds
        self._torn_at = 0.0

    def begin(self) -> None:
        def send(links: Links, peer: PeerId, message: Message, payload: Any = None) -> None:
            if time.monotonic() > self._until:
                Links.send = _real_send  # type: ignore[method-assign]
            elif peer != links.id:
                message, payload = self._spoil(links, peer, message, payload)
            _real_send(links, peer, message, payload)

        Links.send = send  # type: ignore[method-assign, assignment]

    def _spoil(self, links: Links, peer: PeerId, message: Message, payload: Any) -> tuple[Message, Any]:
        match self._kind, message:
            case "nan", Steps() | KvBlocks() if _has_tensors(message):
                return message, np.full(len(payload) // 4, np.nan, np.float32).data.cast("B")
            case "nan", Tokens():
                return msgspec.structs.replace(message, tokens=(-1,)), payload
            case "size", Steps() if _has_tensors(message):
                return message, bytes(memoryview(payload).cast("B")[: memoryview(payload).nbytes // 2])
            case "size", Tokens():
                return msgspec.structs.replace(message, index=message.index + 7), payload
            case "vocabulary", Steps() if _has_tensors(message):
                steps = (msgspec.structs.replace(step, tokens=step.tokens + 1) for step in message.steps)
                return msgspec.structs.replace(message, steps=tuple(steps)), payload
            case "vocabulary", Tokens():
                return msgspec.structs.replace(message, tokens=(2**30,)), payload
            case "torn", Steps() | Tokens() if time.monotonic() > self._torn_at + _TORN_EVERY_S:
                self._torn_at = time.monotonic()
                link = links._table.get(peer)
                if link is not None and Lane.CONTROL in link.lanes:
                    link.lanes[Lane.CONTROL]._transport.write(b"\xff" * 97)
        return message, payload


def _encode(message: Message) -> bytes:
    """Encode a message also if its tokens are below 0: the codec refuses to send it, and the other peer must refuse it as well."""
    if isinstance(message, Tokens) and min(message.tokens) < 0:
        return msgpack.packb([message.number, msgspec.to_builtins(message)])
    return _real_encode(message)


def _has_tensors(message: Message) -> bool:
    """Whether a message carries KV or hidden states. The steps for a first stage are token ids, which come from no stage."""
    return not isinstance(message, Steps) or message.steps[0].stage > 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    state = Path(sys.argv[sys.argv.index("--state") + 1])
    request = json.loads((state / "garbage").read_text())
    _Garbage(request["kind"], request["seconds"]).begin()


if __name__ == "__main__":
    codec.encode = _encode
    signal.signal(signal.SIGUSR1, _on_signal)
    sys.exit(main())
