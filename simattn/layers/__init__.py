"""Whole attention layers: the projections W^Q, W^K, W^V and W^O around an attention, for self- and cross-attention.

A layer takes x, (batch, length, model_width), and in cross-attention a context, (batch, context_length,
context_width)::

    q = x w_q      k = context w_k      v = context w_v      y = attention(q, k, v) w_o

with x for the context in self-attention, and a bias added to each if asked. Grouped- and multi-query attention have
fewer heads in k and v than in q.

What is counted
---------------
- The projections are programs of :mod:`simattn.matrix_products`, the attention is any program of
  :data:`simattn.ALGORITHMS` that is given q, k and v alone, and backward the output's gradient, with its plan and the
  fields that its problems add. Each is a kernel of its own: the projections write q, k and v to memory, and attention
  reads them there. Nothing is fused.
- Nothing is laid out anew in between. A projection of (batch · length) rows and (heads · head_dim) columns writes
  the (batch, length, heads, head_dim) that attention takes.
- k and v are the KV cache: all keys and values in the order of their tokens. A projection that writes them appends to
  it, and attention reads it there.
- A decoding step runs the algorithm's program for it, if that takes such a cache, and else the forward program with the
  few new rows as queries. Programs that take another cache, or a state, are no attention of a layer.
- Every array is in the layer's storage format, gradients of weights too; what an optimiser does is not counted.
"""

from __future__ import annotations

from simattn.layers.layer import DTYPES, AttentionLayer
from simattn.layers.phases import PHASES, Phase
from simattn.layers.results import LayerFlops, LayerPart, LayerRun

__all__ = ["DTYPES", "PHASES", "AttentionLayer", "LayerFlops", "LayerPart", "LayerRun", "Phase"]
