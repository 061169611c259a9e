"""Advice on arguments: what is said, with which number, and that good arguments get none."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest

from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.problem import Assignment
from placement.llamacpp.arguments import parse
from placement.llamacpp.emit.arguments import emit_arguments
from placement.llamacpp.emit.resolve import resolve
from placement.predict.advice.advise import advise
from placement.predict.advice.case import Advice

N_LAYERS = 12
GOOD = "-ngl 99 -ts 8,5 -np 1 -c 4096 -fa on -fit off -lm none"


def machine(cpu_mib: float = 64000, gpu_mib: float = 20000) -> Machine:
    cards = tuple(Device(f"CUDA{i}", 24576, gpu_mib, 480, 1000, 25) for i in range(2))
    return Machine("test", cards, Cpu(cpu_mib, 50, 16))


def model(head: int = 128, architecture: str = "qwen3moe", **metadata: object) -> Model:
    """Twelve layers of 128 experts, with router and shared experts, of about 100 MiB each."""
    parts = {
        "attn_norm.weight": (1024,),
        "attn_q.weight": (1024, 1024),
        "attn_k.weight": (1024, 256),
        "attn_v.weight": (1024, 256),
        "attn_output.weight": (1024, 1024),
        "attn_sinks.weight": (8,),
        "ffn_norm.weight": (1024,),
        "ffn_gate_inp.weight": (1024, 128),
        "ffn_gate_exps.weight": (1024, 256, 128),
        "ffn_up_exps.weight": (1024, 256, 128),
        "ffn_down_exps.weight": (256, 1024, 128),
        "ffn_up_shexp.weight": (1024, 512),
    }
    tensors = [Tensor("token_embd.weight", (1024, 5000), "F16")]
    tensors += [Tensor("output_norm.weight", (1024,), "F32"), Tensor("output.weight", (1024, 5000), "F16")]
    for layer in range(N_LAYERS):
        tensors += [
            Tensor(f"blk.{layer}.{name}", shape, "Q8_0" if len(shape) > 1 else "F32")
            for name, shape in parts.items()
        ]
    header = {
        "block_count": N_LAYERS,
        "context_length": 32768,
        "embedding_length": 1024,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.key_length": head,
        "attention.value_length": head,
        "expert_count": 128,
        "expert_used_count": 8,
    }
    keys = {f"{architecture}.{key}": value for key, value in {**header, **metadata}.items()}
    return Model("m", {"general.architecture": architecture, **keys}, {}, tuple(tensors))


@dataclass(frozen=True)
class Planned:
    """A made-up plan: a split for every tensor moved, four copies without overrides."""

    compute_bytes: dict[str, int]
    splits_prompt: int
    splits_decode: int
    n_copies: int


def planner(assignment: Assignment) -> Planned:
    n_copies = 1 if assignment.settings.has_overrides else 4
    megabytes = n_copies * (1 if assignment.settings.flash_attention == "on" else 3)
    n = len(assignment.moved)
    return Planned({"CUDA0": megabytes << 20, "CUDA1": 0, "Host": 0}, 2 + n, 2 + n, n_copies)


def advised(
    text: str, of: Model | None = None, on: Machine | None = None, plan: bool = False
) -> dict[str, str]:
    of, on = of or model(), on or machine()
    arguments = parse(text)
    assignment = resolve(of, on, arguments)
    result = advise(of, on, arguments, assignment, planner if plan else None)
    return {advice.code: advice.message for advice in result}


def test_good_arguments_get_no_advice() -> None:
    """Arguments such as `place` writes are left alone."""
    assert advised(GOOD) == {}


def test_emitted_arguments_get_no_advice() -> None:
    """What is emitted for experts on the CPU, pinned, is good."""
    of, on = model(), machine()
    assignment = resolve(of, on, parse(GOOD + r" -ot '^blk\.[0-3]\.ffn_(gate|up|down)_exps\.weight=CPU'"))
    arguments = parse(emit_arguments(of, on, assignment))
    assert advise(of, on, arguments, resolve(of, on, arguments)) == []


CASES = {
    "kv-left-behind": r"-ngl 99 -ts 8,5 -ot blk\.[67]\.=CUDA1",
    "override-attn-output": "-ngl 99 -ot output.weight=CPU",
    "override-router": r"-ngl 99 -ot '\.ffn_.*=CPU'",
    "override-shared-experts": "-ngl 99 -ot exp=CPU",
    "nkvo-flash-attention": "-nkvo",
    "kv-types-mixed": "-ctk q8_0 -ctv q4_0",
    "kv-type-without-kernel": "-ctk q5_0 -ctv q5_0",
    "quantised-v-without-flash-attention": "-ctv q8_0 -fa off",
    "gate-up-apart": "-ot ffn_gate_exps=CPU",
    "override-unmatched": "-ot nothing=CPU",
    "override-shadowed": "-cmoe -ot _exps=CUDA1",
    "ubatch-above-batch": "-b 512 -ub 1024",
    "fit-left-on": "-ngl 99",
    "mmap-cpu-weights": "-cmoe",
    "flash-attention-auto-off": r"-ngl 99 -ts 8,5 -ot blk\.3\.=CUDA1",
    "split-mode-row": "-sm row",
    "removed-option": "--no-mmap",
    "layers-left-on-cpu": "-ngl 12",
}


@pytest.mark.parametrize("code", CASES)
def test_bad_arguments_get_their_advice(code: str) -> None:
    """Each bad habit has a code of its own."""
    assert code in advised(CASES[code])


@pytest.mark.parametrize("code", CASES)
def test_advice_carries_a_number(code: str) -> None:
    """Every line says how much or how many, and is one line."""
    message = advised(CASES[code])[code]
    assert re.search(r"\d", message)
    assert "\n" not in message


def test_kv_left_behind_says_the_split_to_use() -> None:
    """Whole layers moved to another card should move by `-ts`, which takes their KV along."""
    message = advised(r"-ngl 99 -ts 8,5 -ot blk\.[67]\.=CUDA1")["kv-left-behind"]
    assert message.startswith("2 layers' KV stays on CUDA0")
    assert message.endswith("about +20 splits a token; use -ts 6,7 instead of -ot")


def test_kv_left_behind_with_experts_on_the_cpu_keeps_overrides_for_them() -> None:
    """Where experts stay on the CPU, `-ot` is still needed for them."""
    message = advised(r"-ngl 99 -ts 8,5 -ot 'blk\.[67]\.=CUDA1,_exps=CPU'")["kv-left-behind"]
    assert message.endswith("use -ts 6,7 and move only expert or FFN tensors with -ot")


def test_kv_left_behind_on_one_card_says_to_move_experts() -> None:
    """Whole layers sent to the CPU by override leave only one remedy at the same homes."""
    message = advised(r"-dev CUDA0 -ot blk\.11\.=CPU")["kv-left-behind"]
    assert message.endswith("move only expert or FFN tensors with -ot")


def test_planned_splits_replace_the_rule() -> None:
    """With a planner the number is a difference of plans."""
    message = advised(r"-ngl 99 -ts 8,5 -ot blk\.7\.=CUDA1", plan=True)["kv-left-behind"]
    assert "+12 splits a token (14 instead of 2)" in message


def test_moved_experts_alone_are_no_habit_to_break() -> None:
    """Routed experts on the CPU, pinned, need no remark about routers or KV."""
    assert set(advised(GOOD + " -cmoe")) == set()


def test_pipeline_memory_is_told() -> None:
    """Pipeline parallelism is told with the buffers that it takes."""
    assert "3.0 MiB" in advised(GOOD, plan=True)["pipeline-on"]


def test_pipeline_given_up_for_nothing_is_told() -> None:
    """An override that moves nothing gives pipeline parallelism up."""
    assert "3.0 MiB" in advised(GOOD + " -ot '^$=CPU'", plan=True)["pipeline-off"]


def test_flash_attention_turned_off_costs_buffers() -> None:
    """What `-fa auto` costs when it gives up is a difference of plans."""
    result = advised(r"-ngl 99 -ts 8,5 -ot blk\.3\.=CUDA1", plan=True)
    assert "2.0 MiB more" in result["flash-attention-auto-off"]


def test_quantised_v_keeps_flash_attention_on() -> None:
    """With a quantised V cache the engine forces flash attention, so auto is safe."""
    assert "flash-attention-auto-off" not in advised(
        r"-ngl 99 -ts 8,5 -ot blk\.3\.=CUDA1 -ctk q8_0 -ctv q8_0"
    )


def test_host_over_its_cap_is_told() -> None:
    """More in host memory than the CPU may give is told in MiB."""
    result = advised("-cmoe -lm none", on=machine(cpu_mib=500))
    assert re.fullmatch(r"the host needs 1,\d\d\d MiB and may give 500: \d+ too many", result["host-memory"])


def test_card_over_its_cap_is_told() -> None:
    """More on a card than it may give, after its runtime, is told in MiB."""
    assert "CUDA1 needs" in advised(GOOD, on=machine(gpu_mib=600))["device-memory"]


def test_fit_that_will_act_is_told() -> None:
    """Without explicit arguments `--fit` changes what does not fit."""
    assert "fit-changes-placement" in advised("-np 1 -c 4096", on=machine(gpu_mib=600))


def test_latent_attention_needs_one_cache_type() -> None:
    """With latent attention the engine refuses K and V of different types."""
    latent = {"attention.key_length_mla": 192, "attention.value_length_mla": 128}
    result = advised("-ctk q8_0 -ctv f16", model(architecture="deepseek2", **latent))
    assert "does not start" in result["kv-types-mixed"]


def test_block_must_divide_the_head() -> None:
    """A cache type whose block does not divide the heads stops the engine."""
    assert "heads of 80" in advised("-ctk q8_0 -ctv q8_0", model(head=80))["kv-type-head-size"]


def test_mapped_weights_compare_pageable_and_pinned() -> None:
    """Streaming is told in seconds for both load modes, the pinned one faster."""
    message = advised("-cmoe")["mmap-cpu-weights"]
    pageable, pinned = map(float, re.findall(r"([\d.]+) s (?:pageable|pinned)", message))
    assert pinned < pageable


def test_four_slots_are_told_where_they_cost() -> None:
    """llama-server's default slots multiply windows."""
    windowed = model(architecture="gpt-oss", **{"attention.sliding_window": 4096})
    of = replace(windowed)
    assert "-np 1" in advised("-c 32768", of)["slots-auto"]


def test_full_windows_are_told() -> None:
    """`--swa-full` is told with the memory that it adds."""
    of = model(architecture="gpt-oss", **{"attention.sliding_window": 128})
    assert "MiB" in advised("--swa-full -c 32768", of)["swa-full"]


def test_what_stops_the_engine_comes_first() -> None:
    """Advice on what does not load precedes advice on speed."""
    of, on = model(), machine()
    arguments = parse("-ngl 99 -b 512 -ub 1024 -sm row")
    result: list[Advice] = advise(of, on, arguments, resolve(of, on, arguments))
    assert result[0].code == "split-mode-row"
