"""How solve time and program size grow with layers and devices, on models that fit no desk.

Usage: python benchmarks/scale.py [CASE …]

Four large cases with their limits, then the synthetic model at growing numbers of layers and devices. `best s` is
the search for the fastest placement, tables, bounds and planned buffers included; `gap` is what is proven.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model, Profile, Tensor
from placement.inputs.problem import Problem, Settings, Workload
from placement.solve.cpsat import program
from placement.solve.search.configurations import SearchSpace
from placement.solve.search.search import Search

Shapes = dict[str, tuple[tuple[int, ...], str]]
Q4, Q6, Q8, F32 = "Q4_K", "Q6_K", "Q8_0", "F32"
GAP = 0.01


def header(architecture: str, **facts: Any) -> dict[str, Any]:
    """Metadata of an architecture; `__` in a name stands for a dot."""
    named = {f"{architecture}.{key.replace('__', '.')}": value for key, value in facts.items()}
    return {"general.architecture": architecture, **named}


def make_model(name: str, facts: dict[str, Any], n_embd: int, n_vocab: int, layers: list[Shapes]) -> Model:
    """A model of those layers between an embedding and an output matrix."""
    shapes: Shapes = {"token_embd.weight": ((n_embd, n_vocab), Q4)}
    shapes |= {"output_norm.weight": ((n_embd,), F32), "output.weight": ((n_embd, n_vocab), Q6)}
    for i, layer in enumerate(layers):
        shapes |= {f"blk.{i}.{each}": row for each, row in layer.items()}
    types = {key: "string" if isinstance(value, str) else "uint32" for key, value in facts.items()}
    tensors = tuple(Tensor(each, shape, kind) for each, (shape, kind) in shapes.items())
    return Model(name, facts, types, tensors, Profile())


def dense_block(n_embd: int, n_ff: int) -> Shapes:
    """A gated feed-forward network."""
    return {
        "ffn_gate.weight": ((n_embd, n_ff), Q4),
        "ffn_down.weight": ((n_ff, n_embd), Q6),
        "ffn_up.weight": ((n_embd, n_ff), Q4),
    }


def experts_block(n_embd: int, n_ff: int, n_experts: int) -> Shapes:
    """A router and its experts."""
    return {
        "ffn_gate_inp.weight": ((n_embd, n_experts), F32),
        "ffn_down_exps.weight": ((n_ff, n_embd, n_experts), Q6),
        "ffn_gate_exps.weight": ((n_embd, n_ff, n_experts), Q4),
        "ffn_up_exps.weight": ((n_embd, n_ff, n_experts), Q4),
    }


def attention_block(n_embd: int, width: int, width_kv: int, *, has_norms: bool = True) -> Shapes:
    """Grouped-query attention."""
    norms: Shapes = {"attn_q_norm.weight": ((128,), F32), "attn_k_norm.weight": ((128,), F32)}
    return {
        "attn_norm.weight": ((n_embd,), F32),
        "ffn_norm.weight": ((n_embd,), F32),
        "attn_q.weight": ((n_embd, width), Q4),
        "attn_k.weight": ((n_embd, width_kv), Q4),
        "attn_v.weight": ((n_embd, width_kv), Q6),
        "attn_output.weight": ((width, n_embd), Q4),
        **(norms if has_norms else {}),
    }


def deepseek_v3() -> Model:
    """DeepSeek-V3 as Q4_K_M: 61 layers, the first three dense, 256 experts of which eight are used."""
    latent: Shapes = {
        "attn_norm.weight": ((7168,), F32),
        "ffn_norm.weight": ((7168,), F32),
        "attn_q_a_norm.weight": ((1536,), F32),
        "attn_kv_a_norm.weight": ((512,), F32),
        "attn_q_a.weight": ((7168, 1536), Q4),
        "attn_q_b.weight": ((1536, 24576), Q4),
        "attn_kv_a_mqa.weight": ((7168, 576), Q4),
        "attn_k_b.weight": ((128, 512, 128), Q8),
        "attn_v_b.weight": ((512, 128, 128), Q8),
        "attn_output.weight": ((16384, 7168), Q4),
    }
    shared: Shapes = {
        "exp_probs_b.bias": ((256,), F32),
        "ffn_gate_shexp.weight": ((7168, 2048), Q4),
        "ffn_down_shexp.weight": ((2048, 7168), Q6),
        "ffn_up_shexp.weight": ((7168, 2048), Q4),
    }
    layers = [latent | dense_block(7168, 18432)] * 3
    layers += [latent | experts_block(7168, 2048, 256) | shared] * 58
    facts = header(
        "deepseek2", vocab_size=129280, context_length=163840, embedding_length=7168, block_count=61,
        feed_forward_length=18432, attention__head_count=128, attention__head_count_kv=1,
        leading_dense_block_count=3, attention__q_lora_rank=1536, attention__kv_lora_rank=512,
        attention__key_length=576, attention__value_length=512, attention__key_length_mla=192,
        attention__value_length_mla=128, expert_feed_forward_length=2048, expert_count=256,
        expert_used_count=8, expert_shared_count=1, expert_gating_func=2, rope__dimension_count=64,
    )  # fmt: skip
    return make_model("deepseek-v3", facts, 7168, 129280, layers)


def qwen3_moe(name: str, n_embd: int, n_heads: int, widths: list[int], n_experts: int) -> Model:
    """A qwen3moe whose layer i has experts of width `widths[i]`."""
    facts = header(
        "qwen3moe", vocab_size=151936, context_length=131072, embedding_length=n_embd, block_count=len(widths),
        feed_forward_length=3 * n_embd, attention__head_count=n_heads, attention__head_count_kv=4,
        attention__key_length=128, attention__value_length=128, expert_feed_forward_length=max(widths),
        expert_count=n_experts, expert_used_count=8,
    )  # fmt: skip
    attention = attention_block(n_embd, n_heads * 128, 512)
    layers = [attention | experts_block(n_embd, width, n_experts) for width in widths]
    return make_model(name, facts, n_embd, 151936, layers)


def qwen3_235b() -> Model:
    """Qwen3-235B-A22B as Q4_K_M."""
    return qwen3_moe("qwen3-235b-a22b", 4096, 64, [1536] * 94, 128)


def llama_405b() -> Model:
    """Llama-3.1-405B as Q4_K_M."""
    facts = header(
        "llama", vocab_size=128256, context_length=131072, embedding_length=16384, block_count=126,
        feed_forward_length=53248, attention__head_count=128, attention__head_count_kv=8,
        rope__dimension_count=128,
    )  # fmt: skip
    layer = attention_block(16384, 16384, 1024, has_norms=False) | dense_block(16384, 53248)
    return make_model("llama-405b", facts, 16384, 128256, [layer] * 126)


def synthetic(n_layers: int) -> Model:
    """A mixture of experts in which no two layers are of one size, 1.4 GB on average."""
    widths = [256 * (8 + i * 37 % n_layers * 256 // n_layers) for i in range(n_layers)]
    return qwen3_moe(f"synthetic-{n_layers}", 1024, 16, widths, 20)


def card(name: str, total_mib: float, bandwidth: float, link: float = 25.0, **fields: Any) -> Device:
    """A card of which 500 MiB are taken."""
    device = Device(name, total_mib, total_mib - 500, 0.0, bandwidth, link)
    return dataclasses.replace(device, **fields)


def equal_cards(n: int, total_mib: float = 24576, bandwidth: float = 936) -> Machine:
    """So many RTX 3090 and 1 TiB of host memory."""
    cards = tuple(card(f"CUDA{i}", total_mib, bandwidth) for i in range(n))
    return Machine(f"{n}-cards", cards, Cpu(1048576, 200.0, 32))


def unequal_cards() -> Machine:
    """An RTX 5090, 4090, 3090 and 3060."""
    rows = (("CUDA0", 32607, 1792), ("CUDA1", 24576, 1008), ("CUDA2", 24576, 936), ("CUDA3", 12288, 360))
    return Machine("unequal", tuple(card(*row) for row in rows), Cpu(262144, 80.0, 16))


def cards_and_workers() -> Machine:
    """Eight RTX 3090 and four RPC workers of 24 GiB."""
    workers = tuple(card(f"RPC{i}", 24576, 936, 1.0, address=f"10.0.0.{i}:50052") for i in range(4))
    cards = equal_cards(8)
    return Machine("8-cards-4-workers", (*workers, *cards.devices), cards.cpu)


def mixed_cards(n: int) -> Machine:
    """Cards of three kinds in turn."""
    kinds = ((24576, 936), (16384, 672), (12288, 360))
    return Machine(
        f"mixed-{n}", tuple(card(f"CUDA{i}", *kinds[i % 3]) for i in range(n)), Cpu(1048576, 200.0, 32)
    )


CASES: dict[str, tuple[Any, Any, float]] = {
    "deepseek-v3": (deepseek_v3, lambda: equal_cards(8), 1.0),
    "qwen3-235b": (qwen3_235b, unequal_cards, 1.0),
    "llama-405b": (llama_405b, cards_and_workers, 3.0),
    "synthetic": (lambda: synthetic(256), lambda: mixed_cards(16), 20.0),
}


def make_problem(model: Model, machine: Machine, ctx_tokens: int = 32768) -> Problem:
    """A turn of 2,000 tokens in and 500 out at a depth of 8,192."""
    settings = Settings(ctx_tokens=ctx_tokens, kv_type_k="q8_0", kv_type_v="q8_0", flash_attention="on")
    return Problem(model, machine, settings, Workload(2000, 500, 8192))


@dataclasses.dataclass
class Sizes:
    """The largest program that was solved and how many were."""

    n_programs: int = 0
    n_variables: int = 0
    n_constraints: int = 0
    n_bytes: int = 0
    wall_s: float = 0.0

    def watch(self) -> None:
        """Count every program from now on."""
        solve = program.Program.solve

        def counted(this: program.Program, *args: Any, **named: Any) -> program.ProgramResult:
            start_s = time.perf_counter()
            result = solve(this, *args, **named)
            self.wall_s += time.perf_counter() - start_s
            self.n_programs += 1
            self.n_variables = max(self.n_variables, this.n_variables)
            self.n_constraints = max(self.n_constraints, this.n_constraints)
            return result

        program.Program.solve = counted  # type: ignore[method-assign]


def row(name: str, problem: Problem, limit_s: float | None) -> str:
    """Solve one case; a line of the table."""
    sizes = Sizes()
    sizes.watch()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    search = Search(problem, time_limit_s=60.0)
    space = SearchSpace()
    lower_bounds = search.lower_bounds(space)
    subproblems_s = time.perf_counter() - start_s
    found = search.best(space, lower_bounds, gap=GAP)
    best_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    what = "nothing fits"
    if found is not None:
        gap = 1 - found.bound / found.objective
        what = f"{gap:8.3%} {found.is_proven!s:>6} {found.speed.turn_s:9.2f}  {len(found.assignment.devices)} of {len(problem.machine.devices)}"
    allowed = f"{limit_s:5.0f}" if limit_s else "    -"
    return (
        f"{name:22}{subproblems_s:8.2f}{best_s:8.2f}{cpu_s:8.2f}{allowed}{sizes.n_programs:6}{sizes.wall_s:8.2f}"
        f"{sizes.n_variables:8}{sizes.n_constraints:8}  {what}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join((*CASES, "growth")))
    asked = parser.parse_args().cases or [*CASES, "growth"]
    print(
        f"{'case':22}{'subs s':>8}{'best s':>8}{'cpu s':>8}{'limit':>5}{'progs':>6}{'solve s':>8}{'vars':>8}{'rules':>8}"
        f"  {'gap':>8} {'proven':>6} {'turn s':>9}  devices"
    )
    for name, (model, machine, limit_s) in CASES.items():
        if name in asked:
            print(row(name, make_problem(model(), machine()), limit_s), flush=True)
    if "growth" in asked:
        for n_layers in (32, 64, 128, 256):
            for n_devices in (2, 4, 8, 16):
                problem = make_problem(synthetic(n_layers), mixed_cards(n_devices))
                print(row(f"{n_layers} layers, {n_devices} cards", problem, None), flush=True)


if __name__ == "__main__":
    main()
