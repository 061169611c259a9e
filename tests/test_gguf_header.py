"""GGUF headers: what is read is what was written, and damage is a one-line input error."""

import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.inputs.gguf_header.facts import STRUCT_CODES, TensorInfo
from placement.inputs.gguf_header.split import read_header
from placement.inputs.gguf_header.write import encode_header, is_header_only, write_header
from placement.inputs.quants import BLOCKS

METADATA = {"general.architecture": "llama", "llama.block_count": 2, "llama.rope.freq_base": 10000.0}
TYPES = {"general.architecture": "string", "llama.block_count": "uint32", "llama.rope.freq_base": "float32"}
TENSORS = [TensorInfo("token_embd.weight", (64, 7), "Q8_0"), TensorInfo("output_norm.weight", (3,), "F32")]

_INTEGERS = {
    "uint8": (0, 2**8),
    "int8": (-(2**7), 2**7),
    "uint16": (0, 2**16),
    "int16": (-(2**15), 2**15),
    "uint32": (0, 2**32),
    "int32": (-(2**31), 2**31),
    "uint64": (0, 2**64),
    "int64": (-(2**63), 2**63),
}


def scalars(name: str) -> st.SearchStrategy[Any]:
    """Values of a GGUF value type."""
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        return st.integers(low, high - 1)
    if name in ("float32", "float64"):
        return st.floats(width=32 if name == "float32" else 64, allow_nan=False)
    return st.booleans() if name == "bool" else st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


TYPE_NAMES = sorted(name for name in STRUCT_CODES if name != "array")
TYPED_VALUES = st.sampled_from(TYPE_NAMES).flatmap(
    lambda name: st.one_of(
        st.tuples(st.just(name), scalars(name)),
        st.tuples(st.just(f"[{name}]"), st.lists(scalars(name), max_size=5).map(tuple)),
    )
)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).map(lambda s: f"x.{s}")
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)


@st.composite
def tensor_infos(draw: st.DrawFn) -> TensorInfo:
    """One tensor of any type with a few blocks to a row."""
    type_ = draw(st.sampled_from(sorted(BLOCKS)))
    row = BLOCKS[type_][0] * draw(st.integers(0, 3))
    return TensorInfo(draw(NAMES), (row, *draw(st.lists(st.integers(0, 4), max_size=3))), type_)


def put(
    path: Path, metadata: dict[str, Any] = METADATA, tensors: list[TensorInfo] = TENSORS, **types: str
) -> Path:
    """Write a small header-only file; `types` overrides those of the metadata."""
    guessed = {k: TYPES.get(k, "string" if isinstance(v, str) else "uint32") for k, v in metadata.items()}
    write_header(path, metadata, {**guessed, **types}, tensors, overwrite=True)
    return path


def raw_file(path: Path, *pairs: bytes, infos: bytes = b"", n_infos: int = 0, version: int = 3) -> Path:
    """Write a file from raw metadata entries and tensor infos, for what the writer refuses to write."""
    head = b"GGUF" + struct.pack("<IQQ", version, n_infos, len(pairs))
    path.write_bytes(head + b"".join(pairs) + infos + bytes(4096))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def info(name: str, shape: tuple[int, ...] = (32,), type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset)


# Reading and writing


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(KEYS, TYPED_VALUES, max_size=6),
    st.lists(tensor_infos(), max_size=5, unique_by=lambda t: t[0]),
)
def test_write_then_read_is_the_same(
    tmp_path: Path, typed: dict[str, Any], tensors: list[TensorInfo]
) -> None:
    """Values, their types, and tensors in their order come back as they were written."""
    metadata, types = {k: v for k, (_, v) in typed.items()}, {k: t for k, (t, _) in typed.items()}
    write_header(tmp_path / "x.gguf", metadata, types, tensors, overwrite=True)
    header = read_header(tmp_path / "x.gguf")
    got = (header.metadata, header.metadata_types, [t._replace(offset=0) for t in header.tensors])
    assert (metadata, types, tensors) == got


