"""
The KV cache: what a pool is filled with
========================================

Requests arrive at random and are served from the same pool by two allocators: one that reserves a chunk for the output
length rounded up to a power of two, and one that takes pages of 16 tokens when they are needed.
"""

import matplotlib.pyplot as plt

from simattn import MODELS, kv_cache, plots

workload = kv_cache.generate_workload(
    150, prompt=kv_cache.Geometric(161), output=kv_cache.Geometric(338), arrivals=kv_cache.Poisson(0.05)
)
pool_tokens = MODELS["OPT-13B"].cache.tokens_in(12 << 30)
runs = kv_cache.compare_allocators(workload, ["buddy-pow2", "paged"], pool_tokens=pool_tokens)
print(runs)

figure, axes = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
for run, ax in zip(runs, axes, strict=True):
    plots.kv_cache_over_time(run, ax=ax)
plt.show()

# %%
# With chunks the queue forms early: every free slot is then lost to the request at its head, which does not fit in any
# free chunk, and most of the rest is set aside. With pages the same requests hardly wait, and are served in half the
# time.
