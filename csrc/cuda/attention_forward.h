// The forward kernels by name, for dispatch and for introspection.
#pragma once

#include "cuda/attention.h"

namespace impure_fast {

struct ForwardArguments {
  AttentionProblem problem;
  const void *q, *k, *v;
  void* out;
  float* lse;
  int stage;     // keys in shared memory at a time, a multiple of 16
  int tiles;     // 16-query tiles of a block
  bool aligned;  // every row starts at a multiple of 16 bytes and is one long
};

constexpr int kForwardThreads = 224;  // 7 warps: 197 queries are 13 tiles

struct ForwardKernel {
  const char* name;
  Format format;
  int width;  // heads up to this width
  void (*function)(ForwardArguments);
};

const ForwardKernel* forward_kernels(int* count);

}  // namespace impure_fast
