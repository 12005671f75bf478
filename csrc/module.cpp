// fastgan._C: the kernels as Python functions over raw addresses. No torch header, no torch library.
//
// Import torch first: it brings the OpenMP runtime.
#include <pybind11/pybind11.h>

#include <string>

#include "binding.hpp"
#include "build_config.hpp"  // written by setup.py
#include "dispatch.hpp"
#include "program.hpp"
#ifdef FG_CUDA
#include "cuda/device.hpp"
#endif
#ifdef FG_NVRTC
#include "cuda/nvrtc/binding.hpp"
#endif

namespace py = pybind11;
using namespace fg;

namespace {

// ---------------------------------------------------------------------------------------------- what was built

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["standard"] = static_cast<int64_t>(__cplusplus);
  py::list names;
  for (const Candidate* c = candidates(); c->name; ++c)
    if (c->table) names.append(c->name);
  info["tables"] = names;
#ifdef FG_CUDA
  py::dict cuda;
  cuda["version"] = FG_CUDA_VERSION;
  cuda["archs"] = py::str(FG_CUDA_ARCHS).attr("split")();
#ifdef FG_NVRTC
  cuda["compiler"] = "nvrtc";  // at a kernel's first launch; `nvcc_absent` says why nvcc did not compile them
#else
  cuda["compiler"] = "nvcc";
#endif
  info["cuda"] = cuda;
#else
  info["cuda"] = py::none();
#endif
  info["nvcc_absent"] = FG_CUDA_ABSENT;
  return info;
}

py::dict tables() {
  py::dict usable;
  for (const Candidate* c = candidates(); c->name; ++c) usable[c->name] = c->refusal();
  return usable;
}

void use_table(const py::object& name) {
  if (name.is_none()) {
    select(nullptr);
    return;
  }
  const auto wanted = name.cast<std::string>();
  if (const std::string why = select(wanted.c_str()); !why.empty())
    binding::refuse("use_table: the table must be usable on this machine, got '" + wanted + "': " + why);
}

#ifdef FG_CUDA
py::dict cuda_devices() {
  std::vector<cuda::Device> found;
  py::dict answer;
  answer["runtime"] = cuda::runtime_version();
  answer["driver"] = cuda::driver_version();
  answer["reason"] = cuda::devices(&found);
  py::list list;
  for (const auto& d : found) {
    py::dict one;
    one["name"] = d.name;
    one["capability"] = py::make_tuple(d.major, d.minor);
    one["multiprocessors"] = d.multiprocessors;
    one["global_bytes"] = d.global_bytes;
    one["shared_bytes_optin"] = d.shared_bytes_optin;
    one["l2_bytes"] = d.l2_bytes;
    list.append(one);
  }
  answer["devices"] = list;
  return answer;
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastgan's native kernels over raw addresses; fastgan.ops is the interface for people.";
  using py::arg;

  m.def("build_info", &build_info, "Compiler, C++ standard, tables, and CUDA or why it is absent.");
  m.def("tables", &tables, "Every table of this build: '' if this machine can run it, else the reason.");
  m.def("table", [] { return current().name; }, "The table in use.");
  m.def("use_table", &use_table, arg("name"), "Force a table by name; None goes back to the best one.");
  m.def("scratch_highest", &scratch_highest, arg("restart") = false,
        "Most bytes of scratch memory ever held at once, in use or kept for the next call; restart begins anew.");
  m.def(
      "prefer_huge_pages",
      [](uintptr_t address, size_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(address), bytes); },
      arg("address"), arg("bytes"), "Ask the system for huge pages, before a block's first use.");
#ifdef FG_CUDA
  m.def("cuda_devices", &cuda_devices, "Runtime and driver version, and the devices or why there are none.");
#endif

  binding::bind_conv_shape(m);
  binding::bind_cpu(m);
  binding::bind_program(m);
#ifdef FG_CUDA
  py::module_ cuda = m.def_submodule("cuda", "The CUDA kernels, under the names of the CPU's.");
  cuda.attr("Conv") = m.attr("Conv");
  binding::bind_cuda(cuda);
#ifdef FG_NVRTC
  binding::bind_nvrtc(cuda);
#endif
#endif
}
