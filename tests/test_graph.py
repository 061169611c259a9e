from __future__ import annotations

import dataclasses

import pytest
from golden_sample import model
from hypothesis import given
from hypothesis import strategies as st

from placement.inputs.problem import Settings
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.rules import RULES
from placement.llamacpp.graph import cuda
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.context import Batch, make_context
from placement.llamacpp.graph.decoder import STRUCTURES, build
from placement.llamacpp.graph.mixers import ATTENTION, RECURRENT
from placement.llamacpp.graph.ops import Graph
from placement.llamacpp.graph.row import ArchitectureRow, permitted_codes
from placement.llamacpp.graph.rows import ROWS
from placement.llamacpp.graph.runs import KEPT_REPETITIONS, MAX_PERIOD, shorten
from placement.llamacpp.graph.template import MAX_KEPT_GRAPHS, ModelGraphs, model_graphs

SETTINGS = Settings(ctx_tokens=8192, n_slots=2)


def decoder(name: str, n_tokens: int) -> Builder:
    """The built graph of a small recorded model."""
    one = model(name)
    facts = describe(one)
    context = make_context(SETTINGS, facts, is_full_offload=True, is_flash=True)
    graph = Builder(one, facts, ROWS[one.architecture], context, Batch(n_tokens, 2, n_tokens))
    build(graph, range(facts.n_layer))
    return graph


def used_codes(field: str) -> set[object]:
    """The codes that the table's rows hold in one field."""
    values = [getattr(row, field) for row in ROWS.values()]
    return {code for value in values for code in (value if isinstance(value, tuple) else (value,))}


# --- tensors


def test_sources_come_first() -> None:
    """Nodes are in the order of a depth-first walk over the sources."""
    graph = Graph()
    a = graph.input("F32", 8)
    left, right = graph.scale(a), graph.unary(a, "silu")
    total = graph.add(left, right)
    graph.expand(total)
    assert graph.nodes == [left, right, total]
    assert graph.leafs == [a]


def test_expand_twice() -> None:
    """A tensor enters the graph once."""
    graph = Graph()
    node = graph.scale(graph.input("F32", 8))
    graph.expand(node)
    graph.expand(node)
    assert graph.nodes == [node]


def test_quantised_rows() -> None:
    """Strides count blocks: 256 elements of Q4_K are 144 bytes."""
    tensor = Graph().new("Q4_K", 512, 3)
    assert (tensor.nb[1], tensor.n_bytes) == (288, 864)


def test_views_share_the_innermost_memory() -> None:
    """A view of a view has the first tensor as its root, and both offsets."""
    graph = Graph()
    base = graph.new("F32", 16, 4)
    view = graph.view_2d(base, 8, 2, base.nb[1], 64)
    inner = graph.view_1d(view, 4, 16)
    assert inner.root is base
    assert inner.offset == 80


def test_permutation() -> None:
    """Axes move with their strides."""
    moved = Graph().permute(Graph().new("F32", 2, 3, 5), 0, 2, 1, 3)
    assert (moved.ne, moved.nb) == ((2, 5, 3, 1), (4, 24, 8, 120))
    assert not moved.is_contiguous
    assert not moved.is_contiguous_to_planes


def test_product_shapes() -> None:
    """Rows of the weight become elements of the result; experts add a dimension."""
    graph = Graph()
    weight, rows = graph.new("F16", 64, 32), graph.new("F32", 64, 7)
    assert graph.mul_mat(weight, rows).ne == (32, 7, 1, 1)
    experts, picked = graph.new("F16", 64, 32, 8), graph.new("I32", 2, 7)
    assert graph.mul_mat_id(experts, graph.reshape(rows, 64, 1, 7), picked).ne == (32, 2, 7, 1)


# --- what CUDA runs


@pytest.mark.parametrize(
    ("heads", "is_masked", "is_supported"),
    [
        ((128, 128, 8, 2), False, True),
        ((576, 512, 64, 1), True, True),
        ((576, 512, 3, 3), True, False),
        ((100, 100, 8, 2), True, False),
        ((192, 128, 8, 1), True, True),
        ((256, 256, 8, 2), True, True),
    ],
)
def test_flash_heads(heads: tuple[int, int, int, int], is_masked: bool, is_supported: bool) -> None:
    """Flash attention has kernels for some head sizes, a few of them only for grouped queries."""
    k_head, v_head, n_head, n_kv = heads
    graph = Graph()
    q, k = graph.new("F32", k_head, 64, n_head), graph.new("F16", k_head, 1024, n_kv)
    mask = graph.new("F16", 1024, 64) if is_masked else None
    node = graph.flash_attn(q, k, graph.new("F16", v_head, 1024, n_kv), mask)
    assert cuda.supports(node, has_alibi=False) == is_supported


@pytest.mark.parametrize(("type", "is_supported"), [("Q4_K", True), ("Q8_0", True), ("TQ1_0", False)])
def test_row_lookups(type: str, is_supported: bool) -> None:
    """Rows of most types can be looked up on the GPU."""
    graph = Graph()
    node = graph.get_rows(graph.new(type, 256, 10), graph.new("I32", 4))
    assert cuda.supports(node, has_alibi=False) == is_supported


def test_offload_batch() -> None:
    """Products count tokens, expert products their third dimension, lookups nothing."""
    graph = Graph()
    product = graph.mul_mat(graph.new("F16", 8, 4), graph.new("F32", 8, 33))
    lookup = graph.get_rows(graph.new("F16", 8, 4), graph.new("I32", 33))
    assert [cuda.offload_batch(node) for node in (product, lookup)] == [33, 0]


