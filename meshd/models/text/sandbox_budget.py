"""The budget of one rendering of a chat template, and the prices of its operations."""

import time
from collections.abc import Mapping, Sized
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.runtime import Context

MAX_WORK = 64 << 20
"""Maximum number of units that one rendering may spend. A new character costs 1 unit."""
STEP = 256
"""Price of a loop iteration or a call, in units."""
MAX_SECONDS = 1.0
MAX_INTEGER_BITS = 4096


class TemplateLimit(TemplateRuntimeError):
    """The template exceeds the budget, or uses a feature that the sandbox does not support."""


class Budget:
    """The units and the time that are left for one rendering. Every method raises TemplateLimit when either runs out."""

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0 or time.monotonic() > self._deadline:
            raise TemplateLimit("it takes more work than a chat template may")

    def spend_on_items(self, value: object) -> None:
        """Pay for a list of a value's items. An iterator costs only STEP, since the values that it yields were paid for before."""
        self.spend(8 * len(value) if isinstance(value, Sized) else STEP)

    def spend_on(self, value: object) -> None:
        """Pay for converting a value to text, including all nested values."""
        if isinstance(value, str):
            self.spend(len(value))
            return
        waiting = [value]
        while waiting:
            item = waiting.pop()
            self.spend(len(item) * 8 + 8 if isinstance(item, str | Mapping | list | tuple) else 8)
            if isinstance(item, Mapping):
                waiting.extend((*item.keys(), *item.values()))
            elif isinstance(item, list | tuple):
                waiting.extend(item)


class BudgetContext(Context):
    """The variables of one rendering, and its budget."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = Budget()


def spend_on_method(budget: Budget, text: str, method: str, args: tuple[Any, ...]) -> None:
    """Pay for a call of a string's method."""
    budget.spend(len(text))
    if method == "replace" and len(args) >= 2:
        budget.spend(replaced_size(text, str(args[0]), str(args[1])))
    elif method == "join" and args:
        budget.spend(joined_size(text, args[0]))


def binop_price(operator: str, left: object, right: object) -> int:
    """Return the price of a binary operation. Raises: TemplateLimit for `%` on text, and for integers over MAX_INTEGER_BITS."""
    if operator == "%" and isinstance(left, str):
        raise TemplateLimit("it formats text with %, which the sandbox does not support")
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}.get(operator, 0)
        if bits > MAX_INTEGER_BITS:
            raise TemplateLimit("it computes a number that is too large")
        return 1
    if operator == "*":
        return length(left) * right if isinstance(right, int) else left * length(right) if isinstance(left, int) else 1
    return length(left) + length(right)


def length(value: object) -> int:
    """Return the price of a copy of a value."""
    return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list | tuple) else 1


def replaced_size(text: str, old: str, new: str) -> int:
    """Return an upper bound of the length of `text.replace(old, new)`."""
    return len(text) + text.count(old) * len(new)


def joined_size(separator: str, items: object) -> int:
    """Return an upper bound of the separators' length in `separator.join(items)`; 0 for an iterator."""
    return len(separator) * len(items) if isinstance(items, str | list | tuple | Mapping) else 0
