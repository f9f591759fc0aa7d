// One kernel as a function that ctypes can call. The build defines KERNEL_FILE and KERNEL.
#include "cpu_device.h"

#include KERNEL_FILE

template <class Parameters>
void run_kernel(void (*kernel)(Parameters), const void* parameters) {
  alignas(Parameters) char aligned[sizeof(Parameters)];
  memcpy(aligned, parameters, sizeof aligned);
  kernel(*reinterpret_cast<const Parameters*>(aligned));
}

// Run the kernel; returns whether all went well, and otherwise writes what did not to `message`.
extern "C" __attribute__((visibility("default"))) int launch(
    const void* parameters, unsigned blocks, unsigned threads, size_t shared_bytes, const cpu::Array* arrays,
    int array_count, int order, int copies, uint64_t seed, char* message, size_t message_bytes) {
  if (threads != THREADS || shared_bytes != SHARED_BYTES) {
    snprintf(message, message_bytes, "%u threads with %zu bytes of shared memory: the kernel has %d and %d", threads,
             shared_bytes, THREADS, SHARED_BYTES);
    return 0;
  }
  cpu::block = cpu::Block();
  cpu::block.blocks = {blocks, 1, 1};
  cpu::block.threads.resize(threads);
  cpu::block.stacks.reset(new char[threads * cpu::STACK_BYTES]);
  cpu::block.shared_bytes = shared_bytes;
  cpu::block.shared.resize((shared_bytes + cpu::GUARD_BYTES) / sizeof(float4));
  cpu::block.copies = static_cast<cpu::Copies>(copies);
  cpu::block.random_state = seed * 2 + 1;
  cpu::block.arrays = arrays, cpu::block.array_count = array_count;
  cpu::block.kernel = [](const void* from) { run_kernel(KERNEL, from); };
  cpu::block.parameters = parameters;
  for (int index : cpu::permutation(blocks, static_cast<cpu::Order>(order))) {
    cpu::block.index = {static_cast<unsigned>(index), 0, 0};
    cpu::run_block(static_cast<cpu::Order>(order));
    if (cpu::block.message[0]) {
      snprintf(message, message_bytes, "%s", cpu::block.message);
      return 0;
    }
  }
  return 1;
}
