// The kernels in plain C++: vectors of 16 bytes, which every 64-bit machine has (SSE2, NEON) and
// the compiler spells out elsewhere.  The only ones for fp64.
#include "cpu/attention_kernel.h"

namespace impure_fast {
namespace {

struct Float4 : Simd<float, 4, 12> {
  using Half = Float4;
};
struct Double2 : Simd<double, 2, 12> {
  using Half = Double2;
};

}  // namespace

const AttentionKernels kAttentionScalar = {
    {Head<Float4, float>::forward, Head<Float4, Bfloat16>::forward, Head<Double2, double>::forward},
    {Head<Float4, float>::backward, Head<Float4, Bfloat16>::backward,
     Head<Double2, double>::backward}};

}  // namespace impure_fast
