"""Text to token ids and back, by the model's own tokenizer, without torch or transformers."""

import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tunesmith.errors import ModelError
from tunesmith.language import t
from tunesmith.models.cache import made_once
from tunesmith.models.headers import gguf_header
from tunesmith.models.quiet import quiet
from tunesmith.models.safety import read_json
from tunesmith.models.store import LocalModel
from tunesmith.paths import cache_dir

MAX_TEMPLATE = 1_000_000  # characters; the longest real ones have about 30,000

# GGUF pre-tokenizers that cut off every digit before GPT-2's rule applies, as llama.cpp does.
# transformers does not know them: a line break before "1." would become other tokens.
_SINGLE_DIGITS = frozenset(
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
)

_PROBE = "Hello, world's  end\n\n1. 3.14 你好，世界。 tokenizer été 🌍"


class ChatTokenizer:
    """A tokenizer and the chat template that came with it.

    Attributes:
        chat_template: The Jinja source, or None if the model has none.
        bos_token, eos_token: As the model's files name them, or None.
        special_tokens: Every control token's text and id, such as `<|im_end|>`.
    """

    def __init__(self, file: Path, config: Mapping[str, Any], chat_template: str | None) -> None:
        self.chat_template = chat_template
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self._file = file
        self._tokenizer = _open(file)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {id: token for id, token in added.items() if token.special}
        self.special_tokens = {token.content: id for id, token in special.items()}
        self._special_text = _pattern(special.values())

    @property
    def eos_token_id(self) -> int | None:
        """The id of `eos_token`, if the model names one."""
        return None if self.eos_token is None else self._tokenizer.token_to_id(self.eos_token)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    @property
    def template_sha256(self) -> str | None:
        """The fingerprint of the chat template's text."""
        template = self.chat_template
        return None if template is None else sha256(template.encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what this tokenizer does: its control tokens, and how it cuts a probe text."""
        tokens = sorted(self.special_tokens.items())
        return sha256(repr((tokens, self.encode(_PROBE))).encode()).hexdigest()

    @cached_property
    def sha256(self) -> str:
        """A hash of all that the ids of a conversation follow from."""
        own = (self.bos_token, self.eos_token, self.chat_template)
        return sha256(repr(own).encode() + self._file.read_bytes()).hexdigest()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of `text`; nothing is added before or after it.

        With `special=False` the text of a control token, say a user's `<|im_end|>`, is encoded as
        the plain characters it is made of.
        """
        plain = not special and self._special_text.search(text) is not None
        tokenizer = self._plain_tokenizer if plain else self._tokenizer
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`, control tokens left out unless `skip_special` is False."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self) -> "TokenStream":
        """A decoder for ids that arrive one at a time."""
        return TokenStream(self)

    @cached_property
    def _plain_tokenizer(self) -> Tokenizer:
        # A second object, because a flag flipped on a shared one would reach other threads.
        tokenizer = _open(self._file)
        tokenizer.encode_special_tokens = True
        return tokenizer


class TokenStream:
    """Decodes ids as they arrive; the pieces join to what decoding them all at once gives.

    A character split over several tokens is held back until it is whole.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._read = 0  # how many of `_ids` were returned as text already
        self._said = ""  # that text

    def push(self, id: int) -> str:
        """The text that `id` completes; empty while a character is not whole."""
        self._ids.append(id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") or text == self._said:
            return ""
        new = text[len(self._said) :]
        # This piece stays as context: decoders treat the first token of a text differently.
        self._ids = self._ids[self._read :]
        self._read, self._said = len(self._ids), self._tokenizer.decode(self._ids)
        return new

    def finish(self) -> str:
        """The rest: what an unfinished character decodes to, if the ids end within one."""
        rest = self._tokenizer.decode(self._ids)[len(self._said) :]
        self._ids, self._read, self._said = [], 0, ""
        return rest


def load_tokenizer(model: LocalModel) -> ChatTokenizer:
    """The tokenizer of a model on this machine.

    Raises:
        ModelError: The tokenizer is missing, unreadable, or carries an absurd chat template.
    """
    return read_tokenizer(tokenizer_folder(model))


def tokenizer_folder(model: LocalModel) -> Path:
    """The folder that holds the model's `tokenizer.json`.

    A tokenizer that comes in a GGUF, or in another form, is converted by transformers on first use
    and kept in the cache.

    Raises:
        ModelError: There is none that can be read.
    """
    if not model.is_gguf and (model.path / "tokenizer.json").is_file():
        return model.path
    converted = cache_dir() / "tokenizers" / model.sha256
    return made_once(converted, lambda folder: _convert(model, folder))


def read_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer a folder holds as `tokenizer.json`, with its chat template.

    Raises:
        ModelError: A file is unreadable, or the chat template is absurdly long.
    """
    config = _read_config(folder)
    return ChatTokenizer(folder / "tokenizer.json", config, _read_template(folder, config))


def save_converted(file: str, folder: str) -> None:
    """Have transformers read a GGUF's tokenizer, or a folder's, and write `tokenizer.json`."""
    with quiet():
        from transformers import AutoTokenizer

        given = Path(file)
        source, more = (given, {}) if given.is_dir() else (given.parent, {"gguf_file": given.name})
        tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, **more)
        tokenizer.save_pretrained(folder)


def _convert(model: LocalModel, folder: Path) -> None:
    """In a process of its own: whoever only counts tokens need not hold transformers and torch."""
    code = f"import sys; from {__name__} import save_converted; save_converted(*sys.argv[1:])"
    command = [sys.executable, "-P", "-c", code, str(model.path), str(folder)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        *_, reason = done.stderr.decode(errors="replace").strip().splitlines() or [""]
        raise ModelError(
            t(
                "{path} holds no tokenizer that can be read: {reason}",
                path=model.path,
                reason=reason,
            )
        )
    if (
        model.is_gguf
        and gguf_header(model.path).metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGITS
    ):
        _split_digits(folder / "tokenizer.json")


def _split_digits(file: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save(str(file))


def _open(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(
            t(
                "{path} is not a tokenizer ({reason}); download the model again.",
                path=file,
                reason=error,
            )
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _pattern(special: Iterable[Any]) -> re.Pattern[str]:
    """Finds text that may hold a control token; one matched after normalising may be anywhere."""
    tokens = list(special)
    if any(token.normalized for token in tokens):
        return re.compile("")
    return re.compile("|".join(re.escape(token.content) for token in tokens) or r"(?!)")


def _token_text(entry: Any) -> str | None:
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    older = _read_fields(folder / "special_tokens_map.json")
    return older | _read_fields(folder / "tokenizer_config.json")


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    template: Any = file.read_text(encoding="utf-8") if file.is_file() else None
    template = template or config.get("chat_template")
    template = template or _read_fields(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # named templates: [{"name": "default", "template": "…"}, …]
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    if len(template) > MAX_TEMPLATE:
        raise ModelError(
            t(
                "The chat template in {path} has {size} characters; more than {limit} is refused. "
                "Use another copy of this model.",
                path=folder,
                size=len(template),
                limit=MAX_TEMPLATE,
            )
        )
    return template


def _read_fields(file: Path) -> dict[str, Any]:
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}
