"""One answer's tokens, their text and their timing, as every reader sees them.

Each token is turned into text when it arrives, whether or not a reader waits. So every reader sees the same sequence of deltas, on
this peer or on a later coordinator.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from meshd.agents.service import Finished, TextDelta
from meshd.agents.session.journal.record import AnswerToken, SessionRecord
from meshd.agents.session.text import Assembler, StopMatcher
from meshd.agents.text.model_texts import ModelText
from meshd.types import FinishReason, ModelCard, TokenLogprobs

_SLICE = 64
"""Number of tokens that `restore` decodes at once: less than a millisecond of work."""
_ANSWER_BYTES, _PROMPT_TOKEN_BYTES, _TOKEN_BYTES, _LOGPROB_BYTES = 10_000, 36, 200, 320
"""Memory of an answer's Python objects, as measured: all that do not depend on its length, a token of the prompt, one of the answer
with its text, and each logprob of a token."""


@dataclass(slots=True)
class AnswerOutput:
    """Owns the tokens and deltas of an answer. `touch` wakes every task that waits in `change` or `until`."""

    record: SessionRecord
    card: ModelCard
    text: ModelText
    started: float
    first_token_at: float | None = None
    last_token_at: float = 0.0
    timed_tokens: int = 0
    """Number of tokens since `started` that this coordinator received."""
    tokens: list[AnswerToken] = field(default_factory=list)
    deltas: list[TextDelta] = field(default_factory=list)
    finished: Finished | None = None
    _assembler: Assembler = field(init=False)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._assembler = Assembler(
            decoder=self.text.table.stream(after=self.record.prompt[-1] if self.record.prompt else None),
            vocabulary=self.text.table,
            stops=StopMatcher(self.record.stop),
            with_logprobs=self.record.sampling.logprobs is not None,
        )

    @property
    def stopped(self) -> bool:
        """Whether the text contains a stop string."""
        return self._assembler.stopped

    @property
    def ttft_s(self) -> float:
        """Seconds from `started` to the first token that this coordinator received; 0 before that token."""
        return self.first_token_at - self.started if self.first_token_at is not None else 0.0

    @property
    def tpot_s(self) -> float:
        """Mean seconds per token since `started`; 0 before the second one."""
        if self.first_token_at is None or self.timed_tokens < 2:
            return 0.0
        return (self.last_token_at - self.first_token_at) / (self.timed_tokens - 1)

    @property
    def size(self) -> int:
        """Approximate bytes that the answer takes in memory, with its prompt."""
        record, token_bytes = self.record, _TOKEN_BYTES
        if record.sampling.logprobs is not None:
            token_bytes += _LOGPROB_BYTES * (1 + record.sampling.logprobs)
        return _ANSWER_BYTES + len(record.renderer) + _PROMPT_TOKEN_BYTES * len(record.prompt) + token_bytes * len(self.tokens)

    def restart(self, now: float) -> None:
        """Measure times from `now`, because the answer runs again after a suspension."""
        self.started, self.first_token_at, self.timed_tokens = now, None, 0

    async def restore(self) -> FinishReason | None:
        """Load the record's tokens. A long answer is decoded in slices, between which other tasks run.

        Returns: why the answer ended; None if it did not. The tokens show it even if the coordinator was lost before it could
        write the reason into the record.
        """
        for index, (token, logprobs) in enumerate(self.record.tokens):
            if index % _SLICE == _SLICE - 1:
                await asyncio.sleep(0)
            self.tokens.append((token, logprobs))
            self.decode(token, logprobs, end_of_sequence=self._ends(token))
        if self.record.finish:
            return FinishReason(self.record.finish)
        if self.stopped:
            return FinishReason.STOP
        return self.finish_at(len(self.tokens) - 1, self.tokens[-1][0]) if self.tokens else None

    def finish_at(self, index: int, token: int) -> FinishReason | None:
        """Returns: why this token ends the answer, by the rule that the last stage also applies; None if it does not end it."""
        if self._ends(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if index + 1 == self.record.max_tokens else None

    def _ends(self, token: int) -> bool:
        return token in self.card.end_of_sequence and not self.record.ignore_eos

    def add(self, token: int, logprobs: TokenLogprobs | None, now: float) -> None:
        """Append a token that arrived at `now`. `decode` adds its text."""
        self.last_token_at = now
        self.timed_tokens += 1
        if self.first_token_at is None:
            self.first_token_at = now
        self.tokens.append((token, logprobs))

    def decode(self, token: int, logprobs: TokenLogprobs | None, *, end_of_sequence: bool) -> None:
        """Append the text that becomes certain with this token. Does nothing after a stop string."""
        if self.stopped:
            return
        delta = self._assembler.push(token, logprobs, end_of_sequence=end_of_sequence)
        if delta is not None:
            self.deltas.append(delta)

    def finish(self, reason: FinishReason) -> None:
        """Complete the text. Only the first call has an effect."""
        if self.finished is not None:
            return
        if (delta := self._assembler.finish()) is not None:
            self.deltas.append(delta)
        self.finished = Finished(
            reason=FinishReason.STOP if self.stopped else reason,
            prompt_tokens=len(self.record.prompt),
            completion_tokens=len(self.tokens),
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
        )

    def touch(self) -> None:
        """Wake every task that waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self) -> None:
        """Wait for the next `touch`."""
        await self._changed.wait()

    async def until(self, condition: Callable[[], object], within_s: float) -> None:
        """Wait until the condition holds, for at most `within_s` seconds. The condition is checked after each `touch`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not condition():
                    await self._changed.wait()
