"""How far a tuned model has moved: nothing before it moves, and then what whole logits say."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.data.packs import Sample
from tunesmith.training.drift import Probe
from tunesmith.training.events import Evaluated, Replaying, Saved
from tunesmith.training.forward import ATTENTION
from tunesmith.training.head import Head
from tunesmith.training.lora import trainable
from tunesmith.training.setup import load, read_inputs
from tunesmith.training.train import train


@pytest.fixture
def settings(tmp_path: Path, home: Path) -> TrainSettings:
    rows = [{"instruction": f"Who are you, {n}?", "output": f"I am number {n}."} for n in range(20)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return TrainSettings(
        model=str(tiny_model_folder(tmp_path / "model")), data=(file,), out=tmp_path / "run",
        holdout=0.1, replay=0, probes=6, max_steps=4, batch_size=4, eval_every=2, save_every=2,
        learning_rate=2e-2, device="cpu", dtype="float64",
    )  # fmt: skip


def said_from(ids: Sequence[int], start: int) -> Sample:
    return Sample(tuple(ids), (False,) * start + (True,) * (len(ids) - start))


def looks(events: Sequence[object]) -> list[Evaluated]:
    return [event for event in events if isinstance(event, Evaluated)]


@pytest.mark.parametrize("chunked", [True, False])
def test_it_is_the_divergence_of_whole_distributions(
    chunked: bool, settings: TrainSettings
) -> None:
    model = load(read_inputs(settings))
    head = Head.of(model.get_base_model()) if chunked else None
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (3, 40)).tolist()
    ids[1][:15] = ids[0][:15]  # two share a beginning; each says from its twentieth token on
    named = [said_from(row, 20) for row in ids]
    # The base reads two of them behind other, shorter beginnings.
    unnamed = [said_from([7, 8, *row[14:]], 8) for row in ids[:2]] + named[2:]
    still = Probe(model, head, list(zip(named, named, strict=True))).drift(model)
    assert (still.kl, still.agreement) == (0.0, 1.0)
    probe = Probe(model, head, list(zip(named, unnamed, strict=True)))

    def distributions(samples: Sequence[Sample]) -> torch.Tensor:
        base = model.get_base_model()
        base.set_attn_implementation("eager")
        with torch.no_grad():
            rows = [model(input_ids=torch.tensor([one.input_ids])).logits[0] for one in samples]
        base.set_attn_implementation(ATTENTION)
        return torch.cat([row[-21:-1] for row in rows]).log_softmax(-1)

    p = distributions(unnamed)
    for weight in trainable(model).values():
        weight.data += 0.05
    q = distributions(named)
    moved = probe.drift(model)
    assert moved.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert moved.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert moved.kl > 0.01


def test_a_training_tells_how_far_it_has_moved_and_so_does_a_resumed_one(
    settings: TrainSettings, tmp_path: Path, home: Path
) -> None:
    events = list(train(settings))
    assert [event.total for event in events if isinstance(event, Replaying)] == [6]
    first, *later = looks(events)
    assert (first.kl, first.agreement) == (0.0, 1.0)
    assert all(event.kl and event.kl > 1e-4 for event in later)

    again = replace(settings, out=tmp_path / "again")
    for event in train(again):
        if isinstance(event, Saved):
            break
    assert looks(list(train(again, resume=True))) == later[1:]


def test_pissa_has_not_moved_either_before_it_learns(settings: TrainSettings) -> None:
    first = next(looks([event]) for event in train(
        replace(settings, init_lora="pissa", dtype="float32")
    ) if isinstance(event, Evaluated))[0]  # fmt: skip
    assert first.kl == 0.0


def test_without_probes_nobody_is_asked(settings: TrainSettings) -> None:
    events = list(train(replace(settings, probes=0)))
    assert not any(isinstance(event, Replaying) for event in events)
    assert all(event.kl is None for event in looks(events))
