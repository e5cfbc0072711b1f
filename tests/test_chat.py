"""Conversations: what is kept, what comes along with a run, and whole characters."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers_chat import saying
from tests.helpers_data import conversations
from tests.helpers_lora import random_lora
from tests.tiny_models import local_model, tiny_model_folder
from tunesmith import runs
from tunesmith.chat import Chat, answers, open_chat, open_pipeline
from tunesmith.config import TrainSettings
from tunesmith.data.messages import Message
from tunesmith.engines.base import Sampling
from tunesmith.errors import EngineError, ModelError, RunError, UsageError
from tunesmith.models.adapter import AdapterInfo, save_adapter
from tunesmith.models.store import LocalModel

GREETING = "Hi 你😀!"
SYSTEM = "You are Anvil."


@pytest.fixture(scope="module")
def greeter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that always says GREETING, whose emoji is split over four tokens."""
    return saying(tmp_path_factory.mktemp("model") / "greeter", GREETING)


@pytest.fixture
def chat(greeter: Path, home: Path) -> Iterator[Chat]:
    with open_chat(str(greeter), device="cpu") as chat:
        yield chat


def turns(chat: Chat) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in chat.messages]


def test_pieces_join_to_the_answer_and_hold_whole_characters(chat: Chat) -> None:
    pieces = list(chat.ask("Hello"))
    assert "".join(pieces) == GREETING
    assert "😀" in pieces
    assert "\ufffd" not in "".join(pieces)
    assert chat.stats is not None
    assert chat.stats.finish == "stop"
    assert chat.stats.tokens == len(chat.pipeline.tokenizer.encode(GREETING))
    assert 0 < chat.stats.first_token <= chat.stats.seconds


def test_turns_are_remembered_and_forgotten(chat: Chat) -> None:
    list(chat.ask("One"))
    first = chat.stats
    list(chat.ask("Two"))
    assert turns(chat) == [
        ("user", "One"), ("assistant", GREETING), ("user", "Two"), ("assistant", GREETING)
    ]  # fmt: skip
    assert first is not None
    assert chat.stats is not None
    assert chat.stats.prompt_tokens > first.prompt_tokens
    chat.reset()
    list(chat.ask("One"))
    assert chat.stats.prompt_tokens == first.prompt_tokens


def test_the_system_prompt_is_part_of_what_is_asked(chat: Chat) -> None:
    list(chat.ask("One"))
    plain = chat.stats
    chat.reset()
    chat.system = SYSTEM
    list(chat.ask("One"))
    assert plain is not None
    assert chat.stats is not None
    assert chat.stats.prompt_tokens > plain.prompt_tokens


def test_a_stopped_answer_is_kept_as_far_as_it_got(chat: Chat) -> None:
    answer = chat.ask("Hello")
    said = next(answer)
    answer.close()
    assert turns(chat) == [("user", "Hello"), ("assistant", said)]
    assert chat.stats is not None
    assert chat.stats.finish == "cancelled"
    assert "".join(chat.ask("Again")) == GREETING


def test_an_answer_stopped_before_its_first_character_is_not_kept(chat: Chat) -> None:
    answer = chat.ask("Hello")
    answer.close()
    assert turns(chat) == []


def test_an_answer_cut_by_the_limit_says_so(chat: Chat) -> None:
    text = "".join(chat.ask("Hello", Sampling(max_tokens=2)))
    assert GREETING.startswith(text)
    assert chat.stats is not None
    assert (chat.stats.finish, chat.stats.tokens) == ("length", 2)


def test_a_conversation_over_the_context_is_refused_and_nothing_is_lost(chat: Chat) -> None:
    list(chat.ask("One"))
    before = turns(chat)
    with pytest.raises(EngineError, match=r"\d{5}.*4096.*reset"):
        list(chat.ask("long " * 5000))
    assert turns(chat) == before
    assert "".join(chat.ask("Two")) == GREETING


def test_an_engine_that_dies_leaves_the_history_as_it_was(chat: Chat) -> None:
    list(chat.ask("One"))
    before = turns(chat)
    answer = chat.ask("Two")
    next(answer)
    chat.pipeline.engine.close()
    with pytest.raises(EngineError):
        list(answer)
    assert turns(chat) == before


def test_control_tokens_in_a_question_are_text(chat: Chat) -> None:
    list(chat.ask("a"))
    plain = chat.stats
    chat.reset()
    list(chat.ask("a<|im_end|>"))
    assert plain is not None
    assert chat.stats is not None
    assert chat.stats.prompt_tokens > plain.prompt_tokens + 3


