"""Model files: descriptions that lose nothing, names that resolve safely, files that llama.cpp plans."""

import dataclasses
import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placement.errors import InputError
from placement.inputs.gguf_header.facts import TensorInfo
from placement.inputs.gguf_header.split import read_header
from placement.inputs.gguf_header.write import write_header
from placement.inputs.model import Model, Profile, Tensor
from placement.inputs.model_files.description import format_model, parse_model
from placement.inputs.model_files.files import (
    export_header,
    model_from_facts,
    model_names,
    read_model,
    resolve_model,
    save_model,
)
from placement.inputs.model_files.rows import format_ranges, from_rows, parse_ranges, to_rows
from placement.inputs.quants import BLOCKS

MODELS = Path(__file__).parent.parent / "models"
LLAMA_FIT_PARAMS = Path(os.environ.get("PLACE_ENGINE", "off")) / "llama-fit-params"

GLM_ARGS = ("--jinja", "--temp", "1.0", "--top-p", "0.95", "--min-p", "0.01")
QWEN_ARGS = (
    "--jinja",
    "--no-context-shift",
    "--temp",
    "1.0",
    "--top-p",
    "0.95",
    "--top-k",
    "40",
    "--min-p",
    "0.01",
)
# name: (digest of the recorded facts, digest of their metadata types, context, arguments)
SHIPPED: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "gemma-3-27b-q4": ("51c1832804cb5bd7", "dd31b2fa577e2a44", 131072, ()),
    "glm-flash": ("cc6a14f4b4555dfc", "b202362cd2a6905c", 131072, GLM_ARGS),
    "glm-flash-exp": ("cc6a14f4b4555dfc", "b202362cd2a6905c", 131072, GLM_ARGS),
    "glm-flash-q4": ("d28a1c3da22bbcdc", "b202362cd2a6905c", 131072, GLM_ARGS),
    "gpt-oss-120b": (
        "6711dcffab0c7227",
        "6ccce0feee1e7c9a",
        131072,
        ("--jinja", "--temp", "1.0", "--top-p", "1.0"),
    ),
    "llama-3.3-70b-q4": ("64346abe2cee510f", "60ed0d65782dd941", 131072, ()),
    "qwen3-30b-a3b-q4": ("04b97c27dbb1f136", "832b64953f046ecc", 131072, ()),
    "qwen3-coder-q5": ("0cb863f6472b4c10", "7350a5e8fb1c7d64", 262144, QWEN_ARGS),
}


def types_digest(model: Model) -> str:
    """16 hex digits of the metadata types."""
    return hashlib.sha256(json.dumps(sorted(model.metadata_types.items())).encode()).hexdigest()[:16]


def facts(model: Model) -> tuple[Any, ...]:
    """All that must survive a round trip."""
    return model.metadata, model.metadata_types, model.tensors, model.digest


# The shipped descriptions


def test_the_shipped_models_are_these() -> None:
    """Eight descriptions are shipped."""
    assert sorted(path.stem for path in MODELS.glob("*.toml")) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_facts_are_the_recorded_ones(name: str) -> None:
    """Each description has exactly the metadata, types and tensors recorded from the real model."""
    model = read_model(MODELS / f"{name}.toml")
    assert (model.digest, types_digest(model)) == SHIPPED[name][:2]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles(name: str) -> None:
    """Each profile has its owner's context and arguments, a q8_0 cache and one slot."""
    ctx_tokens, extra_args = SHIPPED[name][2:]
    assert read_model(MODELS / f"{name}.toml").profile == Profile(ctx_tokens, "q8_0", 1, extra_args)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_descriptions_are_canonical(name: str) -> None:
    """Writing a shipped description again gives the same text."""
    path = MODELS / f"{name}.toml"
    assert format_model(read_model(path)) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_survive_gguf(tmp_path: Path, name: str) -> None:
    """Description, header-only GGUF, description: the same facts, and the file as long as the real one."""
    model = read_model(MODELS / f"{name}.toml")
    n_bytes = export_header(model, tmp_path / "x.gguf")
    again = read_model(tmp_path / "x.gguf")
    assert (facts(again), again.n_bytes <= n_bytes < again.n_bytes + 2**17) == (facts(model), True)


