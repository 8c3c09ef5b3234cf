"""A budget of actions per second, so that what other devices send costs a bounded amount of work."""


class TokenBucket:
    """Allows `rate_s` actions per second on average, and `burst` at once. No clock: time comes with each call."""

    __slots__ = ("_at", "_burst", "_rate_s", "_tokens")

    def __init__(self, rate_s: float, burst: float) -> None:
        self._rate_s = rate_s
        self._burst = self._tokens = burst
        self._at = float("-inf")

    def take(self, now: float) -> bool:
        """Take one token. Returns: False if there is none."""
        if not self.has(now):
            return False
        self._tokens -= 1.0
        return True

    def has(self, now: float) -> bool:
        """Whether there is a token at time `now`."""
        if now > self._at:
            # At the first call `_at` is -inf, and the bucket is full.
            self._tokens = min(self._burst, self._tokens + self._rate_s * (now - self._at))
            self._at = now
        return self._tokens >= 1.0

    def put_back(self) -> None:
        """Give a token back that was not used after all."""
        self._tokens = min(self._burst, self._tokens + 1.0)

    def wait_s(self, now: float) -> float:
        """Returns: seconds until there is a token; 0 if there is one."""
        return 0.0 if self.has(now) else (1.0 - self._tokens) / self._rate_s
