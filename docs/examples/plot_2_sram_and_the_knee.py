"""
Traffic against SRAM: the slope and the knee
============================================

FlashAttention moves Θ(N²d²/M) elements, where M is the number of elements that the SRAM of a thread block holds. That
is the best possible as long as M ≥ d². Below, where even a square tile is narrower than d, an algorithm that also cuts
the head dimension needs only Θ(N²d/√M).

Both statements are visible in counts. Each point uses the largest tiles that fit; the dashed lines are the two
expressions with constant 1, and they meet at the knee, M = d².
"""

import matplotlib.pyplot as plt

import simattn

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
simattn.plots.traffic_against_sram(["flash2", "small_cache"], q_len=1 << 16, head_dim=256, ax=axes)

# %%
# The lines of the two programs cross near the knee: that they do so at M = d² is an accident of their constants. What
# the theorem speaks of is the slope on each side. From the counts:

import math

d, item = 256, 4
print("M in units of d²     flash2  small_cache")
for low, high in ((1 / 32, 1 / 4), (1 / 4, 2), (8, 64), (64, 512)):
    slopes = []
    for name in ("flash2", "small_cache"):
        few, many = (
            simattn.count(
                name, q_len=1 << 22, head_dim=d, dtype="float32", plan="fit", sram_bytes=int(item * m * d * d)
            ).hbm_bytes
            for m in (low, high)
        )
        slopes.append(math.log(many / few) / math.log(high / low))
    print(f"{low:8.4g} to {high:6.4g} {slopes[0]:12.2f} {slopes[1]:12.2f}")

# %%
# Below the knee the small-cache program has its slope of −½. FlashAttention-2 is steeper than −1 there, because its
# tiles of whole rows come in few sizes. Above the knee it is steeper again for a while, until the key tile, which stays
# at d rows, is small beside the query tile. Far above, its slope is −1, where the small-cache tiles are still no
# larger than √M.
#
# All algorithms in one picture, with a length and a head dimension that are more usual:

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
simattn.plots.traffic_against_sram(ax=axes)
plt.show()
