"""Models of known shapes, to be filled with random weights."""

from typing import Any


def qwen2_7b(layers: int = 28) -> Any:
    """The configuration of Qwen2-7B, with as many layers as asked for."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=False,
    )