def write_with_gguf_py(path: Path, n_tokens: int = 100, **options: Any) -> Path:
    """A small model with a vocabulary, written by gguf-py."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("llama.sections", [11, 11, 10, 0])
    writer.add_array("general.tags", ["a", "b"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token {i}" for i in range(n_tokens)])
    writer.add_token_scores([0.5] * n_tokens)
    writer.add_token_merges([f"{i} {i}" for i in range(n_tokens)])
    writer.add_tensor("token_embd.weight", np.zeros((n_tokens, 64), np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((96, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_py_file_is_read(tmp_path: Path) -> None:
    """A file that gguf-py wrote has the metadata that was put in, with its types."""
    header = read_header(write_with_gguf_py(tmp_path / "x.gguf"))
    expected = {
        "general.architecture": ("llama", "string"),
        "llama.context_length": (4096, "uint32"),
        "llama.attention.layer_norm_rms_epsilon": (struct.unpack("f", struct.pack("f", 1e-5))[0], "float32"),
        "llama.sections": ((11, 11, 10, 0), "[int32]"),
        "general.tags": (("a", "b"), "[string]"),
        "tokenizer.ggml.model": ("gpt2", "string"),
    }
    assert expected == {k: (v, header.metadata_types[k]) for k, v in header.metadata.items()}


def test_gguf_py_tensors_are_read(tmp_path: Path) -> None:
    """Tensors of a file by gguf-py have their ggml shapes and lie where gguf-py's reader finds them."""
    path = write_with_gguf_py(tmp_path / "x.gguf")
    header = read_header(path)
    expected = [
        (t.name, tuple(int(n) for n in t.shape), t.data_offset) for t in gguf.GGUFReader(path).tensors
    ]
    assert expected == [(t.name, t.shape, header.data_start + t.offset) for t in header.tensors]


def test_gguf_py_reads_what_is_written(tmp_path: Path) -> None:
    """gguf-py finds the same tensors in a header-only file, and as many bytes as it needs."""
    path = put(tmp_path / "x.gguf")
    got = [
        (t.name, tuple(int(n) for n in t.shape), t.tensor_type.name) for t in gguf.GGUFReader(path).tensors
    ]
    assert [(t.name, t.shape, t.type) for t in TENSORS] == got


def test_vocabulary_is_counted_not_kept(tmp_path: Path) -> None:
    """Vocabulary arrays are stepped over; their lengths stay known."""
    header = read_header(write_with_gguf_py(tmp_path / "x.gguf", n_tokens=70))
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.merges")
    assert (dict.fromkeys(keys, 70), 70) == (header.skipped, header.n_vocab)


def test_vocabulary_makes_no_objects(tmp_path: Path) -> None:
    """Reading the header takes less memory than the list of its 20,000 tokens alone would."""
    path = write_with_gguf_py(tmp_path / "x.gguf", n_tokens=20_000)
    tracemalloc.start()
    read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * 8


def test_version_2_is_read(tmp_path: Path) -> None:
    """Version 2 has the same layout as 3."""
    path = put(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 3), struct.pack("<I", 2), 1))
    assert (read_header(path).parts[0].version, read_header(path).metadata) == (2, METADATA)


def test_alignment_is_obeyed(tmp_path: Path) -> None:
    """`general.alignment` moves the data section and every tensor in it."""
    path = put(tmp_path / "x.gguf", {**METADATA, "general.alignment": 256})
    header = read_header(path)
    assert (
        header.alignment,
        header.data_start % 256,
        [t.offset for t in header.tensors],
    ) == (256, 0, [0, 512])


def test_weights_are_not_read(tmp_path: Path) -> None:
    """A header before a hole of 8 TiB is read like any other."""
    path = tmp_path / "x.gguf"
    try:
        n_bytes = write_header(path, METADATA, TYPES, [TensorInfo("big", (2**30, 2**11), "F32")])
    except InputError:
        pytest.skip("this file system has no files of 8 TiB")
    assert n_bytes == read_header(path).n_bytes


