// Special functions of the hardware, at every input of a range of bits: what simattn/arithmetic/special_functions.py
// models.
//
// Macros:
//   FUNCTION  exp2_approximate, reciprocal_approximate or log2_approximate
#include "hopper.cuh"

extern "C" __global__ void special_function(unsigned* results, unsigned first, unsigned count) {
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    results[i] = __float_as_uint(FUNCTION(__uint_as_float(first + i)));
  }
}