@pytest.mark.engine
@pytest.mark.skipif(not LLAMA_FIT_PARAMS.is_file(), reason="PLACE_ENGINE names no llama.cpp folder")
@pytest.mark.parametrize("name", SHIPPED)
def test_llama_cpp_plans_shipped_models(tmp_path: Path, name: str) -> None:
    """llama-fit-params loads a header-only file of each shipped model and plans it."""
    export_header(read_model(MODELS / f"{name}.toml"), tmp_path / "x.gguf")
    command = [str(LLAMA_FIT_PARAMS), "-m", str(tmp_path / "x.gguf")]
    command += ["-fitp", "on", "-c", "4096", "-ngl", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.startswith("Host ")) == (0, True)


GOOD = """\
layer_order = "1,0"
[profile]
ctx_tokens = 4096
[metadata]
"general.architecture" = "llama"
"llama.block_count" = 2
[metadata_types]
"llama.block_count" = "uint32"
[[tensors]]
name = "blk.{i}.up"
layers = "0-1"
shape = [256, 2]
type = "Q4_K"
"""


# Round trips

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SIMPLE = st.text("abcxyz._-", min_size=1, max_size=8)
VALUES: list[tuple[str, st.SearchStrategy[Any]]] = [
    ("uint32", st.integers(0, 2**32 - 1)),
    ("int32", st.integers(-(2**31), 2**31 - 1)),
    ("uint64", st.integers(0, 2**64 - 1)),
    ("float32", st.floats(width=32, allow_nan=False)),
    ("float64", st.floats(allow_nan=False)),
    ("bool", st.booleans()),
    ("string", TEXT),
]
TYPED = st.one_of(
    [st.tuples(st.just(name), values) for name, values in VALUES]
    + [st.tuples(st.just(f"[{name}]"), st.lists(values, max_size=4).map(tuple)) for name, values in VALUES]
)
TENSORS = st.lists(
    st.builds(
        lambda layer, name, type_, n_rows: Tensor(
            name if layer is None else f"blk.{layer}.{name}", (BLOCKS[type_][0], n_rows), type_
        ),
        st.none() | st.integers(0, 5) | st.just(65535) | st.just(65536) | st.just("07"),
        SIMPLE | st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["F32", "Q4_K"]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=25,
    unique_by=lambda tensor: tensor.name,
)


@given(TENSORS)
def test_rows_keep_any_tensor_list(tensors: list[Tensor]) -> None:
    """Whatever the order of tensors and layers, the rows give back the same list."""
    rows, order = to_rows(tensors)
    assert list(from_rows("rows", rows, order)) == tensors


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.dictionaries(TEXT.map(lambda s: f"llama.{s}"), TYPED, max_size=5), TENSORS, TEXT)
def test_toml_and_gguf_keep_any_model(
    tmp_path: Path, typed: dict[str, Any], tensors: list[Tensor], description: str
) -> None:
    """Model, description, header-only GGUF, model: the same metadata, types, tensors and digest."""
    head = {"general.architecture": "llama", "tokenizer.ggml.model": "none"}
    metadata = {**head, **{key: value for key, (_, value) in typed.items()}}
    types = {**dict.fromkeys(head, "string"), **{key: type_ for key, (type_, _) in typed.items()}}
    model = Model(
        "m", metadata, types, tuple(tensors), Profile(4096, "q4_0", 2, ("--x", 'a "b"\n')), description
    )
    parsed = parse_model("m", format_model(model), "m")
    export_header(parsed, tmp_path / "m.gguf", overwrite=True)
    assert (parsed, facts(read_model(tmp_path / "m.gguf"))) == (model, facts(model))


def test_equal_layers_take_one_row() -> None:
    """Sixty equal layers and an embedding are as many rows as one layer has tensors, and one."""
    tensors = [Tensor("token_embd.weight", (32,), "F32")]
    tensors += [Tensor(f"blk.{i}.{name}", (32,), "F32") for i in range(60) for name in ("norm", "up", "down")]
    assert len(to_rows(tensors)[0]) == 4


def test_layers_sorted_as_text_take_one_row() -> None:
    """Files whose layers come as 0, 1, 10, 11, 2 keep their order by one line, not by more rows."""
    tensors = [Tensor(f"blk.{i}.{name}", (32,), "F32") for i in sorted(range(12), key=str) for name in "ab"]
    rows, order = to_rows(tensors)
    assert (len(rows), order) == (2, [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9])


def test_rows_by_hand() -> None:
    """Two kinds of layers share the rows that they share, in the order of the file."""
    names = ["blk.0.norm", "blk.0.ssm", "blk.0.up", "blk.1.norm", "blk.1.attn", "blk.1.up"]
    rows, _ = to_rows([Tensor(name, (4,), "F32") for name in names])
    expected = [("blk.{i}.norm", "0-1"), ("blk.{i}.attn", "1"), ("blk.{i}.ssm", "0"), ("blk.{i}.up", "0-1")]
    assert [(row["name"], row["layers"]) for row in rows] == expected


