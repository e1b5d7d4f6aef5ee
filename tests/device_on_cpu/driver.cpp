// Runs a kernel on tensors from stdin and writes its results to stdout.
//
// driver forward|backward FORMAT SEQUENCES HEADS QUERIES KEYS WIDTH CHUNKS SCALE SHIFT STRIDES(9)
// Every tensor comes as its bytes (int64) and its data, from its first to its last element, and
// gets an allocation of exactly that size; SHIFT bytes in front of q, k and v spoil their
// alignment.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/attention.h"

namespace impure_fast {
namespace {

char* read(int shift = 0) {
  int64_t bytes = 0;
  if (std::fread(&bytes, sizeof bytes, 1, stdin) != 1) std::abort();
  char* data = static_cast<char*>(std::malloc(bytes + shift)) + shift;
  if (bytes && std::fread(data, bytes, 1, stdin) != 1) std::abort();
  return data;
}

struct Result {
  int64_t bytes;
  void* data;
  explicit Result(int64_t size) : bytes(size), data(std::malloc(size)) {
    std::memset(data, 0xff, size);  // NaN
  }
};

int run(int count, char** words) {
  if (count != 20) return 2;
  auto number = [words = words + 2]() mutable { return std::atoll(*words++); };
  const auto format = static_cast<Format>(number());
  AttentionProblem problem{};
  problem.sequences = number(), problem.heads = number(), problem.queries = number();
  problem.keys = number(), problem.width = number(), problem.chunks = number();
  problem.scale = std::atof(words[9]), number();
  const int shift = static_cast<int>(number());
  for (Rows* rows : {&problem.q, &problem.k, &problem.v})
    rows->batch = number(), rows->row = number(), rows->head = number();

  const int64_t row = problem.heads * problem.width;
  const int64_t element = format < Format::kFloat32 ? 2 : 4;
  const int64_t images = problem.chunks ? problem.sequences / problem.chunks : problem.sequences;
  const auto rows_of = [&](int64_t rows) {
    return images * row * element *
           (problem.chunks ? 2 * (problem.keys - 1) + problem.chunks : rows);
  };
  std::vector<Result> results;
  const char* error;
  if (std::string(words[1]) == "forward") {
    const char *q = read(shift), *k = read(shift), *v = read(shift);
    results.emplace_back(problem.sequences * problem.queries * row * element);
    results.emplace_back(problem.sequences * problem.heads * problem.queries * 4);
    error = launch_attention_forward(problem, format, q, k, v, results[0].data,
                                     static_cast<float*>(results[1].data), nullptr);
  } else {
    const char *grad = read(), *q = read(shift), *k = read(shift), *v = read(shift);
    const char *out = read(), *lse = read();
    for (int64_t rows : {problem.queries, problem.keys, problem.keys})
      results.emplace_back(rows_of(rows));
    const Result workspace(attention_backward_workspace(problem, format));
    error = launch_attention_backward(problem, format, grad, q, k, v, out,
                                      reinterpret_cast<const float*>(lse), results[0].data,
                                      results[1].data, results[2].data, workspace.data, nullptr);
  }
  if (error) std::fprintf(stderr, "%s\n", error);
  for (const Result& result : results) std::fwrite(result.data, 1, result.bytes, stdout);
  return error ? 1 : 0;
}

}  // namespace
}  // namespace impure_fast

int main(int count, char** words) { return impure_fast::run(count, words); }
