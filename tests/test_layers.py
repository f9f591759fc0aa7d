"""Attention layers: counts by program, formula and run; numbers against NumPy; gradients against differences."""

from __future__ import annotations

import doctest
import inspect
import math
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import simattn
from simattn import AttentionLayer
from simattn import layers as layers_module
from simattn.algorithms import ALGORITHMS
from simattn.layers import PHASES, LayerFlops
from simattn.machine import CapacityError
from simattn.matrix_products import ColumnSum, MatrixProduct, ProductTiles, Term
from simattn.testing import assert_within_error_budget, plan_options, windows
from simattn.traffic import COUNTERS

FORWARD = [name for name, spec in ALGORITHMS.items() if spec.takes_any_mask and "forward" in spec.directions]
BOTH = [name for name in FORWARD if "backward" in ALGORITHMS[name].directions]
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


# Strategies


@st.composite
def layers(draw, *, dtypes=tuple(STORED), cross=None, causal=None):
    kv_heads = draw(st.integers(1, 3))
    is_cross = draw(st.booleans()) if cross is None else cross
    return AttentionLayer(
        model_width=draw(st.integers(1, 12)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 8)),
        value_dim=draw(st.none() | st.integers(1, 8)),
        dtype=draw(st.sampled_from(dtypes)),
        biases=draw(st.booleans()),
        context_width=draw(st.integers(1, 12)) if is_cross else None,
        causal=draw(st.booleans()) if causal is None else causal,
        window=draw(windows(8)),
    )


@st.composite
def sizes(draw, layer, phase):
    """Draw the lengths of a phase."""
    found = {"batch": draw(st.integers(0, 3)), "length": draw(st.integers(0, 12))}
    if layer.is_cross_attention:
        found["context_length"] = draw(st.integers(0, 12))
    elif phase == "decode":
        found["cache_length"] = draw(st.integers(0, 12))
    return found


tiles = st.tuples(*(st.integers(1, 14) for _ in range(3)))


@st.composite
def layer_cases(draw, *, backward=False, **arguments):
    """Draw a layer, its inputs and the arguments of a run."""
    layer = draw(layers(**arguments))
    found = draw(sizes(layer, "backward" if backward else "prefill"))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    inputs = inputs_of(layer, generator, backward=backward, **found)
    algorithm = draw(st.sampled_from(BOTH if backward else FORWARD))
    options = {
        **draw(plan_options(ALGORITHMS[algorithm])),
        "algorithm": algorithm,
        "projection_tiles": draw(tiles),
        "tiles": draw(st.tuples(st.integers(1, 14), st.integers(1, 14))),
    }
    return layer, inputs, found, options


def inputs_of(layer, generator, *, batch=2, length=5, context_length=None, backward=False, dtype=None):
    stored = STORED[layer.dtype] if dtype is None else dtype

    def numbers(*shape):
        return generator.standard_normal(shape).astype(stored)

    inputs = {
        "x": numbers(batch, length, layer.model_width),
        "weights": layer.random_weights(int(generator.integers(99))),
    }
    if layer.is_cross_attention:
        inputs["context"] = numbers(batch, context_length, layer.context_width)
    if backward:
        inputs["dy"] = numbers(batch, length, layer.model_width)
    return inputs


# The reference: a layer as a textbook writes it