@given(st.lists(st.integers(0, 99), unique=True, min_size=1))
def test_ranges_keep_any_order(numbers: list[int]) -> None:
    """Ranges give back the numbers in their order."""
    assert parse_ranges("x", "layers", format_ranges(numbers)) == numbers


def test_ranges_by_hand() -> None:
    """Runs become ranges."""
    assert format_ranges([0, 1, 2, 3, 5, 7, 8, 9]) == "0-3,5,7-9"


@pytest.mark.parametrize(
    "text", ["", "1,", "3-1", "a", "-1", "1-2-3", "0-99999", "1,1", "65536", " 1", "²", None, 3]
)
def test_bad_ranges_are_refused(text: Any) -> None:
    """What is no list of layers is an error that shows it."""
    with pytest.raises(InputError, match=r"layers.*each once"):
        parse_ranges("x", "layers", text)


@pytest.mark.parametrize("text", ["1e-06", "5000000.0", "0.1", "0.33333334", "inf", "-0.0"])
def test_float32_is_written_short(text: str) -> None:
    """A float32 is written with the fewest digits that give it back."""
    model = parse_model("x", GOOD.replace("= 2\n", f'= 2\n"llama.x" = {text}\n'), "m")
    assert f'"llama.x" = {text}\n' in format_model(model)


# What a description may not say


def test_the_good_description_is_good() -> None:
    """The description that the next test breaks is read, its layers in the order that it says."""
    assert [tensor.name for tensor in parse_model("x", GOOD, "m").tensors] == ["blk.1.up", "blk.0.up"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[profile]", "[profile", "must be TOML"),
        ("layer_order =", "layers =", "layers: is not one of"),
        ("layer_order =", "x.y =", "x: is not one of"),
        ('"1,0"', '"1,x"', "layer_order = '1,x'"),
        ("ctx_tokens", "ctx", "profile.ctx: is not one of"),
        ("4096", "0", "profile.ctx_tokens = 0"),
        ("4096", "true", "profile.ctx_tokens = True"),
        ("4096", "9" * 5000, "must be TOML"),
        ("ctx_tokens = 4096", 'kv_type = "q6_K"', "profile.kv_type = 'q6_K'"),
        ("ctx_tokens = 4096", 'extra_args = "--jinja"', "profile.extra_args = '--jinja'"),
        ("ctx_tokens = 4096", "n_slots = 1.5", "profile.n_slots = 1.5"),
        ("[profile]\nctx_tokens", "profile", "profile: must be a table"),
        ('"general.architecture" = "llama"', "", "general.architecture"),
        ("= 2\n", "= -2\n", '"llama.block_count" = -2: must be a uint32'),
        ("= 2\n", "= nan\n", "must be a uint32"),
        ("= 2\n", "= 4294967296\n", "must be a uint32"),
        ("= 2\n", "= [2]\n", "must be a uint32"),
        ('= "uint32"', '= "uint128"', "must have a GGUF value type"),
        ('= "uint32"', '= "array"', "must be a array"),
        ('count" = "uint', 'counts" = "uint', "must belong to a key"),
        ("= 2\n", "= []\n", "must be a uint32"),
        ("= 2\n", '= 2\n"llama.x" = []\n', "must have a GGUF value type"),
        ("= 2\n", '= 2\n"llama.x" = 1979-05-27\n', "must have a GGUF value type"),
        ('"Q4_K"', '"q4_k"', "tensors[0].type = 'q4_k'"),
        ("[256, 2]", "[128, 2]", "tensors[0].shape = [128, 2]"),
        ("[256, 2]", "[]", "tensors[0].shape"),
        ("[256, 2]", "[256, -2]", "tensors[0].shape"),
        ("[256, 2]", "[256.0]", "tensors[0].shape"),
        ('layers = "0-1"\n', "", "tensors[0].name"),
        ('"blk.{i}.up"', '"output"', "tensors[0].name"),
        ('"blk.{i}.up"', f'"blk.{{i}}.{"x" * 60}"', "1 to 63 bytes"),
        ("shape = [256, 2]\n", "", "tensors[0]: must be a table of"),
        ("shape =", "shapes =", "tensors[0]: must be a table of"),
        ("shape =", "starts_section = 1\nshape =", "starts_section = 1"),
        (
            'type = "Q4_K"',
            'type = "Q4_K"\n[[tensors]]\nname = "blk.{i}.up"\nlayers = "1"\nshape = [1]\ntype = "F32"',
            "one row only",
        ),
    ],
)
def test_a_bad_description_is_named(old: str, new: str, message: str) -> None:
    """Each rule that is broken gives one line with the file, the field and the rule."""
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        parse_model("m.toml", GOOD.replace(old, new, 1), "m")
    said = str(caught.value)
    assert (said.startswith("m.toml: "), message in said, len(said.splitlines())) == (True, True, 1)


