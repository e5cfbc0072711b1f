"""Text to ids and back: as transformers does it, without loading transformers."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from tests.helpers_llama import LlamaCpp
from tests.tiny_models import (
    CHATML,
    local_gguf,
    tiny_gguf,
    tiny_model_folder,
    tiny_tokenizer_folder,
    vocab_size,
)
from tunesmith.errors import ModelError
from tunesmith.models.store import LocalModel
from tunesmith.models.tokenizer import (
    MAX_TEMPLATE,
    ChatTokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_folder,
)

TEXTS = (
    "Hello, world!",
    "  two  spaces\n\n1. first\n\n2. second",
    "你好，世界。我是一个小助手",
    "<|im_start|>user\nhi 🌍<|im_end|>\n",
    "def f(x):\n\treturn 3.14",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer_folder(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return read_tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_does(folder: Path, tokenizer: ChatTokenizer, text: str) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_knows_its_special_tokens(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.bos_token is None
    assert tokenizer.vocab_size == vocab_size()
    assert tokenizer.chat_template == CHATML


def test_a_control_token_typed_by_a_user_is_text(tokenizer: ChatTokenizer) -> None:
    text = "a<|im_end|>b"
    plain = tokenizer.encode(text, special=False)
    assert tokenizer.encode(text)[1] == 2
    assert not set(plain) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(plain) == text


def test_text_that_only_becomes_a_control_token_by_normalising_is_text_too(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.NFKC()
    backend.add_special_tokens([AddedToken("<|stop|>", special=True, normalized=True)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = read_tokenizer(folder)
    stop = tokenizer.special_tokens["<|stop|>"]
    wide = "＜｜stop｜＞"
    assert stop in tokenizer.encode(wide)
    assert stop not in tokenizer.encode(wide, special=False)


def test_threads_do_not_disturb_each_other(folder: Path) -> None:
    tokenizer = read_tokenizer(folder)

    def encode(special: bool) -> bool:
        return 2 in tokenizer.encode("hi<|im_end|>", special=special)

    wanted = [bool(number % 2) for number in range(2000)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encode, wanted)) == wanted


@given(ids=st.lists(st.integers(0, vocab_size() - 1), max_size=40))
def test_streamed_text_is_the_whole_text(tokenizer: ChatTokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@given(text=st.text(max_size=60))
def test_streamed_characters_arrive_whole(tokenizer: ChatTokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(id) for id in tokenizer.encode(text, special=False)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=30))
def test_streams_byte_fallback_and_leading_spaces(byte_fallback: ChatTokenizer, text: str) -> None:
    ids = byte_fallback.encode(text)
    stream = byte_fallback.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == byte_fallback.decode(ids) == text


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A sentencepiece-like tokenizer: a few letters, all else as single bytes."""
    folder = tmp_path_factory.mktemp("bytes")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["<unk>", *"▁abcdehlo", "▁a"]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    backend = Tokenizer(BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder)


_NAMED = {"default": "FROM CONFIG", "tool_use": "no"}
_LISTED = [{"name": name, "template": template} for name, template in _NAMED.items()]


@pytest.mark.parametrize("value", ["FROM CONFIG", _NAMED, _LISTED], ids=["text", "dict", "list"])
def test_finds_the_template_inside_the_config(tmp_path: Path, value: object) -> None:
    folder = tiny_tokenizer_folder(tmp_path, template=None)
    _change_config(folder, chat_template=value)
    assert read_tokenizer(folder).chat_template == "FROM CONFIG"
    (folder / "chat_template.jinja").write_text("FROM FILE", encoding="utf-8")
    assert read_tokenizer(folder).chat_template == "FROM FILE"


def test_a_model_may_have_no_template(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path, template=None)
    assert read_tokenizer(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "OLD"}))
    assert read_tokenizer(folder).chat_template == "OLD"


def test_an_enormous_template_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path, template="x" * (MAX_TEMPLATE + 1))
    with pytest.raises(ModelError, match="chat template"):
        read_tokenizer(folder)


def test_special_tokens_may_be_objects_or_lie_in_the_older_file(tmp_path: Path) -> None:
    folder = tiny_tokenizer_folder(tmp_path)
    _change_config(folder, eos_token=None, bos_token={"content": "<|im_start|>", "lstrip": False})
    assert read_tokenizer(folder).bos_token == "<|im_start|>"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert read_tokenizer(folder).eos_token_id == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    folder = tiny_tokenizer_folder(tmp_path)
    (folder / name).write_text((folder / name).read_text()[:50])
    with pytest.raises(ModelError, match=name):
        read_tokenizer(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, home: Path) -> None:
    model = LocalModel("empty", tmp_path, "local", "", "0" * 64)
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(model)
    assert not list(home.rglob("tokenizer*.json"))


def test_a_gguf_tokenizer_is_converted_once(tmp_path: Path, home: Path) -> None:
    folder = tiny_model_folder(tmp_path / "hf")
    model = local_gguf(tiny_gguf(folder, tmp_path / "tiny.gguf"))
    converted, original = load_tokenizer(model), read_tokenizer(folder)
    assert [converted.encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert converted.special_tokens == original.special_tokens
    assert converted.chat_template == original.chat_template
    written = (tokenizer_folder(model) / "tokenizer.json").stat().st_mtime_ns
    load_tokenizer(model)
    assert (tokenizer_folder(model) / "tokenizer.json").stat().st_mtime_ns == written


def test_counts_tokens_of_the_real_model_as_llama_cpp_does(smollm2: LocalModel) -> None:
    tokenizer, llama = load_tokenizer(smollm2), LlamaCpp(smollm2.path)
    for text in TEXTS[:-1]:
        assert len(tokenizer.encode(text)) == llama.count_tokens(text), text


def test_loads_fast_and_without_torch(smollm2: LocalModel) -> None:
    load_tokenizer(smollm2)
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from timeit import repeat\n"
        "from tokenizers import Tokenizer\n"
        "from tunesmith.models.tokenizer import read_tokenizer\n"
        "folder = Path(sys.argv[1])\n"
        "file = str(folder / 'tokenizer.json')\n"
        "bare = min(repeat(lambda: Tokenizer.from_file(file), number=1, repeat=5))\n"
        "ours = min(repeat(lambda: read_tokenizer(folder), number=1, repeat=5))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "print(ours / bare)\n"
    )
    command = [sys.executable, "-c", program, str(tokenizer_folder(smollm2))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.5, "reading a tokenizer costs more than the library's own reading"


def _change_config(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
