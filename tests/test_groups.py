from __future__ import annotations

import pytest
from solving_support import dense_model, expert_model

from placement.inputs.groups import is_expert_stack, movable_groups, used_fraction
from placement.inputs.model import Model, Tensor
from placement.inputs.model_files.files import resolve_model


def groups_of(*names: str) -> list[tuple[str, list[str]]]:
    """The groups of a one-layer model with these tensors."""
    model = Model("m", {}, {}, tuple(Tensor(name, (256, 256), "F16") for name in names))
    return [(group.kind, [t.name for t in group.tensors]) for group in movable_groups(model, 1)[0]]


def test_experts_are_two_groups() -> None:
    """Gate and up move together, down by itself."""
    layer = movable_groups(expert_model(2), 2)[1]
    assert [(g.layer, g.kind, len(g.tensors)) for g in layer] == [(1, "gate_up", 2), (1, "down", 1)]


def test_dense_network_is_one_group() -> None:
    """A dense feed-forward network moves whole."""
    layer = movable_groups(dense_model(1), 1)[0]
    assert [(g.kind, len(g.tensors)) for g in layer] == [("ffn", 3)]


def test_biases_move_with_their_experts() -> None:
    """An expert bias belongs to its stack's group."""
    names = ("blk.0.ffn_down_exps.weight", "blk.0.ffn_down_exps.bias")
    assert groups_of(*names) == [("down", list(names))]


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_inp.weight", "blk.0.ffn_up_shexp.weight", "blk.0.exp_probs_b.bias", "blk.0.attn_q.weight",
     "blk.0.ffn_norm.weight", "token_embd.weight", "output.weight"],
)  # fmt: skip
def test_stays_at_home(name: str) -> None:
    """Router, shared expert, attention, norms and the tensors outside of layers never move."""
    assert groups_of("blk.0.ffn_down_exps.weight", name) == [("down", ["blk.0.ffn_down_exps.weight"])]


def test_dense_path_beside_experts_stays() -> None:
    """A layer with experts keeps its dense feed-forward tensors at home."""
    result = groups_of("blk.0.ffn_up.weight", "blk.0.ffn_down_exps.weight")
    assert result == [("down", ["blk.0.ffn_down_exps.weight"])]


@pytest.mark.parametrize("name", ["qwen3-coder-q5", "gpt-oss-120b", "glm-flash"])
def test_every_stack_moves(name: str) -> None:
    """All expert stacks of the shipped models are in a group."""
    model = resolve_model(name)
    n_layers = model.get("block_count")
    moving = {t.name for row in movable_groups(model, n_layers) for group in row for t in group.tensors}
    assert [t.name for t in model.tensors if is_expert_stack(t) and t.name not in moving] == []


STACK, PLAIN = Tensor("blk.0.ffn_up_exps.weight", (4, 4, 8), "F32"), Tensor("output.weight", (4, 4), "F32")


@pytest.mark.parametrize(
    ("tensor", "n_tokens", "expected"),
    [(STACK, 1, 0.25), (STACK, 2, 0.4375), (PLAIN, 1, 1.0), (PLAIN, 5, 1.0)],
)
def test_used_fraction(tensor: Tensor, n_tokens: int, expected: float) -> None:
    """2 of 8 experts: one token reads a quarter, two read 1 - 0.75²; anything else is read whole."""
    assert expected == used_fraction(tensor, 8, 2, n_tokens)