@given(st.text(max_size=40), st.integers(0, len(GOOD)), st.integers(0, 40))
def test_mutated_descriptions_only_raise_input_errors(inserted: str, position: int, n_cut: int) -> None:
    """Whatever text a description is, it is read or refused."""
    try:
        parse_model("m.toml", GOOD[:position] + inserted + GOOD[position + n_cut :], "m")
    except InputError as exc:
        assert str(exc).startswith("m.toml: ")


# Names and paths


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An empty working folder's and an empty user configuration's folder for models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    here, user = tmp_path / "models", tmp_path / "config" / "place" / "models"
    here.mkdir()
    user.mkdir(parents=True)
    return here, user


def test_shipped_names_resolve_anywhere(folders: tuple[Path, Path]) -> None:
    """A shipped name is known in any working folder."""
    assert resolve_model("qwen3-coder-q5").digest == SHIPPED["qwen3-coder-q5"][0]


def test_nearest_folder_wins(folders: tuple[Path, Path]) -> None:
    """`./models` comes before the user's folder, and both before what is shipped."""
    got = []
    for folder in reversed(folders):
        (folder / "gpt-oss-120b.toml").write_text(f'description = "{folder.parent.name}"\n' + GOOD)
        got.append(resolve_model("gpt-oss-120b").description)
    assert got == ["place", folders[0].parent.name]


def test_names_are_listed_with_their_files(folders: tuple[Path, Path]) -> None:
    """The list has the shipped names and the user's own, in alphabetical order."""
    (folders[1] / "mine.toml").write_text(GOOD)
    assert list(model_names()) == sorted([*SHIPPED, "mine"])


def test_paths_resolve(tmp_path: Path) -> None:
    """A path to a description is read as it is, under its file's name."""
    (tmp_path / "other.toml").write_text(GOOD)
    assert resolve_model(str(tmp_path / "other.toml")).name == "other"


def test_near_names_are_suggested(folders: tuple[Path, Path]) -> None:
    """A misspelt name is answered with the nearest."""
    with pytest.raises(InputError, match=r"'qwen3-code-q5'.*did you mean qwen3-coder-q5"):
        resolve_model("qwen3-code-q5")


@pytest.mark.parametrize(
    "text", ["", ".", "..", "../models/gpt-oss-120b", "a/b", "x.gguf", "a\0b", "x" * 9999, "a\nb", "/"]
)
def test_what_is_no_name_never_becomes_a_path(folders: tuple[Path, Path], text: str) -> None:
    """Separators, dots and odd characters are refused, not looked for."""
    with pytest.raises(InputError) as caught:
        resolve_model(text)
    assert len(str(caught.value).splitlines()) == 1


def test_other_files_are_refused(tmp_path: Path) -> None:
    """An existing file that is neither a description nor a GGUF is an error."""
    (tmp_path / "x.txt").write_text("text " * 10)
    with pytest.raises(InputError, match="must be a GGUF file"):
        resolve_model(tmp_path / "x.txt")


def test_description_must_be_utf8(tmp_path: Path) -> None:
    """A description in another encoding is an error that says where."""
    (tmp_path / "x.toml").write_bytes(b'description = "\xff"')
    with pytest.raises(InputError, match=r"UTF-8.*byte 15"):
        read_model(tmp_path / "x.toml")


# Headers to models, and files


def put_gguf(path: Path, **metadata: tuple[str, Any]) -> Path:
    """A header-only file of one tensor with these metadata, `__` standing for the dot."""
    pairs = {key.replace("__", "."): value for key, value in metadata.items()}
    types, values = {k: t for k, (t, _) in pairs.items()}, {k: v for k, (_, v) in pairs.items()}
    write_header(path, values, types, [TensorInfo("token_embd.weight", (32, 3), "F16")], overwrite=True)
    return path


