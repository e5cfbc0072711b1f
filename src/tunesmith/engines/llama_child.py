"""The process that holds llama.cpp. Run as a script, so that it imports nothing else of ours.

stdin: one line of JSON, the settings; when it ends, so does this process, whatever it is doing.
stdout: one line, the address of the HTTP server. stderr: llama.cpp's log.
"""

import json
import os
import sys
import threading
from typing import Any


def main() -> None:
    """Load the model, say where it listens, and serve until stdin ends."""
    settings = json.loads(sys.stdin.buffer.readline())
    watcher = threading.Thread(target=_exit_with_parent)
    watcher.start()
    try:
        server = _serve(settings)
    except RuntimeError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)  # the watcher still waits for stdin
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    watcher.join()


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)  # Server's destructor may wait for ever


def _serve(settings: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx = settings["context"]
    params.n_parallel = settings["slots"]
    params.kv_unified = True  # one request alone may use the whole context
    params.n_batch = 128  # tokens of a prompt read between two looks at who has gone
    params.cpuparams.n_threads = settings["threads"]
    params.cpuparams_batch.n_threads = settings["threads"]
    params.api_keys = [settings["key"]]
    params.verbosity = 1  # errors only: the log of a server that runs for weeks stays small
    params.cache_ram_mib = 0  # saved states do not tell which adapter computed them
    params.fit_params = False  # with the warm-up and the page, 0.3 s of a cold start
    params.warmup = False
    params.ui = False
    params.use_jinja = False
    if settings["adapter"]:
        lora = xllamacpp.CommonAdapterLoraInfo(settings["adapter"], 1.0)
        params.lora_adapters = [lora]
        params.lora_init_without_apply = True
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
