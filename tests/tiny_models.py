"""Tiny random models in the Hugging Face layout, of real architectures, made in the test."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.models.store import LocalModel

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_SENTENCES = (
    "Who are you? I am a small assistant, made to help you learn.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant tool You are a helpful assistant.",
    "请介绍一下你自己。我是一个小助手，很高兴认识你。",
    "你是谁？我是由大家一起训练出来的人工智能助手。",
    "The quick brown fox jumps over the lazy dog, one two three four five.",
)


def tiny_tokenizer_folder(path: Path, *, template: str | None = CHATML) -> Path:
    """A byte-level BPE tokenizer with ChatML's special tokens (ids 0, 1, 2), saved in `path`."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def tiny_model_folder(
    path: Path,
    arch: str = "llama",
    *,
    dtype: str = "float32",
    layers: int = 2,
    hidden: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    tie: bool = False,
    sliding_window: int | None = None,
    template: str | None = CHATML,
    seed: int = 0,
    **over: Any,
) -> Path:
    """A random causal LM of `arch` with its tokenizer, saved in `path`; returns `path`.

    Weights are wide (0.2) so that answers vary with the prompt. `over` goes to the model's
    config as it is.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tiny_tokenizer_folder(path, template=template)
    config = _config(
        arch,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tie,
        **_window(arch, sliding_window, layers),
        **over,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM
        model = auto.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(path)
    return path


def vocab_size() -> int:
    """How many tokens the tiny tokenizer has; the models' embeddings have as many rows."""
    from tokenizers import Tokenizer

    size: int = Tokenizer.from_str(_tokenizer_json()).get_vocab_size()
    return size


def local_model(path: Path, name: str = "tiny") -> LocalModel:
    """The folder as a LocalModel, its hash that of the weights."""
    digest = hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()
    return LocalModel(name=name, path=path, source="local", revision="", sha256=digest)


def _config(arch: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    base: dict[str, Any] = {
        "vocab_size": vocab_size(),
        "intermediate_size": 64,
        "max_position_embeddings": 4096,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if arch in ("gemma2", "gemma3_text"):
        base["query_pre_attn_scalar"] = settings["head_dim"]
    return AutoConfig.for_model(arch, **(base | settings))


def _window(arch: str, sliding_window: int | None, layers: int) -> dict[str, Any]:
    if sliding_window is None:
        return {"sliding_window": None} if arch == "mistral" else {}
    if arch == "mistral":
        return {"sliding_window": sliding_window}
    kinds = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    window: dict[str, Any] = {"sliding_window": sliding_window, "layer_types": kinds}
    return window | ({"use_sliding_window": True} if arch.startswith("qwen") else {})


@cache
def _tokenizer_json() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def tiny_gguf(folder: Path, out: Path, *, dtype: str = "float32") -> Path:
    """The tiny llama, mistral, qwen2 or qwen3 model in `folder` as a GGUF; returns `out`."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[arch], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, arch)
    _add_metadata(writer, config)
    _add_vocabulary(writer, json.loads(_tokenizer_json())["model"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, values in load_file(folder / "model.safetensors").items():
        module, suffix = name.rsplit(".", 1)
        count = heads.get(module.rsplit(".", 1)[-1]) if arch == "llama" else None
        rows = values if count is None else _interleave(values, count)
        kind = dtype if rows.ndim > 1 else "float32"
        writer.add_tensor(f"{names.get_name(module)}.{suffix}", rows.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def local_gguf(path: Path, name: str = "tiny") -> LocalModel:
    """The GGUF file as a LocalModel."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return LocalModel(name=name, path=path, source="local", revision="", sha256=digest)


def _interleave(rows: Any, heads: int) -> Any:
    """q and k rows in the order llama.cpp's rotary embedding reads them."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _add_metadata(writer: Any, config: dict[str, Any]) -> None:
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_vocabulary(writer: Any, model: dict[str, Any]) -> None:
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
