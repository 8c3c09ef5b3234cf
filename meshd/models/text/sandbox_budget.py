"""What one rendering of a chat template may cost, and what its steps do."""

import time
from collections.abc import Mapping, Sized
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.runtime import Context

MAX_WORK = 64 << 20
"""Units of one rendering: a character made costs 1."""
STEP = 256
"""Units of a loop turn or a call."""
MAX_SECONDS = 1.0
MAX_INTEGER_BITS = 4096


class TemplateLimit(TemplateRuntimeError):
    """The template asks for more than a rendering may cost, or for what the sandbox leaves out."""


class Budget:
    """What one rendering may still cost."""

    def __init__(self) -> None:
        self._left = MAX_WORK
        self._deadline = time.monotonic() + MAX_SECONDS

    def spend(self, units: int) -> None:
        self._left -= units
        if self._left < 0 or time.monotonic() > self._deadline:
            raise TemplateLimit("it takes more work than a chat template may")

    def spend_on_items(self, value: object) -> None:
        """The price of a list of a value's items. What has no length is made turn by turn of something that was paid for."""
        self.spend(8 * len(value) if isinstance(value, Sized) else STEP)

    def spend_on(self, value: object) -> None:
        """The price of turning a value into text."""
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
    """One rendering's variables, and what it may still cost."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.budget = Budget()


def spend_on_method(budget: Budget, text: str, method: str, args: tuple[Any, ...]) -> None:
    """Pay for a method of a text."""
    budget.spend(len(text))
    if method == "replace" and len(args) >= 2:
        budget.spend(replaced_size(text, str(args[0]), str(args[1])))
    elif method == "join" and args:
        budget.spend(joined_size(text, args[0]))


def binop_price(operator: str, left: object, right: object) -> int:
    """What an operator costs. Raises: TemplateLimit, for what none may cost."""
    if operator == "%" and isinstance(left, str):
        raise TemplateLimit("it formats text with %, which the sandbox leaves out")
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}.get(operator, 0)
        if bits > MAX_INTEGER_BITS:
            raise TemplateLimit("it computes a number that is too large")
        return 1
    if operator == "*":
        return length(left) * right if isinstance(right, int) else left * length(right) if isinstance(left, int) else 1
    return length(left) + length(right)


def length(value: object) -> int:
    """What a copy of a value costs."""
    return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list | tuple) else 1


def replaced_size(text: str, old: str, new: str) -> int:
    """Characters of a text with something replaced, at most."""
    return len(text) + text.count(old) * len(new)


def joined_size(separator: str, items: object) -> int:
    """Characters of all separators between items."""
    return len(separator) * len(items) if isinstance(items, str | list | tuple | Mapping) else 0
