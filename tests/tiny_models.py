"""Small models with random weights that llama-server really runs: dense or MoE, tens of MB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

N_EMBD, N_HEAD, N_HEAD_KV, HEAD_SIZE = 512, 8, 4, 64
N_EXPERTS, N_EXPERTS_USED = 8, 2


def write_tiny_model(path: Path, *, is_moe: bool, n_layers: int = 6, ctx_tokens: int = 8192) -> Path:
    """Write a Q8_0 model of the llama (dense) or qwen3moe architecture; the same bytes every time."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "qwen3moe" if is_moe else "llama")
    writer.add_block_count(n_layers)
    writer.add_context_length(ctx_tokens)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(1536)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(HEAD_SIZE)
    writer.add_value_length(HEAD_SIZE)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_SIZE)
    if is_moe:
        writer.add_expert_count(N_EXPERTS)
        writer.add_expert_used_count(N_EXPERTS_USED)
        writer.add_expert_feed_forward_length(512)
    n_vocab = _add_vocabulary(writer)
    random = np.random.default_rng(7)
    for name, shape in _tensors(is_moe, n_layers, n_vocab):
        _add_tensor(writer, random, name, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: Any) -> int:
    from gguf import TokenType

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"\u2581w{i}" for i in range(512 - len(tokens))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return len(tokens)


def _tensors(is_moe: bool, n_layers: int, n_vocab: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes, outermost dimension first as numpy has it."""
    results: list[tuple[str, tuple[int, ...]]] = [
        ("token_embd", (n_vocab, N_EMBD)),
        ("output_norm", (N_EMBD,)),
        ("output", (n_vocab, N_EMBD)),
    ]
    for i in range(n_layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm": (N_EMBD,),
            "attn_q": (N_HEAD * HEAD_SIZE, N_EMBD),
            "attn_k": (N_HEAD_KV * HEAD_SIZE, N_EMBD),
            "attn_v": (N_HEAD_KV * HEAD_SIZE, N_EMBD),
            "attn_output": (N_EMBD, N_HEAD * HEAD_SIZE),
            "ffn_norm": (N_EMBD,),
        }
        if is_moe:
            layer |= {
                "attn_q_norm": (HEAD_SIZE,),
                "attn_k_norm": (HEAD_SIZE,),
                "ffn_gate_inp": (N_EXPERTS, N_EMBD),
            }
            layer |= {f"ffn_{kind}_exps": (N_EXPERTS, 512, N_EMBD) for kind in ("up", "gate")}
            layer |= {"ffn_down_exps": (N_EXPERTS, N_EMBD, 512)}
        else:
            layer |= {f"ffn_{kind}": (1536, N_EMBD) for kind in ("up", "gate")}
            layer |= {"ffn_down": (N_EMBD, 1536)}
        results += [(f"blk.{i}.{name}", shape) for name, shape in layer.items()]
    return results


def _add_tensor(writer: Any, random: Any, name: str, shape: tuple[int, ...]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if len(shape) == 1:
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
        return
    values = random.standard_normal(shape, dtype=np.float32) * 0.02
    if name.endswith("ffn_gate_inp"):
        writer.add_tensor(f"{name}.weight", values)
        return
    packed = quantize(values, GGMLQuantizationType.Q8_0)
    writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
