"""Adapters in llama.cpp answer as they do in transformers with PEFT."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers_llama import LlamaCpp, apart
from tests.helpers_lora import random_lora
from tests.tiny_models import local_gguf, local_model, tiny_gguf, tiny_model_folder
from tunesmith.errors import ModelError
from tunesmith.models.adapter import AdapterInfo, check_adapter, save_adapter
from tunesmith.models.gguf import lora_gguf
from tunesmith.models.store import LocalModel
from tunesmith.models.tokenizer import load_tokenizer

PROMPT = [1, 20, 30, 40, 50, 60, 70, 2, 5, 1]
CLOSE = 0.1  # llama.cpp keeps keys and values in float16; rows in the wrong order are off by 4
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 8},
        "alpha_pattern": {"k_proj": 3, "up_proj": 20},
    },
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 1}},
    "one layer": {"layers_to_transform": [1], "target_modules": ["v_proj", "down_proj"]},
    "head": {"target_modules": ["q_proj", "k_proj", "lm_head"]},
    "zero": {"lora_alpha": 0},
}


def saved(model: Any, base: LocalModel, folder: Path) -> Path:
    save_adapter(
        model,
        folder,
        AdapterInfo(
            base_name=base.name, base_source="local", base_revision="", base_sha256=base.sha256
        ),
    )
    return folder


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_architecture_answers_as_in_peft(arch: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "hf", arch)
    base, packed = local_model(folder), local_gguf(tiny_gguf(folder, tmp_path / "tiny.gguf"))
    tuned = random_lora(base)
    adapter = saved(tuned, base, tmp_path / "adapter")
    plain = LlamaCpp(packed.path)
    # The same file must come from the model as a folder and as a GGUF.
    files = [lora_gguf(adapter, form, tmp_path / f"{form.is_gguf}.gguf") for form in (base, packed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    llama = LlamaCpp(packed.path, files[0])
    assert apart(plain, tuned, PROMPT) > 1
    assert apart(llama, tuned, PROMPT) < CLOSE


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_of_lora_answers_as_in_peft(variant: str, tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "hf")
    base, packed = local_model(folder), tiny_gguf(folder, tmp_path / "tiny.gguf")
    tuned = random_lora(base, **VARIANTS[variant])
    adapter = saved(tuned, base, tmp_path / "adapter")
    llama = LlamaCpp(packed, lora_gguf(adapter, base, tmp_path / "lora.gguf"))
    assert apart(llama, tuned, PROMPT) < CLOSE
    assert (apart(LlamaCpp(packed), tuned, PROMPT) > 0.1) == (variant != "zero")


def test_the_real_model_answers_as_in_peft(smollm2: LocalModel, tmp_path: Path) -> None:
    import torch

    tokenizer = load_tokenizer(smollm2)
    tuned = random_lora(smollm2, strength=0.3)
    adapter = saved(tuned, smollm2, tmp_path / "adapter")
    assert check_adapter(adapter, smollm2) == ()
    llama = LlamaCpp(smollm2.path, lora_gguf(adapter, smollm2, tmp_path / "lora.gguf"))
    ids = tokenizer.encode("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n")
    ids += tokenizer.encode("<|im_start|>assistant\n")
    for _ in range(8):  # greedy, each engine asked for every next token
        with torch.no_grad():
            expected = tuned(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        found = llama.next_token(ids)
        # llama.cpp rounds activations of a 4-bit model to 8 bits: only clear choices must agree.
        first, second = expected.topk(2).values.tolist()
        likeliest = int(expected.argmax())
        assert next(iter(found)) == likeliest or first - second < 0.3
        assert abs(found[likeliest] - first) < 0.4
        if likeliest == tokenizer.eos_token_id:
            break
        ids.append(likeliest)
    assert "Paris" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    base = local_model(tiny_model_folder(tmp_path / "hf"))
    adapter = saved(random_lora(base, **settings), base, tmp_path / "adapter")
    out = tmp_path / "lora.gguf"
    with pytest.raises(ModelError, match=named):
        lora_gguf(adapter, base, out)
    assert not out.exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    base = local_model(tiny_model_folder(tmp_path / "hf", tie=True))
    tuned = random_lora(base, target_modules=["lm_head"])
    adapter = saved(tuned, base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="lm_head"):
        lora_gguf(adapter, base, tmp_path / "lora.gguf")


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    base = local_model(tiny_model_folder(tmp_path / "hf", "olmo2"))
    adapter = saved(random_lora(base), base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="olmo2"):
        lora_gguf(adapter, base, tmp_path / "lora.gguf")


def test_written_once_into_the_cache(tmp_path: Path, home: Path) -> None:
    base = local_model(tiny_model_folder(tmp_path / "hf"))
    adapter = saved(random_lora(base), base, tmp_path / "adapter")
    file = lora_gguf(adapter, base)
    written = file.stat().st_mtime_ns
    assert lora_gguf(adapter, base) == file
    assert file.stat().st_mtime_ns == written
    other = saved(random_lora(base, seed=1), base, tmp_path / "other")
    assert lora_gguf(other, base) != file
    assert len(list(file.parent.iterdir())) == 2
