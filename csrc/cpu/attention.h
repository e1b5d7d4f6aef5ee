// reconstruction_attention on a CPU: what a host program calls.  No torch in here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/attention.h"

namespace impure_fast {

enum class Format { kFloat32, kBfloat16, kFloat64 };
constexpr int kFormats = 3;

// Data of the tensors in a problem; forward leaves the gradients alone, backward does not read out.
struct AttentionArrays {
  const void *q, *k, *v;
  void *out, *lse;
  const void* grad;  // contiguous, of out's shape
  void *dq, *dk, *dv;
};

// Works off the tasks [begin, end); tasks write to disjoint places.
using AttentionFunction = void (*)(const AttentionProblem&, const AttentionArrays&, int64_t begin,
                                   int64_t end);

// A forward task is a head of a sequence.  A backward task is a head of an image, with all replicas
// that read it: so no two tasks add to the same gradient.
inline int64_t forward_tasks(const AttentionProblem& p) { return p.sequences * p.heads; }
inline int64_t backward_tasks(const AttentionProblem& p) {
  return p.sequences / (p.chunks ? p.chunks : 1) * p.heads;
}

// What one instruction set offers, by format; nullptr: nothing better than the set before it.
struct AttentionKernels {
  AttentionFunction forward[kFormats], backward[kFormats];
};
extern const AttentionKernels kAttentionScalar, kAttentionAvx2, kAttentionAvx512,
    kAttentionAvx512Bf16, kAttentionAmx;

// The best this machine has, unless IMPURE_FAST_CPU_ISA asks for less: scalar, avx2, avx512 (bf16
// in fp32), avx512+bf16 or amx.
const AttentionKernels& attention_kernels();
const char* attention_isa();

// This thread's scratch, aligned to 64 bytes, kept until the thread ends.
void* attention_scratch(size_t bytes);

}  // namespace impure_fast