class Dense:
    """The layer with einsum, in float64, or in float32 with every matrix rounded to the storage format."""

    def __init__(self, layer, x, weights, context=None, rounded=False):
        self.layer, self.dtype = layer, np.float32 if rounded else np.float64
        self.stored = STORED[layer.dtype] if rounded else None
        self.x, self.weights = self.wide(x), {name: self.wide(array) for name, array in weights.items()}
        self.source = self.x if context is None else self.wide(context)
        self.q, self.k, self.v = (self.project(name) for name in "qkv")
        group = layer.heads // layer.kv_heads
        scale = self.dtype(1 / math.sqrt(layer.head_dim))
        self.keys, self.values = (np.repeat(array, group, axis=2) for array in (self.k, self.v))
        scores = self.round(scale * np.einsum("bqhd,bkhd->bhqk", self.q, self.keys))
        self.seen = self.mask(*scores.shape[2:])
        scores = np.where(self.seen, scores, -np.inf)
        top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
        weights_of_keys = np.exp(scores - np.where(top == -np.inf, 0, top))
        total = weights_of_keys.sum(axis=-1, keepdims=True)
        self.probabilities = self.round((weights_of_keys / np.where(total == 0, 1, total)).astype(self.dtype))
        self.out = self.round(np.einsum("bhqk,bkhd->bqhd", self.probabilities, self.values))
        self.y = self.round(self.merged(self.out) @ self.weights["w_o"] + self.weights.get("b_o", self.dtype(0)))

    def wide(self, array):
        return np.asarray(array).astype(self.dtype)

    def round(self, array):
        return array if self.stored is None else array.astype(self.stored).astype(self.dtype)

    def project(self, name):
        array = self.x if name == "q" else self.source
        heads = self.layer.heads if name == "q" else self.layer.kv_heads
        columns = self.layer.value_dim if name == "v" else self.layer.head_dim
        projected = np.einsum("bnw,wc->bnc", array, self.weights[f"w_{name}"])
        projected = projected + self.weights.get(f"b_{name}", self.dtype(0))
        return self.round(projected).reshape(*array.shape[:2], heads, columns)

    def mask(self, queries, keys):
        left, right = self.layer.window or (None, None)
        seen = np.ones((queries, keys), bool)
        for row in range(queries):
            for column in range(keys):
                offset = column - (row + keys - queries)
                seen[row, column] = (
                    (not self.layer.causal or offset <= 0)
                    and (left is None or -offset <= left)
                    and (right is None or offset <= right)
                )
        return seen

    @staticmethod
    def merged(array):
        return array.reshape(*array.shape[:2], array.shape[2] * array.shape[3])

    def gradients(self, dy):
        """Return dx, dcontext or None, and the gradients of the weights."""
        layer, dy, found = self.layer, self.wide(dy), {}
        scale = self.dtype(1 / math.sqrt(layer.head_dim))

        def weights(name, array, gradient):
            found[f"w_{name}"] = self.round(np.einsum("bni,bno->io", array, gradient))
            if layer.biases:
                found[f"b_{name}"] = self.round(gradient.sum(axis=(0, 1)))

        weights("o", self.merged(self.out), dy)
        dout = self.round(dy @ self.weights["w_o"].T).reshape(self.out.shape)
        dprobabilities = self.round(np.einsum("bqhd,bkhd->bhqk", dout, self.values))
        delta = np.einsum("bqhd,bqhd->bhq", dout, self.out)[..., None]
        dscores = self.round(scale * self.probabilities * (dprobabilities - delta))
        grouped = (*self.k.shape[:3], layer.heads // layer.kv_heads)
        gradients = {
            "q": np.einsum("bhqk,bkhd->bqhd", dscores, self.keys),
            "k": np.einsum("bhqk,bqhd->bkhd", dscores, self.q).reshape(*grouped, layer.head_dim).sum(axis=3),
            "v": np.einsum("bhqk,bqhd->bkhd", self.probabilities, dout).reshape(*grouped, layer.value_dim).sum(axis=3),
        }
        gradients = {name: self.merged(self.round(array)) for name, array in gradients.items()}
        dx, dsource = 0, 0
        for name, gradient in gradients.items():
            weights(name, self.x if name == "q" else self.source, gradient)
            if name == "q":
                dx = gradient @ self.weights["w_q"].T
            else:
                dsource = dsource + gradient @ self.weights[f"w_{name}"].T
        if layer.is_cross_attention:
            return self.round(dx), self.round(dsource), found
        return self.round(dx + dsource), None, found


def output_floor(layer, inputs, precision):
    """Return what roundings may cost y, to first order.

    Each product of K terms errs by K units of the sum of their sizes, in the precision of the sums. Stored arrays err
    by a unit of their format: errors of q, k and the scores change a probability by that many times the largest score's
    terms, and those of P, v, the output and y add one each.
    """
    sizes_of = {name: np.abs(np.asarray(array).astype(np.float64)) for name, array in inputs["weights"].items()}
    x = np.abs(np.asarray(inputs["x"]).astype(np.float64))
    source = np.abs(np.asarray(inputs.get("context", inputs["x"])).astype(np.float64))
    q, k, v = (
        array @ sizes_of[f"w_{name}"] + sizes_of.get(f"b_{name}", 0)
        for name, array in (("q", x), ("k", source), ("v", source))
    )
    group = layer.heads // layer.kv_heads
    q = q.reshape(*x.shape[:2], layer.heads, layer.head_dim)
    k, v = (
        np.repeat(array.reshape(*source.shape[:2], layer.kv_heads, -1 if array.size else width), group, axis=2)
        for array, width in ((k, layer.head_dim), (v, layer.value_dim))
    )
    scores = np.einsum("bqhd,bkhd->bhqk", q, k).max(initial=0.0) / math.sqrt(layer.head_dim)
    values = v.max(axis=1, keepdims=True, initial=0.0)  # a probability-weighted mean is at most the largest
    out = np.broadcast_to(values, (*x.shape[:2], *values.shape[2:])).reshape(
        *x.shape[:2], layer.heads * layer.value_dim
    )
    terms = out @ sizes_of["w_o"] + sizes_of.get("b_o", 0)
    summed = layer.model_width + (layer.context_width or 0) + layer.head_dim + source.shape[1]
    summed += layer.heads * layer.value_dim + 8
    stored = UNIT["float64"] if precision == "float64" else UNIT[layer.dtype]
    return terms * (UNIT[precision] * summed * (1 + 4 * scores) + stored * (4 + 6 * scores))


# Shapes


class TestParameters:
    @given(layers())
    def test_they_are_the_elements_of_the_weights(self, layer):
        weights = layer.random_weights(0)
        assert {name: array.shape for name, array in weights.items()} == layer.weight_shapes
        assert layer.parameters_by_array == {name: array.size for name, array in weights.items()}
        assert layer.parameters == sum(array.size for array in weights.values())
        output = sum(array.size for name, array in weights.items() if name in ("w_o", "b_o"))
        assert layer.parameters_without_output == layer.parameters - output
        assert {array.dtype for array in weights.values()} == {np.dtype(STORED[layer.dtype])}

    @given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 256), st.integers(1, 4096))
    def test_formulas(self, groups, group, head_dim, width):
        heads = groups * group
        grouped = AttentionLayer(model_width=width, heads=heads, kv_heads=groups, head_dim=head_dim)
        assert grouped.parameters == (2 * heads + 2 * groups) * head_dim * width
        assert grouped.parameters_without_output == (heads + 2 * groups) * head_dim * width
        assert (
            AttentionLayer(model_width=width, heads=heads, head_dim=head_dim).parameters == 4 * heads * head_dim * width
        )
        shared = AttentionLayer(model_width=width, heads=heads, kv_heads=1, head_dim=head_dim)
        assert shared.parameters == (2 * heads + 2) * head_dim * width

    def test_the_standard_head_dim_makes_them_independent_of_the_heads(self):
        for heads in (1, 2, 8, 32):
            assert AttentionLayer(model_width=512, heads=heads).parameters == 4 * 512**2

    @given(layers(), st.integers(0, 3), st.integers(0, 9))
    def test_cache_bytes_are_those_of_a_cache(self, layer, batch, length):
        shape = {"length": length} | ({"context_length": length} if layer.is_cross_attention else {})
        inputs = inputs_of(layer, np.random.default_rng(0), batch=batch, **shape)
        cache = layer.run(**inputs).cache
        assert layer.kv_cache_bytes(batch=batch, length=length) == sum(array.nbytes for array in cache)


# Counts


