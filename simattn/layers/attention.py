"""The attention in a layer: which programs it can be, the problem that they are given, and their calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from simattn.algorithms import ALGORITHMS, get_algorithm
from simattn.algorithms.algorithm import Algorithm
from simattn.api import Inputs, Run, closed_form, profile, run_inputs, run_inputs_backward
from simattn.hardware import Hardware
from simattn.layers.phases import PASSES, Lengths, Phase
from simattn.layers.results import LayerPart
from simattn.plan import PLAN_KINDS, PlanKind, check_choice
from simattn.problem import AttentionProblem, Direction
from simattn.traffic import Traffic

if TYPE_CHECKING:
    from simattn.layers.layer import AttentionLayer

Values = npt.NDArray[Any]

LAYER_NAMES = {"out": "attention_out", "dout": "dattention_out"}
"""What a layer calls the arrays that are the result of attention alone."""

GIVEN = frozenset(("q", "k", "v", "dout"))
"""What a layer has to give to a program."""

# Which programs


def program_of(algorithm: Algorithm, phase: Phase, one_pass: Direction) -> Direction | None:
    """Return the program that is the attention of a pass; None if the algorithm has none."""
    program = algorithm.step_direction if phase == "decode" else one_pass
    return program if program in algorithm.programs else None


def algorithms_of(phase: Phase) -> list[str]:
    """Return the algorithms whose usual problems, of a million tokens, can be the attention of a layer in a phase."""
    return [
        name
        for name, algorithm in ALGORITHMS.items()
        if _missing_program(algorithm, phase) is None
        and not any(_others_than_given(algorithm, phase, one_pass) for one_pass in PASSES[phase])
    ]


def _missing_program(algorithm: Algorithm, phase: Phase) -> str | None:
    """Return why an algorithm can have no problem in a phase, if so."""
    for one_pass in PASSES[phase]:
        program = program_of(algorithm, phase, one_pass)
        if program is None:
            wanted = "decoding step" if phase == "decode" else f"{one_pass} pass"
            return f"there is no program for a {wanted}, only {list(algorithm.directions)}"
        if program == "decode" and algorithm.problem_class.decode_cache is not None:
            return (
                f"its decoding program takes {algorithm.problem_class.decode_cache}, where a layer has the keys and "
                "values of all tokens in their order"
            )
    return None


def _others_than_given(algorithm: Algorithm, phase: Phase, one_pass: Direction) -> set[str]:
    """Return what the usual problems' program of a pass is given that a layer has not."""
    program = program_of(algorithm, phase, one_pass)
    assert program is not None
    usual = algorithm.problem_class(**algorithm.problem_class.usual_arguments(program, 1 << 20))
    return set(usual.inputs(program)) - GIVEN


def _refused(algorithm: str, phase: Phase, reason: str) -> ValueError:
    return ValueError(
        f"algorithm={algorithm!r} with phase={phase!r} of a layer: {reason}; expected a program that is given q, k and "
        f"v alone, as usually that of {algorithms_of(phase)}"
    )


# The attention


