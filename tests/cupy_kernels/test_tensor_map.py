"""Tensor maps as the driver is asked for them; what the CPU build makes of them is tested with its kernels."""

import ctypes

import pytest

from cupy_kernels import tensor_map
from cupy_kernels.parameters import MAP_BYTES
from cupy_kernels.tensor_map import TensorMap

MADE = TensorMap("k", "bfloat16", (128, 300, 4, 2), (1024, 256, 307200), (64, 176, 1, 1))


@pytest.fixture
def driver(monkeypatch):
    """Stand in for the driver: note what it is asked for, and write a map of known bytes."""
    asked = {}

    def encode(place, dtype, rank, address, extents, strides, box, steps, *modes):
        asked.update(
            place=place.value,
            dtype=dtype,
            address=address.value,
            extents=tuple(extents),
            strides=tuple(strides),
            box=tuple(box),
            steps=tuple(steps),
            modes=modes,
        )
        assert rank.value == len(extents)
        ctypes.memmove(place.value, bytes(range(MAP_BYTES)), MAP_BYTES)
        return asked.get("status", 0)

    monkeypatch.setattr(tensor_map, "_encode_tiled", lambda: encode)
    return asked


@pytest.mark.parametrize(("dtype", "number"), [("float16", 6), ("bfloat16", 9)])
def test_a_map_is_encoded_by_the_drivers_numbers(driver, dtype, number):
    made = TensorMap("k", dtype, MADE.extents, MADE.strides, MADE.box)
    assert made.encode(1 << 40 | 64) == bytes(range(MAP_BYTES))
    assert driver["place"] % 64 == 0
    assert driver["address"] == 1 << 40 | 64
    assert (driver["extents"], driver["strides"], driver["box"]) == (MADE.extents, MADE.strides, MADE.box)
    assert driver["steps"] == (1, 1, 1, 1)
    assert (driver["dtype"], driver["modes"]) == (number, (0, 3, 3, 0))


def test_the_drivers_numbers_are_those_of_its_bindings():
    bindings = pytest.importorskip("cuda.bindings.driver")
    for dtype, number in tensor_map.DATA_TYPES.items():
        assert number == getattr(bindings.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{dtype.upper()}")
    assert tensor_map.INTERLEAVE_NONE == bindings.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert tensor_map.SWIZZLE_128_BYTES == bindings.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    assert tensor_map.L2_PROMOTION_256_BYTES == bindings.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    assert tensor_map.FILL_ZEROS == bindings.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


def test_a_map_that_the_driver_does_not_take_is_named(driver):
    driver["status"] = 1
    with pytest.raises(RuntimeError, match=r"encodes no tensor map of TensorMap\(array='k'.* at 0x40: CUresult 1"):
        MADE.encode(64)
