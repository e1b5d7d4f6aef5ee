// The bf16 kernels in AVX-512 BF16, which multiplies pairs: half the instructions of fp32.
#include "cpu/attention.h"

#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>

#include <type_traits>
#include <utility>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,bmi2,prefer-vector-width=512")
#include "cpu/attention_kernel.h"
#include "cpu/simd_avx512_bf16.h"

namespace impure_fast {

const AttentionKernels kAttentionAvx512Bf16 = {
    {nullptr, Head<Pair16, Bfloat16>::forward, nullptr},
    {nullptr, Head<Pair16, Bfloat16>::backward, nullptr}};

}  // namespace impure_fast
#pragma GCC pop_options
#else
namespace impure_fast {
const AttentionKernels kAttentionAvx512Bf16 = {};
}
#endif
