// The kernels in AVX2 with fused multiply-add; bf16 is computed in fp32.
#include "cpu/attention.h"

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#include "cpu/attention_kernel.h"

namespace impure_fast {
namespace {

struct Float4 : Simd<float, 4, 12> {};
struct Float8 : Simd<float, 8, 12> {
  using Half = Float4;
};

}  // namespace

const AttentionKernels kAttentionAvx2 = {
    {Head<Float8, float>::forward, Head<Float8, Bfloat16>::forward, nullptr},
    {Head<Float8, float>::backward, Head<Float8, Bfloat16>::backward, nullptr}};

}  // namespace impure_fast
#pragma GCC pop_options
#else
namespace impure_fast {
const AttentionKernels kAttentionAvx2 = {};
}
#endif
