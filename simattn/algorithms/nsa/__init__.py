"""Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089v2): compressed, selected and windowed keys, gated.

Each branch has keys and values of its own. Queries attend to compressed blocks of keys, to the keys of the blocks that
these scores select, and to the last keys; the sum of the three, each times a gate, is the output.
"""

from __future__ import annotations

from simattn.algorithms.algorithm import Algorithm
from simattn.algorithms.nsa import closed_form, plan, program
from simattn.algorithms.nsa.plan import NsaPlan
from simattn.algorithms.nsa.problem import NsaProblem
from simattn.algorithms.nsa.reference import reference

ALGORITHM = Algorithm(
    name="nsa",
    title="Native Sparse Attention",
    source="Yuan et al. 2025, arXiv 2502.11089v2, Section 3",
    summary="Compressed keys, selected blocks of keys and a window of keys, attended to apart and added by gates.",
    family="sparse",
    plan_class=NsaPlan,
    problem_class=NsaProblem,
    reference=reference,
    programs={"forward": program.forward, "backward": program.backward, "decode": program.decode},
    closed_forms={
        "forward": closed_form.closed_form_forward,
        "backward": closed_form.closed_form_backward,
        "decode": closed_form.closed_form_decode,
    },
    paper_tiles=plan.paper_tiles,
    fit_tiles=plan.fit_tiles,
    gpu_tiles=plan.gpu_tiles,
    declare_saved=program.declare_saved,
)
