"""The problem's defaults and its refusals: each names the argument, what it was and what was expected."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given

from simattn import AttentionProblem, BlockMask
from simattn.arithmetic.formats import FLOAT8, ITEM_BYTES, numpy_dtype
from simattn.testing import attention_problems


def test_defaults_follow_the_other_arguments():
    problem = AttentionProblem(heads=6, q_len=10, head_dim=16)
    assert (problem.batch, problem.kv_heads, problem.kv_len, problem.value_dim) == (1, 6, 10, 16)
    assert problem.scale == 1 / math.sqrt(16)
    assert problem.group_size == 1
    assert AttentionProblem(heads=6, kv_heads=2, q_len=1).group_size == 3


@pytest.mark.parametrize("dtype", list(ITEM_BYTES))
def test_storage_formats(dtype):
    problem = AttentionProblem(q_len=1, dtype=dtype)
    assert problem.item_bytes == numpy_dtype(dtype).itemsize
    assert problem.is_float8 == (dtype in FLOAT8)
    assert problem.output_dtype == ("bfloat16" if dtype in FLOAT8 else dtype)
    assert AttentionProblem(q_len=1, dtype=numpy_dtype(dtype)) == problem


def test_numpy_integers_are_integers():
    problem = AttentionProblem(q_len=np.int64(10**12), heads=np.int32(4), window=[np.int16(3), None])
    assert type(problem.q_len) is type(problem.heads) is int
    assert problem.window == (3, None)


def test_a_window_without_limits_is_none():
    assert AttentionProblem(q_len=4, window=(None, None)).window is None


@given(attention_problems())
def test_problems_are_frozen_and_round_trip(problem):
    assert pickle.loads(pickle.dumps(problem)) == problem
    assert hash(problem) == hash(pickle.loads(pickle.dumps(problem)))
    with pytest.raises(FrozenInstanceError):
        problem.q_len = 3


MASK = BlockMask.from_array(np.ones((2, 3), bool), q_block=4, kv_block=4)

REFUSED = [
    ({"q_len": -1}, ValueError, "q_len=-1: expected an integer of at least 0"),
    ({"kv_len": -5}, ValueError, "kv_len=-5: expected an integer of at least 0"),
    ({"batch": -1}, ValueError, "batch=-1"),
    ({"heads": 0}, ValueError, "heads=0: expected an integer of at least 1"),
    ({"kv_heads": 0}, ValueError, "kv_heads=0"),
    ({"head_dim": 0}, ValueError, "head_dim=0"),
    ({"value_dim": -8}, ValueError, "value_dim=-8"),
    ({"q_len": 2.0}, TypeError, r"q_len=2\.0 is a float: expected an integer"),
    ({"q_len": "8"}, TypeError, "q_len='8' is a str: expected an integer"),
    ({"q_len": None}, TypeError, "q_len=None is a NoneType"),
    ({"q_len": True}, TypeError, "q_len=True is a bool"),
    ({"head_dim": math.nan}, TypeError, "head_dim=nan is a float"),
    ({"heads": 6, "kv_heads": 4}, ValueError, "kv_heads=4 does not divide heads=6"),
    ({"heads": 2, "kv_heads": 4}, ValueError, "kv_heads=4 does not divide heads=2"),
    ({"dtype": "float64"}, ValueError, "dtype='float64'.*expected one of.*bfloat16"),
    ({"dtype": "bf16"}, ValueError, "dtype='bf16'.*expected one of"),
    ({"dtype": np.int32}, ValueError, "dtype='int32'.*expected one of"),
    ({"dtype": 7}, ValueError, "dtype='7'.*expected one of"),
    ({"scale": 0}, ValueError, r"scale=0\.0: expected a finite number above 0"),
    ({"scale": -1.0}, ValueError, r"scale=-1\.0"),
    ({"scale": math.inf}, ValueError, "scale=inf"),
    ({"scale": math.nan}, ValueError, "scale=nan"),
    ({"scale": "big"}, TypeError, "scale='big': expected a number"),
    ({"causal": 1}, TypeError, "causal=1: expected a bool"),
    ({"causal": "yes"}, TypeError, "causal='yes'"),
    ({"window": 4}, TypeError, r"window=4: expected None or a pair"),
    ({"window": (1, 2, 3)}, TypeError, r"window=\(1, 2, 3\)"),
    ({"window": (-1, 0)}, ValueError, r"window=\(-1, 0\): expected counts of at least 0, or None"),
    ({"window": (0, 1.5)}, TypeError, r"window\[1\]=1\.5 is a float"),
    ({"block_mask": np.ones((2, 2), bool)}, TypeError, "block_mask is a ndarray: expected a simattn.BlockMask"),
    ({"q_len": 8, "kv_len": 16, "block_mask": MASK}, ValueError, "kv_blocks=3.*expected 4 for kv_len=16"),
    ({"q_len": 9, "kv_len": 12, "block_mask": MASK}, ValueError, "q_blocks=2.*expected 3 for q_len=9"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED, ids=[case[2][:40] for case in REFUSED])
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        AttentionProblem(**{"q_len": 8, **arguments})
