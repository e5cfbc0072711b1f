"""Sizes, times and speeds as people read them."""

import time
from collections import deque

from tunesmith.language import t


def size(count: float) -> str:
    """Bytes for people: 98.1 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def a_pass(tokens: int, recomputed: int, mlps: int, layers: int) -> str:
    """How a step is cut: 2,048 tokens at most, 4 of 28 layers recomputed."""
    longest = t("{tokens:,} tokens at most", tokens=tokens)
    if mlps:
        return longest + t(
            ", {part} of {all} layers and the MLPs of {mlps} recomputed",
            part=recomputed, all=layers, mlps=mlps,
        )  # fmt: skip
    if recomputed:
        return longest + t(", {part} of {all} layers recomputed", part=recomputed, all=layers)
    return longest


def duration(seconds: float) -> str:
    """Seconds for people: 3 min 20 s."""
    whole = round(seconds)
    if whole < 60:
        return t("{s} s", s=whole)
    if whole < 3600:
        return t("{m} min {s} s", m=whole // 60, s=whole % 60)
    return t("{h} h {m} min", h=whole // 3600, m=whole % 3600 // 60)


class Speed:
    """Bytes a second over the last few seconds, and the time that is left."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=50)

    def figures(self, done: int, total: int) -> str:
        """What stands beside a download's bar."""
        self._seen.append((time.monotonic(), done))
        (start, first), (now, last) = self._seen[0], self._seen[-1]
        text = f"{size(done)} / {size(total)}"
        if last == first or now == start:
            return text
        rate = (last - first) / (now - start)
        return t(
            "{text}, {rate}/s, {left} left",
            text=text,
            rate=size(rate),
            left=duration((total - done) / rate),
        )