# Damage


def test_every_truncation_of_the_header_is_refused(tmp_path: Path) -> None:
    """A file that ends anywhere inside its header or data is an input error."""
    whole = put(tmp_path / "x.gguf").read_bytes()
    survivors = []
    for n_bytes in range(len(whole) - 20):  # the last tensor's padding may be missing: 20 of 32 bytes
        (tmp_path / "cut.gguf").write_bytes(whole[:n_bytes])
        try:
            read_header(tmp_path / "cut.gguf")
            survivors.append(n_bytes)
        except InputError:
            pass
    assert survivors == []


def test_truncated_data_says_how_much_is_missing(tmp_path: Path) -> None:
    """Missing tensor data are counted to the byte, the last tensor's padding not among them."""
    path = put(tmp_path / "x.gguf")
    os.truncate(path, path.stat().st_size - 20 - 5)
    with pytest.raises(InputError, match="truncated: 5 bytes"):
        read_header(path)


def nested(key: str) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, 9, 1)


BAD_FILES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "not GGUF": ("begins with", lambda p: p.write_bytes(b"#!/bin/sh" + bytes(100)) and p),
    "empty": ("has only 0 bytes", lambda p: p.write_bytes(b"") or p),
    "version 1": ("must be 2 or 3", lambda p: raw_file(p, version=1)),
    "version 4": ("must be 2 or 3", lambda p: raw_file(p, version=4)),
    "big-endian": ("little-endian", lambda p: raw_file(p, version=3 << 24)),
    "too many tensors": ("tensor count = 9223372036854775807", lambda p: raw_file(p, n_infos=2**63 - 1)),
    "empty key": ("not empty", lambda p: raw_file(p, text("") + struct.pack("<II", 4, 0))),
    "same key twice": ("unique", lambda p: raw_file(p, *[text("a") + struct.pack("<II", 4, 0)] * 2)),
    "unknown value type": ("value types", lambda p: raw_file(p, text("a") + struct.pack("<II", 13, 0))),
    "array of arrays": ("array of arrays", lambda p: raw_file(p, nested("a"))),
    "long array": (
        "a = 4611686018427387904",
        lambda p: raw_file(p, text("a") + struct.pack("<IIQ", 9, 4, 2**62)),
    ),
    "long string": (
        "a = 18446744073709551615",
        lambda p: raw_file(p, text("a") + struct.pack("<IQ", 8, 2**64 - 1)),
    ),
    "vocabulary past the end": (
        "ends inside its header",
        lambda p: raw_file(p, text("tokenizer.x") + struct.pack("<IIQQ", 9, 8, 2, 2**63)),
    ),
    "NaN": ("NaN", lambda p: raw_file(p, text("a") + struct.pack("<If", 6, float("nan")))),
    "key not UTF-8": ("UTF-8", lambda p: raw_file(p, struct.pack("<QB", 1, 255) + struct.pack("<II", 4, 0))),
    "alignment 3": (
        "power of two",
        lambda p: raw_file(p, text("general.alignment") + struct.pack("<II", 4, 3)),
    ),
    "alignment as text": (
        "uint32",
        lambda p: raw_file(p, text("general.alignment") + struct.pack("<IQ", 8, 0)),
    ),
    "same tensor twice": (
        "unique",
        lambda p: raw_file(p, infos=info("t") + info("t", offset=128), n_infos=2),
    ),
    "unknown ggml type": ("t = 4", lambda p: raw_file(p, infos=info("t", type_id=4), n_infos=1)),
    "type number 99": ("t = 99", lambda p: raw_file(p, infos=info("t", type_id=99), n_infos=1)),
    "gap before a tensor": (
        "offset 128",
        lambda p: raw_file(p, infos=info("t") + info("u", offset=160), n_infos=2),
    ),
    "partial block": ("blocks of 256", lambda p: raw_file(p, infos=info("t", (32,), 12), n_infos=1)),
    "five dimensions": ("1 to 4 dimensions", lambda p: raw_file(p, infos=info("t", (1,) * 5), n_infos=1)),
    "overflowing shape": ("2**63", lambda p: raw_file(p, infos=info("t", (2**32, 2**32)), n_infos=1)),
    "long name": ("63 bytes", lambda p: raw_file(p, infos=info("t" * 64), n_infos=1)),
    "split.count as text": (
        "whole number",
        lambda p: raw_file(p, text("split.count") + struct.pack("<IQ", 8, 0)),
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    """Each kind of damage gives one line with the file and the rule that it breaks."""
    rule, make = BAD_FILES[case]
    path = make(tmp_path / "x.gguf")
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert (
        str(path) in str(caught.value),
        rule in str(caught.value),
        len(str(caught.value).splitlines()),
    ) == (True, True, 1)


def test_missing_file_is_an_input_error(tmp_path: Path) -> None:
    """A file that cannot be opened says why."""
    with pytest.raises(InputError, match="No such file"):
        read_header(tmp_path / "none.gguf")


SEED = encode_header(
    "seed",
    {**METADATA, "x.list": (1, 2, 3), "x.texts": ("a", "b"), "split.count": 1, "general.alignment": 32},
    {
        **TYPES,
        "x.list": "[int64]",
        "x.texts": "[string]",
        "split.count": "uint16",
        "general.alignment": "uint32",
    },
    TENSORS,
)[0] + bytes(544)
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(SEED) - 1),
        st.sampled_from(["set", "insert", "cut"]),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=500, deadline=1000)
