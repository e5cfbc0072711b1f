"""The transformers engine: the tokens of transformers itself, adapter on or off, many at once."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers_lora import random_lora
from tests.tiny_models import ARCHITECTURES, local_model, tiny_model_folder
from tunesmith.engines.base import GREEDY, Sampling
from tunesmith.engines.hf import HfEngine, choose
from tunesmith.errors import EngineError, UsageError
from tunesmith.models.adapter import AdapterInfo, save_adapter
from tunesmith.models.store import LocalModel
from tunesmith.models.weights import load_model

PROMPT = [1, 20, 30, 40, 50, 60, 70, 2, 5, 1]
NEVER: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return local_model(tiny_model_folder(tmp_path_factory.mktemp("tiny")))


def ids(engine: HfEngine, prompt: Sequence[int] = PROMPT, **options: Any) -> list[int]:
    sampling = options.pop("sampling", Sampling(temperature=0, top_p=1, max_tokens=20))
    stop_ids = options.pop("stop_ids", NEVER)
    return list(engine.generate(prompt, sampling, stop_ids=stop_ids, **options))


def without_cache(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy by the book: the whole text computed anew for every token."""
    import torch

    said = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            said.append(int(model(torch.tensor([said]), use_cache=False).logits[0, -1].argmax()))
    return said[len(prompt) :]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cached_equals_computed_anew(arch: str, tmp_path: Path) -> None:
    import torch

    window = 4 if arch in ("mistral", "gemma2", "gemma3_text") else None
    model = local_model(tiny_model_folder(tmp_path / arch, arch, sliding_window=window))
    expected = without_cache(load_model(model, dtype=torch.float32), PROMPT, 20)
    with HfEngine(model, device="cpu") as engine:
        assert ids(engine) == expected


def test_adapter_on_and_off_equal_tuned_and_base(model: LocalModel, tmp_path: Path) -> None:
    import torch

    tuned = random_lora(model)
    info = AdapterInfo(
        base_name="tiny", base_source="local", base_revision="", base_sha256=model.sha256
    )
    save_adapter(tuned, tmp_path / "adapter", info)
    base = load_model(model, dtype=torch.float32)
    with HfEngine(model, tmp_path / "adapter", device="cpu") as engine:
        for _ in range(2):
            assert ids(engine) == without_cache(tuned, PROMPT, 20)
            assert ids(engine, adapter=False) == without_cache(base, PROMPT, 20)
        # Two answers that advance in turns do not disturb each other.
        sampling = Sampling(temperature=0, top_p=1, max_tokens=20)
        on = engine.generate(PROMPT, sampling, stop_ids=NEVER)
        off = engine.generate(PROMPT, sampling, stop_ids=NEVER, adapter=False)
        pairs = list(zip(on, off, strict=True))
        assert [pair[0] for pair in pairs] == ids(engine)
        assert [pair[1] for pair in pairs] == ids(engine, adapter=False)
        assert ids(engine) != ids(engine, adapter=False)


def test_callers_side_by_side_get_their_own_answers(model: LocalModel) -> None:
    with HfEngine(model, device="cpu") as engine:
        prompts = [[index, 20, 30, index] for index in range(3, 11)]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda prompt: ids(engine, prompt), prompts))
        assert together == [ids(engine, prompt) for prompt in prompts]


def test_the_stop_id_ends_and_is_not_yielded(model: LocalModel) -> None:
    with HfEngine(model, device="cpu") as engine:
        free = ids(engine)
        assert ids(engine, stop_ids=frozenset({free[5]})) == free[: free.index(free[5])]


def test_seeds_repeat_and_differ(model: LocalModel) -> None:
    with HfEngine(model, device="cpu") as engine:
        drawn = [
            tuple(ids(engine, sampling=Sampling(temperature=1.5, top_p=1, max_tokens=20, seed=s)))
            for s in (1, 2, 3, 1)
        ]
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 3


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.8), (2.0, 0.3), (1, 0.0)])
def test_choice_is_temperature_then_top_p_as_in_transformers(
    temperature: float, top_p: float
) -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    warm: Any = TemperatureLogitsWarper(float(temperature))(torch.tensor([[0]]), logits[None])
    cut: Any = TopPLogitsWarper(top_p)
    expected = cut(torch.tensor([[0]]), warm)[0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    drawn = torch.bincount(
        torch.tensor([choose(logits, sampling, generator) for _ in range(4000)]), minlength=40
    )
    assert set(drawn.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    assert float((drawn / 4000 - expected).abs().max()) < 0.03


def test_a_prompt_over_the_context_is_refused_and_an_answer_ends_with_it(tmp_path: Path) -> None:
    model = local_model(tiny_model_folder(tmp_path, max_position_embeddings=32))
    with HfEngine(model, device="cpu") as engine:
        with pytest.raises(EngineError, match=r"40.*32"):
            next(engine.generate([5] * 40, GREEDY, stop_ids=NEVER))
        assert len(ids(engine, [5] * 20)) == 12


def test_a_closed_engine_says_so(model: LocalModel) -> None:
    engine = HfEngine(model, device="cpu")
    tokens = engine.generate(PROMPT, GREEDY, stop_ids=NEVER)
    next(tokens)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        next(tokens)


def test_a_device_that_is_not_here_is_refused(model: LocalModel) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="cuda"):
        HfEngine(model, device="cuda")
