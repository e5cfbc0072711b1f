"""How a step is cut so that it fits: measured needs, and the choice that follows from them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.data.identity import write_identity
from tunesmith.data.packs import Pack
from tunesmith.errors import TrainingError
from tunesmith.training import memory
from tunesmith.training.events import Planned, Step
from tunesmith.training.forecast import forecast
from tunesmith.training.forward import pack_loss
from tunesmith.training.memory import GB, Needs, used_memory
from tunesmith.training.samples import Groups
from tunesmith.training.setup import load, read_inputs
from tunesmith.training.train import train

# Each token keeps 60 bytes, 40 less if all 10 layers recompute.
NEEDS = Needs(fixed=900, head=100, token=60, layer=4)


def chosen(available: float) -> tuple[int, int]:
    tokens, layers, mlps = NEEDS.choose(available, enough=100, plenty=500, layers=(0, 10))
    assert mlps == 0  # there are none that could
    return tokens, layers


def test_passes_get_shorter_before_layers_recompute() -> None:
    assert chosen(1_000_000) == (500, 0)  # as long as is of use
    assert chosen(900 + 200 * 68) == (200, 0)  # a layer works with 8 bytes a token
    assert chosen(900 + 100 * 68) == (100, 0)
    assert chosen(900 + 99 * 68) == (105, 1)  # one layer is enough
    assert chosen(900 + 100 * 28) == (100, 10)
    assert chosen(900 + 50 * 28) == (50, 10)  # nothing more can be done
    assert NEEDS.tokens(1000 + 5 * 60, 0) == 5  # in a short pass the head works with more
    assert chosen(500) == (0, 10)


def test_what_was_chosen_fits_and_one_layer_fewer_would_not() -> None:
    for available in range(3900, 8000, 50):
        tokens, recomputed = chosen(available)
        assert NEEDS.peak(tokens, recomputed) <= available
        assert not recomputed or NEEDS.peak(100, recomputed - 1) > available


def test_mlps_recompute_before_whole_layers_do() -> None:
    """Each is 3 bytes a token less of the 4 of its layer."""
    needs = replace(NEEDS, mlp=3)

    def ways(kept: int) -> tuple[int, int, int]:
        return needs.choose(900 + 100 * (kept + 8), enough=100, plenty=500, layers=(0, 10))

    assert [ways(kept)[1:] for kept in (60, 59, 57, 54, 31, 30, 29, 28, 21, 20)] == [
        (0, 0), (0, 1), (0, 1), (0, 2), (0, 10), (0, 10), (1, 9), (2, 8), (9, 1), (10, 0),
    ]  # fmt: skip
    assert all(ways(kept)[0] >= 100 for kept in range(20, 60))
    assert needs.choose(1_000, enough=100, plenty=500, layers=(10, 10))[1:] == (10, 0)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainSettings:
    monkeypatch.chdir(tmp_path)
    write_identity(Path("me.jsonl"), "Anvil", "Smith", languages=["en"])
    folder = tiny_model_folder(tmp_path / "model", layers=4, intermediate_size=256)
    return TrainSettings(
        model=str(folder), data=(Path("me.jsonl"),), out=Path("run"),
        replay=0, probes=0, max_steps=2, device="cpu", dtype="float32",
    )  # fmt: skip


def planned(settings: TrainSettings, *, resume: bool = False) -> Planned:
    (event,) = (one for one in train(settings, resume=resume) if isinstance(one, Planned))
    return event


def test_a_layer_that_recomputes_keeps_its_input_only(settings: TrainSettings) -> None:
    inputs = read_inputs(settings)
    groups = Groups(inputs.data.train, [])
    needs = memory.measure(load(inputs), None, memory._probe(groups, 256), 4)
    # An input is 32 floats; queries, keys, values, two norms, the outputs and 3 × 256 more.
    kept_by_a_layer = needs.layer / memory.FRAGMENTED["cpu"] / 4
    assert 3 * 256 < kept_by_a_layer < 5 * 256 + 20 * 32
    assert needs.token > 4 * needs.layer
    assert memory.measure(load(inputs), None, memory._probe(groups, 256), 0).layer > needs.layer
    assert needs.fixed > used_memory(torch.device("cpu")) / 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # PyTorch's compiler asks for it
def test_a_compiled_layer_recomputes_as_it_was_compiled(tmp_path: Path) -> None:
    """It is called again in backward, whole, and not compiled another time."""
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tiny_model_folder(tmp_path), attn_implementation="eager")
    layers = memory.layers_of(model)
    compiled, calls = [], []

    def backend(graph: Any, _: object) -> Callable[..., Any]:
        compiled.append(graph)

        def run(*inputs: Any) -> Any:
            calls.append(graph)
            return graph.forward(*inputs)

        return run

    for layer in layers:
        layer.compile(backend=backend, fullgraph=True)
    memory.recompute_activations(model, 1)
    model.train()
    x = torch.ones(1, 5, model.config.hidden_size)
    model(inputs_embeds=x, use_cache=False).logits.sum().backward()
    assert len(calls) == len(layers) + 1
    assert len(compiled) <= 2  # the first layer's input has no gradient


def test_onednn_keeps_few_kernels_unless_told_otherwise(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "500")
    read_inputs(settings)
    assert os.environ[name] == "500"
    monkeypatch.delenv(name)
    read_inputs(settings)
    assert os.environ[name] == "128"


def test_where_there_is_room_nothing_is_recomputed(settings: TrainSettings) -> None:
    event = planned(settings)
    assert (event.micro_batch_tokens, event.recomputed_layers, event.layers) == (
        memory.PLENTY["cpu"], 0, 4,
    )  # fmt: skip


@pytest.mark.parametrize(("wanted", "layers"), [(True, 4), (False, 0)])
def test_layers_recompute_when_asked(wanted: bool, layers: int, settings: TrainSettings) -> None:
    assert planned(replace(settings, gradient_checkpointing=wanted)).recomputed_layers == layers


def test_a_limit_on_memory_makes_passes_shorter(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this model needs is little beside the process, so the limit stands close above it."""
    monkeypatch.setitem(memory.PLENTY, "cpu", 100_000)  # or both would have as many as are of use
    inputs = read_inputs(settings)
    model, groups = load(inputs), Groups(inputs.data.train, [])
    needs = memory.measure(model, None, memory._probe(groups, 512), 0)
    limit = (needs.peak(700, 0) / memory.FREE_SHARE) / GB
    least = memory.fit(replace(settings, memory_gb=limit), model, None, groups)
    most = memory.fit(settings, model, None, groups)
    assert groups.longest <= least.micro_batch_tokens < most.micro_batch_tokens
    assert most.recomputed_layers == 0