@given(EDITS)
def test_mutated_headers_only_raise_input_errors(tmp_path: Path, edits: list[tuple[int, str, bytes]]) -> None:
    """Whatever bytes a header is made of, it is read within a second or refused in one line."""
    raw = SEED
    for position, kind, data in edits:
        raw = (
            raw[:position]
            + (b"" if kind == "cut" else data)
            + raw[position + (0 if kind == "insert" else len(data)) :]
        )
    (tmp_path / "x.gguf").write_bytes(raw)
    try:
        read_header(tmp_path / "x.gguf")
    except InputError as exc:
        assert len(str(exc).splitlines()) == 1


# Split sets


def put_split(folder: Path, changes: dict[tuple[int, str], int] | None = None, count: int = 3) -> list[Path]:
    """A set of three parts with one tensor each; `changes` overrides split keys by (part, key)."""
    files = []
    for i in range(count):
        split = {"split.no": i, "split.count": count, "split.tensors.count": count}
        split |= {key: value for (part, key), value in (changes or {}).items() if part == i}
        metadata = {**(METADATA if i == 0 else {}), **split}
        name = f"m-{i + 1:05d}-of-{count:05d}.gguf"
        types = {"split.no": "uint16", "split.count": "uint16", "split.tensors.count": "int32"}
        files.append(
            put(folder / name, metadata, [TensorInfo(f"blk.{i}.t", (32 * (i + 1),), "F32")], **types)
        )
    return files


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_gives_the_whole_set(tmp_path: Path, named: int) -> None:
    """Whichever part is named, all tensors come in order, and all files."""
    files = put_split(tmp_path)
    header = read_header(files[named])
    tensors = [(t.name, t.part, t.offset) for t in header.tensors]
    assert ([("blk.0.t", 0, 0), ("blk.1.t", 1, 0), ("blk.2.t", 2, 0)], tuple(files)) == (
        tensors,
        header.files,
    )


