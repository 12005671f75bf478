// The CUDA kernels compiled for the emulator, as a Python module with the functions of fastgan._C.cuda and the
// emulator's own controls. tests/emulation/cuda_shim.py builds and drives it.
#include <pybind11/pybind11.h>

#include "binding.hpp"
#include "simt.hpp"

namespace py = pybind11;
using namespace fg;

PYBIND11_MODULE(fastgan_cuda_shim, m) {
  using py::arg;
  binding::bind_conv_shape(m);
  binding::bind_cuda(m);

  m.def(
      "configure",
      [](unsigned seed, bool counting) {
        simt::settings.seed = seed;
        simt::settings.counting = counting;
      },
      arg("seed"), arg("counting"), "Thread order (0: natural) and whether accesses are counted.");
  m.def(
      "card",
      [](int multiprocessors, int shared, bool cooperative) {
        simt::settings.card = {multiprocessors, shared, cooperative};
      },
      arg("multiprocessors") = simt::Card{}.multiprocessors, arg("shared") = simt::Card{}.shared,
      arg("cooperative") = true, "Run as a card with so many multiprocessors of so many bytes of shared memory.");
  m.def(
      "last_blocks", [](unsigned count) { simt::settings.last_blocks = count; }, arg("count"),
      "Run only so many of the last blocks of each grid; 0: all.");
  m.def(
      "declare",
      [](binding::Address begin, uint64_t bytes) {
        for (auto& r : simt::regions)
          if (r.begin == begin) {
            r.bytes = std::max<uintptr_t>(r.bytes, bytes);
            return;
          }
        simt::regions.push_back({begin, bytes});
      },
      arg("address"), arg("bytes"), "A tensor that the next kernels may touch.");
  m.def(
      "forget",
      [] {
        py::list counts;
        for (const auto& r : simt::regions) counts.append(py::make_tuple(r.begin, r.bytes, r.requested, r.sectors));
        simt::regions.clear();
        return counts;
      },
      "No tensor is declared any more; (address, bytes, bytes requested, sectors) of those that were.");
  m.def(
      "launches",
      [] {
        py::list all;
        for (const auto& l : simt::launches)
          all.append(py::make_tuple(l.kernel, l.blocks, l.threads, l.shared, l.cooperative, l.shared_wavefronts,
                                    l.shared_ideal, l.products));
        simt::launches.clear();
        return all;
      },
      "(kernel, blocks, threads, dynamic bytes, cooperative, shared wavefronts, fewest possible, mma.sync) of every "
      "launch since the last call.");
}
