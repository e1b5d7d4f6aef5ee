// What a program can ask the CUDA library about its kernels, by dlsym and without CUDA headers.
#pragma once

namespace impure_fast {

struct KernelInfo {
  const char* name;
  int registers;     // of a thread; this and the numbers below are -1 without a device
  int local_bytes;   // of a thread: what registers spill to
  int shared_bytes;  // of a block, beside what a launch asks for
  int max_threads;   // of a block
  int architecture;  // that the code was compiled for: 80, 90, ...
};

}  // namespace impure_fast

extern "C" {

// All kernels, read anew from the current device; valid until the next call.
const impure_fast::KernelInfo* impure_fast_cuda_kernels(int* count);

// Blocks of kernel number `index` that a multiprocessor holds at once, with so many threads and
// bytes of shared memory asked for; -1 without a device.
int impure_fast_cuda_blocks(int index, int threads, int shared_bytes);
}
