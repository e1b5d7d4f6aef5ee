// reconstruction_attention.cuda and its backward for torch: checks, allocates, takes the stream,
// launches.  Schemas, fakes and autograd are Python's (impure_fast/ops).
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

#include "cuda/attention.h"

// Found in the library that libtorch_cuda brings with it.
extern "C" __attribute__((weak)) int cublasGetMathMode(void* handle, int* mode);

namespace impure_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch tells libraries of torch.backends.cuda.matmul.allow_tf32 by its cuBLAS handle's mode.
bool tf32_allowed() {
  constexpr int kTensorFloat32 = 3;  // CUBLAS_TF32_TENSOR_OP_MATH
  void* handle = nullptr;
  int mode = 0;
  return cublasGetMathMode && !torch_get_current_cuda_blas_handle(&handle) &&
         !cublasGetMathMode(handle, &mode) && mode == kTensorFloat32;
}

Format format_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::BFloat16:
      return Format::kBfloat16;
    case ScalarType::Half:
      return Format::kFloat16;
    case ScalarType::Float:
      return tf32_allowed() ? Format::kTensorFloat32 : Format::kFloat32;
    default:
      STD_TORCH_CHECK(false, "reconstruction_attention.cuda takes float32, float16 and bfloat16.");
  }
}

Tensor rows_contiguous(const Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

Rows rows_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

AttentionProblem problem_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                            int64_t chunks) {
  STD_TORCH_CHECK(q.is_cuda(), "reconstruction_attention.cuda takes tensors on a CUDA device.");
  for (const Tensor* x : {&k, &v})
    STD_TORCH_CHECK(
        x->is_cuda() && x->get_device_index() == q.get_device_index() &&
            x->scalar_type() == q.scalar_type(),
        "reconstruction_attention.cuda: q, k and v must have one dtype and one device.");
  for (const Tensor* x : {&q, &k, &v})
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == q.size(0) &&
                        x->size(1) == (x == &q ? q : k).size(1) && x->size(2) == q.size(2) &&
                        x->size(3) == q.size(3),
                    "reconstruction_attention.cuda: wanted q [B, Tq, h, d] and k, v [B, T, h, d].");
  const int64_t rows = k.size(1), width = q.size(3);
  STD_TORCH_CHECK(rows > 0, "reconstruction_attention.cuda: there are no keys.");
  STD_TORCH_CHECK(width > 0 && width % 2 == 0 && width <= kMaxWidth,
                  "reconstruction_attention.cuda: the head width is ", width,
                  "; wanted an even number up to ", kMaxWidth, ".");
  AttentionProblem problem{q.size(0), q.size(2), q.size(1),  rows,       width,
                           chunks,    scale,     rows_of(q), rows_of(k), rows_of(v)};
  if (chunks) {
    const int64_t tokens = (rows - chunks) / 2;
    STD_TORCH_CHECK(chunks > 0 && q.size(1) == rows && tokens > 0 && tokens % chunks == 0 &&
                        2 * tokens + chunks == rows,
                    "reconstruction_attention.cuda: ", rows, " rows and chunks=", chunks,
                    "; wanted 2L + K rows in q, k and v, L a multiple of K.");
    problem.sequences *= chunks;
    problem.queries = problem.keys = tokens + 1;
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(problem.sequences * problem.heads <= kMost && q.size(0) * rows <= kMost &&
                      problem.queries < kMost / 2,
                  "reconstruction_attention.cuda: ", problem.sequences, " sequences of ",
                  problem.heads, " heads are more than one launch takes; split the batch.");
  return problem;
}

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error) {
  STD_TORCH_CHECK(!error, "reconstruction_attention.cuda: ", error, ".");
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                   double scale, int64_t chunks) {
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const AttentionProblem problem = problem_of(q, k, v, scale, chunks);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  std::vector<int64_t> lead{q.size(0)};
  if (chunks) lead.push_back(chunks);
  std::vector<int64_t> out_shape = lead, lse_shape = lead;
  out_shape.insert(out_shape.end(), {problem.queries, problem.heads, problem.width});
  lse_shape.insert(lse_shape.end(), {problem.heads, problem.queries});
  Tensor out = torch::stable::new_empty(q, out_shape);
  Tensor lse = torch::stable::new_empty(q, lse_shape, ScalarType::Float);
  check_launch(launch_attention_forward(
      problem, format_of(q), q.const_data_ptr(), k.const_data_ptr(), v.const_data_ptr(),
      out.mutable_data_ptr(), static_cast<float*>(lse.mutable_data_ptr()), stream_of(q)));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_, const Tensor& q_, const Tensor& k_,
                                            const Tensor& v_, const Tensor& out_,
                                            const Tensor& lse_, double scale, int64_t chunks) {
  const Tensor q = rows_contiguous(q_), k = rows_contiguous(k_), v = rows_contiguous(v_);
  const AttentionProblem problem = problem_of(q, k, v, scale, chunks);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Tensor grad = torch::stable::contiguous(grad_), out = torch::stable::contiguous(out_);
  const Tensor lse = torch::stable::contiguous(lse_);
  const int64_t rows = problem.sequences * problem.heads * problem.queries;
  STD_TORCH_CHECK(
      grad.numel() == rows * problem.width && out.numel() == grad.numel() && lse.numel() == rows &&
          lse.scalar_type() == ScalarType::Float && grad.scalar_type() == q.scalar_type() &&
          out.scalar_type() == q.scalar_type(),
      "reconstruction_attention_backward.cuda: grad and out must have forward's shape and "
      "dtype, lse must be forward's.");
  const Format format = format_of(q);
  const auto like = [&](const Tensor& x) {
    return torch::stable::new_empty(q, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  Tensor workspace = torch::stable::new_empty(q, {attention_backward_workspace(problem, format)},
                                              ScalarType::Byte);
  check_launch(launch_attention_backward(
      problem, format, grad.const_data_ptr(), q.const_data_ptr(), k.const_data_ptr(),
      v.const_data_ptr(), out.const_data_ptr(), static_cast<const float*>(lse.const_data_ptr()),
      dq.mutable_data_ptr(), dk.mutable_data_ptr(), dv.mutable_data_ptr(),
      workspace.mutable_data_ptr(), stream_of(q)));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace impure_fast

STABLE_TORCH_LIBRARY_IMPL(impure_fast, CUDA, m) {
  m.impl("reconstruction_attention.cuda", TORCH_BOX(&impure_fast::forward));
  m.impl("reconstruction_attention_backward.cuda", TORCH_BOX(&impure_fast::backward));
}
