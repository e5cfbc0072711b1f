"""Model files: what is refused and how it is said, and what is loaded from them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from timeit import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import local_gguf, local_model, tiny_gguf, tiny_model_folder
from tunesmith.errors import ModelError
from tunesmith.models.headers import GGML_BLOCKS, gguf_header, safetensors_header
from tunesmith.models.safety import ALLOW_CODE, check_files
from tunesmith.models.store import LocalModel
from tunesmith.models.weights import load_model, weights_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def gguf_file(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tiny, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model for the test to spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def hub_model(folder: Path, revision: str = COMMIT) -> LocalModel:
    return LocalModel("hf:owner/name", folder, "hf", revision, "0" * 64)


def refusal(model: LocalModel) -> str:
    with pytest.raises(ModelError) as caught:
        check_files(model)
    return str(caught.value)


def test_sound_models_pass(tiny: Path, gguf_file: Path) -> None:
    check_files(local_model(tiny))
    check_files(local_gguf(gguf_file))


# Code of its own


SPOILS = {
    "config.json": {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}},
    "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
    "generation_config.json": {"attn_implementation": "someone/kernel"},
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_config_that_wants_code_is_refused(folder: Path, name: str) -> None:
    change(folder / name, SPOILS[name])
    message = refusal(local_model(folder))
    assert name in message
    assert ALLOW_CODE in message


@pytest.mark.parametrize(
    "field",
    [
        {"_attn_implementation": "owner/kernel"},
        {"text_config": {"_attn_implementation_internal": "owner/kernel"}},
        {"experts_implementation": {"": "eager", "text": "owner/kernel"}},
        {"layers": [{"attn_implementation": ["eager"]}]},
        {"transformers_weights": "adapter_model.bin"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_an_unknown_implementation_is_refused(folder: Path, field: dict[str, object]) -> None:
    change(folder / "config.json", field)
    assert "config.json" in refusal(local_model(folder))


def test_known_implementations_pass(folder: Path) -> None:
    change(folder / "config.json", {"_attn_implementation": "sdpa", "attn_implementation": None})
    check_files(local_model(folder))


def test_a_python_file_is_refused(folder: Path) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "modeling_x.py").write_text("print('hi')")
    assert "modeling_x.py" in refusal(local_model(folder))


def test_code_is_allowed_for_one_commit_of_one_repo_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "config.json", SPOILS["config.json"])
    monkeypatch.setenv(ALLOW_CODE, f"hf:someone/else@{COMMIT}, hf:owner/name@{COMMIT}")
    check_files(hub_model(folder))
    check_files(LocalModel(f"hf:owner/name@{COMMIT}", folder, "hf", COMMIT, ""))
    refusal(hub_model(folder, COMMIT.replace("0", "f")))
    refusal(LocalModel("modelscope:owner/name", folder, "modelscope", COMMIT, ""))
    refusal(LocalModel("hf:owner/other", folder, "hf", COMMIT, ""))
    refusal(local_model(folder))


@pytest.mark.parametrize("revision", ["main", "v1.0", ""])
def test_code_is_never_allowed_for_what_can_move(
    folder: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    change(folder / "config.json", SPOILS["config.json"])
    monkeypatch.setenv(ALLOW_CODE, f"hf:owner/name@{revision}")
    refusal(hub_model(folder, revision))


def test_code_of_another_repo_is_never_allowed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "config.json", {"auto_map": {"AutoConfig": "else/where--conf.C"}})
    monkeypatch.setenv(ALLOW_CODE, f"hf:owner/name@{COMMIT}")
    assert "else/where" in refusal(hub_model(folder))


def test_code_runs_only_where_allowed(folder: Path, tmp_path: Path) -> None:
    change(folder / "config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    (folder / "modeling_x.py").write_text(
        "from transformers import LlamaForCausalLM\nprint('RAN')\nclass X(LlamaForCausalLM): pass\n"
    )
    program = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from tunesmith.errors import ModelError\n"
        "from tunesmith.models.store import LocalModel\n"
        "from tunesmith.models.weights import load_model\n"
        f"model = LocalModel('hf:owner/name', Path(sys.argv[1]), 'hf', '{COMMIT}', '')\n"
        "try:\n"
        "    print(type(load_model(model, dtype=torch.float32)).__name__)\n"
        "except ModelError:\n"
        "    print('REFUSED')\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    home = {"HF_HOME": str(tmp_path / "hf")}
    said = [
        subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True)
        for more in (home, home | {ALLOW_CODE: f"hf:owner/name@{COMMIT}"})
    ]
    assert said[0].stdout.split() == ["REFUSED"]
    assert said[1].stdout.split() == ["RAN", "X"]


# Pickles and folders that are no models


def test_pickled_weights_are_refused_with_a_hint(folder: Path) -> None:
    model = local_model(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(model)
    assert "pytorch_model.bin" in message
    assert ".safetensors" in message


def test_a_folder_without_weights_or_config_is_refused(folder: Path) -> None:
    model = local_model(folder)
    (folder / "model.safetensors").unlink()
    assert "no .safetensors" in refusal(model)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(model)
    shutil.rmtree(folder)
    assert str(folder) in refusal(model)


def test_an_adapter_is_not_a_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter" in refusal(local_model(folder))


def test_a_config_that_is_not_json_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{" * 100_000)
    assert "config.json" in refusal(local_model(folder))


@pytest.mark.parametrize("name", ["../model.safetensors", "missing.safetensors"])
def test_an_index_must_name_files_beside_it(folder: Path, name: str) -> None:
    model = local_model(folder)
    shutil.move(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert name in refusal(model)


def test_shards_are_each_checked(folder: Path) -> None:
    model = local_model(folder)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(b"\xff" * 64)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    check_files(model)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert "two.safetensors" in refusal(model)


# Safetensors headers


SOUND = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
LIES = {
    "beyond the file": {"a": {"dtype": "F32", "shape": [2, 300], "data_offsets": [0, 2400]}},
    "shape and bytes differ": {"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 24]}},
    "end before begin": {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 0]}},
    "negative": {"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}},
    "not whole": {"a": {"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}},
    "unknown dtype": {"a": {"dtype": "F33", "shape": [2, 3], "data_offsets": [0, 24]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [2, 3]}},
    "overlap": SOUND | {"b": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}},
    "hole": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [12, 24]}},
    "unused end": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}},
    "not an object": [],
}


def safetensors_file(path: Path, header: object, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + bytes(24))
    return path


def test_a_sound_header_is_read(tmp_path: Path) -> None:
    file = safetensors_file(tmp_path / "x.safetensors", SOUND | {"__metadata__": {"format": "pt"}})
    (tensor,) = safetensors_header(file).values()
    assert (tensor.dtype, tensor.shape) == ("F32", (2, 3))
    assert tensor.end == file.stat().st_size


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(tmp_path: Path, lie: str) -> None:
    file = safetensors_file(tmp_path / "lie.safetensors", LIES[lie])
    with pytest.raises(ModelError, match=r"lie\.safetensors"):
        safetensors_header(file)


@pytest.mark.parametrize("length", [2**63, 10**8 + 1, 4096, 3, 0])
def test_a_header_of_the_wrong_length_is_refused(tmp_path: Path, length: int) -> None:
    file = safetensors_file(tmp_path / "long.safetensors", SOUND, length)
    with pytest.raises(ModelError, match=r"long\.safetensors"):
        safetensors_header(file)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 50_000, b'{"a":1,"a":2}'])
def test_a_header_that_is_not_one_object_is_refused(tmp_path: Path, text: bytes) -> None:
    file = safetensors_file(tmp_path / "odd.safetensors", text)
    with pytest.raises(ModelError, match=r"odd\.safetensors"):
        safetensors_header(file)


@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 300))
def test_what_passes_the_library_opens_too(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    from safetensors import safe_open

    file = safetensors_file(tmp_path_factory.mktemp("flip") / "x.safetensors", SOUND)
    data = bytearray(file.read_bytes())
    data[position % len(data)] = value
    file.write_bytes(data[: len(data) - max(0, cut - 200)])
    try:
        tensors = safetensors_header(file)
    except ModelError:
        return
    with safe_open(file, "numpy") as opened:
        assert set(opened.keys()) == set(tensors)


# GGUF files


def test_the_header_agrees_with_the_gguf_library(gguf_file: Path) -> None:
    import gguf

    header, reader = gguf_header(gguf_file), gguf.GGUFReader(gguf_file)
    expected = {
        tensor.name: (tuple(reversed(tensor.shape.tolist())), tensor.data_offset, tensor.n_bytes)
        for tensor in reader.tensors
    }
    found = {
        name: (tensor.shape, tensor.begin, tensor.end - tensor.begin)
        for name, tensor in header.tensors.items()
    }
    assert found == expected
    assert header.architecture == "llama"
    assert header.metadata["llama.attention.head_count"] == 4


def test_block_sizes_are_those_of_the_gguf_library() -> None:
    import gguf

    library = {kind.value: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: library.get(kind) for kind in GGML_BLOCKS} == GGML_BLOCKS


def test_the_real_header_is_read_quickly(smollm2: LocalModel) -> None:
    """Beside the gguf library, which reads the same header."""
    import gguf

    ours = min(repeat(lambda: check_files(smollm2), number=1, repeat=5))
    library = min(repeat(lambda: gguf.GGUFReader(smollm2.path), number=1, repeat=2))
    assert ours < library / 10


@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_gguf_is_refused(
    gguf_file: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    data = gguf_file.read_bytes()
    cut = tmp_path_factory.mktemp("cut") / "cut.gguf"
    cut.write_bytes(data[: int(len(data) * share)])
    assert "cut.gguf" in refusal(LocalModel("cut", cut, "local", "", ""))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 99, b"GGUF" + b"\xff" * 999])
def test_a_junk_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "junk.gguf"
    file.write_bytes(content)
    assert "junk.gguf" in refusal(LocalModel("junk", file, "local", "", ""))


@given(data=st.data())
def test_flipped_header_bytes_never_crash(
    gguf_file: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(gguf_file.read_bytes())
    start = min(tensor.begin for tensor in gguf_header(gguf_file).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, start - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("flip") / "flip.gguf"
    file.write_bytes(content)
    try:
        header = gguf_header(file)
    except ModelError as error:
        assert "flip.gguf" in str(error)
    else:
        assert all(tensor.end <= len(content) for tensor in header.tensors.values())


# Loading


def test_a_folder_is_its_own_weights(tiny: Path) -> None:
    assert weights_folder(local_model(tiny)) == tiny


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_unpacks_to_equal_weights(
    tiny: Path, tmp_path: Path, home: Path, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    model = local_gguf(tiny_gguf(tiny, tmp_path / "tiny.gguf", dtype=dtype))
    folder = weights_folder(model)
    weights, original = (
        load_file(folder / "model.safetensors"),
        load_file(tiny / "model.safetensors"),
    )
    assert weights.keys() == original.keys()
    for name, value in original.items():
        kept = value.half() if dtype == "float16" else value
        assert weights[name].dtype == kept.dtype
        assert weights[name].equal(kept), name
    assert (folder / "tokenizer.json").is_file()
    assert weights_folder(model) == folder
    assert capfd.readouterr() == ("", "")


UNPACK = (
    "import sys\n"
    "from pathlib import Path\n"
    "from tunesmith.errors import ModelError\n"
    "from tunesmith.models.store import LocalModel\n"
    "from tunesmith.models.weights import weights_folder\n"
    "print('ready', flush=True)\n"
    "try:\n"
    "    print(weights_folder(LocalModel('x', Path(sys.argv[1]), 'local', '', 'sha')))\n"
    "except ModelError as error:\n"
    "    sys.exit(str(error))\n"
)


def test_two_processes_unpack_one_model_at_once(gguf_file: Path, home: Path) -> None:
    command = [sys.executable, "-c", UNPACK, str(gguf_file)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split()[-1] for process in both]
    assert said == [str(home / "cache" / "weights" / "sha")] * 2
    left = sorted(path.name for path in (home / "cache" / "weights").iterdir())
    assert left == [".sha.lock", "sha"]


def test_killed_while_unpacking_leaves_nothing_that_loads(gguf_file: Path, home: Path) -> None:
    command = [sys.executable, "-c", UNPACK, str(gguf_file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    cache = home / "cache" / "weights"
    while not list(cache.glob(".sha.*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "sha").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == str(cache / "sha")
    assert not list(cache.glob("*.part"))


def test_a_full_disk_is_said_before_unpacking(gguf_file: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=64k none {disk} && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    command = [*inside, sys.executable, "-c", UNPACK, str(gguf_file)]
    environment = os.environ | {"TUNESMITH_HOME": str(disk)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert str(gguf_file) in done.stderr
    assert "TUNESMITH_HOME" in done.stderr


def test_loads_quietly_as_asked(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    model = load_model(local_model(tiny), dtype=torch.bfloat16, attention="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def test_an_unknown_architecture_is_said(folder: Path) -> None:
    import torch

    change(folder / "config.json", {"model_type": "nonesuch"})
    with pytest.raises(ModelError, match="nonesuch"):
        load_model(local_model(folder), dtype=torch.float32)


def test_the_real_model_answers(smollm2: LocalModel) -> None:
    import torch

    from tunesmith.models.tokenizer import load_tokenizer

    tokenizer, model = load_tokenizer(smollm2), load_model(smollm2, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        likeliest = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([int(likeliest)]) == " Paris"


def change(file: Path, fields: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    assert isinstance(fields, dict)
    file.write_text(json.dumps(content | fields))
