"""A jinja2 sandbox whose renderings cost no more than a set amount of work and memory, whatever the template says.

jinja2's own sandbox keeps a template from code and from changing what it is given, but not from looping for hours or from making
a string of gigabytes. Here every loop turn, call and new text is paid from one budget for each rendering; what can't be priced
beforehand is left out (formatting with widths, padding, inheritance, recursive loops): chat templates do not need it.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NoReturn

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_WORK = 64 << 20
"""Units of one rendering: a character made costs 1."""
STEP = 256
"""Units of a loop turn or a call."""
MAX_SECONDS = 1.0
MAX_INTEGER_BITS = 4096

_CHEAP_FILTERS = frozenset({"abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length", "round"})
_LIST_FILTERS = frozenset(
    {"dictsort", "items", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"}
)
_TEXT_FILTERS = frozenset({"capitalize", "lower", "string", "title", "trim", "upper"})
_UNPRICED_METHODS = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"})


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


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks answers for training, is what it holds."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 types it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates, set as Hugging Face's transformers sets it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    context_class = BudgetContext

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[loopcontrols, GenerationTag],
            finalize=_finalize,
            cache_size=0,
        )
        self.globals = {"range": self.globals["range"], "namespace": self.globals["namespace"]} | _HELPERS
        self.filters = {name: FILTERS[name] for name in _CHEAP_FILTERS}
        self.filters |= {name: _priced(FILTERS[name], Budget.spend_on_items) for name in _LIST_FILTERS}
        self.filters |= {name: _priced(FILTERS[name], Budget.spend_on) for name in _TEXT_FILTERS}
        self.filters |= {"join": _join, "replace": _replace, "safe": _same, "tojson": _to_json}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Pricer().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _UNPRICED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """None: `is_safe_attribute` refuses them, so nothing needs wrapping."""
        return None

    def call(self, context: BudgetContext, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        context.budget.spend(STEP)
        if isinstance(obj, Macro):
            context.budget.spend_on((*args, *kwargs.values()))
        elif isinstance(owner := getattr(obj, "__self__", None), str):
            _spend_on_method(context.budget, owner, obj.__name__, args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: BudgetContext, operator: str, left: Any, right: Any) -> Any:  # type: ignore[override]
        context.budget.spend(_binop_price(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _spend_on_method(budget: Budget, text: str, method: str, args: tuple[Any, ...]) -> None:
    budget.spend(len(text))
    if method == "replace" and len(args) >= 2:
        budget.spend(_replaced_size(text, str(args[0]), str(args[1])))
    elif method == "join" and args:
        budget.spend(_joined_size(text, args[0]))


def _binop_price(operator: str, left: object, right: object) -> int:
    if operator == "%" and isinstance(left, str):
        raise TemplateLimit("it formats text with %, which the sandbox leaves out")
    if isinstance(left, int) and isinstance(right, int):
        bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}.get(operator, 0)
        if bits > MAX_INTEGER_BITS:
            raise TemplateLimit("it computes a number that is too large")
        return 1
    if operator == "*":
        return _length(left) * right if isinstance(right, int) else left * _length(right) if isinstance(left, int) else 1
    return _length(left) + _length(right)


def _length(value: object) -> int:
    return len(value) if isinstance(value, str) else 8 * len(value) if isinstance(value, list | tuple) else 1


def _replaced_size(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * len(new)


def _joined_size(separator: str, items: object) -> int:
    return len(separator) * len(items) if isinstance(items, str | list | tuple | Mapping) else 0


def _priced(plain: Callable[..., Any], pay: Callable[[Budget, object], None]) -> Callable[..., Any]:
    """One of jinja2's own filters, paid for before it runs."""
    wants = getattr(getattr(plain, "jinja_pass_arg", None), "name", None)

    @pass_context
    def priced(context: BudgetContext, value: object, *args: Any, **kwargs: Any) -> Any:
        pay(context.budget, value)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        return plain(first[wants], value, *args, **kwargs) if wants else plain(value, *args, **kwargs)

    return priced


@pass_context
def _finalize(context: BudgetContext, value: object) -> object:
    context.budget.spend_on(value)
    return value


def _same(value: object) -> object:
    """Nothing is escaped here, so nothing needs to be called safe."""
    return value


@pass_context
def _join(context: BudgetContext, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = [context.environment.getattr(item, attribute) if attribute else item for item in value]
    context.budget.spend_on(items)
    context.budget.spend(_joined_size(str(d), items))
    return str(d).join(map(str, items))


@pass_context
def _replace(context: BudgetContext, value: object, old: str, new: str, count: int = -1) -> str:
    context.budget.spend_on(value)
    text = str(value)
    context.budget.spend(_replaced_size(text, old, new))
    return text.replace(old, new, count)


@pass_context
def _to_json(
    context: BudgetContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As in transformers: characters stay as they are, and nothing is escaped for HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateLimit(f"it indents JSON by {indent}")
    context.budget.spend_on(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context
def _turns(context: BudgetContext, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.budget.spend(STEP)
        yield item


@pass_context
def _concatenate(context: BudgetContext, *values: object) -> str:
    context.budget.spend_on(values)
    return "".join(map(str, values))


@pass_context
def _slice(context: BudgetContext, value: Any, start: Any, stop: Any, step: Any) -> Any:
    context.budget.spend(_length(value))
    return value[start:stop:step]


@pass_context
def _built(context: BudgetContext, value: object) -> object:
    """A list, tuple or dict that the template wrote: paid by all that it holds, so that none holds more than was paid for."""
    context.budget.spend_on(value)
    return value


@pass_context
def _dict(context: BudgetContext, *args: Any, **kwargs: Any) -> object:
    return _built(context, dict(*args, **kwargs))


@pass_context
def _text(context: BudgetContext, text: str) -> str:
    context.budget.spend(len(text))
    return text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRuntimeError(message)


_HELPERS: dict[str, Any] = {
    "raise_exception": _raise_exception,
    "dict": _dict,
    "_built": _built,
    "_turns": _turns,
    "_concatenate": _concatenate,
    "_slice": _slice,
    "_text": _text,
}


class _Pricer(NodeTransformer):
    """Puts the helpers above where a template loops, joins, cuts or builds, since jinja2 has no hooks there."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateLimit("it has a recursive loop, which the sandbox leaves out")
        self.generic_visit(node)
        node.iter = _helper("_turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _helper("_concatenate", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _helper("_slice", node.node, *(bound or nodes.Const(None) for bound in bounds))

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return node if isinstance(node, nodes.Tuple) and node.ctx != "load" else _helper("_built", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return node if len(node.data) < STEP else _helper("_text", nodes.Const(node.data))

    def visit_Block(self, node: nodes.Node) -> NoReturn:
        raise TemplateLimit(f"it has a {type(node).__name__.lower()} statement, which the sandbox leaves out")

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block


def _helper(name: str, *args: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(args), [], None, None)
