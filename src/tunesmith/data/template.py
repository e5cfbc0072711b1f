"""The sandbox that runs a model's chat template: untrusted Jinja code from the internet.

What a template sees is what transformers gives it (`raise_exception`, `strftime_now`, `tojson`,
loop controls, `{% generation %}`), so it writes the same text. What it may spend is limited: every
loop turn, call, filter, operator and output draws on a budget of processor time and characters,
checked before the work is done. No thread, no signal, so it holds wherever it is called from.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from functools import wraps
from typing import Any

from jinja2 import TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from tunesmith.errors import DataError, ModelError
from tunesmith.language import t

MOST_TEMPLATE_CHARS = 64_000  # the longest in use have about 30,000
MOST_SECONDS = 0.25  # and once more as many: a garbage collection can take the first
MOST_CHARS = 16_000_000
CHARS_PER_CHAR = 50  # and so many for each that the conversation has
MOST_BITS = 4096

# Llama 3.1 falls back to this day itself. Today's date would make every prompt differ tomorrow.
TODAY = date(2024, 7, 26)

# Slow on purpose-made text, random, or able to grow it in ways that are not worth estimating.
_NO_FILTERS = frozenset(
    ("format", "groupby", "pprint", "random", "striptags", "sum", "urlize", "wordwrap", "xmlattr")
)
_NO_METHODS = frozenset({"encode", "maketrans", "translate"})
_COMPARING_TESTS = ("eq", "equalto", "==", "ne", "!=", "in", "lt", "le", "gt", "ge")
_FAULTS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError)


class ChatTemplate:
    """A compiled chat template. Instances may be shared between threads.

    Raises:
        ModelError: The template is too long, not Jinja, or asks for what no template needs.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MOST_TEMPLATE_CHARS:
            raise ModelError(
                t(
                    "The chat template is {length} characters long, and at most {limit} are run;"
                    " use the model's original template.",
                    length=len(source),
                    limit=MOST_TEMPLATE_CHARS,
                )
            )
        self.sha256 = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        try:
            with _allowance({}):
                self._template = _Sandbox().from_string(source)
        except (*_FAULTS, SyntaxError, RuntimeError, MemoryError) as error:
            raise _unusable(error) from error

    def render(self, **variables: Any) -> str:
        """The text the template writes.

        Raises:
            ModelError: It reached for what is forbidden, or spent its time or space.
            DataError: It refused these messages, or failed on them.
        """
        try:
            with _allowance(variables) as allowance:
                pieces = []
                for piece in self._template.root_render_func(self._template.new_context(variables)):
                    allowance.spend(len(piece))
                    pieces.append(piece)
                return "".join(pieces)
        except (SecurityError, RuntimeError, MemoryError) as error:
            raise _unusable(error) from error
        except _FAULTS as error:
            raise DataError(
                t("The model's chat template refuses these messages: {reason}", reason=_said(error))
            ) from error


def _unusable(error: BaseException) -> ModelError:
    return ModelError(
        t(
            "The chat template cannot be run safely: {reason}; use the model's original template.",
            reason=_said(error),
        )
    )


def _said(error: BaseException) -> str:
    """The template's own words, made harmless for a terminal."""
    if isinstance(error, TemplateSyntaxError):
        words = t("line {line}: {message}", line=error.lineno, message=error.message)
    else:
        words = str(error) or type(error).__name__
    return "".join(char if char.isprintable() else " " for char in words[:200]).strip(" .")


class _Allowance:
    """What one rendering may still spend."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.chars = MOST_CHARS + CHARS_PER_CHAR * _size(given, MOST_CHARS)
        # Processor time of this thread: a busy or sleeping machine must not fail a good template.
        self.deadline = time.thread_time() + MOST_SECONDS
        self.extended = False

    def spend(self, chars: int) -> None:
        self.chars -= chars
        if self.chars < 0:
            raise SecurityError(t("it writes too much text"))
        if time.thread_time() > self.deadline:
            if self.extended:
                raise SecurityError(t("it runs too long"))
            self.extended = True
            self.deadline = time.thread_time() + MOST_SECONDS


_current: ContextVar[_Allowance] = ContextVar("allowance")


@contextmanager
def _allowance(given: Mapping[str, Any]) -> Iterator[_Allowance]:
    allowance = _Allowance(given)
    token = _current.set(allowance)
    try:
        yield allowance
    finally:
        _current.reset(token)


def _metered(value: Any) -> Any:
    """`value`, once paid for."""
    allowance = _current.get()
    allowance.spend(_size(value, allowance.chars) + 1)
    return value


def _size(value: Any, limit: int) -> int:
    """Characters and items inside `value`, counted until they pass `limit`.

    A list of lists of one list is small in memory but endless to print, so an item counts each
    time it is reached.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, int):
        return _bits(value) // 8
    total, waiting = 0, [value]
    while waiting and total <= limit:
        item = waiting.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += 2 * len(item) + 1
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            total += len(item) + 1
            waiting.extend(item)
    return total


