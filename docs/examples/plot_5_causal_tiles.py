"""
Which tiles a mask leaves
=========================

A mask is applied element by element, but it saves traffic tile by tile: a tile in which no element is seen is not
visited, and one in which some are is visited whole.
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

import simattn

COLOURS = ("#e3e6ea", "#e69f00", "#0072b2")
CLASSES = ("empty: not visited", "partial: visited whole", "full")


def tile_classes(problem, q_tile, kv_tile):
    """Return 0, 1 or 2 for every tile that is empty, partial or full."""
    seen = problem.visible_elements()
    return np.array(
        [
            [
                1 * tile.any() + 1 * tile.all()
                for tile in np.split(rows, range(kv_tile, problem.kv_len, kv_tile), axis=1)
            ]
            for rows in np.split(seen, range(q_tile, problem.q_len, q_tile), axis=0)
        ]
    )


def draw(axes, problem, q_tile, kv_tile, title):
    """Draw the tiles of a problem's score matrix and the border of what is seen."""
    classes = tile_classes(problem, q_tile, kv_tile)
    rows, columns = problem.q_len, problem.kv_len
    axes.pcolormesh(
        np.minimum(np.arange(classes.shape[1] + 1) * kv_tile, columns),
        np.minimum(np.arange(classes.shape[0] + 1) * q_tile, rows),
        classes,
        cmap=ListedColormap(COLOURS),
        vmin=0,
        vmax=2,
        edgecolors="white",
        linewidth=1.5,
    )
    axes.contour(
        np.arange(columns) + 0.5,
        np.arange(rows) + 0.5,
        problem.visible_elements(),
        levels=[0.5],
        colors="#24292f",
        linewidths=1,
    )
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", title=title, xlabel="keys", ylabel="queries")
    counts = np.bincount(classes.ravel(), minlength=3)
    return dict(zip(("empty", "partial", "full"), counts.tolist(), strict=True))


problems = {
    "causal, 96 × 96": simattn.AttentionProblem(q_len=96, causal=True),
    "causal, 48 × 96": simattn.AttentionProblem(q_len=48, kv_len=96, causal=True),
    "window (31, 0)": simattn.AttentionProblem(q_len=96, window=(31, 0)),
    "window (15, 15)": simattn.AttentionProblem(q_len=96, window=(15, 15)),
}
figure, axes = plt.subplots(2, 2, figsize=(7.5, 8.2), layout="constrained")
figure.get_layout_engine().set(hspace=0.06)
for panel, (title, problem) in zip(axes.flat, problems.items(), strict=True):
    counts = draw(panel, problem, 16, 12, title)
    traffic = simattn.count("flash2", q_len=problem.q_len, kv_len=problem.kv_len, causal=problem.causal,
                            window=problem.window, tiles=(16, 12))  # fmt: skip
    visits = traffic.by_array["k"].hbm_read_bytes // (12 * 64 * 2)
    print(f"{title:16} {counts}, key tiles loaded: {visits}")
figure.legend(
    handles=[Patch(color=colour, label=name) for colour, name in zip(COLOURS, CLASSES, strict=True)],
    loc="outside lower center",
    ncols=3,
    frameon=False,
)

# %%
# Queries stand at the end of the keys: 48 queries on 96 keys are the last 48 positions, as in the prefill of a second
# chunk. The line is the border of what is seen; the key tiles that are loaded are the partial and the full ones.
#
# The smaller the tile, the closer the visited area comes to the half that a causal mask leaves, and the more often keys
# are loaded:

print("tile      visited part of the scores     K and V, MB")
for tile in (16, 32, 64, 128, 256, 512):
    run = simattn.profile("flash2", q_len=4096, causal=True, tiles=(tile, tile), enforce_capacity=False)
    whole = simattn.profile("flash2", q_len=4096, tiles=(tile, tile), enforce_capacity=False)
    part = run.operations.matmul_flops / whole.operations.matmul_flops
    keys = sum(run.traffic.by_array[name].hbm_read_bytes for name in ("k", "v"))
    print(f"{tile:4} {part:31.3f} {keys / 1e6:15.1f}")
plt.show()
