from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from exact import chain, nearest
from hypothesis import given
from hypothesis import strategies as st

from cupy_kernels.prove_tensor_cores import KINDS, SUMS, draw_operands, rounding_to
from simattn.arithmetic import tensor_cores
from simattn.arithmetic.tensor_cores import DotAdd, add_products
from simattn.testing import assert_same_bits


def model(a: Any, b: Any, c: Any, unit: DotAdd, seen: Any = None) -> Any:
    total, one = np.array(c, np.float32)[None], np.zeros(1, np.intp)
    masks = {} if seen is None else {"seen": seen[None], "seen_of": one}
    add_products(total, a[None], one, b[None], one, unit, **masks)
    return total[0]


# Operands of every kind

FORMATS: dict[str, tuple[DotAdd, str]] = {
    **{name: (unit, name) for name, unit in tensor_cores.WGMMA.items()},
    "tfloat32": (tensor_cores.TFLOAT32, "float32"),
    "float16 sum": (tensor_cores.FLOAT16_SUM, "float16"),
    "float8 mma": (replace(tensor_cores.FLOAT8_E4M3, fraction_bits=25, kept_bits=23), "float8_e4m3fn"),
}


def rounded_to_tfloat32(values: Any) -> Any:
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def operands(kind: str, shape: tuple[int, int, int], name: str, number: int) -> tuple[Any, Any, Any]:
    """Draw a (rows, depth), b (depth, columns) and c (rows, columns)."""
    (unit, storage), (rows, depth, columns) = FORMATS[name], shape
    rounded = rounded_to_tfloat32 if name == "tfloat32" else rounding_to(storage)
    shapes = (rows, depth), (depth, columns), (rows, columns)
    drawn = draw_operands(kind, SUMS[number % len(SUMS)], shapes, np.random.default_rng(number), unit, rounded)
    with np.errstate(over="ignore", under="ignore"):
        before = drawn.before.astype(np.float16 if unit.rounding == "float16" else np.float32)
    return drawn.left, drawn.right, before.astype(np.float32)


cases = st.tuples(
    st.sampled_from(KINDS),
    st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 6)),
    st.integers(0, 2**32 - 1),
)


@pytest.mark.parametrize("name", FORMATS)
@given(case=cases)
def test_products_are_dot_adds_one_by_one(name: str, case: Any) -> None:
    kind, shape, number = case
    a, b, c = operands(kind, shape, name, number)
    assert_same_bits(model(a, b, c, FORMATS[name][0]), chain(a, b, c, FORMATS[name][0]))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@given(case=cases, share=st.sampled_from([0.05, 0.5, 0.97]))
def test_hidden_elements_take_no_part(name: str, case: Any, share: float) -> None:
    kind, shape, number = case
    a, b, c = operands(kind, shape, name, number)
    seen = np.random.default_rng(number + 1).random(a.shape) < share
    assert_same_bits(model(a, b, c, FORMATS[name][0], seen), chain(a, b, c, FORMATS[name][0], seen))


@given(case=cases, products=st.integers(1, 5))
def test_each_product_has_the_matrices_it_is_given(case: Any, products: int) -> None:
    kind, shape, number = case
    unit, generator = FORMATS["bfloat16"][0], np.random.default_rng(number)
    drawn = [operands(kind, shape, "bfloat16", number + index) for index in range(3)]
    left, right = np.stack([a for a, _, _ in drawn]), np.stack([b for _, b, _ in drawn])
    seen = generator.random((2, *left.shape[1:])) < 0.5
    left_of, right_of, seen_of = (generator.integers(0, size, products) for size in (3, 3, 2))
    total = np.stack([drawn[index % 3][2] for index in range(products)])
    expected = [model(left[left_of[i]], right[right_of[i]], total[i], unit, seen[seen_of[i]]) for i in range(products)]
    add_products(total, left, left_of, right, right_of, unit, seen, seen_of)
    assert_same_bits(total, np.stack(expected))