def test_gguf_py_split_is_merged(tmp_path: Path) -> None:
    """A set that gguf-py split has the tensors of the unsplit file."""
    whole = read_header(write_with_gguf_py(tmp_path / "w.gguf"))
    write_with_gguf_py(tmp_path / "s.gguf", split_max_tensors=1)
    header = read_header(tmp_path / "s-00002-of-00003.gguf")
    assert [t[:3] for t in whole.tensors] == [t[:3] for t in header.tensors]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    """A set with parts missing is one error that names them."""
    files = put_split(tmp_path)
    files[0].unlink()
    files[2].unlink()
    with pytest.raises(InputError, match=r"missing: m-00001-of-00003.gguf, m-00003-of-00003.gguf"):
        read_header(files[1])


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({(0, "split.count"): 2}, "must have a name that ends"),
        ({(1, "split.count"): 4}, r"\(1, 4\)"),
        ({(2, "split.no"): 1}, r"\(1, 3\)"),
        ({(0, "split.tensors.count"): 5}, "split.tensors.count = 5"),
    ],
)
def test_inconsistent_sets_are_refused(
    tmp_path: Path, changes: dict[tuple[int, str], int], rule: str
) -> None:
    """Numbers that disagree between the names, the parts and the tensors are an error."""
    with pytest.raises(InputError, match=rule):
        read_header(put_split(tmp_path, changes)[0])


def test_tensor_in_two_parts_is_refused(tmp_path: Path) -> None:
    """No tensor may be in two parts of a set."""
    files = put_split(tmp_path)
    types = {"split.no": "uint16", "split.count": "uint16"}
    put(files[1], {"split.no": 1, "split.count": 3}, [TensorInfo("blk.0.t", (32,), "F32")], **types)
    with pytest.raises(InputError, match="also in another part"):
        read_header(files[0])


def test_name_of_a_part_without_a_set_is_refused(tmp_path: Path) -> None:
    """A file that its name says to be a part, but whose header does not, is an error."""
    with pytest.raises(InputError, match=r"split\.count"):
        read_header(put(tmp_path / "m-00001-of-00002.gguf"))


# Writing safely


def test_header_only_files_take_no_room(tmp_path: Path) -> None:
    """The weights are a hole: a file of 1 GiB takes kilobytes, and is known as header-only."""
    path = tmp_path / "x.gguf"
    write_header(path, METADATA, TYPES, [TensorInfo("t", (2**28,), "F32")])
    assert (path.stat().st_blocks * 512 < 2**20, is_header_only(path)) == (True, True)


def test_a_real_model_is_not_overwritten(tmp_path: Path) -> None:
    """A file with weights in it stays as it was."""
    path = write_with_gguf_py(tmp_path / "x.gguf")
    before = path.read_bytes()
    with pytest.raises(InputError, match="not replaced"):
        write_header(path, METADATA, TYPES, TENSORS)
    assert before == path.read_bytes()


def test_overwrite_replaces_a_real_model(tmp_path: Path) -> None:
    """When told to, any file is replaced."""
    path = write_with_gguf_py(tmp_path / "x.gguf")
    write_header(path, METADATA, TYPES, TENSORS, overwrite=True)
    assert read_header(path).metadata == METADATA


def test_header_only_files_are_replaced(tmp_path: Path) -> None:
    """A header-only file may be written again without being told."""
    path = tmp_path / "x.gguf"
    for n_rows in (2**20, 2**21):
        write_header(path, METADATA, TYPES, [TensorInfo("t", (32, n_rows), "F32")])
    assert read_header(path).tensors[0].shape == (32, 2**21)


@pytest.mark.parametrize(
    ("value", "type_"), [(-1, "uint32"), ("a", "int8"), (1e39, "float32"), (1, "word"), (1, None)]
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, value: Any, type_: str | None) -> None:
    """A value outside its type is an error that names its key, and no file is left behind."""
    with pytest.raises(InputError, match=r"x\.y"):
        write_header(tmp_path / "x.gguf", {"x.y": value}, {"x.y": type_} if type_ else {}, [])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """Where the folder does not exist, nothing is written and the error says so."""
    with pytest.raises(InputError, match="cannot be written"):
        write_header(tmp_path / "none" / "x.gguf", METADATA, TYPES, TENSORS)
