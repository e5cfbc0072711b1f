"""Adapters: PEFT's format, the base they belong to, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers_lora import random_lora
from tests.tiny_models import local_gguf, local_model, tiny_gguf, tiny_model_folder
from tunesmith.errors import ModelError
from tunesmith.models.adapter import (
    AdapterInfo,
    adapter_tensors,
    check_adapter,
    fingerprint,
    load_adapter,
    read_info,
    read_values,
    save_adapter,
)
from tunesmith.models.store import LocalModel
from tunesmith.models.tokenizer import load_tokenizer
from tunesmith.models.weights import load_model

PROMPT = [1, 30, 40, 50, 2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return local_model(tiny_model_folder(tmp_path_factory.mktemp("base")), "tiny-base")


@pytest.fixture(scope="module")
def saved(base: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_adapter(random_lora(base), folder, info(base))
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved adapter for the test to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def info(base: LocalModel) -> AdapterInfo:
    tokenizer = load_tokenizer(base)
    return AdapterInfo(
        base_name=base.name,
        base_source=base.source,
        base_revision=base.revision,
        base_sha256=base.sha256,
        system="你是小助手。",
        template_sha256=tokenizer.template_sha256,
        tokenizer_sha256=tokenizer.fingerprint,
        identity=("小助手", "大家"),
    )


def refusal(adapter: Path, model: LocalModel) -> str:
    with pytest.raises(ModelError) as caught:
        check_adapter(adapter, model)
    return str(caught.value)


def test_what_is_saved_is_read_back(saved: Path, base: LocalModel) -> None:
    assert read_info(saved) == info(base)
    assert check_adapter(saved, base) == ()


def test_a_script_without_tunesmith_gets_the_same_answer(saved: Path, base: LocalModel) -> None:
    import torch

    program = (
        "import sys, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "model = PeftModel.from_pretrained(base, sys.argv[2])\n"
        f"ids = torch.tensor([{PROMPT}])\n"
        "mask = torch.ones_like(ids)\n"
        "out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False,\n"
        "                     max_new_tokens=16)\n"
        "assert 'tunesmith' not in sys.modules\n"
        "print(out[0].tolist())\n"
    )
    command = [sys.executable, "-c", program, str(base.path), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plain = load_model(base, dtype=torch.float32)
    assert json.loads(done.stdout) != answer(plain)
    assert json.loads(done.stdout) == answer(load_adapter(plain, saved))


def test_equal_weights_give_equal_bytes_and_no_local_path(
    saved: Path, base: LocalModel, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    save_adapter(random_lora(base), again, info(base))
    names = sorted(file.name for file in saved.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "tunesmith.json"]
    for name in names:
        content = (saved / name).read_bytes()
        assert (again / name).read_bytes() == content
        assert str(base.path).encode() not in content
    assert fingerprint(saved) == fingerprint(again)


def test_a_loaded_adapter_can_go_on_training(saved: Path, base: LocalModel) -> None:
    import torch

    for trainable in (True, False):
        model = load_adapter(load_model(base, dtype=torch.float32), saved, trainable=trainable)
        assert any(weight.requires_grad for weight in model.parameters()) is trainable


# Another base


def test_another_base_is_refused_and_both_are_named(adapter: Path, tmp_path: Path) -> None:
    other = local_model(tiny_model_folder(tmp_path / "other", seed=1), "other-base")
    message = refusal(adapter, other)
    assert "tiny-base" in message
    assert "other-base" in message


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_a_foreign_adapter_must_fit_by_shape(
    adapter: Path, base: LocalModel, tmp_path: Path, form: str, home: Path
) -> None:
    (adapter / "tunesmith.json").unlink()
    change(adapter / "adapter_config.json", {"base_model_name_or_path": "someone/model"})
    wider = tiny_model_folder(tmp_path / "wider", hidden=64)
    if form == "gguf":
        same = local_gguf(tiny_gguf(base.path, tmp_path / "same.gguf"))
        other = local_gguf(tiny_gguf(wider, tmp_path / "wider.gguf"), "other-base")
    else:
        same, other = base, local_model(wider, "other-base")
    assert check_adapter(adapter, same) == ()
    message = refusal(adapter, other)
    assert "someone/model" in message
    assert "other-base" in message


def test_peft_refuses_what_cannot_fit(adapter: Path, tmp_path: Path) -> None:
    import torch

    other = local_model(tiny_model_folder(tmp_path / "other", hidden=64))
    with pytest.raises(ModelError, match="does not fit"):
        load_adapter(load_model(other, dtype=torch.float32), adapter)


# Broken numbers


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused(
    adapter: Path, base: LocalModel, dtype: str, value: float
) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    kind = getattr(torch, dtype)
    weights = {name: weight.to(kind) for name, weight in load_file(file).items()}
    save_file(weights, file)
    assert check_adapter(adapter, base) == ()
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = value
    save_file(weights, file)
    assert name in refusal(adapter, base)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_read_as_torch_reads_them(adapter: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    kind = getattr(torch, dtype)
    weights = {name: weight.to(kind) for name, weight in load_file(file).items()}
    save_file(weights, file)
    for name, tensor in adapter_tensors(adapter).items():
        assert np.array_equal(read_values(file, tensor), weights[name].float().numpy())


# Another tokenizer or template


def test_another_template_is_warned_of(adapter: Path, base: LocalModel) -> None:
    change(adapter / "tunesmith.json", {"template_sha256": "0" * 64})
    (warning,) = check_adapter(adapter, base)
    assert "template" in warning


def test_another_tokenizer_is_warned_of(adapter: Path, base: LocalModel) -> None:
    change(adapter / "tunesmith.json", {"tokenizer_sha256": "0" * 64})
    (warning,) = check_adapter(adapter, base)
    assert "tokenizer" in warning


def test_a_foreign_adapter_is_compared_by_the_tokenizer_beside_it(
    adapter: Path, base: LocalModel
) -> None:
    (adapter / "tunesmith.json").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base.path / name, adapter)
    assert check_adapter(adapter, base) == ()
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    tokens = (adapter / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(tokens.replace("<|im_end|>", "<|other|>"))
    template, tokenizer = check_adapter(adapter, base)
    assert "template" in template
    assert "tokenizer" in tokenizer


# Files that are refused


def test_a_pickle_is_refused_even_beside_safetensors(adapter: Path, base: LocalModel) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin" in refusal(adapter, base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(adapter: Path, base: LocalModel, name: str) -> None:
    (adapter / name).unlink()
    assert name in refusal(adapter, base)


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "tunesmith.json"]
)
def test_a_cut_file_is_named(adapter: Path, base: LocalModel, name: str) -> None:
    os.truncate(adapter / name, 100)
    assert name in refusal(adapter, base)


@pytest.mark.parametrize("content", ["[]", "{}", '{"base_name": "x"}'])
def test_a_note_that_says_too_little_is_broken(
    adapter: Path, base: LocalModel, content: str
) -> None:
    (adapter / "tunesmith.json").write_text(content)
    assert "tunesmith.json" in refusal(adapter, base)


@pytest.mark.parametrize(
    "field",
    [
        {"peft_type": "LOKR"},
        {"auto_mapping": {"base_model_class": "X", "parent_library": "os"}},
        {"megatron_config": {"x": 1}, "megatron_core": "os"},
    ],
    ids=["type", "mapping", "megatron"],
)
def test_a_config_that_is_not_plain_lora_is_refused(
    adapter: Path, base: LocalModel, field: dict[str, object]
) -> None:
    change(adapter / "adapter_config.json", field)
    assert str(adapter) in refusal(adapter, base)


def test_checking_imports_no_torch(saved: Path, base: LocalModel) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunesmith.models.adapter import check_adapter\n"
        "from tunesmith.models.store import LocalModel\n"
        "model = LocalModel('tiny', Path(sys.argv[2]), 'local', '', sys.argv[3])\n"
        "assert check_adapter(Path(sys.argv[1]), model) == ()\n"
        "print({'torch', 'transformers', 'peft'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", program, str(saved), str(base.path), base.sha256]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def answer(model: object) -> list[int]:
    import torch

    ids = torch.tensor([PROMPT])
    generate = model.generate  # type: ignore[attr-defined]
    mask = torch.ones_like(ids)
    out = generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    tokens: list[int] = out[0].tolist()
    return tokens


def change(file: Path, fields: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
