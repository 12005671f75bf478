// The CUDA launchers as they are built without nvcc, as a Python module. tests/emulation/nvrtc_shim.py builds it.
#include <pybind11/pybind11.h>

#include "binding.hpp"
#include "cuda/launch.hpp"
#include "cuda/nvrtc/binding.hpp"

// Only the fake compiler sees it.
static void large_kernel(const float*, int) {}

static void launch_large(size_t shared) {
  FG_LAUNCH(FG_KERNEL(large_kernel), 3, 64, shared, nullptr, nullptr, 7);
  fg::cuda::check_launch("large");
}

PYBIND11_MODULE(fastgan_nvrtc_shim, m) {
  fg::binding::bind_conv_shape(m);
  fg::binding::bind_cuda(m);
  fg::binding::bind_nvrtc(m);
  m.def("launch_large", &launch_large, "A kernel with so many bytes of dynamic shared memory.");
}