class TestCounts:
    @given(st.data())
    def test_closed_form_is_the_count(self, data):
        phase = data.draw(st.sampled_from(PHASES))
        layer = data.draw(layers())
        assume(not (phase == "decode" and layer.is_cross_attention and (layer.causal or layer.window)))
        given_sizes = data.draw(sizes(layer, phase))
        algorithm = data.draw(st.sampled_from(FORWARD if phase in ("prefill", "decode") else BOTH))
        arguments = {
            "algorithm": algorithm,
            "projection_tiles": data.draw(tiles),
            "tiles": data.draw(st.tuples(st.integers(1, 14), st.integers(1, 14))),
            **data.draw(plan_options(ALGORITHMS[algorithm])),
        }
        run = layer.profile(phase, **given_sizes, **arguments)
        assert layer.closed_form(phase, **given_sizes, **arguments) == run.traffic.global_only()
        assert layer.traffic(phase, **given_sizes, **arguments) == run.traffic
        for counter in COUNTERS:
            assert getattr(run.traffic, counter) == sum(getattr(part.traffic, counter) for part in run.parts)

    @given(layer_cases())
    def test_a_run_charges_what_is_counted(self, case):
        layer, inputs, found, options = case
        run, profile = layer.run(**inputs, **options), layer.profile("prefill", **found, **options)
        assert run.traffic == profile.traffic
        assert run.operations == profile.operations
        assert (run.peak_sram_bytes, run.peak_register_bytes) == (profile.peak_sram_bytes, profile.peak_register_bytes)
        assert repr(run) == repr(profile)

    @given(layer_cases(backward=True))
    def test_a_backward_run_charges_what_is_counted(self, case):
        layer, inputs, found, options = case
        run, profile = layer.run_backward(**inputs, **options), layer.profile("backward", **found, **options)
        assert run.traffic == profile.traffic
        assert run.operations == profile.operations
        train, prefill = (layer.profile(phase, **found, **options) for phase in ("train", "prefill"))
        assert train.traffic == prefill.traffic + run.traffic
        assert repr(run) == repr(profile)

    @given(layers(), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9))
    def test_a_step_with_a_cache_charges_what_is_counted(self, layer, batch, length, cached):
        assume(not (layer.is_cross_attention and (layer.causal or layer.window)))
        generator = np.random.default_rng(0)
        cross = layer.is_cross_attention
        inputs = inputs_of(layer, generator, batch=batch, length=length, context_length=0)
        inputs.pop("context", None)
        cache = [
            generator.standard_normal((batch, cached, layer.kv_heads, columns)).astype(STORED[layer.dtype])
            for columns in (layer.head_dim, layer.value_dim)
        ]
        run = layer.run(**inputs, cache=cache)
        given_sizes = {"context_length" if cross else "cache_length": cached}
        assert run.traffic == layer.traffic("decode", batch=batch, length=length, **given_sizes)
        assert run.cache[0].shape[1] == cached + (0 if cross else length)
        item = cache[0].itemsize
        written = 0 if cross else batch * length * layer.kv_heads * (layer.head_dim + layer.value_dim) * item
        arrays = run.traffic.by_array
        assert sum(arrays[name].hbm_write_bytes for name in "kv" if name in arrays) == written

    def test_the_arrays_of_the_projections_by_hand(self):
        layer = AttentionLayer(
            model_width=100,
            heads=6,
            kv_heads=2,
            head_dim=16,
            value_dim=24,
            context_width=40,
            biases=True,
            dtype="float32",
        )
        batch, n, m, t, c = 3, 50, 70, 32, 16
        arrays = layer.traffic(
            "train", batch=batch, length=n, context_length=m, algorithm="standard", projection_tiles=(t, c, 8)
        ).by_array

        def steps(rows, tile):
            return -(-rows // tile)

        rows, source = batch * n, batch * m
        q, k, v, out = 6 * 16, 2 * 16, 2 * 24, 6 * 24
        # Forward once per column tile; for the weights' gradient once per column tile of that.
        assert arrays["x"].hbm_read_bytes == 4 * rows * 100 * (steps(q, c) + steps(q, c))
        assert arrays["context"].hbm_read_bytes == 4 * source * 40 * 2 * (steps(k, c) + steps(v, c))
        assert arrays["w_q"].hbm_read_bytes == 4 * 100 * q * 2 * steps(rows, t)
        assert arrays["w_k"].hbm_read_bytes == 4 * 40 * k * 2 * steps(source, t)
        assert arrays["b_v"].hbm_read_bytes == 4 * v * steps(source, t)
        assert arrays["y"].hbm_write_bytes == 4 * rows * 100
        # For dattention_out once per column tile, for dw_o once per row tile, for db_o once.
        assert arrays["dy"].hbm_read_bytes == 4 * rows * 100 * (steps(out, c) + steps(out, t) + 1)
        for name in layer.weight_shapes:
            assert arrays[f"d{name}"].hbm_write_bytes == 4 * layer.parameters_by_array[name]
            assert arrays[f"d{name}"].hbm_read_bytes == 0
        assert arrays["dx"].hbm_write_bytes == 4 * rows * 100
        assert arrays["dcontext"].hbm_write_bytes == 4 * source * 40

    @pytest.mark.parametrize("phase", PHASES)
    def test_the_attention_is_that_of_the_call(self, phase):
        layer = AttentionLayer(model_width=64, heads=4, kv_heads=2, causal=True)
        sizes_of = {"cache_length": 99} if phase == "decode" else {"length": 100}
        shape = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "causal": True, "kv_len": 100}
        shape["q_len"] = 1 if phase == "decode" else 100
        run = layer.profile(phase, batch=2, **sizes_of, algorithm="flash1", tiles=(16, 32))
        found = [part for part in run.parts if part.name.startswith("attention")]
        names = {"attention_out": "out", "dattention_out": "dout"}
        for part in found:
            expected = simattn.count("flash1", **shape, direction=part.direction, tiles=(16, 32))
            traffic = {names.get(name, name): counters for name, counters in part.traffic.by_array.items()}
            assert simattn.Traffic(traffic) == expected
        assert [part.direction for part in found] == {
            "prefill": ["forward"],
            "decode": ["forward"],
            "backward": ["backward"],
            "train": ["forward", "backward"],
        }[phase]

    def test_decoding_moves_the_weights_and_the_cache(self):
        layer = AttentionLayer(model_width=4096, heads=32, kv_heads=8)
        for batch, cached in ((1, 1000), (64, 8191)):
            arrays = layer.traffic(
                "decode", batch=batch, cache_length=cached, algorithm="flash3", packed_heads=4
            ).by_array
            weights = sum(arrays[name].hbm_read_bytes for name in layer.weight_shapes)
            assert weights == 2 * layer.parameters
            cache = sum(arrays[name].hbm_read_bytes for name in "kv")
            assert cache == layer.kv_cache_bytes(batch=batch, length=cached + 1)
            written = sum(arrays[name].hbm_write_bytes for name in "kv")
            assert written == layer.kv_cache_bytes(batch=batch, length=1)

    @pytest.mark.parametrize("phase", PHASES)
    def test_the_cost_does_not_depend_on_the_length(self, phase):
        layer = AttentionLayer(model_width=4096, heads=32, kv_heads=8, causal=True, biases=True)
        seconds = []
        for length in (1 << 20, 1 << 40):
            sizes_of = {"cache_length": length} if phase == "decode" else {"length": length}
            times = []
            for _ in range(5):  # the first makes the plans, which are kept; others may be interrupted
                started = time.perf_counter()
                layer.profile(phase, **sizes_of)
                times.append(time.perf_counter() - started)
            seconds.append(min(times))
        assert max(seconds) < 0.1

    def test_capacity(self):
        layer = AttentionLayer(model_width=64, heads=4, dtype="float32")
        for sram_bytes in (4096, 16384, 65536):
            run = layer.profile("train", length=64, sram_bytes=sram_bytes)
            assert run.peak_sram_bytes <= sram_bytes
        assert layer.profile("prefill", length=64, sram_bytes=4096).projection_tiles == ProductTiles(
            rows=16, columns=16, depth=8
        )
        assert layer.profile("prefill", length=64).projection_tiles == ProductTiles(rows=128, columns=128, depth=64)
        with pytest.raises(CapacityError, match=r"projection_tiles=\(64, 64, 64\) take 49.2 kB of SRAM"):
            layer.profile("prefill", length=64, sram_bytes=4096, projection_tiles=(64, 64, 64))
        with pytest.raises(CapacityError, match=r"sram_bytes=8 \(8 B\) holds no tile of a projection"):
            layer.profile("prefill", length=64, sram_bytes=8)