# --- runs of alike layers


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 6), st.integers(0, 20))
def test_shortened_runs_count_all(head: list[int], period: int, n: int) -> None:
    """Kept layers and those left out are all layers, and what is left out repeats what is kept."""
    keys = [*head, *(100 + i for _ in range(n) for i in range(period)), *head]
    kept, runs = shorten(keys)
    assert len(kept) + sum(run.period * run.n_left_out for run in runs) == len(keys)
    assert kept == sorted(set(kept))
    assert kept[-1] == len(keys) - 1
    for run in runs:
        assert run.n_left_out % 2 == 0
        assert 1 <= run.period <= MAX_PERIOD


def test_short_models_are_kept_whole() -> None:
    """Nothing is left out of a run that is hardly longer than what is kept."""
    keys = ["a"] * (KEPT_REPETITIONS + 1)
    assert shorten(keys) == (list(range(len(keys))), [])


# --- rows


@pytest.mark.parametrize("field", permitted_codes())
def test_a_row_refuses_unknown_codes(field: str) -> None:
    """A code that a field does not know is refused by name, with the permitted ones."""
    is_many = isinstance(getattr(ArchitectureRow(), field), tuple)
    with pytest.raises(ValueError) as refused:
        ArchitectureRow(**{field: ("swaa",) if is_many else "swaa"})
    permitted = ", ".join(map(repr, permitted_codes()[field]))
    assert str(refused.value) == f"{field}='swaa': permitted are {permitted}"


@pytest.mark.parametrize(("field", "letters"), [("unread", "qs"), ("scaled", "fe"), ("post_ffn_norm", "")])
def test_a_row_refuses_strings_of_letters(field: str, letters: str) -> None:
    """Where a field holds several codes, they come as a tuple."""
    with pytest.raises(ValueError, match=f"{field}='{letters}': a tuple of "):
        ArchitectureRow(**{field: letters})


@pytest.mark.parametrize(("field", "code"), [("has_alibi", 1), ("n_pos_per_token", True)])
def test_a_row_tells_numbers_from_flags(field: str, code: int) -> None:
    """1 is no flag, and True no number."""
    with pytest.raises(ValueError, match=f"{field}={code}"):
        ArchitectureRow(**{field: code})


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_checked_when_they_are_made(name: str) -> None:
    """The table's rows pass the check that their making runs, so importing the table runs it for all."""
    assert dataclasses.replace(ROWS[name]) == ROWS[name]


@pytest.mark.parametrize("field", permitted_codes())
def test_no_code_is_dead(field: str) -> None:
    """Some row uses each code, in this field or in another that takes the same ones."""
    alike = [other for other, codes in permitted_codes().items() if codes == permitted_codes()[field]]
    fields = [field] if {False, True} <= set(permitted_codes()[field]) else alike
    assert set(permitted_codes()[field]) - {None} <= {code for each in fields for code in used_codes(each)}


@pytest.mark.parametrize(
    ("field", "table"), [("attention", ATTENTION), ("recurrent", RECURRENT), ("structure", STRUCTURES)]
)
def test_tables_have_every_code(field: str, table: dict[str, object]) -> None:
    """A table of blocks has one for each code of its field."""
    assert set(table) == set(permitted_codes()[field]) - {None}


# --- kept graphs


def graphs_of(name: str) -> ModelGraphs:
    """The kept graphs of a recorded model, read anew."""
    one = dataclasses.replace(model(name))
    return model_graphs(one, describe(one), ROWS[one.architecture])


def test_equal_models_share_graphs() -> None:
    """A model that is read twice has its graphs built once."""
    assert graphs_of("bloom-dense") is graphs_of("bloom-dense")


def test_kept_graphs_are_bounded() -> None:
    """The graphs that were asked for last are kept, no more than there is room for."""
    kept = ModelGraphs(model("bloom-dense"), describe(model("bloom-dense")), ROWS["bloom"])
    context = make_context(SETTINGS, kept.facts, is_full_offload=True, is_flash=True)
    layers = range(kept.facts.n_layer)
    asked = [
        kept.get(context, batch, layers, kept.makes(context, batch), [0] * (len(layers) + 1))
        for batch in (Batch(n, 1, n) for n in range(1, MAX_KEPT_GRAPHS + 3))
    ]
    assert list(kept.kept.values()) == asked[-MAX_KEPT_GRAPHS:]


# --- architectures


def test_rows_have_rules() -> None:
    """Every architecture with a graph row has a rule for its layers and caches."""
    assert set(ROWS) <= set(RULES)


@pytest.mark.parametrize(
    "name", ["hy_v4-moe", "kimi-k3-moe", "minimax-m3-moe", "bloom-dense", "plamo2-dense"]
)
def test_decode_and_prompt_are_alike(name: str) -> None:
    """A graph has as many nodes for one token per sequence as for many, block masks aside."""
    decode, prompt = decoder(name, 2), decoder(name, 512)
    n_apart = abs(len(decode.nodes) - len(prompt.nodes))
    assert n_apart == 0 or name == "minimax-m3-moe"


def test_layers_begin_in_order() -> None:
    """Each layer's nodes begin after those of the layer before."""
    graph = decoder("falcon-h1-dense", 8)
    assert graph.layer_starts == sorted(graph.layer_starts)
    assert len(graph.layer_starts) == graph.facts.n_layer + 1


def test_logits_end_the_graph() -> None:
    """The last node gives the logits: one per token that gives any, as wide as the vocabulary."""
    graph = decoder("bloom-dense", 8)
    assert graph.nodes[-1].ne[:2] == (graph.facts.n_vocab, 8)
    assert graph.nodes[-1].is_output