@given(
    case=cases,
    depth=st.sampled_from([4, 8, 16, 32]),
    bits=st.integers(20, 27),
    kept=st.sampled_from([13, 22, 23]),
    lowest=st.sampled_from([-133, -40, -1000]),
)
def test_every_parameter_is_that_of_the_definition(case: Any, depth: int, bits: int, kept: int, lowest: int) -> None:
    kind, shape, number = case
    changed = replace(tensor_cores.BFLOAT16, depth=depth, fraction_bits=bits, kept_bits=kept, lowest_exponent=lowest)
    a, b, c = operands(kind, shape, "bfloat16", number)
    assert_same_bits(model(a, b, c, changed), chain(a, b, c, changed))


OTHER = {
    "a fraction bit less": {"fraction_bits": 24},
    "a fraction bit more": {"fraction_bits": 26},
    "half the depth": {"depth": 8},
    "twice the depth": {"depth": 32},
    "a kept bit less": {"kept_bits": 22},
    "no floor of the exponent": {"lowest_exponent": -1000},
}


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_other_parameters_give_other_bits(name: str, other: str) -> None:
    unit = FORMATS[name][0]
    kinds = {kind: operands(kind, (100, 128, 100), name, SUMS.index("normal")) for kind in ("normal", "tiny")}
    found = {
        kind
        for kind, drawn in kinds.items()
        if (model(*drawn, unit) != model(*drawn, replace(unit, **OTHER[other]))).any()
    }
    if other == "no floor of the exponent":  # products of float16 are never below it
        assert found == ({"tiny"} if name == "bfloat16" else set())
    else:
        assert "normal" in found


@pytest.mark.parametrize("other", [{"rounding": nearest}, {"renormalised": True}], ids=["nearest", "renormalised"])
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_other_rules_give_other_bits(name: str, other: dict[str, Any]) -> None:
    a, b, c = operands("normal", (24, 64, 24), name, SUMS.index("normal"))
    assert (model(a, b, c, FORMATS[name][0]) != chain(a, b, c, FORMATS[name][0], **other)).any()


@given(case=cases, extra=st.integers(1, 40), name=st.sampled_from(["bfloat16", "float16"]))
def test_zeros_at_the_end_change_nothing(case: Any, extra: int, name: str) -> None:
    kind, shape, number = case
    a, b, c = operands(kind, shape, name, number)
    unit = FORMATS[name][0]
    padded_a, padded_b = np.pad(a, ((0, 0), (0, extra))), np.pad(b, ((0, extra), (0, 0)))
    assert_same_bits(model(padded_a, padded_b, c, unit), model(a, b, c, unit))


@given(case=cases, name=st.sampled_from(["bfloat16", "float16"]))
def test_the_order_inside_a_dot_add_does_not_matter(case: Any, name: str) -> None:
    kind, (rows, _, columns), number = case
    a, b, c = operands(kind, (rows, 16, columns), name, number)
    order, unit = np.random.default_rng(number).permutation(16), FORMATS[name][0]
    assert_same_bits(model(a[:, order], b[order], c, unit), model(a, b, c, unit))


def test_nan_has_the_hardware_s_bits_and_zero_is_positive() -> None:
    a, b = np.full((1, 16), -0.0, np.float32), np.ones((16, 1), np.float32)
    unit = tensor_cores.BFLOAT16
    assert not np.signbit(model(a, b, np.full((1, 1), -0.0), unit)).any()
    for value in (np.nan, -np.nan):
        a[0, 3] = value
        assert model(a, b, np.zeros((1, 1)), unit).view(np.uint32) == 0x7FFFFFFF


def test_a_sum_of_the_largest_terms_is_exact() -> None:
    """The largest significands, all of one sign: more than int32 holds with the sum so far."""
    for name in ("bfloat16", "float16"):
        unit = FORMATS[name][0]
        largest = 2.0 - 2.0 ** (1 - unit.significand_bits)
        a, b = np.full((1, 32), largest, np.float32), np.full((32, 1), largest, np.float32)
        for sign in (1, -1):
            c = np.full((1, 1), sign * np.nextafter(np.float32(2), np.float32(0)))
            assert_same_bits(model(sign * a, b, c, unit), chain(sign * a, b, c, unit))
