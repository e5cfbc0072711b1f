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
        """The 20 likeliest next tokens and their log-probabilities, likeliest first.

        Empty where the likeliest is part of a character or ends the answer: llama.cpp tells nothing
        of a token that has no text.
        """
        logprobs = self._complete(list(input_ids))["choices"][0]["logprobs"]
        if logprobs is None:
            return {}
        likeliest = logprobs["content"][0]["top_logprobs"]
        return {entry["id"]: entry["logprob"] for entry in likeliest}

    def count_tokens(self, text: str) -> int:
        """How many tokens llama.cpp's own tokenizer makes of `text`."""
        count: int = self._complete(text)["usage"]["prompt_tokens"]
        return count

    def _complete(self, prompt: list[int] | str) -> Any:
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 20}
        return self._server.handle_completions(request | {"cache_prompt": False})


def apart(llama: LlamaCpp, model: Any, input_ids: Sequence[int]) -> float:
    """The largest difference of a next-token log-probability from `model`'s, after each prefix."""
    import torch

    with torch.no_grad():
        expected = model(torch.tensor([input_ids])).logits[0].log_softmax(-1)
    found = {end: llama.next_token(input_ids[:end]) for end in range(2, len(input_ids) + 1)}
    assert sum(bool(likeliest) for likeliest in found.values()) >= 4
    return max(
        abs(float(expected[end - 1, id]) - value)
        for end, likeliest in found.items()
        for id, value in likeliest.items()
    )
