"""
The online softmax, number by number
====================================

Softmax of a row needs the row's maximum before the first exponential. The online softmax starts without it: it takes
the row in tiles and corrects what it has whenever the maximum rises. Here is one row of eight scores, two at a time.
"""

import matplotlib.pyplot as plt
import numpy as np

import simattn

scores = np.array([1.0, 2.0, 0.5, 1.5, 4.0, 3.0, 0.0, 2.5])
values = np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0])

row_max, row_sum, out = -np.inf, 0.0, 0.0
history = []
print("tile         max   correction      sum       out   out/sum")
for start in range(0, len(scores), 2):
    tile = slice(start, start + 2)
    new_max = max(row_max, scores[tile].max())
    correction = np.exp(row_max - new_max)
    weights = np.exp(scores[tile] - new_max)
    row_sum = correction * row_sum + weights.sum()
    out = correction * out + weights @ values[tile]
    row_max = new_max
    history.append((row_max, row_sum, out / row_sum))
    print(f"{scores[tile]!s:11} {row_max:4} {correction:12.4f} {row_sum:8.4f} {out:9.4f} {out / row_sum:9.4f}")

probabilities = np.exp(scores) / np.exp(scores).sum()
print(f"softmax(scores) @ values = {probabilities @ values:.4f}")

# %%
# The third tile raises the maximum from 2 to 4, and everything so far shrinks by e⁻² = 0.1353. No score is kept, and
# after each tile the quotient is the exact attention over the keys seen so far.

seen = np.arange(2, 9, 2)
exact = [np.exp(scores[:count]) @ values[:count] / np.exp(scores[:count]).sum() for count in range(1, len(scores) + 1)]
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.plot(range(1, 9), exact, color="#6e7781", linewidth=1, label="attention over the first keys, directly")
axes.plot(seen, [row[2] for row in history], "o", color="#0072b2", markersize=8, label="online, after each tile")
axes.set(xlabel="keys seen", ylabel="output")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)

# %%
# The simulated machine does the same. One query with these scores, in tiles of two keys: with q = 1 and a scale of 1,
# the keys are the scores.

q = np.ones((1, 1, 1, 1))
k, v = scores.reshape(1, 8, 1, 1), values.reshape(1, 8, 1, 1)
q, k, v = (array.astype(np.float32) for array in (q, k, v))
for passes in (1, 2, 3):
    run = simattn.run("online_softmax", q, k, v, scale=1.0, passes=passes, tiles=(1, 2), arithmetic="float64")
    read = run.traffic.by_array["k"].hbm_read_bytes
    print(f"passes={passes}: out {run.out.item():.4f}, log-sum-exp {run.lse.item():.4f}, keys read {read} bytes")

# %%
# Three passes over the keys find maximum, sum and output one after the other; two find the first two together; one pass
# finds everything, and that is FlashAttention's inner loop.
plt.show()
