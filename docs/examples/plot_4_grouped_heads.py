"""
Grouped heads: what sharing keys saves
======================================

In grouped-query attention several query heads share one head of keys and values. The KV cache shrinks by the size of
the group. What happens to the traffic depends on who loads the shared tile.
"""

import matplotlib.pyplot as plt
import numpy as np

import simattn

heads, groups = 32, [1, 2, 4, 8, 16, 32]
shape = {"heads": heads, "q_len": 8192, "head_dim": 128, "causal": True}

print("KV heads   K and V   reads of K, forward   reads of K, backward   k_repeated writes")
for kv_heads in groups:
    forward = simattn.profile("flash2", kv_heads=kv_heads, **shape)
    backward = simattn.profile("flash2", kv_heads=kv_heads, direction="backward", **shape)
    repeated = simattn.count("flash2", kv_heads=kv_heads, repeat_kv=True, **shape)
    sizes = (
        2 * kv_heads * 8192 * 128 * 2,
        forward.traffic.by_array["k"].hbm_read_bytes,
        backward.traffic.by_array["k"].hbm_read_bytes,
        repeated.by_array["k_repeated"].hbm_write_bytes,
    )
    cells = (f"{size / 1e6:{width}.1f} MB" for size, width in zip(sizes, (6, 17, 18, 15), strict=True))
    print(f"{kv_heads:8} {' '.join(cells)}")

# %%
# Forward, each query head is a thread block of its own and loads the shared tile itself: the bytes that enter the
# multiprocessors do not change at all. (L2 may serve the repeated loads, so DRAM sees fewer.) Backward, one thread
# block walks the whole group with its key tile on chip, so K and V are loaded once per KV head.
#
# What shrinks in the forward pass is the memory that the arrays take, and with it what must be moved at least:

from simattn.bounds import compulsory_traffic

problems = [simattn.AttentionProblem(kv_heads=kv_heads, **shape) for kv_heads in groups]
once = np.array([compulsory_traffic(problem, "forward").hbm_bytes for problem in problems])
counted = np.array([simattn.count("flash2", kv_heads=kv_heads, **shape).hbm_bytes for kv_heads in groups])
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(groups, counted / 1e9, "o-", color="#0072b2", label="FlashAttention-2, counted")
axes.plot(groups, once / 1e9, "s--", color="#6e7781", label="inputs and outputs once")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(groups, [str(kv_heads) for kv_heads in groups])
axes.set(xlabel="KV heads (of 32 query heads)", ylabel="GB between memory and multiprocessors")
axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
axes.minorticks_off()
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)

# %%
# Libraries without grouped kernels copy the keys out to every query head first (``repeat_kv``). That gives the saving
# back: K and V as large as with 32 KV heads, written once and kept until the backward pass. In the backward pass, the
# heads of a group must also sum their gradients, and the three ways to do so differ in bytes:

print("grouped_gradients       dK and dV and their sums, MB")
for grouped in ("loop", "expand", "reduce"):
    traffic = simattn.count("flash2", kv_heads=8, direction="backward", grouped_gradients=grouped, **shape)
    parts = [item for name, item in traffic.by_array.items() if name.startswith(("dk", "dv"))]
    total = sum(item.hbm_read_bytes + item.hbm_write_bytes + item.hbm_reduce_bytes for item in parts)
    print(f"{grouped:10} {total / 1e6:38.1f}")
plt.show()