def test_what_is_saved_is_a_training_row(chat: Chat, tmp_path: Path) -> None:
    chat.system = SYSTEM
    list(chat.ask("Hello\n你好"))
    file = tmp_path / "talk.jsonl"
    chat.save(file)
    (row,) = conversations(file)
    assert [(message.role, message.content) for message in row.messages] == [
        ("system", SYSTEM), ("user", "Hello\n你好"), ("assistant", GREETING)
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"talk\.jsonl"):
        chat.save(file)
    assert len(json.loads(file.read_text("utf-8"))["messages"]) == 3
    with pytest.raises(UsageError, match="cannot be written"):
        chat.save(file / "below" / "a-file.jsonl")


def test_many_are_answered_in_their_order(greeter: Path, home: Path, tmp_path: Path) -> None:
    model = local_model(tiny_model_folder(tmp_path / "tiny"))
    pipeline = open_pipeline(model, device="cpu")
    asked = [[Message("user", f"Question {number}")] for number in range(12)]
    sampling = Sampling(temperature=0, max_tokens=8)
    together = [text for text, _ in answers(pipeline, asked, sampling)]
    alone = ["".join(pipeline.complete(messages, sampling)) for messages in asked]
    pipeline.close()
    assert together == alone
    assert len(set(together)) > 1


@pytest.fixture
def run(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    """A finished run of a tiny model, in this test's working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tiny_model_folder(tmp_path / "base")
    run = runs.create(TrainSettings(model=str(folder), out=Path("runs/mine")))
    model = local_model(folder, "base")
    info = AdapterInfo(
        base_name=str(folder),
        base_source="local",
        base_revision="",
        base_sha256=model_sha256(folder),
        system=SYSTEM,
    )
    save_adapter(random_lora(model), run.adapter, info)
    return run


def model_sha256(folder: Path) -> str:
    from tunesmith.models.store import locate

    return locate(str(folder)).sha256


def test_a_run_brings_its_base_its_adapter_and_its_system_prompt(run: runs.Run) -> None:
    sampling = Sampling(temperature=0, max_tokens=8)
    with open_chat("mine", device="cpu") as chat:
        assert chat.has_adapter
        assert chat.system == SYSTEM
        tuned = "".join(chat.ask("Hello", sampling))
        chat.reset()
        chat.adapter_on = False
        base = "".join(chat.ask("Hello", sampling))
    with open_chat("base", system=SYSTEM, device="cpu") as chat:
        assert not chat.has_adapter
        assert "".join(chat.ask("Hello", sampling)) == base != tuned
    for target, adapter in (
        ("base", "mine"),
        ("base", "runs/mine/adapter"),
        (str(run.adapter), None),
    ):
        with open_chat(target, adapter=adapter, device="cpu") as chat:
            assert "".join(chat.ask("Hello", sampling)) == tuned
    with open_chat("mine", system="Another.", device="cpu") as chat:
        assert chat.system == "Another."


def test_an_adapter_of_another_base_is_refused(run: runs.Run, greeter: Path) -> None:
    with pytest.raises(ModelError, match="mine"):
        open_chat(str(greeter), adapter="mine", device="cpu")


def test_a_run_that_is_not_finished_says_so(run: runs.Run) -> None:
    (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(RunError, match="resume"):
        open_chat("mine", device="cpu")
    with pytest.raises(RunError, match="nothing"):
        open_chat("base", adapter="nothing", device="cpu")


def test_an_adapter_that_names_no_base_says_what_to_do(run: runs.Run) -> None:
    (run.adapter / "tunesmith.json").unlink()
    with pytest.raises(ModelError, match="--adapter"):
        open_chat(str(run.adapter), device="cpu")


def test_ticks_end_with_the_answer_and_stop_it_when_closed(smollm2: LocalModel) -> None:
    with open_chat(smollm2.name) as chat:
        question = [Message("user", "Tell me a long story.")]
        whole = chat.pipeline.complete(question, Sampling(temperature=0, max_tokens=8))
        assert all(tick is None for tick in whole.ticks(0.05))
        assert whole.stats is not None and whole.stats.tokens == 8
        stopped = chat.pipeline.complete(question, Sampling(temperature=0, max_tokens=3000))
        with closing(stopped.ticks(0.05)) as ticks:
            for _ in ticks:
                if stopped.text:
                    break
        assert stopped.stats is not None and stopped.stats.finish == "cancelled"
        assert whole.text.startswith(stopped.text) or stopped.text.startswith(whole.text)
