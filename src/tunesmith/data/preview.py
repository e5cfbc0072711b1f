"""Samples as a person reads them: which tokens are trained, and what a length limit would cut."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from tunesmith.data.chat_format import ChatTokenizer
from tunesmith.data.packs import Sample
from tunesmith.language import current_language, t

_SHOWN = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}
_JOINERS = "\u200c\u200d"  # emoji and several scripts need them, and they hide nothing
_LONGEST_CHARACTER = 4  # bytes, and so at most as many tokens


@dataclass(frozen=True)
class Span:
    """The fewest tokens that make whole characters: one, or several where a character is split.

    `text` is safe to show: line breaks are marked, control characters and such are named.
    """

    text: str
    trained: bool
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Lengths:
    """How long samples are, in tokens, and what a limit of `max_length` would do to them.

    Attributes:
        samples, tokens, trained: How many there are.
        longest: Tokens of the longest sample.
        cut: Samples that are longer than the limit.
        trained_cut: Trained tokens past the limit.
        emptied: Samples that have nothing left to train.
    """

    samples: int
    tokens: int
    trained: int
    longest: int
    max_length: int | None
    cut: int
    trained_cut: int
    emptied: int


def lengths(samples: Sequence[Sample], max_length: int | None = None) -> Lengths:
    """Count tokens, and what a cut after `max_length` tokens would take."""
    kept = [sum(sample.trained[:max_length]) for sample in samples]
    trained = sum(sum(sample.trained) for sample in samples)
    sizes = [len(sample.input_ids) for sample in samples]
    return Lengths(
        samples=len(samples),
        tokens=sum(sizes),
        trained=trained,
        longest=max(sizes, default=0),
        max_length=max_length,
        cut=0 if max_length is None else sum(size > max_length for size in sizes),
        trained_cut=trained - sum(kept),
        emptied=kept.count(0),
    )


def spans(sample: Sample, tokenizer: ChatTokenizer) -> list[Span]:
    """The sample, token by token, in reading order; the texts join to all of it."""
    ids, found, start = sample.input_ids, [], 0
    for stop, text in _characters(ids, tokenizer):
        found.append(Span(visible(text), sample.trained[start], ids[start:stop]))
        start = stop
    return found


def _characters(ids: Sequence[int], tokenizer: ChatTokenizer) -> Iterator[tuple[int, str]]:
    """Where whole characters end, and the text since the last such place."""
    context = start = 0
    for stop in range(1, len(ids) + 1):
        # Decoders treat the first token of a text differently, so the span before comes along.
        before = tokenizer.decode(ids[context:start], skip_special=False)
        text = tokenizer.decode(ids[context:stop], skip_special=False)
        unfinished = text.endswith("\ufffd") and stop - start < _LONGEST_CHARACTER
        if unfinished and stop < len(ids):
            continue
        yield stop, text[len(before) :]
        context, start = start, stop


def visible(text: str) -> str:
    """`text` with nothing left that moves a cursor, turns the writing direction or hides."""
    return "".join(_SHOWN.get(char) or _named(char) for char in text)


def _named(char: str) -> str:
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in _JOINERS
    return f"‹U+{ord(char):04X}›" if hidden else char


def preview_html(
    samples: Sequence[Sample],
    tokenizer: ChatTokenizer,
    *,
    title: str,
    max_length: int | None = None,
) -> str:
    """A page of its own that shows `samples`: trained tokens coloured, cut ones struck through.

    It loads nothing, runs nothing, and shows every text as text.
    """
    numbers = "".join(f"<li>{escape(line)}</li>" for line in summary(lengths(samples, max_length)))
    body = "".join(
        sample_html(number, sample, tokenizer, max_length)
        for number, sample in enumerate(samples, 1)
    )
    legend = f'<span class="t">{escape(t("trained"))}</span> {escape(t("read only"))}'
    if max_length is not None:
        legend += f" <s>{escape(t('cut off'))}</s>"
    return _PAGE.format(
        language=current_language(),
        title=escape(title),
        numbers=numbers,
        legend=legend,
        body=body,
        style=_STYLE,
    )


def sample_html(
    number: int, sample: Sample, tokenizer: ChatTokenizer, max_length: int | None = None
) -> str:
    """One sample as a heading and a `pre`; its trained tokens have the class `t`, cut ones are `s`.

    Every text in it is escaped.
    """
    limit = len(sample.input_ids) if max_length is None else max_length
    heading = t(
        "Sample {number}: {tokens} tokens, {trained} trained",
        number=number,
        tokens=len(sample.input_ids),
        trained=sum(sample.trained),
    )
    return (
        f"<h2>{escape(heading)}</h2><pre>{''.join(_marks(spans(sample, tokenizer), limit))}</pre>"
    )


def summary(counted: Lengths) -> list[str]:
    """What the numbers say, one sentence each."""
    lines = [
        t(
            "{samples} samples, {tokens} tokens, {trained} of them trained.",
            samples=counted.samples,
            tokens=counted.tokens,
            trained=counted.trained,
        ),
        t("The longest sample has {longest} tokens.", longest=counted.longest),
    ]
    if counted.max_length is not None:
        lines.append(
            t(
                "A limit of {limit} tokens cuts {cut} samples and {trained} trained tokens.",
                limit=counted.max_length,
                cut=counted.cut,
                trained=counted.trained_cut,
            )
        )
    if counted.emptied:
        lines.append(t("{count} samples have nothing to train.", count=counted.emptied))
    return lines


def _marks(found: Iterable[Span], limit: int) -> Iterator[str]:
    place = 0
    for span in found:
        place += len(span.token_ids)
        tag = "s" if place > limit else "span"
        style = ' class="t"' if span.trained else ""
        ids = " ".join(map(str, span.token_ids))
        yield f'<{tag}{style} title="{ids}">{escape(span.text)}</{tag}>'


_PAGE = """<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
<ul>{numbers}</ul>
<p>{legend}</p>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --trained: #bfe8c6; --edge: #8884; }
@media (prefers-color-scheme: dark) { :root { --trained: #1f5a33; } }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
pre { font: 14px/1.8 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre > * { box-shadow: inset 0 0 0 1px var(--edge); border-radius: 2px; }
s { opacity: .5; }
.t { background: var(--trained); }
"""
