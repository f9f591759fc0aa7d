"""
Traffic against length
======================

How the bytes between memory and multiprocessors grow with the sequence length, for every algorithm.

Attention to all keys moves Θ(N²) bytes for a given SRAM, FlashAttention included. What it changes is the constant. The
distance to the dashed line, inputs and outputs moved once, grows with N. Windows of a fixed size and linear attention
keep their distance. In MoBA and NSA each query attends to a fixed number of blocks, but its choice looks at a mean or a
compressed key of every block: a square with a small constant.
"""

import matplotlib.pyplot as plt

import simattn

shape = {"heads": 32, "kv_heads": 8, "head_dim": 128, "causal": True}
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
simattn.plots.traffic_against_length(ax=axes, **shape)

# %%
# Standard attention computes the whole score matrix even under a causal mask; the others skip what no query sees. The
# backward pass:

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
simattn.plots.traffic_against_length(ax=axes, direction="backward", **shape)

# %%
# The exponents, fitted to counts of 128k to 4M tokens; windows have a usual size:

from simattn.bounds import fit_exponents

for name, algorithm in simattn.ALGORITHMS.items():
    for direction in ("forward", "backward"):
        if direction in algorithm.directions:
            rows = []
            for length in (1 << exponent for exponent in range(17, 23)):
                usual = algorithm.problem_class.usual_arguments(direction, length)
                traffic = simattn.count(name, **shape, **usual, direction=direction)
                rows.append({"N": length, "bytes": traffic.hbm_bytes})
            print(f"{name:17} {direction:9} {fit_exponents(rows, ['N'], value='bytes')}")

# %%
# What the bytes are, at 16,384 tokens:

runs = [
    simattn.profile(name, q_len=1 << 14, direction=direction, **shape)
    for name in ("standard", "flash1", "flash2")
    for direction in ("forward", "backward")
]
figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
simattn.plots.traffic_by_array(runs, ax=axes)
plt.show()
