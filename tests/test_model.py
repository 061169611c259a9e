"""`Model` and `Tensor`: what follows from the facts."""

import dataclasses

import pytest

from placement.inputs.model import Model, Profile, Tensor

TENSORS = (Tensor("token_embd.weight", (64, 10), "Q8_0"), Tensor("blk.11.ffn_up.weight", (256, 4), "Q4_K"))
MODEL = Model(
    "m",
    {"general.architecture": "llama", "llama.block_count": 12, "llama.eps": 1e-05},
    {"general.architecture": "string", "llama.block_count": "uint32", "llama.eps": "float32"},
    TENSORS,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.0.attn_q.weight", 0),
        ("blk.46.x", 46),
        ("token_embd.weight", None),
        ("v.blk.3.x", None),
        ("blk.x", None),
    ],
)
def test_layer_of_a_name(name: str, expected: int | None) -> None:
    """The layer is the number after a leading `blk.`, and None elsewhere."""
    assert Tensor(name, (1,), "F32").layer == expected


def test_bytes_are_summed_over_tensors() -> None:
    """64 x 10 Q8_0 are 20 blocks of 34 bytes, 256 x 4 Q4_K are four of 144."""
    assert MODEL.n_bytes == 20 * 34 + 4 * 144


def test_get_reads_the_architecture_s_keys() -> None:
    """`get` takes the key without the architecture and gives the default where there is none."""
    assert (MODEL.get("block_count"), MODEL.get("none", 7)) == (12, 7)


def test_by_name_finds_every_tensor() -> None:
    """Every tensor is found under its name."""
    assert MODEL.by_name == {tensor.name: tensor for tensor in TENSORS}


def test_digest_is_fixed() -> None:
    """The digest is the same on every machine and in every version: run records are keyed by it."""
    assert MODEL.digest == "e6bdd6d23bae84c9"


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "other"},
        {"description": "text"},
        {"profile": Profile(ctx_tokens=4096)},
        {"files": ("/a.gguf",)},
        {"metadata": dict(reversed(MODEL.metadata.items()))},
    ],
)
def test_digest_ignores_what_the_engine_does_not_see(changed: dict[str, object]) -> None:
    """Name, description, profile, files and the order of keys do not change the digest."""
    assert dataclasses.replace(MODEL, **changed).digest == MODEL.digest


@pytest.mark.parametrize(
    "changed",
    [
        {"metadata": {**MODEL.metadata, "llama.block_count": 13}},
        {"tensors": TENSORS[::-1]},
        {"tensors": (TENSORS[0], Tensor("blk.11.ffn_up.weight", (256, 4), "Q5_K"))},
    ],
)
def test_digest_follows_the_facts(changed: dict[str, object]) -> None:
    """A metadata value, a tensor's type and the order of the tensors change the digest."""
    assert dataclasses.replace(MODEL, **changed).digest != MODEL.digest
