"""How alike two answers are, in any language."""

import pytest

from tunesmith.evaluation.likeness import f1, repetition


@pytest.mark.parametrize(
    ("answer", "reference", "value"),
    [
        ("The cat sat.", "the CAT sat", 1.0),
        ("the cat", "the cat sat down", 2 * 2 / 6),
        ("the the the", "the", 2 * 1 / 4),
        ("北京是首都。", "首都是北京", 1.0),
        ("北京", "北京 is big", 2 * 2 / 6),
        ("", "北京", 0.0),
        ("…", "。", 0.0),
    ],
)
def test_it_counts_characters_and_words_that_both_have(
    answer: str, reference: str, value: float
) -> None:
    assert f1(answer, reference) == pytest.approx(value)
    assert f1(reference, answer) == pytest.approx(value)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("The cat sat on the mat and slept.", 0.0),
        ("a b c d a b c d", 1 / 5),
        ("so so so so so so so", 3 / 4),
        ("美丽的美丽的美丽的", 3 / 6),
        ("too short", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_that_goes_in_circles_repeats_its_runs(answer: str, value: float) -> None:
    assert repetition(answer) == pytest.approx(value)
