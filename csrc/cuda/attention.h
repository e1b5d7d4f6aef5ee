// reconstruction_attention on a GPU: what a host program calls.
//
// Every function works on the current device and returns without waiting for it.
#pragma once

#include <cstdint>

#include "common/attention.h"

namespace impure_fast {

// What the elements are and how they are multiplied; sums are always fp32.  kFloat32 is exact
// fp32 arithmetic, kTensorFloat32 rounds the factors of fp32 data to 11 bits.
enum class Format { kBfloat16, kFloat16, kFloat32, kTensorFloat32 };

constexpr int kMaxWidth = 128;  // of a head; widths are even

// Writes out and lse, as csrc/common/attention.h says.  Returns nullptr, or what is wrong.
const char* launch_attention_forward(const AttentionProblem& problem, Format format, const void* q,
                                     const void* k, const void* v, void* out, float* lse,
                                     void* stream);

// Bytes that launch_attention_backward needs as a workspace; 0 in most plain problems.
int64_t attention_backward_workspace(const AttentionProblem& problem, Format format);

// Writes dq, dk, dv.  grad and out are contiguous, of out's shape; lse is forward's.
const char* launch_attention_backward(const AttentionProblem& problem, Format format,
                                      const void* grad, const void* q, const void* k, const void* v,
                                      const void* out, const float* lse, void* dq, void* dk,
                                      void* dv, void* workspace, void* stream);

}  // namespace impure_fast
