"""llama.cpp in its child process: the same tokens, and every way it can end."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import pytest

from tests.helpers_chat import collect, saying
from tests.helpers_lora import random_lora
from tests.tiny_models import local_gguf, local_model, tiny_gguf, tiny_model_folder
from tunesmith.engines.base import GREEDY, Engine, Sampling, Stop
from tunesmith.engines.choose import open_engine
from tunesmith.engines.hf import HfEngine
from tunesmith.engines.llama_cpp import SLOTS, LlamaCppEngine
from tunesmith.errors import EngineError, ModelError, UsageError
from tunesmith.models.adapter import AdapterInfo, save_adapter
from tunesmith.models.store import LocalModel
from tunesmith.models.tokenizer import load_tokenizer

NEVER: frozenset[int] = frozenset()
END = 2  # <|im_end|>, in the tiny models and in SmolLM2
PROBES = (
    "What is the capital of France?",
    "Who are you?",
    "Write one sentence about the sea.",
    "List three colours.",
    "What is 2 + 3?",
    "Translate 'good morning' into French.",
    "Why is the sky blue?",
    "Name an animal that can fly.",
    "How do I boil an egg?",
    "Say hello in Spanish.",
)


@pytest.fixture(scope="module")
def engine(smollm2: LocalModel) -> Iterator[LlamaCppEngine]:
    with LlamaCppEngine(smollm2) as engine:
        yield engine


def ask(model: LocalModel, text: str) -> list[int]:
    tokenizer = load_tokenizer(model)
    return tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")


def greedy(count: int) -> Sampling:
    return Sampling(temperature=0, top_p=1, max_tokens=count)


def whole_answer(model: LocalModel, prompt: list[int], count: int) -> Any:
    """The answer of bare llama.cpp, not streamed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model.path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.api_keys = ["test"]
    server = xllamacpp.Server(params)
    connection = http.client.HTTPConnection(server.listening_address.removeprefix("http://"))
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True}
    connection.request("POST", "/completion", json.dumps(body), {"Authorization": "Bearer test"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer


def test_streamed_ids_are_llama_cpps_own_also_within_characters(
    engine: LlamaCppEngine, smollm2: LocalModel
) -> None:
    # llama.cpp streams only the last id of a character that is split over tokens.
    prompt = load_tokenizer(smollm2).encode(
        "<|im_start|>user\nRepeat exactly: 你好世界，我是小助手 😀🎉<|im_end|>\n"
        "<|im_start|>assistant\n你好世界，我是"
    )
    whole = whole_answer(smollm2, prompt, 40)
    assert "小助手" in whole["content"]
    assert len(whole["tokens"]) == 40
    assert collect(engine.generate(prompt, greedy(40), stop_ids=NEVER)) == (
        whole["tokens"],
        "length",
    )


def test_the_stop_id_ends_and_is_not_yielded(engine: LlamaCppEngine, smollm2: LocalModel) -> None:
    prompt = ask(smollm2, "Say hi")
    free, finish = collect(engine.generate(prompt, greedy(60), stop_ids=NEVER))
    assert finish == "stop"  # llama.cpp knows the model's end token too
    assert load_tokenizer(smollm2).special_tokens["<|im_end|>"] not in free
    end = free[3]
    cut = collect(engine.generate(prompt, greedy(60), stop_ids=frozenset({end})))
    assert cut == (free[: free.index(end)], "stop")


def test_a_seed_repeats_and_a_narrow_top_p_is_greedy(
    engine: LlamaCppEngine, smollm2: LocalModel
) -> None:
    prompt = ask(smollm2, "Tell me a story.")

    def draw(**values: Any) -> list[int]:
        sampling = Sampling(**({"temperature": 1.5, "top_p": 1.0, "max_tokens": 12} | values))
        return collect(engine.generate(prompt, sampling, stop_ids=NEVER))[0]

    assert draw(seed=1) == draw(seed=1)
    assert len({tuple(draw(seed=seed)) for seed in range(3)}) > 1
    assert draw(top_p=1e-6, seed=5) == draw(temperature=0)


def test_only_temperature_and_top_p_shape_the_choice(tmp_path: Path) -> None:
    # Nearly flat logits: llama.cpp's own top-k of 40 and min-p would show at once.
    folder = tiny_model_folder(tmp_path / "hf", initializer_range=0.001)
    model = local_gguf(tiny_gguf(folder, tmp_path / "tiny.gguf"))
    with LlamaCppEngine(model) as engine:
        drawn = {
            id
            for seed in range(20)
            for id in engine.generate(
                [5, 6, 7],
                Sampling(temperature=1.0, top_p=1.0, max_tokens=20, seed=seed),
                stop_ids=NEVER,
            )
        }
    assert len(drawn) > 100


@pytest.mark.parametrize(
    "values",
    [
        *({"temperature": -1}, {"temperature": 3}, {"temperature": float("nan")}, {"top_p": 1.1}),
        *({"max_tokens": 0}, {"max_tokens": -1}, {"seed": -1}, {"seed": 2**32 - 1}),
    ],
)
def test_sampling_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        Sampling(**values)


def test_a_prompt_over_the_context_is_refused_with_both_counts(engine: LlamaCppEngine) -> None:
    with pytest.raises(EngineError, match=r"9000.*8192"):
        next(engine.generate([5] * 9000, GREEDY, stop_ids=NEVER))
    with pytest.raises(EngineError, match="empty"):
        next(engine.generate([], GREEDY, stop_ids=NEVER))
    with pytest.raises(EngineError, match="invalid tokens"):
        next(engine.generate([10**7], GREEDY, stop_ids=NEVER))


def test_an_answer_ends_with_the_context(smollm2: LocalModel) -> None:
    with LlamaCppEngine(smollm2, context_length=256) as engine:
        sampling = Sampling(temperature=1.0, max_tokens=500)
        ids, finish = collect(engine.generate([5] * 200, sampling, stop_ids=NEVER))
        assert engine.context_length == 256
    assert finish == "length"
    assert 50 <= len(ids) <= 56


@pytest.mark.parametrize("damage", ["junk", "cut", "missing"])
def test_a_damaged_model_is_named(damage: str, smollm2: LocalModel, tmp_path: Path) -> None:
    file = tmp_path / f"{damage}.gguf"
    if damage == "junk":
        file.write_bytes(b"\x1b[31m" * 1000)
    if damage == "cut":
        file.write_bytes(smollm2.path.read_bytes()[:20_000_000])
    with (
        LlamaCppEngine(LocalModel("broken", file, "local", "", "0" * 64)) as engine,
        pytest.raises(EngineError) as caught,
    ):
        next(engine.generate([5], GREEDY, stop_ids=NEVER))
    assert str(file) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_killed_engine_is_an_error_at_once(smollm2: LocalModel) -> None:
    with LlamaCppEngine(smollm2) as engine:
        tokens = engine.generate([5, 6], Sampling(max_tokens=4000), stop_ids=NEVER)
        next(tokens)
        os.kill(child_of(os.getpid()), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(EngineError, match=str(smollm2.path)):
            list(tokens)
        with pytest.raises(EngineError, match="-9"):
            next(engine.generate([5, 6], GREEDY, stop_ids=NEVER))
        assert time.monotonic() - start < 20  # all that was asked for takes minutes


def test_a_closed_engine_says_so(smollm2: LocalModel) -> None:
    engine = LlamaCppEngine(smollm2)
    engine.close()
    engine.close()
    with pytest.raises(EngineError):
        next(engine.generate([5, 6], GREEDY, stop_ids=NEVER))


def test_closing_the_generator_frees_its_slot(engine: LlamaCppEngine) -> None:
    long = Sampling(temperature=1.0, max_tokens=900)
    all_slots = [
        engine.generate([5, 6, index], long, stop_ids=NEVER) for index in range(2, 2 + SLOTS)
    ]
    for tokens in all_slots:
        next(tokens)
    for tokens in all_slots:
        tokens.close()
    start = time.monotonic()
    collect(engine.generate([5, 6], greedy(1), stop_ids=NEVER))
    assert time.monotonic() - start < 20  # all that was asked for takes minutes


def test_callers_side_by_side_get_their_own_answers(tmp_path: Path, home: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz0123456789"
    folder = saying(tmp_path / "hf", text)
    letters = load_tokenizer(local_model(folder)).encode(text, special=False)
    prompts = [[*letters[7::-1], letter] for letter in letters[: 2 * SLOTS]]
    with LlamaCppEngine(local_gguf(tiny_gguf(folder, tmp_path / "tiny.gguf"))) as engine:

        def answer(prompt: list[int]) -> list[int]:
            return collect(engine.generate(prompt, greedy(20), stop_ids=NEVER))[0]

        with ThreadPoolExecutor(2 * SLOTS) as pool:
            together = list(pool.map(answer, prompts))
    assert together == [letters[place + 1 : place + 21] for place in range(2 * SLOTS)]


def test_nobody_without_the_key_is_served(engine: LlamaCppEngine) -> None:
    collect(engine.generate([5], greedy(1), stop_ids=NEVER))
    ports = [
        connection.laddr.port
        for child in psutil.Process().children()
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert ports
    for port in ports:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/completion", json.dumps({"prompt": [5], "n_predict": 1}))
        assert connection.getresponse().status == http.client.UNAUTHORIZED
        connection.close()


SCRIPT = """
import sys, time
from pathlib import Path
from threading import Timer
from tunesmith.engines.base import Sampling
from tunesmith.engines.llama_cpp import LlamaCppEngine
from tunesmith.models.store import LocalModel
engine = LlamaCppEngine(LocalModel("m", Path(sys.argv[1]), "local", "", "0" * 64))
tokens = engine.generate([5, 6], Sampling(max_tokens=4000), stop_ids=frozenset())
next(tokens)
print("answering", flush=True)
input()
raise RuntimeError("the parent ends")
"""


@pytest.mark.parametrize("ending", ["kill", "terminate", "raise"])
def test_no_child_outlives_its_parent(ending: str, smollm2: LocalModel) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(smollm2.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout is not None and parent.stdin is not None
        assert parent.stdout.readline() == b"answering\n"
        child = psutil.Process(child_of(parent.pid))
        if ending == "raise":
            parent.stdin.write(b"\n")
            parent.stdin.flush()
        else:
            getattr(parent, ending)()
        parent.wait(30)
    _, alive = psutil.wait_procs([child], timeout=5)
    assert not alive


def tuned(model: LocalModel, folder: Path, strength: float, **config: Any) -> Path:
    info = AdapterInfo(
        base_name=model.name,
        base_source=model.source,
        base_revision=model.revision,
        base_sha256=model.sha256,
    )
    save_adapter(random_lora(model, strength=strength, **config), folder, info)
    return folder


def next_id(engine: Engine, ids: list[int], *, adapter: bool = True) -> int | None:
    """The likeliest next token; None if that is the model's end token."""
    stop_ids = frozenset({END})
    return next(engine.generate(ids, greedy(1), stop_ids=stop_ids, adapter=adapter), None)


def test_the_adapter_is_switched_by_each_request(tmp_path: Path, home: Path) -> None:
    folder = local_model(tiny_model_folder(tmp_path / "hf"))
    packed = local_gguf(tiny_gguf(folder.path, tmp_path / "tiny.gguf"))
    adapter = tuned(folder, tmp_path / "adapter", 1.0)
    prompts = [[1, 20, 30, 40, 50, 60, 70, 2, 5, 1][:length] for length in range(1, 11)]

    def answers(engine: Engine) -> list[list[int | None]]:
        return [
            [next_id(engine, prompt, adapter=on) for prompt in prompts]
            for on in (True, False, True, False)
        ]

    with LlamaCppEngine(packed, adapter) as ours, HfEngine(folder, adapter) as reference:
        found, expected = answers(ours), answers(reference)
    assert found == expected
    assert found[0] == found[2] != found[1] == found[3]


def test_the_tuned_model_agrees_with_the_reference(smollm2: LocalModel, tmp_path: Path) -> None:
    # At each position of the reference's answers: would llama.cpp have said the same next?
    adapter = tuned(smollm2, tmp_path / "adapter", 0.1)
    same = total = 0
    with LlamaCppEngine(smollm2, adapter) as ours, HfEngine(smollm2, adapter) as reference:
        for probe in PROBES:
            prompt = ask(smollm2, probe)
            said, finish = collect(
                reference.generate(prompt, greedy(12), stop_ids=frozenset({END}))
            )
            expected = [*said, *([None] if finish == "stop" else [])]
            for position, id in enumerate(expected):
                same += next_id(ours, prompt + said[:position]) == id
            total += len(expected)
    print(f"{same} of {total} greedy tokens agree")
    assert total > 90
    assert same / total >= 0.95


def test_auto_takes_llama_cpp_for_a_gguf_and_transformers_for_a_folder(
    smollm2: LocalModel, tmp_path: Path
) -> None:
    folder = local_model(tiny_model_folder(tmp_path / "hf"))
    for model, kind in ((smollm2, LlamaCppEngine), (folder, HfEngine)):
        engine = open_engine(model, device="cpu")
        assert isinstance(engine, kind)
        engine.close()
    with pytest.raises(UsageError, match="gguf"):
        open_engine(folder, engine="llama.cpp")


def test_auto_takes_transformers_where_llama_cpp_has_no_form_for_the_adapter(
    smollm2: LocalModel, tmp_path: Path
) -> None:
    adapter = tuned(smollm2, tmp_path / "dora", 0.1, use_dora=True)
    with pytest.raises(ModelError, match="use_dora"):
        open_engine(smollm2, adapter, engine="llama.cpp")
    engine = open_engine(smollm2, adapter, device="cpu")
    assert isinstance(engine, HfEngine)
    assert engine.has_adapter
    engine.close()


def child_of(pid: int) -> int:
    """The newest process that holds llama.cpp, of a parent that has one."""
    found = [
        child
        for child in psutil.Process(pid).children()
        if any("llama_child" in word for word in child.cmdline())
    ]
    newest: psutil.Process = max(found, key=psutil.Process.create_time)
    return int(newest.pid)


def test_stopping_frees_the_engine_while_it_reads_a_long_prompt(engine: LlamaCppEngine) -> None:
    def first_token(prompt: list[int], stop: Stop | None = None) -> float:
        start = time.monotonic()
        collect(engine.generate(prompt, greedy(2), stop_ids=NEVER, stop=stop))
        return time.monotonic() - start

    whole = first_token([7] * 800)
    stop = Stop()
    Timer(0.1, stop.ask).start()
    stopped = first_token([8] * 4000, stop)
    assert stopped < whole
    assert first_token([9, 10]) < whole


def test_what_was_stopped_before_it_began_is_not_answered(engine: LlamaCppEngine) -> None:
    stop = Stop()
    stop.ask()
    tokens = engine.generate([5, 6], greedy(500), stop_ids=NEVER, stop=stop)
    assert collect(tokens) == ([], "stop")
