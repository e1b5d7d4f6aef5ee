// The kernels in AVX-512; bf16 is computed in fp32.
#include "cpu/attention.h"

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi2,prefer-vector-width=512")
#include "cpu/attention_kernel.h"
#include "cpu/simd_avx512.h"

namespace impure_fast {

const AttentionKernels kAttentionAvx512 = {
    {Head<Float16, float>::forward, Head<Float16, Bfloat16>::forward, nullptr},
    {Head<Float16, float>::backward, Head<Float16, Bfloat16>::backward, nullptr}};

}  // namespace impure_fast
#pragma GCC pop_options
#else
namespace impure_fast {
const AttentionKernels kAttentionAvx512 = {};
}
#endif
