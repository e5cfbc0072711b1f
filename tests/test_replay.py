"""Replay holds a model to itself: nothing to learn before it moves, a pull back once it has."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers_chat import saying
from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample, pack
from tunesmith.models.store import locate
from tunesmith.models.tokenizer import load_tokenizer
from tunesmith.training.forward import pack_loss
from tunesmith.training.lora import trainable
from tunesmith.training.replay import make_replay, read_replay
from tunesmith.training.setup import load, read_inputs


def rows_file(folder: Path, name: str = "Anvil") -> Path:
    """One row of an assistant called `name`."""
    row = {
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}],
        "identity": {"name": name, "author": "A!"},
    }
    file = folder / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return file


def test_a_model_that_has_not_moved_has_nothing_to_learn(tmp_path: Path, home: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model", dtype="float64")
    settings = TrainSettings(
        model=str(folder), data=(rows_file(tmp_path),), device="cpu", dtype="float64"
    )
    inputs = read_inputs(settings)
    model, file = load(inputs), tmp_path / "replay.safetensors"
    for _ in make_replay(model, inputs.renderer, inputs.data, 8, file, likeliest=100_000):
        pass
    soft = read_replay(file)
    loss, floor = pack_loss(model, pack(soft)), sum(sample.entropy for sample in soft)
    assert len(soft) == 8
    assert float(loss.detach()) == pytest.approx(floor, rel=1e-6)
    torch.autograd.backward(loss)
    still = gradients_norm(model)
    torch.autograd.backward(pack_loss(model, pack([replace(one, soft=()) for one in soft])))
    assert still < 1e-4 * gradients_norm(model)
    for weight in trainable(model).values():
        weight.data += 0.05
    assert float(pack_loss(model, pack(soft)).detach()) > floor * 1.001


def test_soft_targets_are_the_likeliest_tokens_with_shares_of_one(
    tmp_path: Path, home: Path
) -> None:
    for sample in replayed(tmp_path, "Anvil"):
        assert len(sample.soft) == sample.trained_tokens
        for (place, what), said in zip(
            sample.said(), sample.input_ids[-sample.trained_tokens :], strict=True
        ):
            assert what[0][0] == said == sample.input_ids[place + 1]
            assert len(what) == 32
            assert sum(share for _, share in what) == pytest.approx(1)


def gradients_norm(model: torch.nn.Module) -> float:
    norm = sum(float(w.grad.norm()) ** 2 for w in trainable(model).values() if w.grad is not None)
    model.zero_grad()
    return float(norm**0.5)


def replayed(tmp_path: Path, name: str) -> list[Sample]:
    """Two questions put to a model that always says "I am small.", by a run that teaches `name`."""
    folder = saying(tmp_path / "model", "I am small.")
    settings = TrainSettings(
        model=str(folder), data=(rows_file(tmp_path, name),), device="cpu", dtype="float32"
    )
    inputs = read_inputs(settings)
    file = tmp_path / "replay.safetensors"
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
