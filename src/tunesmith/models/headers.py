"""What a weight file says about itself, read and checked before any library maps it.

A safetensors or GGUF file is a header, which names each tensor, its shape and where its bytes lie,
then the bytes. A header that lies makes a loader read past the end of the file, so both kinds are
walked here in plain Python, in milliseconds, and refused by name when they do not add up.
"""

import json
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.language import t

MAX_JSON_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_ITEMS = 1 << 20  # tensors or metadata keys in a GGUF; real files have a few thousand

SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("BOOL", "I8", "U8"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# GGML tensor type: (values in a block, bytes of a block).
GGML_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8)},
    **{30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210)},
    **{15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18)},
    **{21: (256, 110), 22: (256, 82), 23: (256, 136), 29: (256, 56), 34: (256, 54)},
    **{35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18)},
}
GGML_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}

# GGUF metadata scalars: type number → struct format.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: its dtype, shape (slowest first), and bytes `begin` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A GGUF's metadata and tensors. Arrays in the metadata are left out but for their length.

    The dtype of a tensor is "F32", "F16", "BF16" or the number of its quantised GGML type.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name for the architecture, such as "llama" or "qwen2"."""
        return str(self.metadata["general.architecture"])


class _LieError(Exception):
    """The header contradicts itself or the file's size."""