SHAPES = {"a": (5, 7), "b": (7, 9), "c": (5, 9), "row": (1, 9)}


class TestProducts:
    def test_formulas_are_texts(self):
        product = MatrixProduct("c", (Term("a", "b"), Term("d", "e", True, True)), "row")
        assert product.text == "c = a b + dᵀ eᵀ + row"
        assert product.inputs == ("a", "b", "d", "e", "row")
        assert ColumnSum("row", "c").text == "row = Σ rows of c"

    def test_closed_form_by_hand(self):
        product = MatrixProduct("c", (Term("a", "b"),), "row")
        moved = product.closed_form(SHAPES, ProductTiles(rows=2, columns=4, depth=3), 2).by_array
        assert moved["a"].hbm_read_bytes == 2 * 5 * 7 * 3
        assert moved["b"].hbm_read_bytes == 2 * 7 * 9 * 3
        assert moved["row"].hbm_read_bytes == 2 * 9 * 3
        assert moved["c"].hbm_write_bytes == 2 * 5 * 9
        assert product.matmul_flops(SHAPES) == 2 * 5 * 7 * 9


class TestFlops:
    @given(st.data())
    def test_formulas(self, data):
        """Standard attention computes each score once, so without a mask its programs do no more."""
        phase = data.draw(st.sampled_from(PHASES))
        layer = data.draw(layers(causal=False))
        layer = AttentionLayer(**{**vars(layer), "window": None})
        found = data.draw(sizes(layer, phase))
        batch, n = found["batch"], found["length"]
        m = found.get("context_length", found.get("cache_length", 0) + n)
        projected = 0 if phase == "decode" and layer.is_cross_attention else found.get("context_length", n)
        h, g, d, e, width = layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim, layer.model_width
        source = layer.context_width or width
        once = 2 * batch * (n * width * h * (d + e) + projected * source * g * (d + e))
        pair = 2 * batch * h * n * m * (d + e)
        times = {"prefill": (1, 1), "decode": (1, 1), "backward": (2, 2), "train": (3, 3)}[phase]
        flops = layer.flops(phase, **found)
        assert flops == LayerFlops(projections=times[0] * once, attention=times[1] * pair)
        assert flops.total == flops.projections + flops.attention
        run = layer.profile(phase, algorithm="standard", **found)
        assert run.operations.matmul_flops == flops.total
        recomputed = 0 if phase in ("prefill", "decode") else 2 * batch * h * n * m * d
        run = layer.profile(phase, algorithm="flash2", **found)
        assert run.operations.matmul_flops == flops.total + recomputed

    @given(layers(), st.data())
    def test_masked_scores_are_left_out(self, layer, data):
        found = data.draw(sizes(layer, "prefill"))
        n, m = found["length"], found.get("context_length", found["length"])
        seen = simattn.AttentionProblem(q_len=n, kv_len=m, causal=layer.causal, window=layer.window).visible_elements()
        pair = 2 * found["batch"] * layer.heads * int(seen.sum()) * (layer.head_dim + layer.value_dim)
        assert layer.flops("prefill", **found).attention == pair
        counted = layer.profile("prefill", **found, algorithm="flash2", tiles=(1, 1)).operations.matmul_flops
        assert counted == layer.flops("prefill", **found).total


# Numbers


