"""Request an answer and print it as it streams; for `run`, `chat` and `demo`."""

import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from meshd.bounds import printable
from meshd.cli.support.client import Daemon, Stream
from meshd.cli.support.output import show
from meshd.errors import NotReady, PeerFault, UsageError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
READY_WITHIN_S = 600.0
MODEL_HELP = "a model's name or reference (`meshd models`); a model that the cluster does not have is fetched first, if it can be"
SAMPLING_DEFAULTS = {"temperature": 0.6, "top_p": 0.9}
"""For `run` and `chat`, if the model's authors recommend nothing: at OpenAI's temperature of 1, small models lose the thread."""
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p")
_FIELDS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")
_MESH_FIELDS = ("stages", "peers", "min_peers", "objective", "context", "mirror")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSummary:
    """The result of a request, measured on the client's side."""

    text: str
    finish: str
    plan: str
    """The layers of each peer, e.g. `ash:0-12,birch:12-30`."""
    predicted_ttft_s: float
    """Predicted seconds to the first token. 0: the daemon sent no prediction."""
    predicted_tpot_s: float
    """Predicted seconds per output token. 0: the daemon sent no prediction."""
    prompt_tokens: int
    completion_tokens: int
    ttft_s: float
    decode_s: float
    """Seconds from the first text to the last."""

    @property
    def tokens_s(self) -> float:
        """Tokens per second after the first token; 0 if the answer is too short to measure."""
        return (self.completion_tokens - 1) / self.decode_s if self.completion_tokens > 1 and self.decode_s > 0 else 0.0

    def summary(self) -> str:
        """Format the result as one line of text."""
        parts = [f"{self.completion_tokens} tokens", f"{self.tokens_s:.1f} tokens/s", f"first after {self.ttft_s * 1e3:.0f} ms"]
        if self.predicted_tpot_s > 0:
            first = f", first after {self.predicted_ttft_s * 1e3:.0f} ms" if self.predicted_ttft_s > 0 else ""
            parts.append(f"predicted {1 / self.predicted_tpot_s:.1f} tokens/s{first}")
        return ", ".join(parts) + (f"; {self.plan}" if self.plan else "")


def add_sampling(parser: ArgumentParser) -> None:
    """Add `--system`, and flags named after the fields of a chat request and of its `mesh` object."""
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="maximum number of tokens in the answer; default: until the context is full"
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="from 0 (always the likeliest token) to 2; default: the model's own, or 0.6"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities sum to P, above 0 and up to 1; default: the model's own, or 0.9",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K likeliest tokens; default: the model's own, or 0 (all)"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="drop tokens less likely than P times the likeliest one, from 0 to 1; default: the model's own, or 0 (none)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="64-bit seed; the same seed gives the same answer; default: random")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; repeatable")
    parser.add_argument(
        "--stages",
        metavar="a:0-12,b:12-30",
        help="the layers that each peer computes, half-open ranges from 0; default: the planner decides",
    )
    parser.add_argument("--peers", type=lambda text: text.split(","), metavar="a,b", help="use only these peers")
    parser.add_argument("--min-peers", type=int, metavar="N", help="split the model over at least N peers")
    parser.add_argument("--objective", choices=("latency", "ttft", "throughput", "energy", "memory"), help="what to optimise")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to reserve KV memory for, prompt and answer")
    parser.add_argument(
        "--mirror",
        action="store_true",
        default=None,
        help="keep a copy of the session's KV on another peer, for a faster recovery if a peer is lost",
    )


def sampling_of(daemon: Daemon, args: Namespace) -> dict[str, float]:
    """Return `SAMPLING_DEFAULTS` if neither the flags nor the model's authors say how to sample; else nothing, as the daemon knows.

    Raises: Unavailable if no daemon answers.
    """
    if any(getattr(args, field) is not None for field in _SAMPLING_FIELDS):
        return {}
    try:
        model = daemon.get(f"/v1/models/{quote(args.model, safe='')}")
    except (PeerFault, UsageError):
        return SAMPLING_DEFAULTS  # the request itself may load the model, or say why it can't
    return {} if model.get("meshd", {}).get("sampling") else SAMPLING_DEFAULTS


def request_of(args: Namespace, messages: list[dict[str, str]], sampling: Mapping[str, float]) -> dict[str, Any]:
    """Make the body of a chat completion. The daemon chooses the values of fields that neither `sampling` nor a flag sets."""
    system = [{"role": "system", "content": args.system}] if args.system else []
    body: dict[str, Any] = {"model": args.model, "messages": [*system, *messages], **sampling}
    body |= {field: getattr(args, field) for field in _FIELDS if getattr(args, field) is not None}
    mesh = {field: getattr(args, field) for field in _MESH_FIELDS if getattr(args, field) is not None}
    return body | ({"mesh": mesh} if mesh else {})


def text_request_of(chat: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Make the body of a text completion from that of a chat, for a model that can't chat."""
    return {name: value for name, value in chat.items() if name != "messages"} | {"prompt": prompt}


def stream_answer(daemon: Daemon, body: Mapping[str, Any], write: Callable[[str], object], *, route: str = CHAT) -> AnswerSummary:
    """Send a request for a chat or a text completion, and pass each chunk of text to `write` as it arrives.

    While the model is being placed, the request is repeated for up to READY_WITHIN_S.

    Raises: what `Daemon.stream` raises.
    """
    deadline = time.monotonic() + READY_WITHIN_S
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    while True:
        sent_at = time.monotonic()
        try:
            with daemon.stream(route, streamed) as stream:
                return _read(stream, write, sent_at)
        except NotReady as wait:
            if time.monotonic() > deadline:
                raise
            notice(f"{wait.message}; waiting")
            time.sleep(min(max(wait.retry_after_s, 0.2), 10.0))


def _read(stream: Stream, write: Callable[[str], object], sent_at: float) -> AnswerSummary:
    first = last = 0.0
    thinking = False
    chunks: list[str] = []
    finish, usage = "", {"prompt_tokens": 0, "completion_tokens": 0}
    for event in stream.events():
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            finish = choice.get("finish_reason") or finish
            if thought := choice.get("delta", {}).get("reasoning_content"):
                thinking = True
                show(thought, file=sys.stderr, end="")  # standard output has only the answer
            if text := choice.get("delta", {}).get("content") or choice.get("text"):
                if thinking:
                    thinking = False
                    show("\n", file=sys.stderr)
                last = time.monotonic()
                first = first or last
                chunks.append(text)
                write(text)
    return AnswerSummary(
        text="".join(chunks),
        finish=finish,
        plan=stream.headers.get("x-meshd-plan", ""),
        predicted_ttft_s=float(stream.headers.get("x-meshd-predicted-ttft-ms") or 0) / 1e3,
        predicted_tpot_s=float(stream.headers.get("x-meshd-predicted-tpot-ms") or 0) / 1e3,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        ttft_s=max(0.0, first - sent_at),
        decode_s=last - first,
    )


def write_out(text: str) -> None:
    """Write a part of an answer to standard output and flush. On a terminal, unprintable characters become spaces or escapes."""
    sys.stdout.write(printable(text, keep="\n\t") if sys.stdout.isatty() else text)
    sys.stdout.flush()


def notice(text: str) -> None:
    """Print a line to standard error."""
    show(text, file=sys.stderr)
