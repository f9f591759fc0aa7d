// Special functions of the hardware, at every input of a range of bits: what simattn/arithmetic/special_functions.py
// models.
//
// Macros:
//   FUNCTION  exp2_approximate, reciprocal_approximate or log2_approximate
#include "hopper.cuh"

constexpr int THREADS = 256;
constexpr int SHARED_BYTES = 0;

static_assert(SHARED_BYTES == 0, "everything stays in registers");

struct RangeParameters {
  unsigned* results;
  unsigned first, count;
};

extern "C" __global__ void __launch_bounds__(THREADS) special_function(RangeParameters range) {
  for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < range.count; i += gridDim.x * THREADS) {
    store_4_bytes(range.results + i, bits_of_float(FUNCTION(float_of_bits(range.first + i))));
  }
}
