"""llama.cpp in a child process: fast on a CPU, and a crash in it is an error, not ours.

The child serves HTTP on loopback under a random key. Closing a connection stops its answer.
"""

import http.client
import json
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from tunesmith.engines.base import Finish, Sampling, Stop, Tokens, check_prompt
from tunesmith.errors import EngineError
from tunesmith.language import t
from tunesmith.machine import cores
from tunesmith.models.gguf import lora_gguf
from tunesmith.models.store import LocalModel

CONTEXT = 8192  # tokens; a model trained on fewer has fewer
SLOTS = 8  # requests decoded together; measured to cost a lone request nothing

_CHILD = Path(__file__).with_name("llama_child.py")


class LlamaCppEngine:
    """A GGUF model, with a PEFT adapter if one is given.

    The constructor starts the child and returns; the first request waits until it has loaded.

    Args:
        model: A model whose weights are a GGUF.
        adapter: An adapter folder that passed `check_adapter` for this model.
        context_length: Most tokens of prompt and answer; never more than the model was trained on.
        threads: Default: one core less than there are, since a busy neighbour stalls all threads.

    Raises:
        ModelError: llama.cpp has no form for this adapter.
    """

    name = "llama.cpp"

    def __init__(
        self,
        model: LocalModel,
        adapter: Path | None = None,
        *,
        context_length: int = CONTEXT,
        threads: int | None = None,
    ) -> None:
        self._model = model.path
        self._adapter = lora_gguf(adapter, model) if adapter else None
        self._key = secrets.token_urlsafe(32)
        self._lock = threading.Lock()
        self._address: str | None = None
        self._context_length = context_length
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._child = subprocess.Popen(
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for the child
        )
        self._send(
            {
                "model": str(self._model),
                "adapter": str(self._adapter) if self._adapter else None,
                "context": context_length,
                "slots": SLOTS,
                "threads": threads or max(1, cores() - 1),
                "key": self._key,
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was loaded."""
        return self._adapter is not None

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together; waits until the model is loaded.

        Raises:
            EngineError: The model could not be loaded.
        """
        self._wait()
        return self._context_length

    def generate(
        self,
        input_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: frozenset[int],
        adapter: bool = True,
        stop: Stop | None = None,
    ) -> Tokens:
        """Yield new token ids; see `Engine.generate`."""
        check_prompt(len(input_ids), self.context_length)
        body = _request(input_ids, sampling)
        if self.has_adapter:
            body["lora"] = [{"id": 0, "scale": float(adapter)}]
        stop = stop or Stop()
        connection = self._connect()
        try:
            stop.on_ask(partial(_hang_up, connection))
            return (yield from self._tokens(self._events(connection, body, stop), stop_ids))
        except _HungUp:
            return "stop"
        finally:
            connection.close()

    def close(self) -> None:
        """End the child process; calling it twice does no harm."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._log):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()

    def _tokens(self, events: Iterator[dict[str, Any]], stop_ids: frozenset[int]) -> Tokens:
        count = 0
        silent: list[int] = []  # control tokens: if the answer ends here, they are its end
        for event in events:
            if event["stop"]:
                return (yield from _ending(event, silent + event["tokens"], stop_ids))
            ids = self._ids(event, event["tokens_predicted"] - count)
            count = event["tokens_predicted"]
            if not stop_ids.isdisjoint(ids):
                yield from silent
                return "stop"
            silent += ids
            if event["content"]:
                yield from silent
                silent = []
        raise self._died()

    def _ids(self, event: dict[str, Any], count: int) -> list[int]:
        """The `count` tokens of an event.

        llama.cpp streams only the last token of a character that was split; the others are those
        of its text. Of bytes that are no character, the same number of others stands in.
        """
        ids: list[int] = event["tokens"]
        return ids if len(ids) == count else self._tokenize(event["content"])[-count:]

    def _tokenize(self, text: str) -> list[int]:
        # Behind a line break: at the start of a text some tokenizers insert a space.
        body = {"content": "\n" + text, "parse_special": False, "with_pieces": True}
        connection = self._connect()
        try:
            reply = self._post(connection, "/tokenize", body)
            return _last_ids(json.loads(reply.read())["tokens"], len(text.encode()))
        except (OSError, http.client.HTTPException) as error:
            raise self._died() from error
        finally:
            connection.close()

    def _events(
        self, connection: http.client.HTTPConnection, body: dict[str, Any], stop: Stop
    ) -> Iterator[dict[str, Any]]:
        try:
            reply = self._post(connection, "/completion", body)
            if not body["stream"]:
                yield json.loads(reply.read())
                return
            for line in reply:
                if line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise _refused(event)
                    yield event
        except (OSError, http.client.HTTPException) as error:
            if stop.asked:
                raise _HungUp from error
            raise self._died() from error
        if stop.asked:
            raise _HungUp

    def _post(
        self, connection: http.client.HTTPConnection, path: str, body: dict[str, Any]
    ) -> http.client.HTTPResponse:
        headers = self._headers | {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != http.client.OK:
            raise _refused(json.loads(reply.read()))
        return reply

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._wait())
        try:
            connection.connect()
        except OSError as error:
            raise self._died() from error
        return connection

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"}

    def _wait(self) -> str:
        """The child's host and port, once it has loaded the model."""
        with self._lock:
            if self._address is None:
                assert self._child.stdout is not None
                if self._child.stdout.closed:
                    raise self._died()
                line = self._child.stdout.readline().decode()
                if not line:
                    raise self._not_loaded()
                self._address = line.strip().removeprefix("http://")
                self._context_length = self._read_context(self._address)
            return self._address

    def _read_context(self, address: str) -> int:
        connection = http.client.HTTPConnection(address)
        try:
            connection.request("GET", "/props", headers=self._headers)
            properties = json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException) as error:
            raise self._died() from error
        finally:
            connection.close()
        return int(properties["default_generation_settings"]["n_ctx"])

    def _send(self, settings: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):  # it died at once; the first request says so
            self._child.stdin.write(json.dumps(settings).encode() + b"\n")
            self._child.stdin.flush()

    def _not_loaded(self) -> EngineError:
        return EngineError(
            t(
                "llama.cpp could not load {files}: {reason}. If a file is damaged, get it again.",
                files=" + ".join(str(file) for file in (self._model, self._adapter) if file),
                reason=self._first_error() or self._end(),
            )
        )

    def _died(self) -> EngineError:
        return EngineError(
            t(
                "The llama.cpp process that held {file} ended while it was answering "
                "({reason}); start again, and if memory ran out, take a smaller model.",
                file=self._model,
                reason=self._end(),
            )
        )

    def _first_error(self) -> str | None:
        """What went wrong first, by the child's log."""
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        error = re.search(r"^[\d.]+ E (.*)", log, re.MULTILINE)
        return error and "".join(filter(str.isprintable, error[1])).strip(" .")

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):  # its socket closes a moment before it ends
            self._child.wait(1)
        return t("exit code {code}", code=self._child.returncode)


