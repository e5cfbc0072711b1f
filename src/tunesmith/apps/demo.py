"""`tunesmith demo`: the commands a person would type, one after another, each explained."""

import shlex
from itertools import count
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tunesmith.apps.commands import compare
from tunesmith.apps.data_commands import check
from tunesmith.apps.train_command import watch
from tunesmith.config import TrainSettings
from tunesmith.language import t

DATA_FOLDER = Path("demo")


def demo(
    *,
    name: Annotated[str, Parameter(help="What your assistant is called.")] = "不要葱姜蒜",
    author: Annotated[str, Parameter(help="Who made it.")] = "Datawhale",
    model: Annotated[str, Parameter(help="The model to start from.")] = "smollm2-135m",
    out: Annotated[
        Path | None, Parameter(help="Run folder. Default: runs/demo, or the next free number.")
    ] = None,
) -> None:
    """Take a newcomer from nothing to an assistant that knows its name."""
    from tunesmith.apps.terminal import show_pull
    from tunesmith.data.identity import write_identity
    from tunesmith.models.hub import pull
    from tunesmith.training.train import train

    run = out or _free_run()
    data = DATA_FOLDER / f"{run.name}.jsonl"
    _explain(
        1,
        t("A model"),
        t("An open model is downloaded once and verified. It can talk, but it is nobody's yet."),
    )
    show_pull(pull(model))
    _explain(
        2,
        t("Data"),
        t(
            "What it shall learn is written down: many ways to ask who it is, each with the "
            "answer you want, half of them behind a system prompt."
        ),
    )
    rows = write_identity(data, name, author)
    print(t("{rows} rows written to {path}", rows=rows, path=data))
    _explain(
        3,
        t("A look at the data"),
        t("Bad rows teach bad habits, so each row is examined before anything is trained."),
    )
    check(data)
    _explain(
        4,
        t("Training"),
        t(
            "LoRA leaves the model as it is and trains a small addition beside it. Neutral "
            "questions with the model's own answers are mixed in, so that it forgets little. "
            "The loss falls as it learns; the held-out loss is on questions it does not train on."
        ),
    )
    watch(train(TrainSettings(model=model, data=(data,), out=run)))
    _explain(
        5,
        t("Before and after"),
        t("The same questions to the model without and with the addition: learnt, and kept?"),
    )
    _next_steps(run, passed=compare(str(run)) == 0)


def _free_run() -> Path:
    """`runs/demo`, or with the first number that neither a run nor its data has."""
    names = ("demo" if number == 1 else f"demo-{number}" for number in count(1))
    return next(
        Path("runs", name)
        for name in names
        if not Path("runs", name).exists() and not (DATA_FOLDER / f"{name}.jsonl").exists()
    )


def _explain(number: int, title: str, text: str) -> None:
    import shutil

    from tunesmith.apps.help import wrap

    columns = min(shutil.get_terminal_size().columns, 88)
    print(f"\n━━ {number}. {title} ━━")
    print("\n".join(wrap(text, columns)), flush=True)


def _next_steps(run: Path, *, passed: bool) -> None:
    path = shlex.quote(str(run))
    print()
    if passed:
        print(t("Your assistant is ready."))
    print(t("What to type next:"))
    commands = (
        (f"tunesmith chat {path}", t("talk to it")),
        (f"tunesmith compare {path} --ask questions.txt", t("compare on questions of your own")),
        ("tunesmith train --data mine.jsonl", t("teach it something of your own")),
    )
    width = max(len(command) for command, _ in commands)
    for command, why in commands:
        print(f"  {command:{width}}  {why}")
