"""Rows as a model's tokens: which are trained, how long they are, what a limit would cut."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import islice
from pathlib import Path

import streamlit as st

from tunesmith.apps.studio.data_files import Stamp, stamp
from tunesmith.apps.studio.parts import sentences
from tunesmith.data.checks import scan
from tunesmith.data.messages import Conversation
from tunesmith.data.packs import Sample
from tunesmith.data.preview import lengths, sample_html, summary
from tunesmith.data.render import Renderer
from tunesmith.language import t
from tunesmith.models.store import LocalModel, installed, locate
from tunesmith.models.tokenizer import load_tokenizer

MOST_ROWS = 5000  # read and counted
MOST_CHARACTERS = 4_000_000  # counted
MOST_TOKENS = 4000  # of one sample drawn
BARS = 20

# Transparent, so that it suits a light page and a dark one.
_STYLE = """<style>
.tokens h2 { font-size: 1rem; }
.tokens pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8; }
.tokens pre > * { box-shadow: inset 0 0 0 1px #8884; border-radius: 2px; }
.tokens s { opacity: .5; }
.tokens .t { background: rgb(60 180 90 / .3); }
</style>"""


def view_tokens(file: Path) -> None:
    """Draw one row token by token, then the lengths of all."""
    models = [model.name for model in installed()]
    if not models:
        st.info(t("A model comes first: get one on the models page."))
        return
    left, right = st.columns(2)
    model = locate(left.selectbox(t("Model"), models, key="tokens-model"))
    rows = _good_rows(file, stamp(file))
    if not rows:
        st.info(t("No row can be trained on yet; what is wrong stands above."))
        return
    with st.spinner(t("The tokens are being counted.")):
        renderer = _renderer(model.sha256, model)
    number = int(right.number_input(t("Row"), 1, len(rows), key=f"row-{file}"))
    key = f"limit-{file}-{stamp(file)}-{model.sha256}"
    with sentences():
        _tokens(renderer, rows[number - 1], st.session_state.get(key))
    with sentences(), st.spinner(t("The tokens are being counted.")):
        counted, samples = _samples(file, stamp(file), model.sha256, renderer)
        _lengths(samples, key)
        if counted < len(rows) or len(rows) == MOST_ROWS:
            st.caption(t("Only the first {count} rows are counted.", count=counted))


def _tokens(renderer: Renderer, row: Conversation, limit: int | None) -> None:
    samples = renderer.sample(row)
    st.caption(f"`{row.place}`")
    drawn = [Sample(one.input_ids[:MOST_TOKENS], one.trained[:MOST_TOKENS]) for one in samples]
    marked = "".join(
        sample_html(number, sample, renderer.tokenizer, limit)
        for number, sample in enumerate(drawn, 1)
    )
    trained, only_read, cut = escape(t("trained")), escape(t("read only")), escape(t("cut off"))
    legend = f'<p><span class="t">{trained}</span> {only_read} <s>{cut}</s></p>'
    st.html(f'{_STYLE}<div class="tokens">{legend}{marked}</div>')
    if drawn != samples:
        st.caption(t("Only the first {count} tokens are shown.", count=MOST_TOKENS))


def _lengths(samples: Sequence[Sample], key: str) -> None:
    longest = max(len(sample.input_ids) for sample in samples)
    limit = st.slider(t("Longest sample allowed, in tokens"), 1, max(2, longest), longest, key=key)
    st.markdown("\n".join(f"- {line}" for line in summary(lengths(samples, limit))))
    st.bar_chart(
        bars([len(sample.input_ids) for sample in samples]),
        x=t("tokens"), y=t("samples"), sort=False, height=220,
    )  # fmt: skip


def bars(sizes: Sequence[int]) -> list[dict[str, int | str]]:
    """How many samples have about so many tokens: a histogram of equal steps."""
    step = max(sizes) // BARS + 1
    counts = Counter(size // step for size in sizes)
    return [
        {
            t("tokens"): f"{place * step}–{(place + 1) * step - 1}" if step > 1 else str(place),
            t("samples"): counts[place],
        }
        for place in range(min(counts), max(counts) + 1)
    ]


@st.cache_resource(max_entries=2, show_spinner=False)
def _good_rows(file: Path, stamp: Stamp | None) -> Sequence[Conversation]:
    good = (
        row
        for row, findings in scan([file])
        if row is not None and not any(found.is_error for found in findings)
    )
    return tuple(islice(good, MOST_ROWS))


@st.cache_resource(max_entries=2, show_spinner=False)
def _samples(
    file: Path, stamp: Stamp | None, sha256: str, _renderer: Renderer
) -> tuple[int, Sequence[Sample]]:
    """How many rows were counted, and what is trained on of them."""
    samples: list[Sample] = []
    characters = counted = 0
    for row in _good_rows(file, stamp):
        if characters > MOST_CHARACTERS:
            break
        samples += _renderer.sample(row)
        characters += sum(len(message.content) for message in row.messages)
        counted += 1
    return counted, tuple(samples)


@st.cache_resource(max_entries=2, show_spinner=False)
def _renderer(sha256: str, _model: LocalModel) -> Renderer:
    return Renderer(load_tokenizer(_model))
