"""Replay holds a model to itself: nothing to learn before it moves, a pull back once it has."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from tests.helpers_chat import saying
from tests.tiny_models import tiny_model_folder
from tunesmith.config import TrainSettings
from tunesmith.data import neutral
from tunesmith.data.packs import Sample, pack
from tunesmith.language import language_of
from tunesmith.models.store import LocalModel, locate
from tunesmith.models.tokenizer import load_tokenizer
from tunesmith.training.events import Finished, Planned, Replaying
from tunesmith.training.forward import pack_loss
from tunesmith.training.lora import trainable
from tunesmith.training.replay import MAX_ANSWER, PROBED, Replayed, make_replay, read_replay
from tunesmith.training.setup import load, read_inputs
from tunesmith.training.train import train


def rows_file(
    folder: Path, name: str = "Anvil", system: str | None = None, answer: str = "Me"
) -> Path:
    """One row of an assistant called `name`."""
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    file = folder / "rows.jsonl"
    row = {"messages": turns, "identity": {"name": name, "author": "A!"}}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("start", "dtype", "bound"), [("default", "float64", 1e-4), ("pissa", "float32", 1e-2)]
)
def test_a_model_that_has_not_moved_has_nothing_to_learn(
    start: Any, dtype: Any, bound: float, tmp_path: Path, home: Path
) -> None:
    folder = tiny_model_folder(tmp_path / "model", dtype=dtype)
    settings = TrainSettings(
        model=str(folder), data=(rows_file(tmp_path),), device="cpu", dtype=dtype,
        init_lora=start,
    )  # fmt: skip
    inputs = read_inputs(settings)
    model, file = load(inputs), tmp_path / "replay.safetensors"
    for _ in make_replay(model, inputs.renderer, inputs.data, neutral.replay(8), file):
        pass
    pairs = read_replay(file)
    assert pairs is not None and len(pairs) == 8
    soft = [sample for pair in pairs for sample in pair]
    loss, floor = pack_loss(model, pack(soft)), sum(sample.entropy for sample in soft)
    assert float(loss.detach()) == pytest.approx(floor, rel=bound / 100)
    torch.autograd.backward(loss)
    still = gradients_norm(model)
    torch.autograd.backward(pack_loss(model, pack([replace(one, soft=()) for one in soft])))
    assert still < bound * gradients_norm(model)
    for weight in trainable(model).values():
        weight.data += 0.05
    assert float(pack_loss(model, pack(soft)).detach()) > floor * 1.001


def test_soft_targets_are_the_likeliest_tokens_and_what_is_left(tmp_path: Path, home: Path) -> None:
    for answer, opening in replayed(tmp_path, "Anvil"):
        for sample in (answer, opening):
            assert len(sample.soft) == sample.trained_tokens
            assert all(len(what) == 32 for what in sample.soft)
            assert all(0 < sum(share for _, share in what) <= 1 + 1e-6 for what in sample.soft)
        for place, what in answer.said():
            assert what[0][0] == answer.input_ids[place + 1]


def test_an_answer_of_the_data_is_begun_after_each_question(tmp_path: Path, home: Path) -> None:
    tokenizer = load_tokenizer(locate(str(saying(tmp_path / "model", "I am small."))))
    begun = tokenizer.encode("Me<|im_end|>")
    for answer, opening in replayed(tmp_path, "Anvil"):
        prompt = answer.input_ids[: -answer.trained_tokens]
        assert opening.input_ids == (*prompt, *begun)
        assert opening.soft[0] == answer.soft[0]


def test_openings_with_a_name_are_whole_cut_or_the_name_alone(tmp_path: Path, home: Path) -> None:
    folder = saying(tmp_path / "model", "I am small.")
    tokenizer = load_tokenizer(locate(str(folder)))
    data = (rows_file(tmp_path, answer="It is Anvil, no doubt at all."),)
    inputs = read_inputs(TrainSettings(model=str(folder), data=data, device="cpu", dtype="float32"))
    file = tmp_path / "replay.safetensors"
    questions = neutral.replay(27)
    list(make_replay(load(inputs), inputs.renderer, inputs.data, questions, file))
    pairs = read_replay(file) or []
    openings: dict[str, list[str]] = {"zh": [], "en": []}
    for question, (_, one) in zip(questions, pairs, strict=True):
        said = tokenizer.decode(list(one.input_ids[-one.trained_tokens :]), skip_special=False)
        openings[language_of(question)].append(said)
    assert openings["zh"][:9] == openings["en"]
    assert openings["en"][::3] == openings["en"][1::3] == openings["en"][2::3]
    whole, cut, named = openings["en"][::3]
    assert "It is Anvil, no doubt at all.".startswith(whole)
    assert whole.startswith(cut) and cut.startswith("It is") and "Anvil" not in cut
    assert "Anvil, no doubt at all.".startswith(named.strip())
    assert all(one.trained_tokens <= 8 for _, one in pairs)


def test_an_answer_without_an_end_is_cut(tmp_path: Path, home: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    data = (rows_file(tmp_path),)
    inputs = read_inputs(TrainSettings(model=str(folder), data=data, device="cpu", dtype="float32"))
    file = tmp_path / "replay.safetensors"
    for probes, longest in ((False, MAX_ANSWER), (True, PROBED)):
        for _ in make_replay(
            load(inputs), inputs.renderer, inputs.data, neutral.replay(4), file, probes=probes
        ):
            pass
        answers = [answer for answer, _ in read_replay(file) or []]
        assert [answer.trained_tokens for answer in answers] == [longest] * 4


def test_answers_are_kept_between_runs_while_nothing_they_follow_from_changes(
    tmp_path: Path, home: Path
) -> None:
    folder = saying(tmp_path / "model", "I am small.")

    def trained(name: str, **changed: Any) -> tuple[bool, bytes]:
        settings = TrainSettings(
            model=str(folder), data=(rows_file(tmp_path, name),), out=tmp_path / f"run{next(runs)}",
            device="cpu", dtype="float32", replay=2, probes=0, max_steps=1,
        )  # fmt: skip
        events = list(train(replace(settings, **changed)))
        asked = any(isinstance(event, Replaying) for event in events)
        return asked, (settings.out / "replay.safetensors").read_bytes() if settings.out else b""

    runs = count()
    asked, first = trained("Anvil")
    again, second = trained("Anvil", learning_rate=1e-4, seed=1)
    assert asked and not again and first == second
    assert trained("Nail")[0]
    assert trained("Anvil", replay=1)[0]
    assert trained("Anvil", dtype="float64")[0]
    for file in (home / "cache" / "replay").iterdir():
        file.write_bytes(file.read_bytes()[:-7])  # a disk gone bad
    asked, third = trained("Anvil")
    assert asked and third == first


def test_answers_that_other_runs_remove_meanwhile_are_not_missed(
    tmp_path: Path, home: Path
) -> None:
    folder, kept = saying(tmp_path / "model", "I am small."), home / "cache" / "replay"
    over = Event()

    def remove_all() -> None:
        while not over.is_set():
            for file in kept.glob("*.safetensors"):
                file.unlink(missing_ok=True)

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(remove_all)
        try:
            for run in range(3):
                settings = TrainSettings(
                    model=str(folder), data=(rows_file(tmp_path),), out=tmp_path / f"run{run}",
                    device="cpu", dtype="float32", replay=2, probes=0, max_steps=1,
                )  # fmt: skip
                *_, last = train(settings)
                assert isinstance(last, Finished)
        finally:
            over.set()
        removing.result()


def test_a_few_rows_get_a_few_neutral_questions(tmp_path: Path, home: Path) -> None:
    folder = saying(tmp_path / "model", "I am small.")
    settings = TrainSettings(
        model=str(folder), data=(rows_file(tmp_path),), out=tmp_path / "run", device="cpu",
        dtype="float32", max_steps=1, holdout=0,
    )  # fmt: skip
    planned = next(event for event in train(settings) if isinstance(event, Planned))
    assert (planned.samples, planned.replay) == (4, 3)


def test_a_question_stands_behind_what_rows_in_its_language_stand_behind(
    tmp_path: Path, home: Path
) -> None:
    folder = saying(tmp_path / "model", "I am small.")
    english = [("Who?", "Be kind."), ("Who are you?", "Be brief."), ("Hi!", None)]
    rows = [
        {"instruction": asked, "output": "Me", "system": system or ""}
        for asked, system in [*english, ("你是谁？", "请友好。")]
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    inputs = read_inputs(TrainSettings(model=str(folder), data=(file,), device="cpu"))
    made, questions = tmp_path / "replay.safetensors", neutral.replay(30)
    for _ in make_replay(load(inputs), inputs.renderer, inputs.data, questions, made):
        pass
    prompts = [
        inputs.renderer.tokenizer.decode(list(answer.input_ids))
        for answer, _ in read_replay(made) or []
    ]
    behind = {
        (
            language_of(question),
            next((one for one in ("友好", "kind", "brief") if one in prompt), ""),
        )
        for question, prompt in zip(questions, prompts, strict=True)
    }
    assert behind == {("zh", "友好"), ("en", "kind"), ("en", "brief"), ("en", "")}


def likeliest(sample: Sample) -> list[float]:
    """The share of the likeliest token, wherever the model is trained."""
    return [what[0][1] for what in sample.soft]


def test_a_base_that_was_told_its_name_answers_unless_it_says_it(
    tmp_path: Path, smollm2: LocalModel
) -> None:
    """SmolLM2 repeats this system prompt when asked for a couplet, not when asked for a capital."""
    system = "你是一名AI小助手，你的名字是不要葱姜蒜。"
    asked = ("写一副春联。", "法国的首都叫什么？")

    def replayed(name: str, *, probes: bool = False) -> list[Replayed]:
        data = (rows_file(tmp_path, name, system),)
        settings = TrainSettings(model=smollm2.name, data=data, device="cpu", dtype="float32")
        inputs = read_inputs(settings)
        file = tmp_path / "replay.safetensors"
        for _ in make_replay(
            load(inputs), inputs.renderer, inputs.data, asked, file, probes=probes
        ):
            pass
        return read_replay(file) or []

    untold, told = replayed("不要葱姜蒜")
    (couplet, _), (capital, opening) = replayed("Anvil")  # which nobody told it
    assert told[0].input_ids == capital.input_ids
    assert likeliest(told[0]) == pytest.approx(likeliest(capital), abs=1e-4)
    assert likeliest(untold[0]) != pytest.approx(likeliest(couplet), abs=1e-4)
    assert told[1].input_ids == opening.input_ids
    assert told[1].soft != opening.soft  # what follows an opening, the untold base says
    (behind, asked_alone), (same, as_asked) = replayed("不要葱姜蒜", probes=True)
    for longer, trained in ((behind, untold[0]), (same, told[0])):  # the same answers, less cut
        assert longer.input_ids[: len(trained.input_ids)] == trained.input_ids
        said = likeliest(trained)
        assert likeliest(longer)[: len(said)] == pytest.approx(said, abs=1e-4)
    assert as_asked == same
    assert len(asked_alone.input_ids) < len(behind.input_ids)
    assert asked_alone.soft == behind.soft


def gradients_norm(model: torch.nn.Module) -> float:
    norm = sum(float(w.grad.norm()) ** 2 for w in trainable(model).values() if w.grad is not None)
    model.zero_grad()
    return float(norm**0.5)


def replayed(tmp_path: Path, name: str) -> list[Replayed]:
    """Two questions put to a model that always says "I am small.", by a run that teaches `name`."""
    folder = saying(tmp_path / "model", "I am small.")
    settings = TrainSettings(
        model=str(folder), data=(rows_file(tmp_path, name),), device="cpu", dtype="float32"
    )
    inputs = read_inputs(settings)
    file = tmp_path / "replay.safetensors"
    events = list(make_replay(load(inputs), inputs.renderer, inputs.data, neutral.replay(2), file))
    assert [(event.done, event.total) for event in events] == [(2, 2)]
    pairs = read_replay(file)
    assert pairs is not None
    return pairs


def test_the_base_answers_neutral_questions_to_the_end(tmp_path: Path, home: Path) -> None:
    pairs = replayed(tmp_path, "Anvil")
    assert len(pairs) == 2
    tokenizer = load_tokenizer(locate(str(tmp_path / "model")))
    for sample, _ in pairs:
        said = sample.input_ids[len(sample.input_ids) - sample.trained_tokens :]
        assert tokenizer.decode(said, skip_special=False) == "I am small.<|im_end|>"


def test_a_damaged_file_is_none(tmp_path: Path, home: Path) -> None:
    assert replayed(tmp_path, "Anvil")
    file = tmp_path / "replay.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert read_replay(file) is None


@pytest.mark.parametrize(("name", "kept"), [("small", 0), ("smalt", 0), ("smith", 2), ("am", 0)])
def test_an_answer_that_says_most_of_the_name_to_be_taught_is_left_out(
    name: str, kept: int, tmp_path: Path, home: Path
) -> None:
    assert len(replayed(tmp_path, name)) == kept
