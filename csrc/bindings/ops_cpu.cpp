// The CPU implementations of the operators, for torch's dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/noise.h"
#include "cpu/rows.h"

namespace impure_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Format format_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Format::kFloat32;
    case ScalarType::BFloat16:
      return Format::kBfloat16;
    case ScalarType::Double:
      return Format::kFloat64;
    default:
      STD_TORCH_CHECK(false, "This backend takes float32, bfloat16 and float64.");
  }
}

ScalarType lse_type(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Rows rows_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// The operator's Python side has said what is wrong in full sentences; this guards direct calls.
AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                            int64_t chunks) {
  for (const Tensor* x : {&q, &k, &v}) {
    STD_TORCH_CHECK(x->is_cpu() && x->scalar_type() == q.scalar_type() && x->dim() == 4,
                    "q, k and v must be CPU tensors of one dtype and four axes.");
    STD_TORCH_CHECK(x->size(0) == q.size(0) && x->size(2) == q.size(2) && x->size(3) == q.size(3),
                    "q, k and v must agree in batch, heads and width.");
    STD_TORCH_CHECK(x->stride(3) == 1 || x->size(3) == 1, "The last axis must be contiguous.");
  }
  STD_TORCH_CHECK(k.size(1) == v.size(1), "k and v must agree in rows.");
  STD_TORCH_CHECK(k.size(1) > 0 && q.size(3) > 0, "Keys and width must not be empty.");
  AttentionProblem p{.sequences = q.size(0),
                     .heads = q.size(2),
                     .queries = q.size(1),
                     .keys = k.size(1),
                     .width = q.size(3),
                     .chunks = chunks,
                     .scale = scale,
                     .q = rows_of(q),
                     .k = rows_of(k),
                     .v = rows_of(v)};
  if (chunks == 0) return p;
  const int64_t tokens = (q.size(1) - chunks) / 2;
  STD_TORCH_CHECK(chunks > 0 && tokens > 0 && tokens % chunks == 0 &&
                      q.size(1) == 2 * tokens + chunks && k.size(1) == q.size(1),
                  "q, k and v must have 2L + K rows, L a multiple of K = chunks.");
  p.sequences *= chunks;
  p.queries = p.keys = tokens + 1;
  return p;
}

// As many tasks as make about 20 microseconds, so that starting a thread pays.
int64_t grain(int64_t multiplications) {
  return std::max<int64_t>(1, 1'000'000 / std::max<int64_t>(1, multiplications));
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                   int64_t chunks) {
  const Format format = format_of(q);
  const AttentionProblem p = problem_of(q, k, v, scale, chunks);
  std::vector<int64_t> shape{q.size(0)};
  if (chunks) shape.push_back(chunks);
  std::vector<int64_t> lse_shape = shape;
  shape.insert(shape.end(), {p.queries, p.heads, p.width});
  lse_shape.insert(lse_shape.end(), {p.heads, p.queries});
  Tensor out = torch::stable::new_empty(q, shape);
  Tensor lse = torch::stable::new_empty(q, lse_shape, lse_type(q));
  AttentionArrays arrays{};
  arrays.q = q.const_data_ptr(), arrays.k = k.const_data_ptr(), arrays.v = v.const_data_ptr();
  arrays.out = out.mutable_data_ptr(), arrays.lse = lse.mutable_data_ptr();
  const AttentionFunction run = attention_kernels().forward[static_cast<int>(format)];
  torch::stable::parallel_for(0, forward_tasks(p), grain(2 * p.queries * p.keys * p.width),
                              [&](int64_t begin, int64_t end) { run(p, arrays, begin, end); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& /*out*/,
                                            const Tensor& lse, double scale, int64_t chunks) {
  const Format format = format_of(q);
  const AttentionProblem p = problem_of(q, k, v, scale, chunks);
  const int64_t rows = p.sequences * p.heads * p.queries;
  STD_TORCH_CHECK(grad.is_cpu() && grad.is_contiguous() && grad.scalar_type() == q.scalar_type() &&
                      grad.numel() == rows * p.width,
                  "grad must be contiguous, of out's dtype and shape.");
  STD_TORCH_CHECK(lse.is_cpu() && lse.is_contiguous() && lse.scalar_type() == lse_type(q) &&
                      lse.numel() == rows,
                  "lse must be what forward returned.");
  Tensor dq = torch::stable::new_empty(q, q.sizes());
  Tensor dk = torch::stable::new_empty(k, k.sizes());
  Tensor dv = torch::stable::new_empty(v, v.sizes());
  AttentionArrays arrays{};
  arrays.q = q.const_data_ptr(), arrays.k = k.const_data_ptr(), arrays.v = v.const_data_ptr();
  arrays.grad = grad.const_data_ptr(), arrays.lse = const_cast<void*>(lse.const_data_ptr());
  arrays.dq = dq.mutable_data_ptr(), arrays.dk = dk.mutable_data_ptr();
  arrays.dv = dv.mutable_data_ptr();
  const AttentionFunction run = attention_kernels().backward[static_cast<int>(format)];
  const int64_t products = 5 * std::max<int64_t>(1, chunks);
  torch::stable::parallel_for(0, backward_tasks(p), grain(products * p.queries * p.keys * p.width),
                              [&](int64_t begin, int64_t end) { run(p, arrays, begin, end); });
  return {dq, dk, dv};
}

Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBfloat16;
    case ScalarType::Byte:
      return Element::kUint8;
    default:
      STD_TORCH_CHECK(false, "This backend takes float32 and bfloat16, and gives uint8 too.");
  }
}