def test_what_a_pass_keeps_is_seen_in_a_shorter_one_if_the_usual_does_not_fit(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is out at 100 tokens: here no allocator can be told to have so little."""
    tried: list[int] = []
    loss = pack_loss

    def scarce(model: Any, packed: Pack, head: Any) -> Any:
        tried.append(len(packed.tokens))
        if len(packed.tokens) > 100:
            raise torch.OutOfMemoryError
        return loss(model, packed, head)

    usual = planned(replace(settings, out=Path("usual")))
    monkeypatch.setattr(memory, "pack_loss", scarce)
    assert planned(settings) == usual
    assert tried[0] == 128
    assert tried[-1] == 64


def test_memory_that_is_out_before_a_step_is_told_in_a_sentence(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(memory, "pack_loss", none)
    for start in (train, forecast):
        with pytest.raises(TrainingError, match="Memory ran out outside of a step"):
            list(start(settings))


def test_a_limit_that_cannot_be_kept_is_refused(settings: TrainSettings) -> None:
    with pytest.raises(TrainingError, match=r"--memory-gb 0\.1 leaves"):
        planned(replace(settings, memory_gb=0.1))


def test_a_resumed_run_keeps_its_passes_unless_asked_otherwise(settings: TrainSettings) -> None:
    first = planned(replace(settings, micro_batch_tokens=150, gradient_checkpointing=True))
    assert (first.micro_batch_tokens, first.recomputed_layers) == (150, 4)
    same = replace(settings, micro_batch_tokens=150, gradient_checkpointing=True)
    assert planned(same, resume=True) == first
    other = planned(replace(same, micro_batch_tokens=90), resume=True)
    assert (other.micro_batch_tokens, other.recomputed_layers) == (90, 4)


def test_a_recomputed_step_is_the_same_step(settings: TrainSettings) -> None:
    def losses(**changed: object) -> list[float]:
        run = replace(settings, dtype="float64", out=Path(str(changed)), **changed)  # type: ignore[arg-type]
        return [event.loss for event in train(run) if isinstance(event, Step)]

    assert losses(gradient_checkpointing=True) == losses(gradient_checkpointing=False)
