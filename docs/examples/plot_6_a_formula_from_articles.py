"""
The formula n²/M of popular articles
====================================

Articles like to say that FlashAttention reduces memory accesses from O(n²) to O(n²/M). The paper says Θ(n²d²/M). The
missing d² is not a detail: without it, attention would read less than its own inputs.
"""

import matplotlib.pyplot as plt
import numpy as np

import simattn
from simattn.bounds import compulsory_traffic, flash_elements

d, sram_elements = 64, 116_000
lengths = [1 << exponent for exponent in range(9, 21)]
counted, inputs_and_outputs = [], []
for length in lengths:
    shape = {"q_len": length, "head_dim": d, "dtype": "float32"}
    counted.append(simattn.count("flash2", plan="fit", sram_bytes=4 * sram_elements, **shape).hbm_bytes // 4)
    problem = simattn.AttentionProblem(**shape)
    inputs_and_outputs.append(compulsory_traffic(problem, "forward").hbm_bytes // 4)

at = lengths.index(4096)
print(f"at n = 4096, d = {d}, M = {sram_elements}:")
print(f"  n²/M                      {4096**2 / sram_elements:12,.0f} elements")
print(f"  reading Q, K, V, writing O {inputs_and_outputs[at]:11,} elements")
print(f"  n²d²/M                    {flash_elements(4096, d, sram_elements):12,.0f} elements")
print(f"  counted                   {counted[at]:12,} elements")

# %%
# The article's formula gives 145 elements for a computation whose inputs and outputs are a million. The paper's
# expression is in the right place: the count approaches it in slope, with a constant factor.

figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
lines = (
    (counted, {"color": "#0072b2", "linewidth": 2, "marker": "o"}, "counted"),
    ([flash_elements(length, d, sram_elements) for length in lengths], {"color": "#009e73"}, "n²d²/M (paper)"),
    (inputs_and_outputs, {"color": "#6e7781", "linestyle": "--"}, "inputs and outputs once"),
    ([length**2 / sram_elements for length in lengths], {"color": "#d55e00"}, "n²/M (articles)"),
)
for numbers, style, name in lines:
    axes.plot(lengths, numbers, label=name, **style)
    axes.annotate(name, (lengths[-1], numbers[-1]), xytext=(8, 0), textcoords="offset points", va="center")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(lengths[1::2], ["1k", "4k", "16k", "64k", "256k", "1M"])
axes.set(xlabel=f"length n (d = {d}, M = {sram_elements:,} elements)", ylabel="elements moved")
axes.spines[["top", "right"]].set_visible(False)

# %%
# How far the article's formula is off, at every length:

ratio = np.array(counted) / (np.array(lengths, dtype=float) ** 2 / sram_elements)
for length, factor in zip(lengths, ratio, strict=True):
    print(f"n = {length:9,}: counted is {factor:9,.0f} n²/M = {factor / d**2:5.2f} n²d²/M")

# %%
# The first factor contains d² = 4096, which the formula lacks. The second is a constant of the order of one, once the
# quadratic term dominates.
plt.show()
