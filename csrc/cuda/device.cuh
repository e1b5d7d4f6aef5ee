// The instructions of sm_80 that the kernels use, each one behind a function.
//
// Beside these functions the kernels use nothing of CUDA but its keywords, threadIdx, blockIdx,
// blockDim and the two barriers, and they include this file as "cuda/device.cuh": a build that
// finds another file of that name first on its include path runs them elsewhere.  Fragments of mma
// (PTX ISA, g = lane / 4, t = lane % 4), for 16-bit | 32-bit elements:
//   a[0..3]: rows g, g+8, g, g+8; columns 2t, 2t+1 | t, those of a[2], a[3] 8 | 4 further on
//   b[0..1]: column g; rows 2t, 2t+1 | t, those of b[1] 8 | 4 further on
//   c[0..3]: rows g, g, g+8, g+8; columns 2t, 2t+1, 2t, 2t+1
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace impure_fast {

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

// What lane ^ mask, or lane `source`, holds.
__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(~0u, x, mask);
}
__device__ __forceinline__ float shuffle(float x, int source) {
  return __shfl_sync(~0u, x, source);
}

// Copies 16 bytes to shared memory in the background, or zeroes them where `valid` is false; both
// addresses are multiples of 16.  The thread's own copies are there after copy_wait().
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8x8 matrices of 16-bit elements; lane 8i + j names row j of matrix i.  Lane 4g + t gets
// elements 2t, 2t+1 of row g of each, or of column g if transposed.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&x)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from)
               : "memory");
}

#define IMPURE_FAST_MMA(name, instruction)                                                      \
  __device__ __forceinline__ void name(float (&c)[4], const uint32_t (&a)[4],                   \
                                       const uint32_t (&b)[2]) {                                \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));           \
  }
// c += a b, accumulated in fp32.
IMPURE_FAST_MMA(mma_bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
IMPURE_FAST_MMA(mma_f16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
IMPURE_FAST_MMA(mma_tf32, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
#undef IMPURE_FAST_MMA

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even and packed, the first in the low half; and back.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
__device__ __forceinline__ float2 unpack_f16(uint32_t x) {
  float2 y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(y.x), "=f"(y.y)
      : "r"(x));
  return y;
}
__device__ __forceinline__ uint32_t round_tf32(uint32_t x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}
__device__ __forceinline__ float as_float(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }

// The current device.
struct Device {
  int arch;          // 80, 90, ...
  int shared_bytes;  // the most that a block may have
  int multiprocessors;
};

inline Device current_device() {
  int index = 0, major = 0, minor = 0;
  Device device{};
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  device.arch = 10 * major + minor;
  return device;
}

// Queues a kernel; nullptr, or what is wrong.
template <class Arguments>
const char* launch(void (*kernel)(Arguments), int64_t blocks_x, int blocks_y, int threads,
                   int shared_bytes, void* stream, const Arguments& arguments) {
  cudaError_t status = cudaSuccess;
  // More has to be allowed; always the most, since another thread may launch the kernel too.
  if (shared_bytes > 48 * 1024)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  current_device().shared_bytes);
  if (status == cudaSuccess) {
    kernel<<<dim3(static_cast<unsigned>(blocks_x), blocks_y), threads, shared_bytes,
             static_cast<cudaStream_t>(stream)>>>(arguments);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace impure_fast
