"""llm_graph_context in Python: norms, projections, feed-forward blocks and expert routing as graph nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from placement.architecture import Architecture, LayerFacts
from placement.graph.context import Batch, Context
from placement.graph.ops import Graph
from placement.graph.tensor import Tensor, row_size
from placement.model import Model

GATED_GLU = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "swiglu_oai": "swiglu_oai"}


class UnknownGraph(Exception):
    """No rule says how the model's graph is built; what follows is an estimate."""


class Builder(Graph):
    """A graph for one batch of one model; block methods return the tensor that the next block reads."""

    def __init__(self, model: Model, facts: Architecture, context: Context, batch: Batch) -> None:
        super().__init__()
        self.model, self.facts, self.context, self.batch = model, facts, context, batch
        self.n_embd = facts.n_embd
        self.n_tokens = batch.n_tokens
        self.weights: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.fused_nodes: list[tuple[str, Tensor, int]] = []  # operation, node, layer: what is probed
        self.has_mixed_batch = True
        self.has_embedding_scale = False
        self.n_deepstack = 0
        self.n_pos_per_token = 1
        self.unread = ""  # tensors that the engine loads and does not use, see `Row.unread`
        self.is_down_scaled = False
        self.has_rope_factors = False
        self.is_window_unfactored = False  # layers with a window are roped without factors
        self.homes: Sequence[int] = ()  # of layers, as far as leafs are shared between them
        self.token_input: Tensor | None = None

    # --- facts

    def layer(self, il: int) -> LayerFacts:
        """The facts of layer `il`."""
        return self.facts.layers[il]

    def number(self, key: str, default: float = 0.0) -> float:
        """A scalar of the architecture's metadata; the first of an array."""
        value: Any = self.model.get(key, default)
        if isinstance(value, (tuple, list)):
            value = value[0] if value else default
        return float(value)

    def integer(self, key: str, default: int = 0) -> int:
        """A whole number of the architecture's metadata; the first of an array."""
        return int(self.number(key, default))

    # --- weights

    def weight(self, name: str, layer: int | None = None, key: str | None = None) -> Tensor | None:
        """The leaf of a model tensor, or None where the model has none of that name."""
        key = key or name
        leaf = self.weights.get(key)
        if leaf is None:
            tensor = self.model.by_name.get(name)
            if tensor is None:
                return None
            leaf = self.new(tensor.type, *tensor.shape)
            leaf.weight, leaf.layer = key, layer
            self.weights[key] = leaf
        return leaf

    def w(self, il: int, name: str) -> Tensor | None:
        """The weight `blk.<il>.<name>.weight`; a few files have it without the last part."""
        il = self.block_of(il)
        found = self.weight(f"blk.{il}.{name}.weight", il)
        return found if found is not None else self.weight(f"blk.{il}.{name}", il)

    def b(self, il: int, name: str) -> Tensor | None:
        """The bias `blk.<il>.<name>.bias`."""
        il = self.block_of(il)
        return self.weight(f"blk.{il}.{name}.bias", il)

    def block_of(self, il: int) -> int:
        """The block whose weights layer `il` uses: its own, unless layers share theirs."""
        return il

    def need(self, tensor: Tensor | None) -> Tensor:
        """The tensor itself; a model without it would not load."""
        if tensor is None:
            raise UnknownGraph("a tensor that this architecture has elsewhere")
        return tensor

    def input_once(self, name: str, type: str, *ne: int) -> Tensor:
        """The graph input of that name, made at its first use."""
        if name not in self.inputs:
            self.inputs[name] = self.input(type, *ne)
        return self.inputs[name]

    @property
    def positions(self) -> Tensor:
        """inp_pos; four numbers a token where the architecture ropes in several dimensions."""
        return self.input_once("pos", "I32", self.n_tokens * self.n_pos_per_token)

    def rows_out(self, *tensors: Tensor) -> list[Tensor]:
        """The rows of the tokens that give logits."""
        ids = self.input_once("out_ids", "I32", self.batch.n_outputs)
        return [self.get_rows(tensor, ids) for tensor in tensors]

    # --- blocks

    def lora_mm(self, weight: Tensor | None, cur: Tensor, *, is_scaled: bool = False) -> Tensor:
        """A projection (build_lora_mm), times the tensor's own scale where the engine asks for it."""
        weight = self.need(weight)
        out = self.mul_mat(weight, cur)
        return self.scaled(out, weight) if is_scaled else out

    def scaled(self, out: Tensor, weight: Tensor) -> Tensor:
        """A result times the `.scale` tensor of its weight, where the file has one (NVFP4)."""
        name = weight.weight or ""
        scale = self.weight(name.removesuffix("weight") + "scale", weight.layer)
        return self.mul(out, scale) if scale is not None else out

    def build_norm(
        self,
        cur: Tensor,
        weight: Tensor | None,
        bias: Tensor | None = None,
        kind: str = "rms",
        il: int = -1,
    ) -> Tensor:
        """A norm and its scale; the callback pins it to the layer's device where it has either."""
        cur = self.like("RMS_NORM" if kind == "rms" else "NORM", cur)
        if (weight is not None or bias is not None) and il >= 0:
            cur.pin = il
        if weight is not None:
            cur = self.mul(cur, weight)
        return self.add(cur, bias) if bias is not None else cur

    def layer_norm(
        self, cur: Tensor, il: int, name: str, kind: str = "rms", *, is_pinned: bool = True
    ) -> Tensor:
        """The norm `blk.<il>.<name>`."""
        return self.build_norm(cur, self.w(il, name), self.b(il, name), kind, il if is_pinned else -1)

    def embed(self, token_scale: float = 1.0) -> Tensor:
        """The token embeddings with the unused branches for other inputs (build_inp_embd)."""
        table = self.need(self.weight("token_embd.weight"))
        n_embd_inp = self.n_embd * (1 + self.n_deepstack)
        tokens = self.input_once("tokens", "I32", self.n_tokens)
        cur = self._token_rows(table, tokens, n_embd_inp)
        branches = [cur, self.input("F32", n_embd_inp, self.n_tokens)]
        if self.has_mixed_batch:
            n_rows = max(self.n_tokens, 1)
            ids = self.input("I32", n_rows)
            slots = self.input("I64", n_rows)
            copy = self.like("DUP", self.input("F32", n_embd_inp, self.n_tokens))
            branches.append(self.set_rows(copy, self._token_rows(table, ids, n_embd_inp), slots))
        for branch in branches:
            self.expand(branch)
        if n_embd_inp != self.n_embd:
            cur = self.view_2d(cur, self.n_embd, self.n_tokens, cur.nb[1])
            self.token_input = cur
        return self._scaled_embeddings(cur, token_scale)

    def _token_rows(self, table: Tensor, ids: Tensor, n_embd_inp: int) -> Tensor:
        rows = self.get_rows(table, ids)
        return self.pad(rows, n_embd_inp - self.n_embd) if n_embd_inp != self.n_embd else rows

    def _scaled_embeddings(self, cur: Tensor, token_scale: float) -> Tensor:
        is_token_only = self.has_embedding_scale and self.n_deepstack > 0
        if self.has_embedding_scale and not is_token_only:
            cur = self.scale(cur if cur.is_contiguous else self.cont(cur))
        if is_token_only or token_scale != 1.0:
            rows = self.input("F32", 1, self.n_tokens)
            cur = self.mul(cur if cur.is_contiguous else self.cont(cur), rows)
        self.expand(cur)
        return cur

    def qkv(
        self,
        cur: Tensor,
        il: int,
        heads: tuple[int, int, int],
        sizes: tuple[int, int, int],
        *,
        is_flat: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V as [head size, heads, tokens], or as [width, tokens] if `is_flat` (build_qkv)."""
        if (fused := self.w(il, "attn_qkv")) is not None:
            return self._qkv_fused(cur, il, fused, heads, sizes, is_flat)
        parts = []
        for name, n_head, size in zip(("attn_q", "attn_k", "attn_v"), heads, sizes, strict=True):
            part = self.lora_mm(self.w(il, name), cur, is_scaled="s" not in self.unread)
            bias = self.b(il, name) if "q" not in self.unread else None
            if bias is not None:
                part = self.add(part, bias)
            if not is_flat:
                part = self._clamp_qkv(part)
                part = self.reshape(part, size, n_head, self.n_tokens)
            parts.append(part)
        return parts[0], parts[1], parts[2]

    def _clamp_qkv(self, cur: Tensor) -> Tensor:
        return self.clamp(cur) if self.number("attention.clamp_kqv") > 0.0 else cur

    def _qkv_fused(
        self,
        cur: Tensor,
        il: int,
        fused: Tensor,
        heads: tuple[int, int, int],
        sizes: tuple[int, int, int],
        is_flat: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.lora_mm(fused, cur, is_scaled="s" not in self.unread)
        biases = [self.b(il, name) for name in ("attn_q", "attn_k", "attn_v")]
        if (bias := self.b(il, "attn_qkv")) is not None:
            qkv = self.add(qkv, bias)
        elif all(bias is not None for bias in biases):
            q_b, k_b, v_b = (self.need(bias) for bias in biases)
            qkv = self.add(qkv, self.concat(self.concat(q_b, k_b, 0), v_b, 0))
        if not is_flat:
            qkv = self._clamp_qkv(qkv)
        parts, offset = [], 0
        for n_head, size in zip(heads, sizes, strict=True):
            width = n_head * size
            if is_flat:
                part = self.cont(self.view_2d(qkv, width, self.n_tokens, qkv.nb[1], offset))
            else:
                strides = (row_size("F32", size), qkv.nb[1])
                part = self.view_3d(qkv, size, n_head, self.n_tokens, *strides, offset)
            parts.append(part)
            offset += row_size("F32", width)
        return parts[0], parts[1], parts[2]

    def ffn(
        self,
        cur: Tensor,
        il: int,
        activation: str,
        *,
        suffix: str = "",
        clamp: str = "",
        is_scaled: bool = False,
    ) -> Tensor:
        """A dense feed-forward block of `ffn_{up,gate,down}<suffix>`, parallel gate (build_ffn)."""
        if self.w(il, f"ffn_up{suffix}") is None:  # nothing but the activation
            return self.activate(cur, activation, il)
        up = self.linear(cur, il, f"ffn_up{suffix}", is_scaled=is_scaled)
        if self.w(il, f"ffn_gate{suffix}") is not None:
            gate = self.linear(cur, il, f"ffn_gate{suffix}", is_scaled=is_scaled)
            cur = self.gated(gate, up, activation, clamp)
        else:
            cur = self.activate(up, activation, il)
        if self.w(il, "ffn_sub_norm") is not None:
            cur = self.layer_norm(cur, il, "ffn_sub_norm")
        return self.linear(cur, il, f"ffn_down{suffix}", is_scaled=is_scaled or self.is_down_scaled)

    def linear(self, cur: Tensor, il: int, name: str, *, is_scaled: bool = False) -> Tensor:
        """The projection `blk.<il>.<name>`, with its bias where there is one."""
        weight = self.need(self.w(il, name))
        cur = self.mul_mat(weight, cur)
        bias = self.b(il, name) if "f" not in self.unread else None
        cur = self.add(cur, bias) if bias is not None else cur
        return self.scaled(cur, weight) if is_scaled else cur

    def gated(self, gate: Tensor, up: Tensor, activation: str, clamp: str = "") -> Tensor:
        """The activation of a gated block; `clamp` limits SiLU in one operation ("fused") or in several."""
        if activation == "silu" and clamp == "fused":
            return self.glu(gate, up, "swiglu_clamp")
        if activation == "silu" and clamp == "split":
            up = self.clamp(up)
            return self.mul(self.clamp(self.unary(gate, "silu")), up)
        if activation == "situ":
            out = self.scale(self.unary(self.scale(gate), "tanh"))
            out = self.mul(out, self.unary(gate, "sigmoid"))
            if self.number("activation.situ_linear_beta") > 0.0:
                up = self.scale(self.unary(self.scale(up), "tanh"))
            return self.mul(out, up)
        return self.glu(gate, up, GATED_GLU[activation])

    def activate(self, cur: Tensor, activation: str, il: int) -> Tensor:
        """The activation of a block without a gate, or with gate and up in one tensor."""
        if activation in ("swiglu", "geglu", "reglu"):
            return self.glu(cur, None, activation)
        if activation == "relu_sqr":
            return self.like("SQR", self.unary(cur, "relu"))
        cur = self.unary(cur, activation)
        scales = self.weight(f"blk.{il}.ffn.act.scales", il) if activation == "gelu" else None
        return self.div(cur, scales) if scales is not None else cur

    # --- the end

    def output_weight(self) -> Tensor:
        """output.weight, or the copy of the token embedding in its place; BitNet has no copy."""
        own = self.weight("output.weight")
        if own is not None:
            return own
        key = "output.weight" if self.facts.is_output_tied else None
        return self.need(self.weight("token_embd.weight", key=key))

    def soft_cap(self, cur: Tensor) -> Tensor:
        """cap * tanh(x / cap)."""
        return self.scale(self.unary(self.scale(cur), "tanh"))
