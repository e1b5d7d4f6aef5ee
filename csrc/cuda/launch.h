// What both launchers compute on the host.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cuda/attention.h"

namespace impure_fast {

constexpr const char* kUnsupportedWidth = "there is no kernel for this head width";

inline int divide_up(int64_t x, int64_t y) { return static_cast<int>((x + y - 1) / y); }

inline int element_bytes(Format format) {
  return format == Format::kBfloat16 || format == Format::kFloat16 ? 2 : 4;
}

// Whether rows can be copied 16 bytes at a time: all data, strides and the width are multiples.
inline bool is_aligned(const AttentionProblem& problem, Format format,
                       std::initializer_list<const void*> data) {
  const int64_t elements = 16 / element_bytes(format);
  int64_t odd = problem.width % elements;
  for (const Rows& rows : {problem.q, problem.k, problem.v})
    odd |= rows.batch % elements | rows.row % elements | rows.head % elements;
  for (const void* pointer : data) odd |= reinterpret_cast<uintptr_t>(pointer) % 16;
  return !odd;
}

// The first of a file's kernels for a format and at least a width, or nullptr.
template <class Kernel, int kCount>
const Kernel* find_kernel(const Kernel (&kernels)[kCount], Format format, int64_t width) {
  for (const Kernel& kernel : kernels)
    if (kernel.format == format && kernel.width >= width) return &kernel;
  return nullptr;
}

}  // namespace impure_fast
