// Registers, memory and occupancy of every kernel, from the CUDA runtime.
#include <cuda_runtime.h>

#include <vector>

#include "common/kernel_info.h"
#include "cuda/attention_backward.h"
#include "cuda/attention_forward.h"
#include "cuda/device.cuh"

namespace impure_fast {
namespace {

struct Kernel {
  const char* name;
  const void* function;
};

const std::vector<Kernel>& kernels() {
  static const std::vector<Kernel> all = [] {
    std::vector<Kernel> list;
    const auto add = [&](auto table) {
      int count;
      const auto* kernel = table(&count);
      for (; count--; ++kernel)
        list.push_back({kernel->name, reinterpret_cast<const void*>(kernel->function)});
    };
    add(forward_kernels);
    add(backward_kernels);
    add(sum_kernels);
    return list;
  }();
  return all;
}

}  // namespace
}  // namespace impure_fast

const impure_fast::KernelInfo* impure_fast_cuda_kernels(int* count) {
  static std::vector<impure_fast::KernelInfo> infos;
  infos.clear();
  for (const auto& kernel : impure_fast::kernels()) {
    cudaFuncAttributes has;
    if (cudaFuncGetAttributes(&has, kernel.function) == cudaSuccess)
      infos.push_back({kernel.name, has.numRegs, static_cast<int>(has.localSizeBytes),
                       static_cast<int>(has.sharedSizeBytes), has.maxThreadsPerBlock,
                       has.binaryVersion});
    else
      infos.push_back({kernel.name, -1, -1, -1, -1, -1});
  }
  cudaGetLastError();  // a failed question must not fail the next launch
  *count = static_cast<int>(infos.size());
  return infos.data();
}

int impure_fast_cuda_blocks(int index, int threads, int shared_bytes) {
  const void* kernel = impure_fast::kernels().at(index).function;
  int blocks = -1;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           impure_fast::current_device().shared_bytes) ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes)) {
    cudaGetLastError();
    return -1;
  }
  return blocks;
}
