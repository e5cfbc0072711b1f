"""A base in 4 bits: the layers compute with the weights they hold, and a model learns over them."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_kernels import GPU, distance, needs_gpu
from tests.test_train import only, run_to, write_rows
from tests.tiny_models import tiny_model_folder
from tunesmith import runs
from tunesmith.config import TrainSettings
from tunesmith.errors import TrainingError
from tunesmith.models.nf4 import Nf4Linear, unpacked
from tunesmith.models.store import locate
from tunesmith.models.weights import load_model
from tunesmith.training.events import Evaluated, Finished, Planned, Step
from tunesmith.training.lora import add_lora, trainable
from tunesmith.training.train import train

BY_THE_COMPILER = pytest.mark.filterwarnings("default")  # for it warns of itself


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings(tmp_path: Path, model: Path, home: Path) -> TrainSettings:
    return TrainSettings(
        model=str(model), data=(write_rows(tmp_path / "rows.json"),), out=tmp_path / "run",
        replay=0, probes=0, max_steps=6, batch_size=4, eval_every=2, save_every=2,
        learning_rate=5e-3,
        holdout=0.1, device="cpu", dtype="float32", base_dtype="nf4",
    )  # fmt: skip


def whole(layer: Nf4Linear) -> Tensor:
    return unpacked(layer.weight, layer.quant_state, layer.dtype)


def test_a_weight_takes_little_more_than_four_bits_and_is_what_the_library_says() -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    plain = nn.Linear(256, 512).requires_grad_(False)
    nn.init.normal_(plain.weight)
    packed, state = quantize_4bit(plain.weight, compress_statistics=True, quant_type="nf4")
    layer = Nf4Linear.of(plain)
    assert torch.equal(whole(layer), dequantize_4bit(packed, state))
    assert distance(whole(layer), plain.weight) < 0.1
    bits = 8 * (layer.weight.nbytes + layer.quant_state.nbytes) / plain.weight.numel()
    assert 4.1 < bits < 4.2


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_lora_over_it_is_lora_over_the_unpacked_weight(dropout: float) -> None:
    from peft import LoraConfig, get_peft_model

    from tunesmith.training.fused import FusedLinear, fuse_lora

    torch.manual_seed(0)
    layer = Nf4Linear.of(nn.Linear(64, 96))
    plain = nn.Linear(64, 96)
    plain.weight.data, plain.bias = whole(layer), layer.bias
    x, outer = torch.randn(2, 5, 64), torch.randn(2, 5, 96)

    def outcome(base: nn.Module) -> list[Tensor]:
        config = LoraConfig(target_modules=["0"], lora_dropout=dropout)
        torch.manual_seed(1)
        tuned: Any = get_peft_model(nn.Sequential(base), config)
        fuse_lora(tuned)
        assert any(type(part) is FusedLinear for part in tuned.modules())
        for weight in trainable(tuned).values():
            nn.init.normal_(weight)
        given = x.clone().requires_grad_()
        found = [y := tuned(given)]
        torch.autograd.backward(y, outer)
        with tuned.disable_adapter():
            again = x.clone().requires_grad_()
            found += [y := tuned(again)]
            torch.autograd.backward(y, outer)
        every = (given, again, *trainable(tuned).values())
        return [*found, *(one.grad for one in every if one.grad is not None)]

    for ours, theirs in zip(outcome(layer), outcome(plain), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_is_packed_while_it_loads_all_but_its_head(model: Path, home: Path) -> None:
    packed: Any = load_model(locate(str(model)), dtype=torch.float32, nf4=True)
    plain: Any = load_model(locate(str(model)), dtype=torch.float32)
    assert type(packed.get_output_embeddings()) is nn.Linear
    assert packed.get_input_embeddings().weight.equal(plain.get_input_embeddings().weight)
    layers = {name: part for name, part in packed.named_modules() if type(part) is Nf4Linear}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(whole(layer), whole(Nf4Linear.of(plain.get_submodule(name))))


def test_no_unpacked_weight_is_kept_for_backward(model: Path, home: Path) -> None:
    tuned = add_lora(load_model(locate(str(model)), dtype=torch.float32, nf4=True), TrainSettings())
    shapes = {
        (part.out_features, part.in_features)
        for part in tuned.modules()
        if isinstance(part, Nf4Linear)
    }
    kept: list[Tensor] = []

    def see(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    ids: Any = torch.arange(13)[None]  # as no layer is wide
    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        tuned(input_ids=ids)
    assert kept and not shapes & {tuple(one.shape) for one in kept if one.is_floating_point()}


def test_a_cpu_slower_in_bf16_unpacks_into_float32(model: Path, home: Path) -> None:
    from tunesmith.training.widened import widen

    packed: Any = load_model(locate(str(model)), dtype=torch.bfloat16, nf4=True)
    ids: Any = torch.arange(20)[None]
    with torch.no_grad():
        narrow = packed(input_ids=ids).logits
        widen(packed)
        found = packed(input_ids=ids).logits
    assert narrow.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert distance(narrow, found) < 0.05


def test_a_model_learns_over_it_and_can_go_on(settings: TrainSettings, tmp_path: Path) -> None:
    assert settings.out is not None
    events = list(train(replace(settings, out=tmp_path / "whole", max_steps=20)))
    steps = only(events, Step)
    assert steps[-1].loss < 0.8 * steps[0].loss
    plain = next(train(replace(settings, out=tmp_path / "plain", base_dtype="auto")))
    assert isinstance(plain, Planned) and isinstance(events[0], Planned)
    assert events[0].total_parameters == plain.total_parameters
    run_to(replace(settings, max_steps=20), 3)
    list(train(replace(settings, max_steps=20), resume=True))
    losses = [line["loss"] for line in runs.find(settings.out).events() if line["event"] == "Step"]
    assert losses == [step.loss for step in steps]


def test_the_adapter_goes_on_the_whole_base(settings: TrainSettings) -> None:
    from tunesmith.data.packs import pack
    from tunesmith.models.adapter import load_adapter
    from tunesmith.training.forward import ATTENTION, pack_loss
    from tunesmith.training.setup import read_inputs

    events = list(train(replace(settings, max_steps=20)))
    start, finished = only(events, Evaluated)[0].loss, only(events, Finished)[0]
    inputs = read_inputs(settings)
    base = load_model(inputs.model, dtype=torch.float32, attention=ATTENTION)
    tuned = load_adapter(base, finished.adapter)
    held_out = inputs.data.held_out
    with torch.no_grad():
        loss = float(pack_loss(tuned, pack(held_out))) / sum(s.trained_tokens for s in held_out)
    assert start - loss > 0.7 * (start - finished.loss) > 0.7


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"init_lora": "pissa"}, {"init_lora": "olora"}, {"dtype": "float64"},
])  # fmt: skip
def test_what_it_does_not_go_with_is_refused(
    settings: TrainSettings, change: dict[str, Any]
) -> None:
    with pytest.raises(TrainingError, match="leave them out"):
        next(train(replace(settings, **change)))
    assert settings.out is not None and not settings.out.exists()


def test_without_the_library_the_way_to_it_is_named(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(TrainingError, match=r"pip install 'tunesmith\[qlora\]'"):
        next(train(settings))
    assert settings.out is not None and not settings.out.exists()


def test_where_the_library_does_not_work_its_reason_is_told(
    settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.functional

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel here\nand much more")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(TrainingError, match=r"not work on cpu here \(no kernel here\)"):
        next(train(settings))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes at which layers that read the same become one."""
    return tiny_model_folder(
        tmp_path_factory.mktemp("wide"), dtype="bfloat16", hidden=512, kv_heads=4,
        intermediate_size=2048,
    )  # fmt: skip


