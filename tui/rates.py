"""How fast each session makes tokens, from the rows that come."""

from collections import deque

WINDOW_S = 3.0


class TokenRates:
    """Tokens per second of each session over the last `WINDOW_S`. Pure: callers pass the time."""

    def __init__(self) -> None:
        self._counts: dict[str, deque[tuple[float, int]]] = {}

    def observe(self, session: str, tokens: int, now: float) -> None:
        """Add the number of tokens that a session has made so far."""
        counts = self._counts.setdefault(session, deque())
        if not counts or counts[-1][1] != tokens:
            counts.append((now, tokens))
        while len(counts) > 2 and now - counts[1][0] > WINDOW_S:
            counts.popleft()

    def forget(self, keep: frozenset[str]) -> None:
        """Forget all sessions but these."""
        for session in self._counts.keys() - keep:
            del self._counts[session]

    def tokens_s(self, session: str, now: float) -> float | None:
        """Return the rate. None: it is not known. 0 after `WINDOW_S` without a token."""
        counts = self._counts.get(session)
        if counts is None or len(counts) < 2:
            return None
        (began, first), (_, last) = counts[0], counts[-1]
        if now - counts[-1][0] > WINDOW_S:
            return 0.0
        return (last - first) / max(1e-3, now - began)
