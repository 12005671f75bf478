// The loader as Python functions: fastgan/_nvrtc.py finds the libraries and calls prepare.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/nvrtc/loader.hpp"

namespace fg::binding {

inline void bind_nvrtc(pybind11::module_& m) {
  namespace py = pybind11;
  using py::arg;
  m.def("prepare", &cuda::nvrtc::prepare, arg("drivers"), arg("compilers"), arg("cache"),
        py::call_guard<py::gil_scoped_release>(),
        "Open the driver and NVRTC, the first that loads of each list of paths: '' or the reason why not.");
  m.def(
      "kernels",
      [] {
        std::vector<std::pair<std::string, std::string>> all;
        for (const auto* k : cuda::nvrtc::kernels()) all.emplace_back(cuda::nvrtc::headers_of(k->name), k->name);
        return all;
      },
      "(includes of its device code, C++ expression) of every kernel that a launcher names.");
  m.def(
      "compile",
      [](const std::vector<std::string>& names, int capability) {
        cuda::nvrtc::Compiled c;
        {
          py::gil_scoped_release release;
          c = cuda::nvrtc::compile(names, capability);
        }
        return std::make_pair(py::bytes(c.code), c.names);
      },
      arg("names"), arg("capability"),
      "(machine code, names in it) of kernels with the same includes for sm_<capability>.");
}

}  // namespace fg::binding
