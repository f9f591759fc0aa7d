"""Error budgets of the kernels."""

from __future__ import annotations

import numpy as np


def rounding_floors(problem, inputs):
    """What roundings cost where the low-precision reference is exact by luck, in the output and the log-sum-exp.

    An error in a score becomes a relative error of its probability, and scores are rounded three times: as products,
    times the scale, and as the scale times log2(e) itself.
    """
    # What is not finite is hidden, or makes the reference's row NaN too.
    q, k, v = (np.nan_to_num(np.abs(inputs[name].astype(np.float64)), nan=0.0, posinf=0.0) for name in "qkv")
    scores = problem.scale * np.einsum("bihd,bjhd->bhij", q, np.repeat(k, problem.group_size, axis=2))
    growth = 1 + scores.max(initial=0.0)
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
    largest = v.max(initial=0.0)
    return (4 * unit["float32"] * growth + unit[problem.dtype]) * largest, 5 * unit["float32"] * growth
