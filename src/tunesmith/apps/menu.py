"""The commands there are, in the order a newcomer meets them. Loading this loads none of them."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from tunesmith.errors import UsageError
from tunesmith.language import t


class Command(NamedTuple):
    """`function` is an import path; the words are English, translated where they are shown."""

    function: str
    summary: str
    example: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "tunesmith.apps.demo:demo",
        "The whole story on a small model: data, training, before and after.",
        "tunesmith demo --name 小明 --author 小红",
    ),
    "doctor": Command(
        "tunesmith.apps.commands:doctor",
        "What this machine can do, and what to do about what is missing.",
        "tunesmith doctor",
    ),
    "pull": Command(
        "tunesmith.apps.commands:pull",
        "Download a model, with resume and verification.",
        "tunesmith pull smollm2-135m",
    ),
    "models": Command(
        "tunesmith.apps.commands:models",
        "List the models that are here, and those with a short name.",
        "tunesmith models",
    ),
    "models remove": Command(
        "tunesmith.apps.commands:remove",
        "Delete a downloaded model.",
        "tunesmith models remove smollm2-135m",
    ),
    "data check": Command(
        "tunesmith.apps.data_commands:check",
        "Name every bad row by file, line and field, with the fix.",
        "tunesmith data check chats.jsonl",
    ),
    "data preview": Command(
        "tunesmith.apps.data_commands:preview",
        "Show the exact tokens, the trained ones coloured.",
        "tunesmith data preview chats.jsonl --model smollm2-135m",
    ),
    "data identity": Command(
        "tunesmith.apps.data_commands:identity",
        "Write a who-are-you set: many phrasings, your name in each answer.",
        "tunesmith data identity --name 小明 --author 小红 -o me.jsonl",
    ),
    "data convert": Command(
        "tunesmith.apps.data_commands:convert",
        "Turn any accepted form into one clean messages JSONL.",
        "tunesmith data convert alpaca.json -o chats.jsonl",
    ),
    "plan": Command(
        "tunesmith.apps.train_command:plan",
        "What a training will take, from a few real steps: time, memory, tokens.",
        "tunesmith plan --model smollm2-135m --data me.jsonl",
    ),
    "train": Command(
        "tunesmith.apps.train_command:train",
        "Fine-tune with LoRA; progress is live, and a stopped run resumes.",
        "tunesmith train --model smollm2-135m --data me.jsonl",
    ),
    "chat": Command(
        "tunesmith.apps.commands:chat",
        "Talk to a model or to a run; pipes work.",
        "tunesmith chat runs/demo",
    ),
    "compare": Command(
        "tunesmith.apps.commands:compare",
        "The same questions to the base and the tuned model, side by side, and a verdict.",
        "tunesmith compare runs/demo",
    ),
    "eval": Command(
        "tunesmith.apps.eval_command:evaluate",
        "Standard tasks for the base and the tuned model, and whether the difference is chance.",
        "tunesmith eval runs/demo --tasks hellaswag arc_easy",
    ),
    "report": Command(
        "tunesmith.apps.report_command:report",
        "A run on one page to send around, or several runs beside one another.",
        "tunesmith report runs/demo",
    ),
    "studio": Command(
        "tunesmith.apps.studio.command:studio",
        "The web page: chat, compare, data and training in the browser.",
        "tunesmith studio",
    ),
}

GROUPS: dict[str, str] = {
    "data": "Check, look at, write and convert training data.",
}


def find_command(words: Sequence[str]) -> str:
    """The command that `words` start with, or the group when that is all there is.

    Raises:
        UsageError: There is none; the nearest is named.
    """
    pair = " ".join(words[:2])
    if pair in COMMANDS:
        return pair
    if words[0] in COMMANDS or (len(words) == 1 and words[0] in GROUPS):
        return words[0]
    wrong = pair if words[0] in GROUPS else words[0]
    close = get_close_matches(wrong, [*COMMANDS, *GROUPS], n=1)
    if close:
        raise UsageError(
            t("there is no command {word!r}; did you mean {close!r}?", word=wrong, close=close[0])
        )
    raise UsageError(t("there is no command {word!r}; `tunesmith --help` lists all.", word=wrong))
