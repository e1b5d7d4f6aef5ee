// impure_fast._info: what the compiled libraries say of themselves.
//
// A library is opened by its path and asked through plain C functions, so that this module links
// to neither torch nor CUDA.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/kernel_info.h"

namespace py = pybind11;

namespace {

template <class Function>
Function* find(const std::string& library, const char* name) {
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(dlerror());
  void* const symbol = dlsym(handle, name);  // torch keeps the library open as well
  if (!symbol) throw std::runtime_error(library + " has no " + name);
  return reinterpret_cast<Function*>(symbol);
}

std::string cpu_isa(const std::string& library) {
  return find<const char*()>(library, "impure_fast_cpu_isa")();
}

py::list cuda_kernels(const std::string& library) {
  int count = 0;
  const auto* kernels =
      find<decltype(impure_fast_cuda_kernels)>(library, "impure_fast_cuda_kernels")(&count);
  py::list found;
  for (int i = 0; i < count; ++i) {
    const impure_fast::KernelInfo& kernel = kernels[i];
    py::dict row;
    row["name"] = kernel.name;
    row["registers"] = kernel.registers;
    row["local_bytes"] = kernel.local_bytes;
    row["shared_bytes"] = kernel.shared_bytes;
    row["max_threads"] = kernel.max_threads;
    row["architecture"] = kernel.architecture;
    found.append(row);
  }
  return found;
}

int cuda_blocks(const std::string& library, int index, int threads, int shared_bytes) {
  return find<decltype(impure_fast_cuda_blocks)>(library, "impure_fast_cuda_blocks")(index, threads,
                                                                                     shared_bytes);
}

}  // namespace

PYBIND11_MODULE(_info, module) {
  module.def("compiler", [] { return std::string(__VERSION__); }, "Compiler of the native parts.");
  module.def(
      "cpu_isa", &cpu_isa, py::arg("library"),
      "Instruction set that the CPU kernels take: scalar, avx2, avx512, avx512+bf16 or amx.");
  module.def("cuda_kernels", &cuda_kernels, py::arg("library"),
             "[{name, registers, local_bytes, shared_bytes, max_threads, architecture}] of the "
             "CUDA kernels; -1 where there is no device to ask.");
  module.def("cuda_blocks", &cuda_blocks, py::arg("library"), py::arg("index"), py::arg("threads"),
             py::arg("shared_bytes"),
             "Blocks of kernel number index that a multiprocessor holds at once; -1 without a "
             "device.");
}
