"""The sandbox: hostile templates end in an error within a second, honest ones are left alone."""

import hashlib
import threading
import time
from typing import Any

import psutil
import pytest

from tests.helpers_templates import FAMILIES, template
from tests.helpers_time import yardstick
from tunesmith.data.template import MOST_SECONDS, MOST_TEMPLATE_CHARS, ChatTemplate
from tunesmith.errors import DataError, ModelError, TunesmithError

MESSAGES = [{"role": "user", "content": "Hi"}]
MEBIBYTE = 2**20

BIG = "{% set big = 'a' * 7000000 %}"
GROW = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(100) %}"
NEST = "{% set n = namespace(x=['a']) %}{% for i in range(100) %}"

HOSTILE = {
    # never ends
    "nested loops": "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4,
    "loops that call": "{% set c = cycler(1) %}"
    + "{% for a in range(99999) %}" * 4
    + "{{ c.next() }}"
    + "{% endfor %}" * 4,
    "recursive macro": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "power": "{{ 10 ** 1000000000 }}",
    "squares": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}"
    "{% endfor %}{{ n.x }}",
    "long division": "{{ ('1' * 4000000) | int(base=2) // ('1' * 2000000) | int(base=2) }}",
    "filtered loop": BIG + "{% for i in range(99999) if big == big[1:] ~ 'a' %}{% endfor %}",
    "search": BIG + "{% for i in ['ab'] * 90000 if i in big %}{% endfor %}",
    "search by filter": BIG + "{{ (['ab'] * 90000) | select('in', big) | list }}",
    "search without a loop": BIG + "{% if 'ab' in big %}{% endif %}" * 2000,
    # grows
    "string times": "{{ 'a' * 10000000000 }}",
    "times string": "{{ 10000000000 * 'a' }}",
    "list times": "{{ ([1] * 1000000000) | length }}",
    "plus": GROW + "{% set n.x = n.x + n.x %}{% endfor %}",
    "tilde": GROW + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "block": GROW + "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}{% endfor %}",
    "macro": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}"
    + GROW
    + "{% set n.x = d(n.x) %}{% endfor %}",
    "list of lists": NEST + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "dict of dicts": NEST + "{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}{{ n.x | tojson }}",
    "tuple of tuples": "{% set n = namespace(x=(1,)) %}{% for i in range(100) %}"
    "{% set n.x = (n.x, n.x) %}{% endfor %}{{ {n.x: 1} }}",
    "dict()": NEST + "{% set n.x = dict(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "slices": BIG + "{% set n = namespace(x=[]) %}{% for i in range(9999) %}"
    "{% set n.x = n.x + [big[1:]] %}{% endfor %}",
    "output": BIG + "{% for i in range(99999) %}{{ big }}{% endfor %}",
    "output of a macro": BIG + "{% macro m() %}" + "{{ big }}" * 6000 + "{% endmacro %}{{ m() }}",
    "replace": BIG + "{{ big.replace('a', big) }}",
    "replace nothing": BIG + "{{ big | replace('', big) }}",
    "join": BIG + "{{ big.join(range(99999) | map('string')) }}",
    "join filter": BIG + "{{ range(99999) | join(big) }}",
    "map": BIG + "{{ range(99999) | map('replace', '1', big) | list }}",
    "format": "{{ '{:>9999999999}'.format('a') }}",
    "format map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "computed width": "{{ '{:>{}}'.format('a', 9999999999) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (9999999999, 1) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(10000000000) }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "tojson": "{{ [1, [2]] | tojson(indent=10000000000) }}",
    "batch": "{{ [1] | batch(10000000000, 'a') | list }}",
    "range": "{{ range(10000000000) | list }}",
    "lorem ipsum": "{{ lipsum(1000000) }}",
    # reaches for what is not its own
    "class": "{{ ''.__class__.__mro__ }}",
    "class by filter": "{{ '' | attr('__class__') }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "builtins": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "frame": "{{ (messages | map('upper')).gi_frame }}",
    "context": "{{ self._TemplateReference__context }}",
    "private name": "{% set n = namespace() %}{% set n._x = 1 %}",
    "change": "{{ messages.pop() }}",
    "file": "{% include '/etc/passwd' %}",
    "module": "{% import 'os' as os %}",
    # is too much to read
    "10 MB": "a" * 10_000_000,
    "10 MB of code": "{{ a }}" * 1_500_000,
    "parentheses": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "lists": "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
    "sums": "{{ 1" + "+1" * 30_000 + " }}",
    "filters": "{{ a" + "|upper" * 10_000 + " }}",
    "attributes": "{{ a" + ".b" * 30_000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "unclosed": "{{" * 30_000,
    "not Jinja": "{% for %}",
}


def run(source: str) -> None:
    ChatTemplate(source).render(messages=MESSAGES, tools=None, add_generation_prompt=True)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_soon_ends_in_an_error(name: str) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    start = time.thread_time()
    with pytest.raises(TunesmithError):
        run(HOSTILE[name])
    assert time.thread_time() - start < 35 * yardstick()  # about a second
    assert process.memory_info().rss - before < 300 * MEBIBYTE


