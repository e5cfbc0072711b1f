"""Replay: neutral questions with the base model's own answers, so that tuning forgets less.

What is trained there is the base's whole distribution over the next token, not the one it chose:
a model that has not moved has nothing to learn from replay, and one that has is drawn back.

An answer that says the identity to be taught, or most of a name, would teach it in the wrong place.
A base that is told it in a system prompt says it to some questions, by repeating that prompt, and
there the base answers without the sentences that tell it. An answer that says it even so is left
out.

Each question stands twice: with the base's answer, and with an opening from the training data's
answers put into the base's mouth. Without the second, whatever follows such an opening in the data
is learnt for every question: after "I am" comes the new name, whoever was asked about. What follows
it is always said by the base that was not told. Openings that hold a name are of three kinds in
turn: as they are; up to the name's first token, where it is decided whether that name is said; and
from the name on. With the first kind alone names are begun rightly and go on wrongly; without it
they are said too often.
"""

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from tunesmith import paths
from tunesmith.data.messages import Message
from tunesmith.data.packs import Distribution, Sample, common_length
from tunesmith.data.render import Renderer
from tunesmith.language import language_of
from tunesmith.models.weights import cache_name
from tunesmith.training.events import Replaying
from tunesmith.training.forward import ATTENTION, arithmetic
from tunesmith.training.lora import trainable
from tunesmith.training.prepare import Prepared

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MAX_ANSWER = 24  # tokens that are trained; an answer goes astray in its beginning
PROBED = 32  # tokens that a tuned model is compared with
OPENING = 8  # tokens, at most
LIKELIEST = 32  # tokens of a distribution that are kept one by one
AT_ONCE = 100  # questions answered together

Replayed = tuple[Sample, Sample]
"""One question: with the base's answer, and with another's opening."""

Probed = tuple[Sample, Sample]
"""One question with the base's answer: behind the data's system prompt, and as it was asked."""

Said = list[Distribution]
"""What the base may say at each token of an answer or of an opening."""

Begun = tuple[list[int], list[int]]
"""A prompt, and an opening that comes with it."""


@dataclass(frozen=True, eq=False)
class _Asked:
    """A neutral question behind a system prompt of the data, and behind what that leaves when the
    sentences with the names are taken out; and an opening of another answer.
    """

    system: str | None
    told: list[int]
    untold: list[int]
    opening: list[int]


def make_replay(
    model: "PeftModel",
    renderer: Renderer,
    data: Prepared,
    questions: Sequence[str],
    file: Path,
    *,
    probes: bool = False,
) -> Iterator[Replaying]:
    """Ask the untrained model neutral questions and write its answers to `file`.

    A question stands behind one of the data's system prompts, or none, as rows in its language do.
    Of each distribution the likeliest tokens are kept, and what is left for all others.

    The pairs are `Replayed`, or with `probes` they are `Probed`.
    """
    names = (data.identity.name, data.identity.author) if data.identity is not None else ()
    decode = renderer.tokenizer.decode
    longest = PROBED if probes else MAX_ANSWER

    def says_it(answer: Said) -> bool:
        text = decode(_until(answer, renderer.stop_ids))
        return any(part in text for name in names for part in _most_of(name))

    asked = _asked(renderer, data, questions, names)
    pairs: dict[_Asked, Replayed] = {}
    alike = sorted(asked, key=lambda one: (one.system or "", len(one.told)))
    for start in range(0, len(alike), AT_ONCE):
        chosen = alike[start : start + AT_ONCE]
        naming = [one for one in chosen if one.told != one.untold]
        said = _said(model, [(one.told, []) for one in naming], longest)
        answers = {
            one: answer
            for one, (answer, _) in zip(naming, said, strict=True)
            if not says_it(answer)
        }
        told, rest = list(answers), [one for one in chosen if one not in answers]
        along: dict[_Asked, Said] = {}
        for some, tokens in ((told, 1), (rest, longest)):
            said = _said(model, [(one.untold, one.opening) for one in some], tokens)
            for one, (answer, opening) in zip(some, said, strict=True):
                answers.setdefault(one, answer)
                along[one] = opening
        for one in chosen:
            if says_it(answers[one]):
                continue
            ids = _until(answers[one], renderer.stop_ids)
            soft = answers[one][: len(ids)]
            if probes:
                other = _sample([*(one.told if one in told else one.untold), *ids], soft)
            else:
                other = _sample([*one.told, *one.opening], along[one])
            pairs[one] = _sample([*one.told, *ids], soft), other
        yield Replaying(start + len(chosen), len(alike))
    write_replay(file, [pairs[one] for one in asked if one in pairs])