@needs_gpu
@BY_THE_COMPILER
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kernels_and_compiled_layers_over_it_have_the_gradients_of_plain_lines(
    dropout: float, wide: Path, home: Path
) -> None:
    """Bounds: two products in bf16 differ by hundredths here; other entries are dropped.

    What is compiled rounds less often, and plain lines in bf16 lie 0.11 from those in float32.
    """
    from tunesmith.data.packs import Sample, pack
    from tunesmith.training.compiled import compile_layers
    from tunesmith.training.forward import ATTENTION, arithmetic, pack_loss, register_attention
    from tunesmith.training.kernels.fuse import Stack, use_kernels

    register_attention()
    base = load_model(
        locate(str(wide)), dtype=torch.bfloat16, device=GPU, attention=ATTENTION, nf4=True
    )
    tuned = add_lora(base, TrainSettings(lora_dropout=dropout))
    torch.manual_seed(0)
    for weight in trainable(tuned).values():
        nn.init.normal_(weight, std=0.1)
    packed = pack([Sample(tuple(range(5, 55)), (True,) * 50), Sample((7,) * 30, (True,) * 30)])
    tuned.train()

    def gradients() -> Tensor:
        tuned.zero_grad()
        torch.manual_seed(1)
        with arithmetic(base):
            loss = pack_loss(tuned, packed)
        torch.autograd.backward(loss)
        parts = [one.grad.flatten() for one in trainable(tuned).values() if one.grad is not None]
        return torch.cat(parts)

    expected = gradients()
    use_kernels(tuned)
    sizes = [len(part.layers) for part in tuned.modules() if isinstance(part, Stack)]
    assert sizes == [3, 1, 2, 1] * 2
    assert distance(gradients(), expected) < 0.06
    compile_layers(tuned)
    assert distance(gradients(), expected) < (2.0 if dropout else 0.15)


@needs_gpu
@BY_THE_COMPILER
def test_on_a_gpu_it_trains_compiled_and_the_model_is_never_whole_there(
    wide: Path, settings: TrainSettings
) -> None:
    load_model(locate(str(wide)), dtype=torch.bfloat16, device=GPU, nf4=True)  # workspaces
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    base = load_model(locate(str(wide)), dtype=torch.bfloat16, device=GPU, nf4=True)
    whole_bytes = sum(file.stat().st_size for file in wide.glob("*.safetensors"))
    assert torch.cuda.max_memory_allocated() - before < 0.8 * whole_bytes
    del base
    changed = replace(
        settings, model=str(wide), device="cuda", dtype="bfloat16", compile=True, max_steps=20
    )
    steps = only(list(train(changed)), Step)
    assert steps[-1].loss < steps[0].loss