def test_it_holds_in_any_thread_and_disturbs_no_other() -> None:
    errors: list[BaseException] = []
    written: list[str] = []

    def hostile() -> None:
        try:
            run(HOSTILE["nested loops"])
        except ModelError as error:
            errors.append(error)

    honest = ChatTemplate(template("qwen2.5"))
    threads = [threading.Thread(target=hostile) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        written.append(honest.render(messages=MESSAGES, add_generation_prompt=True))
    assert len(errors) == 3
    assert len(set(written)) == 1


def test_a_hostile_conversation_does_not_use_up_an_honest_template() -> None:
    honest = ChatTemplate(template("qwen2.5"))
    text = "control " * 500_000
    assert text in honest.render(messages=[{"role": "user", "content": text}])


def test_a_long_conversation_is_in_budget() -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": "word " * 200} for turn in range(1001)]
    for name in ("qwen3", "mistral-v0.3", "llama3.1"):
        honest = ChatTemplate(template(name))
        assert "word word" in honest.render(messages=messages, tools=None, eos_token="</s>")


def test_what_a_template_complains_of_is_shown_harmlessly() -> None:
    source = "{{ raise_exception('no ' + messages[0].content) }}"
    with pytest.raises(DataError, match="refuses these messages: no evil  name") as caught:
        ChatTemplate(source).render(messages=[{"content": "evil\x1b\nname"}])
    assert str(caught.value).isprintable()


def test_the_day_never_changes() -> None:
    assert ChatTemplate("{{ strftime_now('%Y-%m-%d %B') }}").render() == "2024-07-26 July"


def test_the_fingerprint_is_that_of_the_text() -> None:
    assert ChatTemplate("é").sha256 == hashlib.sha256("é".encode()).hexdigest()


HONEST = {
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n b {%- if true %} c {%- endif %}\n",
    "json": "{{ messages | tojson }}{{ {'a': '<é>'} | tojson(indent=2, sort_keys=true) }}",
    "loops": "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}"
    "{% if loop.first %}{% continue %}{% endif %}{% break %}{% endfor %}",
    "loop filter": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].content }}{{ 'abc'[:-1] }}",
    "strings": "{{ ' a '.strip() ~ 'b' + 'c' * 3 }}{{ 'a-b'.split('-')[-1] }}{{ 'x' | trim }}"
    "{{ 'aXa'.replace('X', '-') }}{{ ', '.join(['a', 'b']) }}{{ '%s' % 'z' }}{{ '{}'.format(1) }}",
    "namespace": "{% set n = namespace(found=false) %}{% for m in messages %}"
    "{% set n.found = n.found or m.role == 'user' %}{% endfor %}{{ n.found }}",
    "macro": "{% macro show(m, end='.') %}{{ m.role + end }}{% endmacro %}"
    "{% for m in messages %}{{ show(m) }}{{ show(m, end='!') }}{% endfor %}",
    "call": "{% macro b() %}[{{ caller() }}]{% endmacro %}{% call b() %}x{% endcall %}",
    "selection": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content')"
    " | join(', ') }}{{ messages | rejectattr('tool_calls', 'defined') | list | length }}",
    "unpacking": "{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}"
    "{% for key, value in messages[0] | dictsort %}{{ key }}{% endfor %}",
    "tests": "{{ tools is none }}{{ x is defined }}{{ messages is iterable }}{{ 'a' is string }}"
    "{{ {} is mapping }}{{ 3 is odd }}{{ 'a' in ['a'] }}{{ 'b' not in 'abc' }}",
    "numbers": "{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 8 }}{{ 7 / 2 }}{{ -3 | abs }}{{ 1.25 | round(1) }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% endfor %}",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "set block": "{% set x %}a{{ 1 }}{% endset %}{{ x }}{{ x | upper }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ nothing | default('d') }}",
    "escape": "{{ '<b>' }}{{ '<b>' | e }}{{ '<b>' | safe }}",
    "dict": "{{ dict(a=1) }}{{ {'a': [1, (2, 3)]} }}{{ none }}{{ true }}",
} | {name: template(name) for name in FAMILIES if name != "llama3.1"}


@pytest.mark.parametrize("name", HONEST)
def test_writes_what_transformers_writes(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [
        {"role": "user", "content": "Hi <b>"},
        {"role": "assistant", "content": " 你好\n"},
        {"role": "user", "content": "\n\nBye"},
    ]
    given: dict[str, Any] = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    expected: Any = render_jinja_template([messages], chat_template=HONEST[name], **given)
    assert (
        ChatTemplate(HONEST[name]).render(messages=messages, tools=None, **given) == expected[0][0]
    )


def test_the_longest_template_is_compiled_in_time() -> None:
    source = "{{ messages[0].content ~ '-' }}" * (MOST_TEMPLATE_CHARS // 31)
    start = time.thread_time()
    assert ChatTemplate(source).render(messages=MESSAGES).startswith("Hi-Hi-")
    assert time.thread_time() - start < 50 * yardstick()


def test_one_pause_for_a_garbage_collection_fails_no_template() -> None:
    lived = [object() for _ in range(10)]

    def pause() -> str:
        start = time.thread_time()
        while time.thread_time() - start < 1.2 * MOST_SECONDS:
            lived.append(object())
            lived.pop()
        return ""

    written = ChatTemplate("{{ pause() }}{{ messages[0].content }}").render(
        messages=MESSAGES, pause=pause
    )
    assert written == "Hi"
