"""Messages for the user about the cluster: `meshd status` shows the newest ones, and each is logged when it is new."""

from collections.abc import Callable
from logging import getLogger

from meshd.agents.budget import TokenBucket
from meshd.agents.observe.events import NoticeGiven

log = getLogger(__name__)

_KEPT = 20
_LOGGED_PER_S, _LOGGED_AT_ONCE = 0.2, 20
"""Other devices cause notices, so they must not be able to fill the log."""


class Notices:
    """The newest messages, each with a hint on how to fix the problem, oldest first.

    A message may be about a subject. It then replaces the earlier message about the same subject, and is withdrawn by it.
    """

    def __init__(self, now: Callable[[], float], publish: Callable[[NoticeGiven], None] = lambda event: None) -> None:
        self._now, self._publish = now, publish
        self._hints: dict[str, str] = {}
        self._about: dict[str, str] = {}
        """Subject -> its message."""
        self._budget = TokenBucket(_LOGGED_PER_S, _LOGGED_AT_ONCE)

    def add(self, message: str, hint: str = "", about: str = "") -> None:
        """Show a message, and log it unless it is shown already."""
        if message not in self._hints and self._budget.take(self._now()):
            log.warning("%s%s", message, f"; {hint}" if hint else "")
            self._publish(NoticeGiven(message=message, hint=hint))
        if about and self._about.get(about, message) != message:
            self.withdraw(about)
        self._hints.pop(message, None)
        self._hints[message] = hint
        if about:
            self._about[about] = message
        while len(self._hints) > _KEPT:
            self._drop(next(iter(self._hints)))

    def withdraw(self, about: str) -> None:
        """Remove the message about a subject, if there is one."""
        if (message := self._about.get(about)) is not None:
            self._drop(message)

    def items(self) -> list[tuple[str, str]]:
        """Returns: (message, hint) of each message."""
        return list(self._hints.items())

    def _drop(self, message: str) -> None:
        self._hints.pop(message, None)
        self._about = {about: known for about, known in self._about.items() if known != message}