def safetensors_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, offsets counted from the start of the file.

    Raises:
        ModelError: The header is not one, or lies about the file.
    """
    try:
        return _read_safetensors(path)
    except (_LieError, ValueError, RecursionError) as error:
        raise ModelError(
            t(
                "{path} is not a sound safetensors file ({reason}); download it again.",
                path=path,
                reason=_reason(error),
            )
        ) from error


def gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file (version 2 or 3, little-endian), checked against its size.

    Raises:
        ModelError: The file is cut, junk, or of a kind llama.cpp would not read either.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read_gguf(data)
    except (_LieError, ValueError, struct.error, RecursionError) as error:
        raise ModelError(
            t(
                "{path} is not a sound GGUF file ({reason}); it may be cut short, "
                "so download it again.",
                path=path,
                reason=_reason(error),
            )
        ) from error


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _LieError) else t("its header cannot be read")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(MAX_JSON_HEADER, size - 8):
            raise _LieError(t("its header is longer than the file"))
        entries = json.loads(file.read(length), object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise _LieError(t("its header names no tensors"))
    entries.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _safetensors_entry(name, entry, start) for name, entry in entries.items()}
    _check_seamless(tensors, start, size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise _LieError(t("a name is used twice"))
    return entries


def _safetensors_entry(name: str, entry: Any, start: int) -> Tensor:
    try:
        bits, shape = SAFETENSORS_BITS[entry["dtype"]], entry["shape"]
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _LieError(t("tensor {name} is badly described", name=name)) from None
    numbers = (*shape, begin, end)
    sound = all(type(number) is int and number >= 0 for number in numbers)
    if not sound or (end - begin) * 8 != prod(shape) * bits:
        raise _LieError(t("tensor {name} is badly described", name=name))
    return Tensor(entry["dtype"], tuple(shape), start + begin, start + end)


def _check_seamless(tensors: dict[str, Tensor], start: int, size: int) -> None:
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            raise _LieError(t("tensor {name} overlaps another or leaves a hole", name=name))
        position = tensor.end
    if position != size:
        raise _LieError(t("its tensors do not fill the file"))


def _read_gguf(data: mmap.mmap) -> GgufHeader:
    if data[:4] != b"GGUF":
        raise _LieError(t("it does not start like one"))
    version, tensor_count, key_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3) or max(tensor_count, key_count) > MAX_ITEMS:
        raise _LieError(t("its version or counts are out of range"))
    metadata, position = _read_metadata(data, key_count)
    if not isinstance(metadata.get("general.architecture"), str):
        raise _LieError(t("it names no architecture"))
    tensors = _read_tensors(data, position, tensor_count, metadata.get("general.alignment", 32))
    return GgufHeader(metadata, tensors)


def _read_metadata(data: mmap.mmap, count: int) -> tuple[dict[str, Any], int]:
    metadata: dict[str, Any] = {}
    position = 24
    for _ in range(count):
        key, position = _string(data, position)
        (kind,) = struct.unpack_from("<I", data, position)
        metadata[key], position = _value(data, position + 4, kind)
    return metadata, position


def _value(data: mmap.mmap, position: int, kind: int) -> tuple[Any, int]:
    if kind == _STRING:
        return _string(data, position)
    if kind == _ARRAY:
        return _skip_array(data, position)
    if kind not in _SCALARS:
        raise _LieError(t("it holds a value of unknown type"))
    form = _SCALARS[kind]
    (value,) = struct.unpack_from(form, data, position)
    return value, position + struct.calcsize(form)


def _string(data: mmap.mmap, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, position)
    end = position + 8 + length
    if end > len(data):
        raise _LieError(t("it ends within its header"))
    return data[position + 8 : end].decode("utf-8", errors="replace"), end


def _skip_array(data: mmap.mmap, position: int) -> tuple[int, int]:
    kind, count = struct.unpack_from("<IQ", data, position)
    position += 12
    if kind in _SCALARS:
        position += count * struct.calcsize(_SCALARS[kind])
    elif kind == _STRING:
        position = _skip_strings(data, position, count)
    else:
        raise _LieError(t("it holds a value of unknown type"))
    if position > len(data):
        raise _LieError(t("it ends within its header"))
    return count, position


def _skip_strings(data: mmap.mmap, position: int, count: int) -> int:
    size, unpack = len(data), struct.Struct("<Q").unpack_from
    for _ in range(count):
        position += 8 + unpack(data, position)[0]
        if position > size:
            raise _LieError(t("it ends within its header"))
    return position


def _read_tensors(data: mmap.mmap, position: int, count: int, alignment: int) -> dict[str, Tensor]:
    if alignment not in {1 << power for power in range(3, 17)}:
        raise _LieError(t("its version or counts are out of range"))
    found: list[tuple[str, int, tuple[int, ...], int]] = []
    for _ in range(count):
        name, position = _string(data, position)
        (rank,) = struct.unpack_from("<I", data, position)
        if rank > 4:
            raise _LieError(t("tensor {name} is badly described", name=name))
        *dims, kind, offset = struct.unpack_from(f"<{rank}QIQ", data, position + 4)
        position += 4 + 8 * rank + 12
        found.append((name, kind, tuple(reversed(dims)), offset))
    start = -(-position // alignment) * alignment
    tensors = dict(_gguf_entry(item, start, alignment) for item in found)
    if len(tensors) != count:
        raise _LieError(t("a name is used twice"))
    _check_within(tensors.items(), len(data))
    return tensors


def _gguf_entry(
    item: tuple[str, int, tuple[int, ...], int], start: int, alignment: int
) -> tuple[str, Tensor]:
    name, kind, shape, offset = item
    values, size = GGML_BLOCKS.get(kind, (0, 0))
    if not values or offset % alignment or (shape and shape[-1] % values):
        raise _LieError(t("tensor {name} is badly described", name=name))
    begin = start + offset
    end = begin + prod(shape) // values * size
    return name, Tensor(GGML_FLOATS.get(kind, str(kind)), shape, begin, end)


def _check_within(tensors: Iterable[tuple[str, Tensor]], size: int) -> None:
    position = 0
    for name, tensor in sorted(tensors, key=lambda item: item[1].begin):
        if tensor.begin < position:
            raise _LieError(t("tensor {name} overlaps another or leaves a hole", name=name))
        if tensor.end > size:
            raise _LieError(t("tensor {name} lies beyond the end of the file", name=name))
        position = tensor.end
