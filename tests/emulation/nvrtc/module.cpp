// The CUDA launchers as they are built without nvcc, as a Python module. tests/emulation/nvrtc_shim.py builds it.
#include <pybind11/pybind11.h>

#include "binding.hpp"
#include "cuda/nvrtc/binding.hpp"

PYBIND11_MODULE(fastgan_nvrtc_shim, m) {
  fg::binding::bind_conv_shape(m);
  fg::binding::bind_cuda(m);
  fg::binding::bind_nvrtc(m);
}
