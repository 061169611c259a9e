"""Small synthetic models and machines: a mixture of experts and a dense model that solve in milliseconds."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model, Profile, Tensor
from placement.inputs.problem import Problem, Settings, Workload
from placement.solve.cpsat.frame import Answer, Frame
from placement.solve.frames.pieces import Pieces
from placement.solve.frames.tables import Configuration, Table, TableBuilder
from placement.solve.search.search import Search

N_EMBD, N_VOCAB = 1024, 4096


def _header(architecture: str, n_layers: int, **keys: int) -> dict[str, Any]:
    facts = {
        "block_count": n_layers,
        "context_length": 32768,
        "embedding_length": N_EMBD,
        "feed_forward_length": 4096,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.key_length": 128,
        "attention.value_length": 128,
        **keys,
    }
    return {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in facts.items()},
    }


def _attention(i: int) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{i}.attn_norm.weight": (N_EMBD,),
        f"blk.{i}.attn_q.weight": (N_EMBD, 1024),
        f"blk.{i}.attn_k.weight": (N_EMBD, 256),
        f"blk.{i}.attn_v.weight": (N_EMBD, 256),
        f"blk.{i}.attn_output.weight": (1024, N_EMBD),
        f"blk.{i}.ffn_norm.weight": (N_EMBD,),
    }


def _experts(i: int, n_experts: int) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{i}.attn_q_norm.weight": (128,),
        f"blk.{i}.attn_k_norm.weight": (128,),
        f"blk.{i}.ffn_gate_inp.weight": (N_EMBD, n_experts),
        f"blk.{i}.ffn_gate_exps.weight": (N_EMBD, 512, n_experts),
        f"blk.{i}.ffn_up_exps.weight": (N_EMBD, 512, n_experts),
        f"blk.{i}.ffn_down_exps.weight": (512, N_EMBD, n_experts),
    }


def _dense(i: int) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{i}.ffn_gate.weight": (N_EMBD, 4096),
        f"blk.{i}.ffn_up.weight": (N_EMBD, 4096),
        f"blk.{i}.ffn_down.weight": (4096, N_EMBD),
    }


def _model(name: str, header: dict[str, Any], layers: list[dict[str, tuple[int, ...]]]) -> Model:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_EMBD, N_VOCAB)}
    for layer in layers:
        shapes |= layer
    shapes |= {"output_norm.weight": (N_EMBD,), "output.weight": (N_EMBD, N_VOCAB)}
    types = {key: "string" if isinstance(value, str) else "uint32" for key, value in header.items()}
    tensors = tuple(
        Tensor(tensor, shape, "F32" if len(shape) == 1 or "_inp" in tensor else "Q8_0")
        for tensor, shape in shapes.items()
    )
    return Model(name, header, types, tensors, Profile(ctx_tokens=4096, kv_type="q8_0", n_slots=1))


def expert_model(n_layers: int = 8, n_experts: int = 64) -> Model:
    """A qwen3moe: about 104 MiB of experts a layer, of which a token uses an eighth."""
    header = _header("qwen3moe", n_layers, expert_count=n_experts, expert_used_count=8)
    header["qwen3moe.expert_feed_forward_length"] = 512
    return _model("tiny-experts", header, [_attention(i) | _experts(i, n_experts) for i in range(n_layers)])


def dense_model(n_layers: int = 8) -> Model:
    """A llama: about 16 MiB a layer."""
    return _model(
        "tiny-dense", _header("llama", n_layers), [_attention(i) | _dense(i) for i in range(n_layers)]
    )


def card(name: str, usable_mib: float, **fields: Any) -> Device:
    """A CUDA card that is as large as what is usable, without a runtime of its own."""
    device = Device(name, usable_mib, usable_mib, 0.0, 1000.0, 25.0, tflops=100.0)
    return dataclasses.replace(device, **fields)


def two_cards(first_mib: float, second_mib: float, host_mib: float = 65536.0, **second: Any) -> Machine:
    """CUDA0 and a CUDA1 of half its bandwidth."""
    slower = {"bandwidth_gb_per_s": 500.0, **second}
    devices = (card("CUDA0", first_mib), card("CUDA1", second_mib, **slower))
    return Machine("two-cards", devices, Cpu(host_mib, 50.0, 8))


def one_card(usable_mib: float, host_mib: float = 65536.0) -> Machine:
    """CUDA0 alone."""
    return Machine("one-card", (card("CUDA0", usable_mib),), Cpu(host_mib, 50.0, 8))


def problem(model: Model, machine: Machine, **workload: int) -> Problem:
    """A question about 4,096 tokens of q8_0 cache with flash attention."""
    settings = Settings(ctx_tokens=4096, kv_type_k="q8_0", kv_type_v="q8_0", flash_attention="on")
    turn = Workload(**{"prompt_tokens": 1000, "generate_tokens": 200, "depth_tokens": 1024, **workload})
    return Problem(model, machine, settings, turn)


def random_answer(frame: Frame, random: Random) -> Answer:
    """Any cuts between the positions, every GPU with a layer, and any choice for each layer; caps are ignored."""
    n_layers, n_cards = len(frame.layers), len(frame.positions) - 1
    has_host = bool(frame.layers[0].choices[0])
    cuts = sorted(random.sample(range(0 if has_host else 1, n_layers), n_cards - (not has_host)))
    edges = cuts if has_host else [0, *cuts]
    homes = [sum(i >= edge for edge in edges) for i in range(n_layers)]
    picks = [
        random.randrange(len(table.choices[home])) for table, home in zip(frame.layers, homes, strict=True)
    ]
    return Answer(tuple(homes), tuple(picks))


def table_of(asked: Problem, configuration: Configuration) -> Table:
    """The frame of a configuration with the buffers of a typical placement."""
    return TableBuilder(Pieces(asked), configuration).build(Search(asked).buffers.exact(configuration))


def configuration(asked: Problem, *devices: str, **settings: Any) -> Configuration:
    """A configuration that may use the host, with these settings."""
    uses_host = settings.pop("uses_host", True)
    is_pipelined = settings.pop("is_pipelined", False)
    return Configuration(devices, dataclasses.replace(asked.settings, **settings), uses_host, is_pipelined)
