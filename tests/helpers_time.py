"""Time as a ratio: other work on the machine slows the yardstick as it slows what is measured."""

import time


def yardstick() -> float:
    """Processor seconds of this thread for a fixed piece of work: 0.04 on a machine of 2025."""
    times = []
    for _ in range(3):
        start = time.thread_time()
        sorted(str(number) for number in range(300_000))
        times.append(time.thread_time() - start)
    return max(times)
