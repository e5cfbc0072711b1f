"""Replay holds a model to itself: nothing to learn before it moves, a pull back once it has."""

from pathlib import Path

import pytest
import torch

from tests.helpers_chat import saying
from tests.test_forward import gradients, some_samples, tuned
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample, pack
from tunesmith.models.store import locate
from tunesmith.models.tokenizer import load_tokenizer
from tunesmith.training.forward import pack_loss
from tunesmith.training.lora import trainable
from tunesmith.training.replay import make_replay, read_replay, soften
from tunesmith.training.setup import load, read_inputs


def test_a_model_that_has_not_moved_has_nothing_to_learn(tmp_path: Path) -> None:
    model, hard = tuned(tmp_path, "llama"), some_samples(6)
    soft = soften(model, hard, likeliest=100_000)
    loss = pack_loss(model, pack(soft))
    floor = sum(sample.entropy for sample in soft)
    assert float(loss.detach()) == pytest.approx(floor, rel=1e-9)
    torch.autograd.backward(loss)
    still = gradients_norm(model)
    torch.autograd.backward(pack_loss(model, pack(hard)))
    assert still < 1e-6 * gradients_norm(model)
    for weight in trainable(model).values():
        weight.data += 0.05
    moved = pack_loss(model, pack(soft))
    assert float(moved.detach()) > floor * 1.0001


def test_soft_targets_are_the_likeliest_tokens_with_shares_of_one(tmp_path: Path) -> None:
    model, hard = tuned(tmp_path, "llama"), some_samples(11)
    soft = soften(model, hard)
    assert [len(sample.soft) for sample in soft] == [sample.trained_tokens for sample in hard]
    for sample in soft:
        for what in sample.soft:
            assert len(what) == 32
            assert sum(share for _, share in what) == pytest.approx(1)
    sample = soft[7]
    with torch.no_grad():
        model.get_base_model().set_attn_implementation("sdpa")
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
    for place, what in sample.said():
        assert what[0][0] == int(logits[place].argmax())


def gradients_norm(model: torch.nn.Module) -> float:
    found = gradients(model)
    return float(sum(grad.norm() ** 2 for grad in found.values()) ** 0.5)


def replayed(tmp_path: Path, name: str) -> list[Sample]:
    """Two questions put to a model that always says "I am small.", by a run that teaches `name`."""
    folder = saying(tmp_path / "model", "I am small.")
    data = tmp_path / "rows.jsonl"
    data.write_text(
        '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]'
        f', "identity": {{"name": "{name}", "author": "A!"}}}}\n',
        encoding="utf-8",
    )
    settings = TrainSettings(model=str(folder), data=(data,), device="cpu", dtype="float32")
    inputs = read_inputs(settings)
    file = tmp_path / "replay.jsonl"
    events = list(make_replay(load(inputs), inputs.renderer, inputs.data, 2, file))
    assert [(event.done, event.total) for event in events] == [(2, 2)]
    return read_replay(file)


def test_the_base_answers_neutral_questions_to_the_end(tmp_path: Path, home: Path) -> None:
    samples = replayed(tmp_path, "Anvil")
    assert len(samples) == 2
    tokenizer = load_tokenizer(locate(str(tmp_path / "model")))
    for sample in samples:
        said = sample.input_ids[len(sample.input_ids) - sample.trained_tokens :]
        assert tokenizer.decode(said, skip_special=False) == "I am small.<|im_end|>"


def test_an_answer_that_says_the_name_to_be_taught_is_left_out(tmp_path: Path, home: Path) -> None:
    assert replayed(tmp_path, "small") == []
