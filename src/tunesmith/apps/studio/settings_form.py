"""A form for the settings of a run, drawn from their one declaration."""

from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import streamlit as st

from tunesmith.config import TrainSettings
from tunesmith.language import t

CHOSEN_ELSEWHERE = ("model", "data", "eval_data", "out")
FEW = ("epochs", "learning_rate", "lora_r")  # shown; the rest is folded away


def settings_form() -> dict[str, Any]:
    """Draw a widget for each setting; returns the values that differ from the defaults."""
    hints = get_type_hints(TrainSettings)
    chosen = [item for item in fields(TrainSettings) if item.name not in CHOSEN_ELSEWHERE]
    few = [item for item in chosen if item.name in FEW]
    rest = [item for item in chosen if item.name not in FEW]
    values = {}
    for item, column in zip(few, st.columns(len(few)), strict=True):
        with column:
            values[item.name] = _widget(item, hints[item.name])
    with st.expander(t("All settings"), icon=":material/tune:"):
        left, right = st.columns(2)
        for number, item in enumerate(rest):
            with right if number % 2 else left:
                values[item.name] = _widget(item, hints[item.name])
    defaults = {item.name: item.default for item in chosen}
    return {name: value for name, value in values.items() if value != defaults[name]}


def _widget(item: "Field[Any]", hint: Any) -> Any:
    label, key = item.name.replace("_", " "), f"setting-{item.name}"
    tip, default = t(item.metadata["help"]), _default(item)
    kind = _without_none(hint)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return st.selectbox(label, choices, choices.index(default), help=tip, key=key)
    if get_origin(kind) is tuple:
        words = st.text_input(label, " ".join(default), help=tip, key=key)
        return tuple(words.split())
    if kind is bool and kind is hint:
        return st.checkbox(label, default, help=tip, key=key)
    if kind is bool:
        answers = {t("automatic"): None, t("yes"): True, t("no"): False}
        return answers[st.selectbox(label, [*answers], help=tip, key=key)]
    if kind is str:
        text = st.text_input(label, default or "", help=tip, key=key)
        return (text or "").strip() or None
    return st.number_input(
        label,
        min_value=_bound(item.metadata["low"], kind),
        max_value=_bound(item.metadata["high"], kind),
        value=_bound(default, kind),
        format="%d" if kind is int else "%g",
        placeholder=t("automatic"),
        help=tip,
        key=key,
    )


def _default(item: "Field[Any]") -> Any:
    return item.default


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`."""
    arguments = [one for one in get_args(hint) if one is not type(None)]
    return arguments[0] if type(None) in get_args(hint) else hint


def _bound(value: float | None, kind: type) -> Any:
    """Streamlit wants bounds, value and result of one type."""
    return None if value is None else kind(value)