Tensor normalise(const Tensor& x, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, double eps, double scale, int64_t zero,
                 ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() > 0, "x must be contiguous CPU rows.");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16,
                  "x must be float32 or bfloat16.");
  const int64_t width = x.size(x.dim() - 1);
  for (const auto* parameter : {&weight, &bias}) {
    STD_TORCH_CHECK(
        !*parameter || ((*parameter)->is_contiguous() && (*parameter)->numel() == width &&
                        (*parameter)->scalar_type() == ScalarType::Float),
        "weight and bias must be contiguous float32 [width].");
  }
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "weight and bias belong together.");
  Tensor y = torch::stable::new_empty(x, x.sizes(), dtype);
  const RowsProblem p{.width = width,
                      .in = element_of(x.scalar_type()),
                      .out = element_of(dtype),
                      .x = x.const_data_ptr(),
                      .weight = weight ? weight->const_data_ptr<float>() : nullptr,
                      .bias = bias ? bias->const_data_ptr<float>() : nullptr,
                      .eps = static_cast<float>(eps),
                      .inverse_scale = static_cast<float>(1 / scale),
                      .zero = static_cast<float>(zero),
                      .y = y.mutable_data_ptr()};
  const int64_t rows = width ? x.numel() / width : 0;
  torch::stable::parallel_for(0, rows, grain(8 * width),
                              [&](int64_t begin, int64_t end) { normalise_rows(p, begin, end); });
  return y;
}

Tensor make_noise(const Tensor& streams, const Tensor& seed, int64_t purpose, int64_t count,
                  bool gaussian) {
  STD_TORCH_CHECK(streams.is_cpu() && streams.is_contiguous() && streams.dim() == 1 &&
                      streams.scalar_type() == ScalarType::Long && count >= 0,
                  "streams must be contiguous int64 [N] on the CPU.");
  STD_TORCH_CHECK(seed.is_cpu() && seed.is_contiguous() && seed.scalar_type() == ScalarType::Long &&
                      (seed.dim() == 0 || (seed.dim() == 1 && seed.size(0) == streams.size(0))),
                  "seed must be contiguous int64, [] or [N], on the CPU.");
  Tensor out = torch::stable::new_empty(streams, {streams.size(0), count}, ScalarType::Float);
  const NoiseProblem p{.seeds = seed.const_data_ptr<int64_t>(),
                       .seed_step = seed.dim(),
                       .streams = streams.const_data_ptr<int64_t>(),
                       .purpose = static_cast<uint32_t>(purpose),
                       .count = count,
                       .gaussian = gaussian,
                       .out = out.mutable_data_ptr<float>()};
  torch::stable::parallel_for(0, streams.size(0), grain(40 * count),
                              [&](int64_t begin, int64_t end) { fill_noise(p, begin, end); });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(impure_fast, CPU, m) {
  m.impl("reconstruction_attention.cpp", TORCH_BOX(&forward));
  m.impl("reconstruction_attention_backward.cpp", TORCH_BOX(&backward));
  m.impl("noise.cpp", TORCH_BOX(&make_noise));
  m.impl("normalise_rows.cpp", TORCH_BOX(&normalise));
}

}  // namespace
}  // namespace impure_fast

// The instruction set chosen: scalar, avx2, avx512, avx512+bf16 or amx.
extern "C" __attribute__((visibility("default"))) const char* impure_fast_cpu_isa() {
  return impure_fast::attention_isa();
}
