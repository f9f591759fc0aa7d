// Bytes that a thread moves between global memory and the multiprocessor. Without COUNT_TRAFFIC nothing is left of it.
#pragma once

#include "device.cuh"

#ifdef COUNT_TRAFFIC
template <class Sum>
class ByteCounterOf {
 public:
  DEVICE explicit ByteCounterOf(unsigned long long* total) : total_(total), bytes_(0) {}
  DEVICE void add(unsigned bytes) { bytes_ += bytes; }
  DEVICE void flush() { add_to_counter(total_, bytes_); }

 private:
  unsigned long long* total_;
  Sum bytes_;
};
#else
template <class Sum>
class ByteCounterOf {
 public:
  DEVICE explicit ByteCounterOf(unsigned long long*) {}
  DEVICE void add(unsigned) {}
  DEVICE void flush() {}
};
#endif

using ByteCounter = ByteCounterOf<unsigned>;
using LargeByteCounter = ByteCounterOf<unsigned long long>;  // of a thread that copies what a whole block takes