class TestForward:
    @given(layer_cases())
    def test_float64_is_the_definition(self, case):
        layer, inputs, _, options = case
        run, dense = layer.run(**inputs, **options, arithmetic="float64"), Dense(layer, **inputs)
        assert run.y.dtype == np.float64
        assert np.isfinite(run.y).all()
        floor = output_floor(layer, inputs, "float64")
        assert_within_error_budget(run.y, dense.y, dense.y, floor=floor, name="y")

    @given(layer_cases())
    def test_float32_is_within_the_budget(self, case):
        layer, inputs, _, options = case
        run = layer.run(**inputs, **options)
        assert run.y.dtype == STORED[layer.dtype]
        assert np.isfinite(run.y.astype(np.float64)).all()
        dense, rounded = Dense(layer, **inputs), Dense(layer, **inputs, rounded=True)
        floor = output_floor(layer, inputs, "float32")
        assert_within_error_budget(run.y, dense.y, rounded.y, floor=floor, name="y")

    @pytest.mark.parametrize("dtype", STORED)
    @pytest.mark.parametrize("algorithm", FORWARD)
    def test_a_larger_layer_is_as_exact_as_its_precision(self, dtype, algorithm):
        layer = AttentionLayer(model_width=96, heads=4, kv_heads=2, dtype=dtype, causal=True, biases=True)
        inputs = inputs_of(layer, np.random.default_rng(3), length=130)
        run = layer.run(**inputs, algorithm=algorithm)
        assert np.isfinite(run.y.astype(np.float64)).all()
        assert_within_error_budget(run.y, Dense(layer, **inputs).y, Dense(layer, **inputs, rounded=True).y)

    @given(layer_cases())
    def test_grouped_heads_are_heads_with_repeated_weights(self, case):
        layer, inputs, _, options = case
        group = layer.heads // layer.kv_heads
        multi = AttentionLayer(**{**vars(layer), "kv_heads": layer.heads})
        weights = dict(inputs["weights"])
        for name, columns in (("k", layer.head_dim), ("v", layer.value_dim)):
            for kind in ("w", "b") if layer.biases else ("w",):
                array = weights[f"{kind}_{name}"]
                heads = array.reshape(*array.shape[:-1], layer.kv_heads, columns)
                weights[f"{kind}_{name}"] = np.repeat(heads, group, axis=-2).reshape(*array.shape[:-1], -1)
        repeated = {**inputs, "weights": weights}
        shared = layer.run(**inputs, **options, arithmetic="float64")
        own = multi.run(**repeated, **options, arithmetic="float64")
        floor = output_floor(layer, inputs, "float64")
        assert_within_error_budget(own.y, shared.y, shared.y, floor=2 * floor, name="y")
        for mine, theirs in zip(own.cache, shared.cache, strict=True):
            np.testing.assert_allclose(mine, np.repeat(theirs, group, axis=2), rtol=1e-12, atol=1e-12)

    @settings(max_examples=40)
    @given(layers(cross=False, causal=True), st.integers(1, 2), st.integers(1, 8), st.sampled_from(FORWARD), st.data())
    def test_decoding_step_by_step_is_prefilling(self, layer, batch, length, algorithm, data):
        arithmetic = data.draw(st.sampled_from(["float64", "float32"]))
        inputs = inputs_of(layer, np.random.default_rng(data.draw(st.integers(0, 999))), batch=batch, length=length)
        whole = layer.run(**inputs, algorithm=algorithm, arithmetic=arithmetic)
        start = data.draw(st.integers(0, length - 1))
        chunk = {**inputs, "x": inputs["x"][:, :start]}
        run = layer.run(**chunk, algorithm=algorithm, arithmetic=arithmetic)
        outputs = [run.y]
        for token in range(start, length):
            step = {**inputs, "x": inputs["x"][:, token : token + 1]}
            run = layer.run(**step, cache=run.cache, algorithm=algorithm, arithmetic=arithmetic)
            assert run.phase == "decode"
            outputs.append(run.y)
        decoded, dense = np.concatenate(outputs, axis=1), Dense(layer, **inputs)
        assert np.isfinite(decoded.astype(np.float64)).all()
        rounded = dense if arithmetic == "float64" else Dense(layer, **inputs, rounded=True)
        floor = output_floor(layer, inputs, arithmetic)
        assert_within_error_budget(decoded, dense.y, rounded.y, floor=floor, name="decoded")
        assert_within_error_budget(whole.y, dense.y, rounded.y, floor=floor, name="prefilled")
        for grown, once in zip(run.cache, whole.cache, strict=True):
            assert grown.shape == once.shape

    def test_decoding_in_cross_attention_takes_the_keys_of_the_context(self):
        layer = AttentionLayer(model_width=24, heads=4, kv_heads=2, context_width=10, dtype="float32")
        inputs = inputs_of(layer, np.random.default_rng(0), length=3, context_length=7)
        whole = layer.run(**inputs, arithmetic="float64")
        for token in range(3):
            step = layer.run(
                inputs["x"][:, token : token + 1], inputs["weights"], cache=whole.cache, arithmetic="float64"
            )
            floor = output_floor(layer, inputs, "float64")[:, token : token + 1]
            expected = Dense(layer, **inputs).y[:, token : token + 1]
            assert_within_error_budget(step.y, expected, expected, floor=floor)
            assert {"w_k", "w_v", "context"} & set(step.traffic.by_array) == set()

    def test_a_row_without_keys_is_the_bias(self):
        layer = AttentionLayer(model_width=8, heads=2, context_width=5, biases=True, dtype="float32")
        inputs = inputs_of(layer, np.random.default_rng(0), length=3, context_length=0)
        run = layer.run(**inputs)
        np.testing.assert_array_equal(run.y, np.broadcast_to(inputs["weights"]["b_o"], run.y.shape))

    def test_inputs_are_left_alone(self):
        layer = AttentionLayer(model_width=8, heads=2, biases=True)
        inputs = inputs_of(layer, np.random.default_rng(0), backward=True)
        copies = {"x": inputs["x"].copy(), "dy": inputs["dy"].copy()}
        weights = {name: array.copy() for name, array in inputs["weights"].items()}
        layer.run_backward(**inputs)
        assert all((inputs[name] == array).all() for name, array in copies.items())
        assert all((inputs["weights"][name] == array).all() for name, array in weights.items())


