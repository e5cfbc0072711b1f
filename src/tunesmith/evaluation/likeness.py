"""How alike two answers are, whatever their languages."""

import re
from collections import Counter

_UNIT = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def f1(answer: str, reference: str) -> float:
    """Of the characters (Chinese) and words (others) that both have, 0 to 1; their order is free.

    The measure of SQuAD (Rajpurkar et al. 2016), by characters as CMRC 2018 has it for Chinese.
    """
    said, wanted = _units(answer), _units(reference)
    return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())


def _units(text: str) -> Counter[str]:
    return Counter(_UNIT.findall(text.casefold()))
