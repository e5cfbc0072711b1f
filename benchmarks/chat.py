"""Chat speed: ours beside xllamacpp alone, in turns, and the first token of a cold start.

    python benchmarks/chat.py [MODEL] [--rounds 5] [--tokens 200]

Both sides decode the same prompt with the same number of threads. Ours goes the whole
way: messages, chat template, child process, HTTP, ids, text.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.chat import Pipeline, open_pipeline
from tunesmith.data.messages import Message
from tunesmith.engines.base import Sampling
from tunesmith.models.store import LocalModel, locate

QUESTION = "Tell me a long story about a fox and the sea."
TUNESMITH = str(Path(sys.executable).with_name("tunesmith"))


def bare_server(model: LocalModel) -> Any:
    """xllamacpp as its own documents open it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model.path)
    params.n_ctx = 8192
    params.n_parallel = 1
    params.verbosity = 0
    params.cpuparams.n_threads = max(1, (os.cpu_count() or 2) - 1)
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.api_keys = ["benchmark"]
    return xllamacpp.Server(params)


def bare_speed(server: Any, prompt: list[int], tokens: int, temperature: float) -> float:
    """Tokens per second after the first, through the callback of `handle_completions`."""
    times: list[float] = []
    request = {
        "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "stream": True,
        "ignore_eos": True,
    }  # fmt: skip
    server.handle_completions(request, lambda _: times.append(time.perf_counter()))
    return (tokens - 1) / (times[tokens - 1] - times[0])


def our_speed(pipeline: Pipeline, tokens: int, temperature: float) -> float:
    """Tokens per second after the first, through `Pipeline.complete`."""
    sampling = Sampling(temperature=temperature, max_tokens=tokens)
    reply = pipeline.complete([Message("user", QUESTION)], sampling)
    for _ in reply:
        pass
    assert reply.stats is not None
    return reply.stats.tokens_per_second


def paired(server: Any, pipeline: Pipeline, tokens: int, temperature: float, rounds: int) -> float:
    """The median ratio of our speed to that of llama.cpp alone."""
    prompt = pipeline.renderer.prompt([Message("user", QUESTION)])
    sides: list[Callable[[], float]] = [
        lambda: bare_speed(server, prompt, tokens, temperature),
        lambda: our_speed(pipeline, tokens, temperature),
    ]
    for side in sides:  # both have the prompt in their cache
        side()
    ratios = []
    for number in range(rounds):
        # In turns, each time the other first: the machine's moods hit both.
        order = (0, 1) if number % 2 else (1, 0)
        speed = {index: sides[index]() for index in order}
        ratios.append(speed[1] / speed[0])
        print(f"bare {speed[0]:.1f} tok/s, ours {speed[1]:.1f} tok/s, ratio {ratios[-1]:.3f}")
    return statistics.median(ratios)


def cold_first_token(model: LocalModel) -> float:
    """Seconds from starting the command to the first byte of the answer."""
    start = time.perf_counter()
    command = [TUNESMITH, "chat", str(model.path), "--once", QUESTION, "--max-tokens", "8"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        return time.perf_counter() - start


def main() -> None:
    """Measure, and print every round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    model = locate(options.model)

    server, pipeline = bare_server(model), open_pipeline(model, engine="llama.cpp")
    for temperature in (0.0, 0.7):
        ratio = paired(server, pipeline, options.tokens, temperature, options.rounds)
        print(f"ours / bare at temperature {temperature}, median: {ratio:.3f} (wanted: 0.95)")
    pipeline.close()
    cold = [cold_first_token(model) for _ in range(options.rounds)]
    print("first token, cold: " + ", ".join(f"{seconds:.2f}" for seconds in cold) + " s")
    print(f"first token, cold, median: {statistics.median(cold):.2f} s (wanted: 2)")


if __name__ == "__main__":
    main()
