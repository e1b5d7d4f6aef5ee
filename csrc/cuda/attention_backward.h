// The backward kernels by name, for dispatch and for introspection.
#pragma once

#include "cuda/attention.h"

namespace impure_fast {

struct BackwardArguments {
  AttentionProblem problem;
  const void *grad, *q, *k, *v, *out;
  const float* lse;
  void *dq, *dk, *dv;
  float *dq_parts, *dk_parts, *dv_parts;  // where given, instead of dq; of dk and dv
  bool aligned;  // every row starts at a multiple of 16 bytes and is one long
};

// Up to 18 tiles of 16 keys: 288 keys in one block where the registers of so many threads suffice.
constexpr int backward_threads(int row_bytes) {
  return row_bytes <= 32 ? 576 : row_bytes <= 64 ? 512 : row_bytes <= 128 ? 384 : 256;
}

struct BackwardKernel {
  const char* name;
  Format format;
  int width;  // heads up to this width
  void (*function)(BackwardArguments);
};

struct SumArguments {
  AttentionProblem problem;
  int64_t images, rows;  // of each result
  int parts[3];
  const float* from[3];
  void* to[3];
};

struct SumKernel {
  const char* name;
  Format format;
  void (*function)(SumArguments);
};

const BackwardKernel* backward_kernels(int* count);
const SumKernel* sum_kernels(int* count);

}  // namespace impure_fast
