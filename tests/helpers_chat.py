"""A real model that says one thing, and a real terminal to talk to a program through."""

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.tiny_models import tiny_model_folder, vocab_size
from tunesmith.data.messages import Message
from tunesmith.data.render import Renderer
from tunesmith.engines.base import Finish, Tokens
from tunesmith.models.tokenizer import read_tokenizer

# Makes the terminal on stdin the one whose Ctrl-C reaches us, then becomes the program.
_ATTACH = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


def saying(path: Path, text: str) -> Path:
    """A llama in `path` whose every answer is `text`, in which no token may come twice.

    Embeddings are one-hot and the layers add nothing, so the head alone says what follows a token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    size = vocab_size()
    tiny_model_folder(path, hidden=size, heads=1, kv_heads=1, layers=1)
    tokenizer = read_tokenizer(path)
    start = Renderer(tokenizer).prompt([Message("user", "?")])[-1]
    end = tokenizer.special_tokens["<|im_end|>"]
    chain = [start, *tokenizer.encode(text, special=False), end]
    assert len(set(chain)) == len(chain)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(path)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "norm" in name else 0.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for before, after in pairwise(chain):
            model.lm_head.weight[after, before] = 1.0
    model.save_pretrained(path)
    return path


class Terminal:
    """A program that runs in a terminal of its own."""

    def __init__(self, command: Sequence[str], **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _ATTACH, *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb"} | environment,
        )
        os.close(theirs)
        self.seen = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self._ours, text.encode())

    def press_at_prompt(self, key: str) -> None:
        """Wait for the prompt and until it is being listened to, then press the key."""
        self.until("> ")
        program = psutil.Process(self.process.pid)
        while program.status() != psutil.STATUS_SLEEPING:
            time.sleep(0.01)
        self.type(key)

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown up to `text`; what follows stays for the next call."""
        wanted, deadline = text.encode(), time.monotonic() + seconds
        while wanted not in self.seen:
            ready, _, _ = select.select([self._ours], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} is not in {self.seen!r}"
            self.seen += self._read()
        before, _, self.seen = self.seen.partition(wanted)
        return (before + wanted).decode()

    def _read(self) -> bytes:
        try:
            piece = os.read(self._ours, 65536)
        except OSError:  # Linux says so when the other side is closed
            piece = b""
        assert piece, f"the program ended: {self.seen!r}"
        return piece


def collect(tokens: Tokens) -> tuple[list[int], Finish]:
    """All ids of an answer, and how it ended."""
    ids: list[int] = []
    while True:
        try:
            ids.append(next(tokens))
        except StopIteration as end:
            return ids, end.value
