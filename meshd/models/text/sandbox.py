"""A jinja2 sandbox that bounds the work and memory of every rendering, whatever the template contains.

jinja2's own sandbox prevents a template from running code and from changing its input, but not from looping for hours or building
a string of gigabytes. Here each loop iteration, call and new string is charged to the budget of its rendering. Features whose
cost is not known in advance are not supported (formatting with widths, padding, inheritance, recursive loops): chat templates do
not need them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import Formatter
from typing import Any, NoReturn

from jinja2 import TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_indent
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from meshd.models.text.sandbox_budget import (
    STEP,
    Budget,
    BudgetContext,
    TemplateLimit,
    binop_price,
    joined_size,
    length,
    replaced_size,
    spend_on_method,
)

_CHEAP_FILTERS = frozenset({"abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length", "round"})
_LIST_FILTERS = frozenset(
    {"dictsort", "items", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique"}
)
_TEXT_FILTERS = frozenset({"capitalize", "lower", "string", "title", "trim", "upper"})
_UNPRICED_METHODS = frozenset({"center", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"})
_MAX_INDENT = 16
"""Maximum number of characters by which JSON and text may be indented."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for training. Here it renders its content and nothing more."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 types it as a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates, with the options that Hugging Face's transformers uses."""

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
        self.filters |= {"indent": _indent, "join": _join, "replace": _replace, "safe": _same, "tojson": _to_json}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Pricer().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _UNPRICED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replace `str.format` with a version that supports only plain fields, such as `{}` and `{name}`.

        Returns: None if `value` is not `str.format`. `is_safe_attribute` refuses `str.format_map`.
        """
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or getattr(value, "__name__", "") != "format":
            return None

        @pass_context
        def filled(context: BudgetContext, *args: object, **named: object) -> str:
            return "".join(_formatted(context.budget, text, args, named))

        return filled

    def call(self, context: BudgetContext, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        context.budget.spend(STEP)
        if isinstance(obj, Macro):
            context.budget.spend_on((*args, *kwargs.values()))
        elif isinstance(owner := getattr(obj, "__self__", None), str):
            spend_on_method(context.budget, owner, obj.__name__, args)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: BudgetContext, operator: str, left: Any, right: Any) -> Any:  # type: ignore[override]
        context.budget.spend(binop_price(operator, left, right))
        return super().call_binop(context, operator, left, right)


def _formatted(budget: Budget, text: str, args: tuple[object, ...], named: Mapping[str, object]) -> Iterator[str]:
    """Yield the parts of a formatted text. Raises: TemplateLimit for widths, conversions and attributes."""
    count = 0
    for literal, field, width, conversion in Formatter().parse(text):
        yield literal
        if field is None:
            continue
        if width or conversion or not (field.isalnum() or field == ""):
            raise TemplateLimit("it formats text with more than plain fields, which the sandbox does not support")
        value = named[field] if field and not field.isdigit() else args[int(field or count)]
        count += 1
        budget.spend_on(value)
        budget.spend(STEP)
        yield str(value)


def _priced(plain: Callable[..., Any], pay: Callable[[Budget, object], None]) -> Callable[..., Any]:
    """Wrap a filter of jinja2: `pay` charges the filter's input to the budget before the filter runs."""
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
    """Return the value unchanged: the `safe` filter. This environment escapes nothing, so nothing needs to be marked as safe."""
    return value


@pass_context
def _join(context: BudgetContext, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = [context.environment.getattr(item, attribute) if attribute else item for item in value]
    context.budget.spend_on(items)
    context.budget.spend(joined_size(str(d), items))
    return str(d).join(map(str, items))


@pass_context
def _replace(context: BudgetContext, value: object, old: str, new: str, count: int = -1) -> str:
    context.budget.spend_on(value)
    text = str(value)
    context.budget.spend(replaced_size(text, old, new))
    return text.replace(old, new, count)


@pass_context
def _indent(context: BudgetContext, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > _MAX_INDENT:
        raise TemplateLimit(f"it indents text by more than {_MAX_INDENT}")
    context.budget.spend(len(value) + _MAX_INDENT * len(value.splitlines()))
    return do_indent(value, width, first, blank)


@pass_context
def _to_json(
    context: BudgetContext,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Convert a value to JSON: the `tojson` filter of transformers, which escapes neither non-ASCII characters nor HTML."""
    if indent is not None and not 0 <= indent <= _MAX_INDENT:
        raise TemplateLimit(f"it indents JSON by {indent}")
    context.budget.spend_on(value)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context
def _iterate(context: BudgetContext, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.budget.spend(STEP)
        yield item


@pass_context
def _concatenate(context: BudgetContext, *values: object) -> str:
    context.budget.spend_on(values)
    return "".join(map(str, values))


@pass_context
def _slice(context: BudgetContext, value: Any, start: Any, stop: Any, step: Any) -> Any:
    context.budget.spend(length(value))
    return value[start:stop:step]


@pass_context
def _container(context: BudgetContext, value: object) -> object:
    """Charge for a list, tuple or dict literal and all nested values, so that no container outgrows the budget."""
    context.budget.spend_on(value)
    return value


@pass_context
def _dict(context: BudgetContext, *args: Any, **kwargs: Any) -> object:
    return _container(context, dict(*args, **kwargs))


@pass_context
def _text(context: BudgetContext, text: str) -> str:
    context.budget.spend(len(text))
    return text


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRuntimeError(message)


_HELPERS: dict[str, Any] = {
    "raise_exception": _raise_exception,
    "dict": _dict,
    "_container": _container,
    "_iterate": _iterate,
    "_concatenate": _concatenate,
    "_slice": _slice,
    "_text": _text,
}


class _Pricer(NodeTransformer):
    """Makes loops, concatenations, slices and literals call `_HELPERS`, which charge for them, since jinja2 has no hooks for these.

    Raises TemplateLimit for statements that the sandbox does not support.
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateLimit("it has a recursive loop, which the sandbox does not support")
        self.generic_visit(node)
        node.iter = _helper("_iterate", node.iter)
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
        return node if isinstance(node, nodes.Tuple) and node.ctx != "load" else _helper("_container", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return node if len(node.data) < STEP else _helper("_text", nodes.Const(node.data))

    def visit_Block(self, node: nodes.Node) -> NoReturn:
        raise TemplateLimit(f"it has a {type(node).__name__.lower()} statement, which the sandbox does not support")

    visit_Extends = visit_Include = visit_Import = visit_FromImport = visit_Block


def _helper(name: str, *args: nodes.Node) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), list(args), [], None, None)
