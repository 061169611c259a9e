"""What mixes tokens in a layer: the attention or the recurrent block of the layer's row, by the row's codes.

The blocks themselves mirror src/models/*.cpp; which one a layer has is what those files' layer loops decide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from placement.llamacpp.graph.blocks import block_attention, has_blocks
from placement.llamacpp.graph.builder import Builder, UnknownGraph
from placement.llamacpp.graph.compressed import compressed_attention
from placement.llamacpp.graph.feed import feed
from placement.llamacpp.graph.heads import (
    attended,
    gated_query_attention,
    no_cache_attention,
    plain_attention,
    prepared_heads,
)
from placement.llamacpp.graph.latent import gated_latent_attention, latent_attention, sparse_attention
from placement.llamacpp.graph.linear import (
    KDA,
    KDA_BOUNDED,
    KDA_BOUNDED_LOW,
    KDA_DIRECT,
    kda_layer,
    lightning_layer,
)
from placement.llamacpp.graph.pools import pool_mask_of, pooled_latent_attention
from placement.llamacpp.graph.recurrent import gated_delta_layer
from placement.llamacpp.graph.row import Attention, Recurrent
from placement.llamacpp.graph.state_space import mamba2_layer, mamba_layer, plamo2_layer, shortconv_layer
from placement.llamacpp.graph.tensor import GraphTensor

Mixer = Callable[[Builder, int, GraphTensor], GraphTensor]


def input_norm(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The norm before attention."""
    if builder.w(il, "attn_norm") is None and builder.row.has_norm_weights:
        return cur
    return builder.layer_norm(cur, il, "attn_norm", builder.row.norm)


def mix(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Attention, or the layer's recurrent block."""
    row = builder.row
    if row.is_norm_expanded:
        builder.expand(cur)
    if builder.layer(il).is_recurrent or row.recurrent == "mamba2_beside":
        if row.recurrent is None:
            raise UnknownGraph("a recurrent layer of an architecture that has none elsewhere")
        return RECURRENT[row.recurrent](builder, il, cur)
    if row.feed == "layer" and builder.layer(il).n_ff:
        return feed(builder, il, cur)
    return ATTENTION[row.attention](builder, il, cur)


# --- attention


def _where_heads(attend: Mixer) -> Mixer:
    """That attention in layers with K and V; the others have a projection, or nothing (Deci)."""

    def mixed(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
        if builder.layer(il).n_head_kv:
            return attend(builder, il, cur)
        return builder.lora_mm(builder.w(il, "attn_output"), cur) if builder.layer(il).n_head else cur

    return mixed


def _blocks(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    q, k, v = prepared_heads(builder, il, cur)
    attend = block_attention if has_blocks(builder, il) else attended
    return attend(builder, il, cur, q, k, v)


def _gated_query(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    is_pooled = builder.row.has_pools and builder.indexer_cache(il) is not None
    return gated_query_attention(builder, il, cur, pool_mask_of(builder, il, cur) if is_pooled else None)


ATTENTION: dict[Attention, Mixer] = {
    "plain": _where_heads(plain_attention),
    "no_cache": _where_heads(no_cache_attention),
    "blocks": _where_heads(_blocks),
    "mla": latent_attention,
    "mla_plain": partial(latent_attention, has_rope=False, is_reshaped=False),
    "mla_gated": gated_latent_attention,
    "mla_plain_gated": sparse_attention,
    "dsa": sparse_attention,
    "compressed": compressed_attention,
    "pools_latent": pooled_latent_attention,
    "gated_q": _gated_query,
    "gated_q_views": _gated_query,
}


# --- recurrent blocks


def _mamba2_beside(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Attention and Mamba 2 side by side (Falcon H1)."""
    attn = plain_attention(builder, il, cur)
    return builder.add(attn, mamba2_layer(builder, il, input_norm(builder, il, builder.shared.layer_input)))


RECURRENT: dict[Recurrent, Mixer] = {
    "mamba": mamba_layer,
    "mamba2": mamba2_layer,
    "mamba2_beside": _mamba2_beside,
    "plamo2": plamo2_layer,
    "shortconv": shortconv_layer,
    "lightning": lightning_layer,
    "gdn": gated_delta_layer,
    "gdn_split": partial(gated_delta_layer, is_split=True),
    "gdn_padded": partial(gated_delta_layer, is_split=True, is_padded=True),
    "kda": partial(kda_layer, variant=KDA),
    "kda_direct": partial(kda_layer, variant=KDA_DIRECT),
    "kda_bounded": partial(kda_layer, variant=KDA_BOUNDED),
    "kda_bounded_low": partial(kda_layer, variant=KDA_BOUNDED_LOW),
}
