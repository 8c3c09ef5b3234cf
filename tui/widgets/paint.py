"""The colours of texts in tables and drawings, which follow the theme."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich.text import Text

_STATES = {
    "alive": "good",
    "decoding": "good",
    "finished": "good",
    "found": "calm",
    "connecting": "calm",
    "opening": "calm",
    "prefilling": "calm",
    "queued": "calm",
    "suspect": "warn",
    "draining": "warn",
    "suspended": "warn",
    "dead": "bad",
    "refused": "bad",
    "recovering": "bad",
    "failed": "bad",
}
_LEVELS = {
    "error": "bad",
    "warning": "warn",
    "debug": "dim",
    "recovery": "warn",
    "refusal": "bad",
    "peer": "calm",
    "session": "calm",
}


@dataclass(frozen=True, slots=True)
class Paint:
    """Styles by what they mean."""

    good: str
    calm: str
    warn: str
    bad: str
    dim: str = "dim"

    @classmethod
    def of(cls, theme: Mapping[str, str]) -> Self:
        """Take the colours that a theme has for texts, which are readable on its background."""
        return cls(good=theme["text-success"], calm=theme["text-primary"], warn=theme["text-warning"], bad=theme["text-error"])

    def state(self, name: str, shown: str = "") -> Text:
        """Show the state of a peer or a session. A state that this version does not know has no colour."""
        return Text(shown or name, self._named(_STATES.get(name, "")))

    def kind(self, name: str) -> str:
        """Return the style of a line of this level, or of an event of this type."""
        return self._named(_LEVELS.get(name, ""))

    def bar(self, share: float, width: int) -> Text:
        """Draw a share from 0 to 1 as a bar that warns when it is nearly full."""
        share = min(1.0, max(0.0, share))
        filled = round(share * width)
        style = self.bad if share > 0.9 else self.warn if share > 0.75 else self.good
        return Text.assemble(("█" * filled, style), ("░" * (width - filled), self.dim))

    def progress(self, share: float, width: int) -> Text:
        """Draw how much of some work is done."""
        filled = round(min(1.0, max(0.0, share)) * width)
        return Text.assemble(("█" * filled, self.calm), ("░" * (width - filled), self.dim))

    def _named(self, name: str) -> str:
        return str(getattr(self, name)) if name else ""
