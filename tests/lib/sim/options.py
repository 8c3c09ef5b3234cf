"""The options of a run, and the command that repeats it."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Together with the seed these determine a run completely."""

    peers: int = 4
    models: int = 1
    """With 6 layers, 7, ..."""
    faults: int = 4
    requests: int = 6
    within_s: float = 12.0
    kinds: tuple[str, ...] | None = None
    repeats: float = 0.002
    prompt: int = 150
    answer: int = 120
    events: int = 0
    """Run until so many events have happened."""
    churn: bool = False
    """With `events`: faults arrive until the end, too."""


def replay(seed: int, options: Options) -> str:
    """The command that repeats a run, and shows all of it."""
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
