"""`meshd run MODEL [PROMPT]`: ask one question."""

import sys
from argparse import Namespace
from typing import Any

from meshd.cli.support.answering import (
    CHAT,
    COMPLETIONS,
    MODEL_HELP,
    AnswerSummary,
    add_sampling,
    notice,
    request_of,
    sampling_of,
    stream_answer,
    text_request_of,
    write_out,
)
from meshd.cli.support.arguments import Parser, add_client
from meshd.cli.support.client import STREAM_SILENCE_S, Daemon, daemon_of
from meshd.cli.support.fetching import known_model, with_model
from meshd.cli.support.output import print_json
from meshd.errors import InvalidRequest, NoChatTemplate, RemoteFailure

EXAMPLE = (
    'meshd run smollm2:135m "Why is the sky blue?"\n  meshd run file:~/my-model.gguf "Hello"\n'
    "  meshd run smollm2:135m < question.txt"
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the question; default: read from standard input")
    add_sampling(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the API's response as one JSON document, when the answer is complete"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the answer, without the statistics after it")
    add_client(parser)


def run(args: Namespace) -> int:
    prompt = args.prompt or _piped()
    daemon = daemon_of(args)
    args.model = known_model(args, daemon)

    def ask() -> AnswerSummary | None:
        chat = request_of(args, [{"role": "user", "content": prompt}], sampling_of(daemon, args))
        try:
            return _ask(daemon, CHAT, chat, as_json=args.json)
        except RemoteFailure as error:
            if error.remote_code != NoChatTemplate.code or args.system:
                raise
            notice(f"{args.model} has no chat template: it continues the text")
            return _ask(daemon, COMPLETIONS, text_request_of(chat, prompt), as_json=args.json)

    answer = with_model(args, daemon, ask)
    if answer is None:
        return 0
    write_out("\n")
    if not args.quiet:
        notice(f"[{answer.summary()}]")
    return 0


def _ask(daemon: Daemon, route: str, body: dict[str, Any], *, as_json: bool) -> AnswerSummary | None:
    """Print the answer. Returns: None if it was printed as one document."""
    if not as_json:
        return stream_answer(daemon, body, write_out, route=route)
    print_json(daemon.post(route, body, timeout_s=STREAM_SILENCE_S))
    return None


def _piped() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidRequest(
            "there is no prompt", hint="give one after the model, or pipe it in; for a conversation, use `meshd chat`"
        )
    text = sys.stdin.read()
    if not text.strip():
        raise InvalidRequest("the prompt is empty", hint="give one after the model, or pipe it in")
    return text