class _HungUp(Exception):
    """We closed the connection ourselves."""


def _hang_up(connection: http.client.HTTPConnection) -> None:
    """Close it even while another thread reads from it."""
    if connection.sock is not None:
        with suppress(OSError):
            connection.sock.shutdown(socket.SHUT_RDWR)


def _request(input_ids: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    # These in this order and no others; top-p sorts the vocabulary, so not for nothing.
    uncut = sampling.temperature == 0 or sampling.top_p == 1
    return {
        "prompt": list(input_ids),
        "n_predict": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "samplers": ["temperature"] if uncut else ["temperature", "top_p"],
        "stream": sampling.max_tokens > 1,  # unstreamed, even part of a character is named
        "return_progress": True,  # the write that fails is what tells llama.cpp that we have gone
        "return_tokens": True,
        "cache_prompt": True,
    }


def _ending(event: dict[str, Any], ids: list[int], stop_ids: frozenset[int]) -> Tokens:
    if event["stop_type"] == "eos":
        ids = ids[:-1]
    if not stop_ids.isdisjoint(ids):
        return "stop"
    yield from ids
    finish: Finish = "length" if event["stop_type"] == "limit" else "stop"
    return finish


def _last_ids(tokens: list[dict[str, Any]], size: int) -> list[int]:
    """The ids of the last tokens whose pieces together have `size` bytes."""
    ids: list[int] = []
    for token in reversed(tokens):
        if size <= 0:
            break
        piece = token["piece"]
        size -= len(piece.encode() if isinstance(piece, str) else piece)
        ids.insert(0, token["id"])
    return ids


def _refused(reply: dict[str, Any]) -> EngineError:
    reason = reply["error"]["message"]
    return EngineError(t("llama.cpp refused the request: {reason}.", reason=reason))
