"""The options of a run, and the command that repeats it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a run. Together with the seed they determine the run completely."""

    peers: int = 4
    models: int = 1
    """Number of models. The first one has 6 layers, and each further one has one layer more than the one before."""
    faults: int = 4
    requests: int = 6
    within_s: float = 12.0
    """Seconds within which requests start and faults begin."""
    kinds: tuple[str, ...] | None = None
    """The kinds of faults to inject. None: all kinds."""
    repeats: float = 0.002
    """Share of session messages that are sent twice in a row."""
    prompt: int = 150
    """Longest prompt, in tokens."""
    answer: int = 120
    """Longest answer, in tokens."""
    contexts: int = 0
    """Number of whole contexts that a placement reserves KV for at most. 0: as many as meshd chooses."""
    sessions: int = 16
    """Number of sessions that a peer runs at once. Further requests wait."""
    numerics: int = 1
    """Number of different numerics in the cluster. Each peer has one of them."""
    slowness: float = 1.0
    """Factor by which all peers compute slower. At 5, a whole prefill chunk takes up to ten seconds."""
    guesses: float = 0.4
    """Share of the first stages that have a drafter, so that their sessions have verify and refill steps."""
    width: int = 576
    """Width of the model as it counts for the sizes of payloads. The toy model is 4 wide."""
    events: int = 0
    """Number of timers that must have fired before clients stop sending requests. 0: send `requests` requests in all."""
    churn: bool = False
    """Whether to inject faults too until `events` timers have fired. Only if `events` is not 0."""


def replay(seed: int, options: Options) -> str:
    """Return the command that repeats a run and prints its trace."""
    return " ".join(["python -P tests/sim/run.py", f"--seed {seed}", *_arguments(options)])


def _arguments(options: Options) -> Iterator[str]:
    for field in dataclasses.fields(Options):
        value = getattr(options, field.name)
        if value == field.default:
            continue
        name = f"--{field.name.replace('_', '-')}"
        match value:
            case True:
                yield name
            case tuple():
                yield f'{name} "{",".join(value)}"'
            case _:
                yield f"{name} {value}"