LAYERS = [
    AttentionLayer(model_width=5, heads=2, head_dim=3, dtype="float32", biases=True),
    AttentionLayer(model_width=4, heads=4, kv_heads=2, head_dim=2, value_dim=3, dtype="float32", causal=True),
    AttentionLayer(model_width=4, heads=3, kv_heads=1, head_dim=2, dtype="float32", biases=True, window=(2, 0)),
    AttentionLayer(model_width=4, heads=2, kv_heads=1, head_dim=2, dtype="float32", biases=True, context_width=3),
]


class TestBackward:
    @pytest.mark.parametrize("layer", LAYERS, ids=str)
    @pytest.mark.parametrize("algorithm", BOTH)
    def test_gradients_are_the_differences_of_the_loss(self, layer, algorithm):
        """Central differences in float64 of Σ y ∘ dy, for every element of every input.

        With the step ∛ε, truncation is of the order of ε^⅔ times the third derivative, and rounding of ε^⅔ times the
        loss; third derivatives of these layers are below 100.
        """
        lengths = {"length": 3} | ({"context_length": 4} if layer.is_cross_attention else {})
        inputs = inputs_of(layer, np.random.default_rng(1), batch=2, **lengths, backward=True, dtype=np.float64)
        inputs["weights"] = {name: array.astype(np.float64) for name, array in inputs["weights"].items()}
        dy = inputs.pop("dy")
        run = layer.run_backward(**inputs, dy=dy, algorithm=algorithm, arithmetic="float64")
        step = np.finfo(np.float64).eps ** (1 / 3)

        def loss():
            return float((Dense(layer, **inputs).y * dy).sum())

        gradients = {"x": run.dx, "context": run.dcontext}
        checked = [(inputs[name], gradients[name]) for name in ("x", "context") if name in inputs]
        checked += [(array, run.dweights[name]) for name, array in inputs["weights"].items()]
        assert set(run.dweights) == set(layer.weight_shapes)
        bound = 100 * step**2 * max(1.0, abs(loss()))
        for array, gradient in checked:
            assert gradient.shape == array.shape
            assert np.isfinite(gradient).all()
            for index in np.ndindex(array.shape):
                kept = array[index]
                array[index] = kept + step
                above = loss()
                array[index] = kept - step
                below = loss()
                array[index] = kept
                assert abs((above - below) / (2 * step) - gradient[index]) <= bound

    @settings(max_examples=60)
    @given(layer_cases(backward=True))
    def test_float64_is_the_definition(self, case):
        layer, inputs, _, options = case
        dy = inputs.pop("dy")
        run = layer.run_backward(**inputs, dy=dy, **options, arithmetic="float64")
        dx, dcontext, weights = Dense(layer, **inputs).gradients(dy)
        pairs = [(run.dx, dx), *((run.dweights[name], weights[name]) for name in layer.weight_shapes)]
        pairs += [(run.dcontext, dcontext)] if layer.is_cross_attention else []
        assert (run.dcontext is None) is not layer.is_cross_attention
        largest = max(np.abs(expected).max(initial=0.0) for _, expected in pairs)
        for actual, expected in pairs:
            assert actual.shape == expected.shape
            assert np.isfinite(actual).all()
            # Errors are relative to the terms, whose sums may cancel; 2¹² units of the largest gradient cover them.
            assert np.abs(actual - expected).max(initial=0.0) <= 2.0**-41 * max(1.0, largest)

    @pytest.mark.parametrize("dtype", STORED)
    @pytest.mark.parametrize("context_width", [None, 40])
    @pytest.mark.parametrize("algorithm", BOTH)
    def test_a_larger_layer_is_as_exact_as_its_precision(self, dtype, context_width, algorithm):
        layer = AttentionLayer(
            model_width=96, heads=4, kv_heads=2, dtype=dtype, context_width=context_width, causal=True, biases=True
        )
        lengths = {"length": 130} | ({"context_length": 150} if context_width else {})
        inputs = inputs_of(layer, np.random.default_rng(3), **lengths, backward=True)
        dy = inputs.pop("dy")
        run = layer.run_backward(**inputs, dy=dy, algorithm=algorithm)
        dx, dcontext, weights = Dense(layer, **inputs).gradients(dy)
        low_dx, low_dcontext, low_weights = Dense(layer, **inputs, rounded=True).gradients(dy)
        cases = [("dx", run.dx, dx, low_dx)]
        cases += [(name, run.dweights[name], weights[name], low_weights[name]) for name in weights]
        cases += [("dcontext", run.dcontext, dcontext, low_dcontext)] if context_width else []
        for name, actual, expected, low in cases:
            assert actual.dtype == STORED[dtype]
            assert np.isfinite(actual.astype(np.float64)).all()
            if name == "b_k":
                # The scores' gradients sum to 0 along the keys, and with them those of the keys' bias.
                assert np.abs(expected).max() <= 1e-12 * np.abs(weights["w_k"]).max()
            assert_within_error_budget(actual, expected, low, name=name)


# Results


def test_the_repr_is_a_table_of_the_parts():
    layer = AttentionLayer(model_width=4096, heads=32, kv_heads=8, causal=True)
    run = layer.profile("train", length=4096)
    text = repr(run)
    lines = text.splitlines()
    assert lines[0] == f"train of {layer}"
    assert str(layer).startswith("grouped-query attention: heads 32 on 8, columns 128, width 4096, bfloat16, causal")
    for part in run.parts:
        line = next(line for line in lines if line.startswith(f"{part.name}  "))
        assert f"{part.traffic.hbm_read_bytes:,}" in line
        assert f"{part.operations.matmul_flops:,}" in line
    assert f"{run.traffic.hbm_bytes - run.traffic.hbm_write_bytes - run.traffic.hbm_reduce_bytes:,}" in lines[-1]
    rows = list(run.rows())
    assert len(rows) == len(run.parts) + 1
    assert rows[-1]["matmul_flops"] == run.operations.matmul_flops == sum(row["matmul_flops"] for row in rows[:-1])
    assert run.y is run.cache is run.dx is run.dcontext is run.dweights is None