def _bits(number: int) -> int:
    if number.bit_length() > MOST_BITS:
        raise SecurityError(t("it computes with enormous numbers"))
    return number.bit_length()


def _afford(name: str, subject: Any, arguments: tuple[Any, ...]) -> None:
    """Refuse a call whose result would be too long, before it is made."""
    limit = _current.get().chars
    if name == "replace" and len(arguments) >= 2:
        length = str(subject).count(str(arguments[0])) * len(str(arguments[1]))
    elif name in ("format", "format_map"):
        length = _format_length(str(subject), arguments, limit)
    else:
        growth = max((abs(item) for item in arguments if isinstance(item, int)), default=0)
        if name == "join":
            growth += _size(list(arguments), limit)
        length = _size(subject, limit) * (1 + growth)
    if length > limit:
        raise SecurityError(t("it writes too much text"))


def _format_length(pattern: str, arguments: Any, limit: int) -> int:
    """What a format may write at most, unless its widths are long or computed."""
    if re.search(r"\d{4}|%[^a-z%]*\*|\{[^{}]*\{", pattern.replace("{{", "")):
        raise SecurityError(t("it writes too much text"))
    places = pattern.count("{") + pattern.count("%")
    return len(pattern) + places * (1000 + _size(arguments, limit))


def _charged(function: Any) -> Callable[..., Any]:
    """A filter or test that pays for what it makes."""

    @wraps(function)  # also copies Jinja's mark that asks for the context as first argument
    def charged(*arguments: Any, **named: Any) -> Any:
        values = tuple(_settled(item) for item in arguments)
        start = 1 if hasattr(function, "jinja_pass_arg") else 0
        others = (*values[start + 1 :], *named.values())
        _afford(function.__name__.removeprefix("do_"), values[start], others)
        return _metered(function(*values, **named))

    return charged


def _settled(value: Any) -> Any:
    """`value`, made a list if its items cannot be counted otherwise."""
    return (
        list(value)
        if isinstance(value, Iterator | KeysView | ValuesView | ItemsView | range)
        else value
    )


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks the answer for others; we need no mark."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Meter(NodeTransformer):
    """Puts a payment on what Jinja compiles to bare Python, out of the sandbox's sight."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_paid(nodes.Const(None)), lineno=node.lineno))
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node) if node.ctx == "load" else node

    def _pay(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _paid(node)

    visit_List = visit_Dict = visit_Concat = visit_Compare = _pay


def _paid(node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, "_metered", [], [], None, None, lineno=node.lineno)


class _Namespace(Namespace):
    """Jinja's, without private names, and printed without following what it holds."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, attributes = args[0], dict(*args[1:], **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(t("it reaches for the private name {name}", name=name))


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants would be folded while compiling
            finalize=_metered,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.filters["tojson"] = _tojson
        self.filters = {
            name: _charged(function)
            for name, function in self.filters.items()
            if name not in _NO_FILTERS
        }
        self.filters["_metered"] = _metered
        self.tests |= {name: _charged(self.tests[name]) for name in _COMPARING_TESTS}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _Namespace,
        }
        self.concat = _concat  # type: ignore[method-assign]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Meter().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(
            t(
                "it reaches for {name} of a {kind}",
                name=attribute,
                kind=type(obj).__name__,
            )
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _afford("format", left, (right,))
        elif operator == "*":
            _afford("*", left, (right,))
            _afford("*", right, (left,))
        elif operator == "**":
            _bits(1 << min(abs(int(right)) * int(left).bit_length(), MOST_BITS + 1))
        return _metered(super().call_binop(context, operator, left, right))

    # The names keep clear of a template's own keyword arguments, as in Jinja.
    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        values = tuple(_settled(item) for item in args)
        maker = getattr(__obj, "__wrapped__", __obj)
        subject = getattr(maker, "__self__", None)
        _afford(getattr(maker, "__name__", ""), subject, (*values, *kwargs.values()))
        return _metered(super().call(__context, __obj, *values, **kwargs))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return TODAY.strftime(pattern[:100])


def _concat(parts: Iterable[str]) -> str:
    pieces = list(parts)
    _current.get().spend(sum(map(len, pieces)))
    return "".join(pieces)
