"""llama.cpp for real: what it thinks the next token is, with and without an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A model in llama.cpp, in this process; `adapter` is a LoRA GGUF."""

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = 512
        params.n_parallel = 1
        params.cpuparams.n_threads = 1
        params.api_keys = ["test"]
        params.warmup = False
        params.verbosity = 0
        if adapter is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(params)

    def next_token(self, input_ids: Sequence[int]) -> dict[int, float]:
        """The 20 likeliest next tokens and their log-probabilities, likeliest first."""
        answer = self._complete(list(input_ids))
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in likeliest}

    def count_tokens(self, text: str) -> int:
        """How many tokens llama.cpp's own tokenizer makes of `text`."""
        count: int = self._complete(text)["usage"]["prompt_tokens"]
        return count

    def _complete(self, prompt: list[int] | str) -> Any:
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
        # Without ignore_eos there are no probabilities where the likeliest token ends the answer;
        # they are the model's own, before that rule.
        more = {"cache_prompt": False, "ignore_eos": True}
        return self._server.handle_completions(request | more)