def test_the_examples_of_the_docstrings_run():
    results = doctest.testmod(layers_module)
    assert results.attempted > 0
    assert results.failed == 0


def test_names_of_layers():
    assert str(AttentionLayer(model_width=8, heads=2)).startswith("multi-head attention")
    assert str(AttentionLayer(model_width=8, heads=1)).startswith("multi-head attention")
    shared = AttentionLayer(model_width=8, heads=2, kv_heads=1, value_dim=3, context_width=5, window=(3, None))
    assert str(shared).startswith(
        "multi-query attention: heads 2 on 1, columns 4, values of 3, width 8, context width 5"
    )
    assert "window (3, None)" in str(shared)


def test_calls_that_share_arguments_have_them_in_common():
    parameters = [inspect.signature(call).parameters for call in (AttentionLayer.profile, AttentionLayer.closed_form)]
    assert parameters[0].keys() == parameters[1].keys()
    assert all(parameters[0][name].default == parameters[1][name].default for name in parameters[0])


# Refusals

SHAPE = {"model_width": 8, "heads": 2}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model_width": 0}, ValueError, "model_width=0: expected an integer of at least 1"),
        ({"model_width": 8.0}, TypeError, r"model_width=8\.0 is a float: expected an integer"),
        ({"heads": 0}, ValueError, "heads=0: expected an integer of at least 1"),
        ({"heads": "2"}, TypeError, "heads='2' is a str: expected an integer"),
        ({"heads": 3}, ValueError, "head_dim=None: expected an integer, as heads=3 does not divide model_width=8"),
        ({"head_dim": 0}, ValueError, "head_dim=0: expected an integer of at least 1"),
        ({"value_dim": -1}, ValueError, "value_dim=-1: expected an integer of at least 1"),
        ({"heads": 4, "kv_heads": 3}, ValueError, "kv_heads=3 does not divide heads=4"),
        ({"kv_heads": 0}, ValueError, "kv_heads=0: expected an integer of at least 1"),
        ({"dtype": "int8"}, ValueError, "dtype='int8' is not a storage format; expected one of"),
        ({"dtype": "float8_e5m2"}, ValueError, r"dtype='float8_e5m2': expected one of \('float32', 'float16', 'bfl"),
        ({"biases": 1}, TypeError, "biases=1: expected a bool"),
        ({"context_width": 0}, ValueError, "context_width=0: expected an integer of at least 1"),
        ({"causal": "yes"}, TypeError, "causal='yes': expected a bool"),
        ({"window": 4}, TypeError, r"window=4: expected None or a pair \(left, right\)"),
    ],
)
def test_layers_are_checked(changes, error, words):
    with pytest.raises(error, match=words):
        AttentionLayer(**{**SHAPE, **changes})


@pytest.mark.parametrize("call", [AttentionLayer.profile, AttentionLayer.traffic, AttentionLayer.closed_form])
@pytest.mark.parametrize(
    ("layer", "arguments", "error", "words"),
    [
        ({}, {"phase": "forward"}, ValueError, "phase='forward': expected one of"),
        ({}, {"length": None}, ValueError, "length=None with phase='prefill': expected the rows of x"),
        ({}, {"length": -1}, ValueError, "length=-1: expected an integer of at least 0"),
        ({}, {"batch": 1.5}, TypeError, r"batch=1\.5 is a float: expected an integer"),
        ({}, {"phase": "decode"}, ValueError, "cache_length=None with phase='decode': expected the rows of the cache"),
        ({}, {"phase": "decode", "cache_length": -1}, ValueError, "cache_length=-1: expected an integer of at least 0"),
        ({}, {"phase": "train", "cache_length": 4}, ValueError, "cache_length=4 with phase='train' of self-attention"),
        ({}, {"context_length": 4}, ValueError, "context_length=4 with context_width=None: expected None"),
        (
            {"context_width": 3},
            {},
            ValueError,
            "context_length=None with context_width=3: expected the rows of the con",
        ),
        (
            {"context_width": 3},
            {"context_length": -1},
            ValueError,
            "context_length=-1: expected an integer of at least",
        ),
        (
            {"context_width": 3},
            {"phase": "decode", "context_length": 3, "cache_length": 3},
            ValueError,
            "cache_length=3 with phase='decode' of cross-attention: expected None",
        ),
        (
            {"context_width": 3, "causal": True},
            {"phase": "decode", "context_length": 3},
            ValueError,
            "phase='decode' of cross-attention with causal=True, window=None: expected no mask",
        ),
        ({}, {"algorithm": "flash9"}, ValueError, "algorithm='flash9' is unknown"),
        (
            {},
            {"phase": "train", "algorithm": "small_cache"},
            ValueError,
            "direction='backward' of small_cache: expected",
        ),
        ({}, {"plan": "best"}, ValueError, r"plan='best': expected one of \('paper', 'fit', 'gpu'\)"),
        ({}, {"hardware": "H900"}, ValueError, "hardware='H900'"),
        ({}, {"sram_bytes": 0}, ValueError, "sram_bytes=0: expected an integer of at least 1"),
        ({}, {"projection_tiles": 64}, TypeError, r"projection_tiles=64: expected \(rows, columns, depth\)"),
        ({}, {"projection_tiles": (64, 0, 8)}, ValueError, r"projection_tiles\.columns=0: expected an integer of at"),
        ({}, {"tile": (4, 4)}, TypeError, r"tile=\(4, 4\): no argument of a layer and no plan option"),
    ],
)
def test_counting_refuses(call, layer, arguments, error, words):
    given_phase = arguments.get("phase", "prefill")
    rest = {"length": 4, **{name: value for name, value in arguments.items() if name != "phase"}}
    with pytest.raises(error, match=words):
        call(AttentionLayer(**SHAPE, **layer), given_phase, **rest)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"phase": "forward"}, ValueError, "phase='forward': expected one of"),
        ({"length": None}, ValueError, "length=None with phase='prefill'"),
        ({"batch": -1}, ValueError, "batch=-1"),
    ],
)
def test_flops_refuse(arguments, error, words):
    with pytest.raises(error, match=words):
        AttentionLayer(**SHAPE).flops(**{"phase": "prefill", "length": 4, **arguments})


