"""Run `meshd` with a drafter that knows the answers: a test double for speculation, at the first stage of each session.

    python tests/lib/real_daemons/guessing_daemon.py up --state DIR ...

A session is known by `max_tokens`, which must differ between requests: a first stage gets no sampling parameters.

The folder `DIR/../guesses` has a file `mode`, which is read when a stage opens:

    record    guess nothing, and write the tokens to the file MAX_TOKENS (but for those that come with the answer's end)
    none      guess nothing
    back      two right guesses and two wrong ones in each step, so that each step is rolled back
    mixed     right, wrong, partly right or no guesses, by chance; for an odd `max_tokens` also behind steps without an answer

The file `steps` there gets a line for each answer to guesses: the number of tokens, and of guesses before them.
"""

import json
import random
import sys
from pathlib import Path

from meshd.agents.stage.host import StageHost
from meshd.cli import main
from meshd.protocol.messages import Open

VOCAB = 49152
_MOST = 5


class _Recorder:
    """Guesses nothing, and writes the tokens of an answer to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens: list[int] = []

    def after(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        self._tokens += tokens
        self._path.write_text(json.dumps(self._tokens))
        return ()

    def ahead(self) -> tuple[int, ...]:
        return ()


class _Guesser:
    """Guesses from the recorded answer."""

    def __init__(self, host: StageHost, message: Open, folder: Path, mode: str) -> None:
        self._host, self._open, self._mode = host, message, mode
        self._truth: list[int] = json.loads((folder / str(message.max_tokens)).read_text())
        self._steps = folder / "steps"
        self._known = message.answered
        self._guessed = 0
        self._runs_ahead = mode == "mixed" and message.max_tokens % 2 == 1
        self._dice = random.Random(f"{message.max_tokens} {message.epoch}")

    def after(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if self._guessed:
            with self._steps.open("a") as file:
                file.write(f"{len(tokens)} {self._guessed}\n")
        self._known += len(tokens)
        return self._guesses(self._known)

    def ahead(self) -> tuple[int, ...]:
        active = self._host._active.get((self._open.session, 0))
        if active is None or not self._runs_ahead:
            return ()
        return self._guesses(active.machine.due - self._open.prompt_tokens)

    def _guesses(self, index: int) -> tuple[int, ...]:
        right = self._truth[index : index + _MOST]
        wrong = [(token + 1) % VOCAB for token in right]
        kind = "partly" if self._mode == "back" else self._dice.choice(["right", "wrong", "partly", "none"])
        guesses = {"right": right, "wrong": wrong, "partly": right[:2] + wrong[2:4], "none": []}[kind]
        self._guessed = len(guesses)
        return tuple(guesses)


def _patch(folder: Path) -> None:
    """Give each `StageHost` the drafters of this file."""
    real = StageHost.__post_init__

    def post_init(host: StageHost) -> None:
        def drafter_of(message: Open) -> _Recorder | _Guesser | None:
            mode = (folder / "mode").read_text()
            if mode == "record":
                return _Recorder(folder / str(message.max_tokens))
            return None if mode == "none" else _Guesser(host, message, folder, mode)

        host.drafter_of = drafter_of
        real(host)

    StageHost.__post_init__ = post_init  # type: ignore[method-assign]


if __name__ == "__main__":
    _patch(Path(sys.argv[sys.argv.index("--state") + 1]).parent / "guesses")
    sys.exit(main())
