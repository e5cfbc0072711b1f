"""How alike two answers are, and how alike one is to itself, whatever their languages."""

import re
from collections import Counter

_UNIT = re.compile(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+")


def f1(answer: str, reference: str) -> float:
    """Of the characters (Chinese) and words (others) that both have, 0 to 1; their order is free.

    The measure of SQuAD (Rajpurkar et al. 2016), by characters as CMRC 2018 has it for Chinese.
    """
    said, wanted = Counter(_units(answer)), Counter(_units(reference))
    return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())


def repetition(answer: str) -> float:
    """Of all runs of four characters or words the share that stood there before, 0 to 1.

    It is seq-rep-4 of Welleck et al. 2019 (Neural Text Generation with Unlikelihood Training).
    """
    units = _units(answer)
    runs = [tuple(units[start : start + 4]) for start in range(len(units) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _units(text: str) -> list[str]:
    return _UNIT.findall(text.casefold())