def problem_of(
    layer: AttentionLayer,
    lengths: Lengths,
    problem_class: type[AttentionProblem] = AttentionProblem,
    own: Mapping[str, Any] | None = None,
) -> AttentionProblem:
    """Return the attention in a layer as a problem of this class, with the fields that the class adds."""
    return problem_class(
        batch=lengths.batch,
        heads=layer.heads,
        kv_heads=layer.kv_heads,
        q_len=lengths.queries,
        kv_len=lengths.keys,
        head_dim=layer.head_dim,
        value_dim=layer.value_dim,
        dtype=layer.dtype,
        causal=layer.causal,
        window=layer.window,
        **(own or {}),
    )


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention in a layer.

    Attributes
    ----------
    algorithm, problem
        What is run, and on which problem.
    forward_program
        What is run as the forward pass: "forward", or in decoding "decode" where the algorithm has that.
    plan, plan_fields
        Kind of the plans, and those of their fields that are given.
    machine
        The arguments ``hardware`` and ``sram_bytes`` of a call.
    """

    algorithm: str
    problem: AttentionProblem
    forward_program: Direction
    plan: PlanKind | None
    plan_fields: Mapping[str, Any]
    machine: Mapping[str, Any]

    @classmethod
    def checked(
        cls,
        layer: AttentionLayer,
        phase: Phase,
        lengths: Lengths,
        algorithm: str,
        plan: PlanKind | None,
        hardware: str | Hardware | None,
        sram_bytes: int | None,
        options: Mapping[str, Any],
    ) -> Attention:
        """Return what the arguments of :meth:`simattn.AttentionLayer.profile` mean."""
        if plan is not None:
            # One object would be the plan of two programs in training.
            check_choice("plan", plan, PLAN_KINDS)
        spec = get_algorithm(algorithm)
        reason = _missing_program(spec, phase)
        if reason is not None:
            raise _refused(algorithm, phase, reason)
        for name, value in options.items():
            if name not in spec.own_arguments:
                raise TypeError(
                    f"{name}={value!r}: no argument of a layer and no field of a plan or problem of {algorithm}; "
                    f"options: {spec.own_arguments}"
                )
        of_problem = {item.name for item in fields(spec.problem_class)}
        problem = problem_of(
            layer,
            lengths,
            spec.problem_class,
            {name: value for name, value in options.items() if name in of_problem},
        )
        made = cls(
            algorithm=algorithm,
            problem=problem,
            forward_program=program_of(spec, phase, "forward") or "forward",
            plan=plan,
            plan_fields={name: value for name, value in options.items() if name not in of_problem},
            machine={"hardware": hardware, "sram_bytes": sram_bytes},
        )
        for one_pass in PASSES[phase]:
            program = made._program(one_pass)
            others = sorted(set(problem.inputs(program)) - GIVEN)
            if others:
                raise _refused(algorithm, phase, f"the {program} program of this problem is given {others} too")
            problem.check_direction(program)
        return made

    def without_tiles(self) -> Attention:
        """Return the attention of the forward pass before a backward pass with tiles of its own."""
        return replace(self, plan_fields={name: value for name, value in self.plan_fields.items() if name != "tiles"})

    # Counting

    def profile(self, one_pass: Direction) -> LayerPart:
        """Count the program of a pass."""
        return attention_part(profile(self.algorithm, direction=self._program(one_pass), **self._arguments))

    def closed_form(self, one_pass: Direction) -> Traffic:
        """Return what the formula of a pass says."""
        return renamed(closed_form(self.algorithm, direction=self._program(one_pass), **self._arguments))

    # Running

    def run_forward(self, arrays: Mapping[str, Values], arithmetic: str) -> Run:
        """Run the forward pass on q, k and v, (batch, length, heads, columns)."""
        return run_inputs(
            self.algorithm,
            Inputs(dict(arrays), self._problem_arguments),
            arithmetic=arithmetic,
            direction=self.forward_program,
            plan=self.plan,
            **self.machine,
            **self.plan_fields,
        )

    def run_backward(self, arrays: Mapping[str, Values], saved: Mapping[str, Values], arithmetic: str) -> Run:
        """Run the backward pass on q, k, v and dout, and what the forward pass saved."""
        return run_inputs_backward(
            self.algorithm,
            Inputs(dict(arrays), self._problem_arguments),
            self.machine,
            saved=saved,
            arithmetic=arithmetic,
            plan=self.plan,
            **self.plan_fields,
        )

    def _program(self, one_pass: Direction) -> Direction:
        return self.forward_program if one_pass == "forward" else one_pass

    @property
    def _problem_arguments(self) -> dict[str, Any]:
        return {item.name: getattr(self.problem, item.name) for item in fields(self.problem)}

    @property
    def _arguments(self) -> dict[str, Any]:
        return {**self._problem_arguments, "plan": self.plan, **self.machine, **self.plan_fields}


def renamed(traffic: Traffic) -> Traffic:
    """Return an attention's traffic by the layer's names of the arrays."""
    return Traffic({LAYER_NAMES.get(name, name): counters for name, counters in traffic.by_array.items()})


def attention_part(run: Run) -> LayerPart:
    """Return the counts of an attention as those of a part of the layer."""
    return LayerPart(
        name="attention backward" if run.direction == "backward" else "attention",
        direction=run.direction,
        traffic=renamed(run.traffic),
        operations=run.operations,
        peak_sram_bytes=run.peak_sram_bytes,
        peak_register_bytes=run.peak_register_bytes,
    )
