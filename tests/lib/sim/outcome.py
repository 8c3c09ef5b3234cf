"""The result of one run of the simulator."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """Figures of one run, and why it failed, if it did."""

    seed: int
    failure: str = ""
    """The broken invariant, wrong answer or other error that ended the run. Empty: none."""
    digest: int = 0
    events: int = 0
    callbacks: int = 0
    messages: int = 0
    steps: int = 0
    checks: int = 0
    faults: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    """Number of steps of each kind, of parts of prompts, of batches of several steps, and of guesses of each skill."""
    exact: int = 0
    mixed: int = 0
    """Number of answers that were computed with several numerics, as their stories say, and are not those of one."""
    cancelled: int = 0
    client_errors: int = 0
    refused: int = 0
    """Number of the clients' errors that say that the peers are full."""
    recoveries: int = 0
    losses: int = 0
    """Number of times that answers continued after something had failed. Moves and resumed answers are not counted."""
    plans: int = 0
    searches: int = 0
    searching_s: float = 0.0
    """Real time of all searches of the routers, in seconds."""
    methods: Counter[str] = field(default_factory=Counter)
    """Number of times that answers continued by each method after a change of plan."""
    pauses: list[float] = field(default_factory=list)
    """Virtual seconds that clients waited for each delta."""
    worst: tuple[float, str] = 0.0, ""
    """The longest of `pauses`, and its client, time and event."""
    lines: list[str] = field(default_factory=list)
    """The last lines of the trace, as many as the caller wanted."""

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.failure or 'ok'}"