def test_vocabulary_becomes_its_size(tmp_path: Path) -> None:
    """A real vocabulary is dropped for the number of its tokens, whatever `vocab_size` says."""
    path = put_gguf(
        tmp_path / "x.gguf",
        general__architecture=("string", "bert"),
        bert__vocab_size=("uint64", 99),
        tokenizer__ggml__model=("string", "gpt2"),
        tokenizer__ggml__tokens=("[string]", ("a", "b", "c")),
        tokenizer__ggml__token_type_count=("uint32", 2),
        tokenizer__chat_template=("string", "{{ x }}"),
        split__count=("uint16", 0),
    )
    expected = {
        "general.architecture": "bert",
        "bert.vocab_size": 3,
        "tokenizer.ggml.model": "none",
        "tokenizer.ggml.token_type_count": 2,
    }
    model = read_model(path)
    assert (model.metadata, model.metadata_types["bert.vocab_size"]) == (expected, "uint32")


def test_imported_model_knows_its_files(tmp_path: Path) -> None:
    """A model of a GGUF file keeps the path, and its name without the suffix."""
    path = put_gguf(tmp_path / "x-Q8_0.gguf", general__architecture=("string", "llama"))
    model = read_model(path)
    assert (model.name, model.files) == ("x-Q8_0", (str(path),))


def test_description_of_a_file_has_its_digest(tmp_path: Path) -> None:
    """A GGUF file and the description imported from it have the same digest."""
    metadata = {
        "general__architecture": ("string", "llama"),
        "tokenizer__ggml__tokens": ("[string]", ("a",) * 3),
    }
    model = read_model(put_gguf(tmp_path / "x.gguf", **metadata))
    save_model(model, tmp_path / "x.toml")
    assert read_model(tmp_path / "x.toml").digest == model.digest


def test_a_file_without_architecture_is_refused(tmp_path: Path) -> None:
    """A GGUF that names no architecture is no model."""
    with pytest.raises(InputError, match=r"general\.architecture"):
        read_model(put_gguf(tmp_path / "x.gguf", general__name=("string", "x")))


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    """A vocabulary-only GGUF is no model."""
    write_header(
        tmp_path / "x.gguf", {"general.architecture": "llama"}, {"general.architecture": "string"}, []
    )
    with pytest.raises(InputError, match="no tensors"):
        read_model(tmp_path / "x.gguf")


def test_export_adds_what_llama_cpp_needs(tmp_path: Path) -> None:
    """An exported file says that it has no vocabulary, even where the model does not."""
    export_header(parse_model("x", GOOD, "m"), tmp_path / "x.gguf")
    assert read_header(tmp_path / "x.gguf").metadata["tokenizer.ggml.model"] == "none"


def test_saving_keeps_a_backup(tmp_path: Path) -> None:
    """The description that is replaced stays beside the new one."""
    path, model = tmp_path / "m.toml", parse_model("x", GOOD, "m")
    save_model(model, path)
    before = path.read_text()
    save_model(dataclasses.replace(model, description="new"), path)
    assert ((tmp_path / "m.toml.bak").read_text(), read_model(path).description) == (before, "new")


def test_saving_the_same_changes_nothing(tmp_path: Path) -> None:
    """Saving an unchanged model leaves no backup behind."""
    for _ in range(2):
        save_model(parse_model("x", GOOD, "m"), tmp_path / "m.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["m.toml"]


@pytest.mark.parametrize("value", [2**32, 1.5, "x", float("nan")])
def test_saving_a_value_that_does_not_fit_is_refused(tmp_path: Path, value: Any) -> None:
    """A metadata value outside its type is an error and writes nothing."""
    model = parse_model("x", GOOD, "m")
    bad = dataclasses.replace(model, metadata={**model.metadata, "llama.block_count": value})
    with pytest.raises(InputError, match=r"llama\.block_count"):
        save_model(bad, tmp_path / "m.toml")
    assert list(tmp_path.iterdir()) == []


def test_facts_in_json_are_read(tmp_path: Path) -> None:
    """Recorded facts become a model; the type of an empty array, which they lack, is taken for text."""
    recorded = {
        "metadata": {"general.architecture": "a", "a.labels": [], "a.n": [1, 2]},
        "metadata_types": {"general.architecture": "string", "a.labels": "[array]", "a.n": "[uint32]"},
        "tensors": [["t", [4, 2], "F32"]],
    }
    (tmp_path / "m.json").write_text(json.dumps(recorded))
    model = model_from_facts(tmp_path / "m.json")
    got = (model.name, model.metadata["a.n"], model.metadata_types["a.labels"], model.tensors)
    assert got == ("m", (1, 2), "[string]", (Tensor("t", (4, 2), "F32"),))
