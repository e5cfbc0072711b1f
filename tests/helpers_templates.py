"""Chat templates of model families, and small tokenizers that know their control tokens."""

import json
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from tunesmith.data.messages import Conversation, Message
from tunesmith.data.packs import Sample
from tunesmith.models.tokenizer import ChatTokenizer

GOLDEN = Path(__file__).parent / "golden"

TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}},)

_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3 = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
_GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")


@dataclass(frozen=True)
class Family:
    """A model family: the control tokens (bos and eos first) and the kind of tokenizer it has."""

    special: tuple[str, ...]
    bos: str | None
    eos: str
    sentencepiece: bool = False


FAMILIES = {
    "smollm2": Family(_CHATML, "<|im_start|>", "<|im_end|>"),
    "qwen2.5": Family(_CHATML, None, "<|im_end|>"),
    "qwen3": Family(_CHATML, None, "<|im_end|>"),
    "generation-tag": Family(_CHATML, None, "<|im_end|>"),
    "llama3": Family(_LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "llama3.1": Family(_LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "mistral-v0.3": Family(("<s>", "</s>", "[INST]", "[/INST]"), "<s>", "</s>", sentencepiece=True),
    "gemma2": Family(_GEMMA, "<bos>", "<eos>", sentencepiece=True),
    "gemma3": Family(_GEMMA, "<bos>", "<eos>", sentencepiece=True),
}

_CORPUS = (
    "system user assistant model Question Answer. Hello! How can I help you today?",
    "You are a helpful assistant. The capital of France is Paris, and two and two is four.",
    "你好！我是一个小助手，很高兴认识你。请介绍一下你自己。",
)


def template(name: str) -> str:
    return (GOLDEN / "templates" / f"{name}.jinja").read_text(encoding="utf-8").removesuffix("\n")


@cache
def family_tokenizer(name: str) -> ChatTokenizer:
    """The family's template with a tokenizer of its kind, of a few hundred tokens."""
    family = FAMILIES[name]
    return tokenizer_for(family, template(name))


def tokenizer_for(family: Family, chat_template: str | None) -> ChatTokenizer:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        backend(family).save(str(file))
        config = {"bos_token": family.bos, "eos_token": family.eos}
        made = ChatTokenizer(file, config, chat_template)
        made.encode("".join(family.special), special=False)  # reads the file a second time
    return made


def backend(family: Family) -> Tokenizer:
    return _sentencepiece(family) if family.sentencepiece else _byte_level(family)


def _byte_level(family: Family) -> Tokenizer:
    """As Qwen, Llama 3 and SmolLM2 have it: any text is bytes, no space is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(token, special=True) for token in family.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])  # known words, but not control tokens
    return tokenizer


def _sentencepiece(family: Family) -> Tokenizer:
    """As Mistral has it: `▁` for a space, one put before the text, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = (decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(token, special=True) for token in ("<unk>", *family.special)],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in _CORPUS if text.isascii()], trainer)
    whole = json.loads(tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(whole))


def marked(rendered: Sample, tokenizer: ChatTokenizer) -> str:
    """The text of a sample, what is trained in ⟦brackets⟧.

    A backslash stands before text that looks like a control token and is none.
    """
    text, inside = "", False
    control = frozenset(tokenizer.special_tokens.values())
    places = zip(rendered.input_ids, rendered.trained, strict=True)
    start = 0
    for (trained, is_control), group in groupby(places, lambda at: (at[1], at[0] in control)):
        stop = start + len(list(group))
        before = tokenizer.decode(rendered.input_ids[:start], skip_special=False)
        piece = tokenizer.decode(rendered.input_ids[:stop], skip_special=False)[len(before) :]
        if not is_control:
            for token in tokenizer.special_tokens:
                piece = piece.replace(token, "\\" + token)
        text += ("" if trained == inside else "⟦" if trained else "⟧") + piece
        inside, start = trained, stop
    return text + ("⟧" if inside else "")


def talk(*turns: tuple[str, str], system: str | None = None) -> tuple[Message, ...]:
    """Question and answer, again and again."""
    messages = [Message("system", system)] if system is not None else []
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return tuple(messages)


def tool_talk(arguments: object) -> Conversation:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = (
        Message("user", "Rain in Paris?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "sunny"),
        Message("assistant", "No, sunny."),
    )
    return Conversation(messages, tools=TOOLS)