@pytest.mark.parametrize("arguments", [{"length": -1}, {"length": 1, "batch": -1}, {"length": 1.5}])
def test_cache_bytes_refuse(arguments):
    with pytest.raises((ValueError, TypeError), match=r"(length|batch)="):
        AttentionLayer(**SHAPE).kv_cache_bytes(**arguments)


def test_seeds_are_checked():
    with pytest.raises(ValueError, match="seed=-1: expected an integer of at least 0"):
        AttentionLayer(**SHAPE).random_weights(-1)


def run_inputs(layer, **changes):
    given_inputs = inputs_of(layer, np.random.default_rng(0), length=4, context_length=5)
    return {**given_inputs, **changes}


SELF, CROSS = AttentionLayer(**SHAPE, dtype="float32"), AttentionLayer(**SHAPE, dtype="float32", context_width=3)
ONES = np.ones((2, 5, 2, 4), np.float32)


@pytest.mark.parametrize(
    ("layer", "changes", "error", "words"),
    [
        (SELF, {"x": np.ones((4, 8), np.float32)}, ValueError, r"x has shape \(4, 8\): expected \(batch, length, 8\)"),
        (
            SELF,
            {"x": np.ones((2, 4, 7), np.float32)},
            ValueError,
            r"x has shape \(2, 4, 7\): expected \(batch, length, 8",
        ),
        (
            SELF,
            {"x": np.ones((2, 4, 8))},
            TypeError,
            "x has dtype float64: expected float32 in a float32 layer with ari",
        ),
        (SELF, {"weights": [1]}, TypeError, "weights is a list: expected a mapping of arrays by name"),
        (
            SELF,
            {"weights": {"w_q": 1}},
            ValueError,
            r"weights has the arrays \['w_q'\]: expected \['w_k', 'w_o', 'w_q'",
        ),
        (
            SELF,
            {"weights": {**SELF.random_weights(0), "w_k": np.ones((8, 4), np.float32)}},
            ValueError,
            r"weights\['w_k'\] has shape \(8, 4\): expected \(8, 8\)",
        ),
        (
            SELF,
            {"weights": {**SELF.random_weights(0), "w_o": np.ones((8, 8), np.float16)}},
            TypeError,
            r"weights\['w_o'\] has dtype float16: expected float32",
        ),
        (
            SELF,
            {"context": np.ones((2, 5, 3), np.float32)},
            ValueError,
            "context is given with context_width=None and no",
        ),
        (CROSS, {"context": None}, ValueError, r"context is None with context_width=3 and no cache: expected an array"),
        (
            CROSS,
            {"context": np.ones((2, 5, 4), np.float32)},
            ValueError,
            r"context has shape \(2, 5, 4\): expected \(2, length, 3\)",
        ),
        (
            CROSS,
            {"cache": (ONES, ONES)},
            ValueError,
            "context is given with context_width=3 and a cache: expected None",
        ),
        (SELF, {"cache": ONES}, TypeError, r"cache is a ndarray: expected a pair of arrays \(k, v\)"),
        (
            SELF,
            {"cache": (ONES[:1], ONES)},
            ValueError,
            r"cache\[0\] has shape \(1, 5, 2, 4\): expected \(2, length, 2, 4",
        ),
        (
            SELF,
            {"cache": (ONES, ONES[:, :4])},
            ValueError,
            r"cache\[1\] has shape \(2, 4, 2, 4\): expected \(2, 5, 2, 4",
        ),
        (SELF, {"arithmetic": "simt"}, ValueError, r"arithmetic='simt': expected one of \['float32', 'float64'\]"),
        (SELF, {"algorithm": "flash9"}, ValueError, "algorithm='flash9' is unknown"),
        (SELF, {"plan": "best"}, ValueError, "plan='best': expected one of"),
        (
            SELF,
            {"projection_tiles": (1, 2)},
            TypeError,
            r"projection_tiles=\(1, 2\): expected \(rows, columns, depth\)",
        ),
    ],
)
def test_running_refuses(layer, changes, error, words):
    with pytest.raises(error, match=words):
        layer.run(**run_inputs(layer, **changes))


@pytest.mark.parametrize(
    ("dy", "error", "words"),
    [
        (np.ones((2, 4, 7), np.float32), ValueError, r"dy has shape \(2, 4, 7\): expected \(2, 4, 8\)"),
        (np.ones((2, 4, 8), np.float16), TypeError, "dy has dtype float16: expected float32"),
    ],
)
def test_running_backward_refuses(dy, error, words):
    with pytest.raises(error, match=words):
        SELF.run_backward(**run_inputs(SELF), dy=dy)


def test_running_backward_refuses_an_algorithm_without_a_backward_pass():
    inputs = run_inputs(SELF)
    with pytest.raises(ValueError, match="direction='backward' of small_cache: expected one of"):
        SELF.run_backward(**inputs, dy=inputs["x"], algorithm="small_cache")


@pytest.mark.parametrize("algorithm", [name for name, spec in ALGORITHMS.items() if not spec.takes_any_mask])
def test_algorithms_without_a_softmax_are_refused(algorithm):
    with pytest.raises(ValueError, match=rf"algorithm='{algorithm}': expected attention under any mask"):
        AttentionLayer(model_width=8, heads=2, head_dim=4).profile("prefill", length=4, algorithm=algorithm)


@pytest.mark.parametrize(
    "options", [{"scale": 7.0}, {"q_len": 5}, {"block_mask": None}, {"causal": True}, {"dq_": "reduce"}], ids=str
)
def test_options_that_are_no_plans_are_named(options):
    (name,) = options
    layer = AttentionLayer(model_width=8, heads=2, head_dim=4)
    with pytest.raises(TypeError, match=rf"{name}=.*: no argument of a layer and no plan option of flash2; options: "):
        layer.profile("prefill", length=4, **options)
