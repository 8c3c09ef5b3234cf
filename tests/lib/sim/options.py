"""The options of a run, and the command that repeats it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a run. Together with the seed they determine it completely."""

    peers: int = 4
    models: int = 1
    """The first has 6 layers, each further one has one more."""
    faults: int = 4
    requests: int = 6
    within_s: float = 12.0
    """Requests start, and faults begin, within this time."""
    kinds: tuple[str, ...] | None = None
    """The kinds of faults. None: all."""
    repeats: float = 0.002
    """Share of session messages that arrive twice."""
    prompt: int = 150
    """Longest prompt, in tokens."""
    answer: int = 120
    """Longest answer, in tokens."""
    events: int = 0
    """If not 0: requests keep coming until this many timers have fired."""
    churn: bool = False
    """With `events`: faults keep coming until the end, too."""


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