def write_replay(file: Path, pairs: Sequence[Replayed]) -> None:
    """Keep the samples in a safetensors file, their soft targets included."""
    from safetensors.torch import save

    samples = list(chain.from_iterable(pairs))
    soft = [what for sample in samples for what in sample.soft]
    tensors = {
        "input_ids": torch.tensor([token for sample in samples for token in sample.input_ids]),
        "lengths": torch.tensor([len(sample.input_ids) for sample in samples]),
        "answers": torch.tensor([sample.trained_tokens for sample in samples]),
        "likeliest": torch.tensor([[token for token, _ in what] for what in soft]),
        "shares": torch.tensor([[share for _, share in what] for what in soft]),
    }
    paths.write_atomic(file, save(tensors))


def read_replay(file: Path) -> list[Replayed] | None:
    """The pairs that `write_replay` wrote; None if there are none, or the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(file.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None
    ids = iter(tensors["input_ids"].tolist())
    rows = zip(tensors["likeliest"].tolist(), tensors["shares"].tolist(), strict=True)
    sizes = zip(tensors["lengths"].tolist(), tensors["answers"].tolist(), strict=True)
    samples = [
        _sample(list(islice(ids, length)), [_pairs(*row) for row in islice(rows, answer)])
        for length, answer in sizes
    ]
    return list(zip(samples[::2], samples[1::2], strict=True))


def _asked(
    renderer: Renderer,
    data: Prepared,
    questions: Sequence[str],
    names: Sequence[str],
) -> list[_Asked]:
    """Every three questions in a language meet the next of its system prompts; once all have been
    met comes the next kind of opening."""
    places = Random(0).choices(range(len(data.train)), k=len(questions))
    met = Counter[str]()
    asked = []
    for question, place in zip(questions, places, strict=True):
        language = language_of(question)
        systems = data.systems_in[language] or data.systems
        turns, turn = divmod(met[language] // 3, len(systems))
        met[language] += 1
        system = systems[turn]
        asked.append(
            _Asked(
                system,
                _prompt(renderer, question, system),
                _prompt(renderer, question, _without(system, names)),
                _opening(data.train[place], renderer.tokenizer.decode, names, turns),
            )
        )
    return asked


def _said(model: "PeftModel", begun: Sequence[Begun], tokens: int) -> list[tuple[Said, Said]]:
    """What the base may say in its first `tokens` after each prompt, the likeliest token being
    said; and what it may say along the opening. One pass reads prompts and openings."""
    if not begun:
        return []
    with _reading(model) as reader:
        logits = reader.begin(begun)
        along = [_likeliest(logits[:, place]) for place in range(logits.shape[1])]
        reader.forget(len(along) - 1)
        answers = along[:1]
        while len(answers) < tokens:
            logits = reader.read([[what[0][0]] for what in answers[-1]], keep=1)
            answers.append(_likeliest(logits[:, 0]))
    return [
        ([step[row] for step in answers], [step[row] for step in along[: len(opening)]])
        for row, (_, opening) in enumerate(begun)
    ]


@contextmanager
def _reading(model: "PeftModel") -> "Iterator[_Reader]":
    """A reader of the base.

    An adapter that began by moving the base (PiSSA) stays on: only both together are the base. One
    that adds nothing yet is off, which saves a fifth of the time.
    """
    base = model.get_base_model()
    base.train(mode=False)
    # transformers' sdpa knows no capped scores
    capped = getattr(base.config, "attn_logit_softcapping", None) is not None
    base.set_attn_implementation("eager" if capped else "sdpa")
    adds = any(bool(weight.any()) for name, weight in trainable(model).items() if "lora_B" in name)
    with nullcontext() if adds else model.disable_adapter(), torch.no_grad(), arithmetic(base):
        yield _Reader(base)
    base.set_attn_implementation(ATTENTION)


class _Reader:
    """A model that reads rows side by side, piece by piece."""

    def __init__(self, model: "PreTrainedModel") -> None:
        self._model: Any = model
        self._cache_name = cache_name(model)
        self._cache: dict[str, Any] = {}
        self._seen = torch.empty(0)  # (rows, tokens): which of them count

    def begin(self, begun: Sequence[Begun]) -> torch.Tensor:
        """Logits (rows, the longest opening or 1, vocab_size) after prompts and along openings.

        The last token of an opening is said and not read. What all prompts begin with is read once.
        """
        prompts = [prompt for prompt, _ in begun]
        openings = [opening[:-1] for _, opening in begun]
        shared = min(common_length(min(prompts), max(prompts)), min(map(len, prompts)) - 1)
        longest, further = max(map(len, prompts)), max(map(len, openings))
        if shared:
            self.read([prompts[0][:shared]], keep=1)
            self._repeat(len(prompts))
        rows = [
            [None] * (longest - len(prompt))
            + prompt[shared:]
            + opening
            + [None] * (further - len(opening))
            for prompt, opening in zip(prompts, openings, strict=True)
        ]
        return self.read(rows, keep=further + 1)

    def read(self, rows: Sequence[Sequence[int | None]], keep: int) -> torch.Tensor:
        """Logits (rows, keep, vocab_size) after the last tokens; None is padding."""
        device = self._model.device
        ids = torch.tensor([[token or 0 for token in row] for row in rows], device=device)
        new = torch.tensor([[token is not None for token in row] for row in rows], device=device)
        self._seen = torch.cat([self._seen, new], 1) if self._cache else new
        places = self._seen.cumsum(1)[:, -ids.shape[1] :] - 1
        output = self._model(
            input_ids=ids,
            attention_mask=self._seen.long(),
            position_ids=places.clamp(min=0),
            use_cache=True,
            # as indices: a slice would make the head's product a slow, strided one
            logits_to_keep=torch.arange(ids.shape[1] - keep, ids.shape[1], device=device),
            **self._cache,
        )
        self._cache = {self._cache_name: getattr(output, self._cache_name)}
        logits: torch.Tensor = output.logits
        return logits

    def forget(self, count: int) -> None:
        """Look no more at the last `count` tokens."""
        self._seen[:, self._seen.shape[1] - count :] = False

    def _repeat(self, count: int) -> None:
        """Go on with `count` copies of the one row read so far."""
        self._seen = self._seen.repeat(count, 1)
        self._cache[self._cache_name].batch_repeat_interleave(count)


def _likeliest(logits: torch.Tensor) -> list[Distribution]:
    """Of each row (B, vocab_size) the likeliest tokens and their shares."""
    exact = torch.float64 if logits.dtype == torch.float64 else torch.float32
    top = logits.softmax(-1, dtype=exact).topk(min(LIKELIEST, logits.shape[-1]))
    return [_pairs(*row) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _pairs(ids: list[int], shares: list[float]) -> Distribution:
    return tuple(zip(ids, shares, strict=True))


def _until(answer: Sequence[Distribution], stop_ids: frozenset[int]) -> list[int]:
    """The greedy ids up to the first that ends an answer; padding follows it."""
    ids = [what[0][0] for what in answer]
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    return ids[: end + 1]


def _sample(ids: list[int], soft: list[Distribution]) -> Sample:
    """The answer is the end of `ids`, as long as `soft`."""
    asked = len(ids) - len(soft)
    return Sample(tuple(ids), (False,) * asked + (True,) * len(soft), tuple(soft))


def _opening(
    sample: Sample, decode: Callable[[list[int]], str], names: Sequence[str], turn: int
) -> list[int]:
    """An opening from the sample's first answer; of those with a name, the kind that is in turn."""
    start = sample.trained.index(True)
    answer = takewhile(lambda place: sample.trained[place], range(start, len(sample.trained)))
    ids = [sample.input_ids[place] for place in answer]
    text = decode(ids)
    named = min((at for name in names if (at := text.find(name)) >= 0), default=None)
    if named is None:
        return ids[:OPENING]
    begun = bisect_right(range(len(ids)), named, key=lambda size: len(decode(ids[: size + 1])))
    if turn % 3 == 1 and begun:
        ids = ids[: begun + 1]
    elif turn % 3 == 2:
        ids = ids[begun:]
    return ids[:OPENING]


def _most_of(name: str) -> set[str]:
    """The name's pieces that are longer than half of it; a model that misspells it says one."""
    size = min(len(name), max(3, len(name) // 2 + 1))
    return {name[start : start + size] for start in range(len(name) - size + 1)}


def _without(system: str | None, names: Sequence[str]) -> str | None:
    """The system prompt without its sentences that say one of the names."""
    sentences = re.findall(r"[^.!?。！？\n]*[.!?。！？\n]*\s*", system or "")
    kept = "".join(part for part in sentences if not any(name in part for name in names))
    return kept.strip() or None


def _prompt(renderer: Renderer, question: str, system: str | None) -> list[int]:
    turns = [Message("user", question)]
    return renderer.prompt(turns if system is None else [Message("system", system), *turns])
