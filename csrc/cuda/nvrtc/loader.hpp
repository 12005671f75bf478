// Kernels without nvcc: each is compiled by NVRTC at its first launch, for the card that it runs on, and kept on disk.
//
// The launchers (.cu) are compiled by the host's C++ compiler against nvrtc/toolkit and do not notice: FG_LAUNCH hands
// the kernel's name, as the compiler spells it, to the loader instead of starting it. The device code (.cuh) lies in
// this library as text, so that it can never be of another version than the launchers' parameters. Neither toolkit nor
// driver is needed to build: both libraries are opened by name, through prototypes of our own.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace fg::cuda::nvrtc {

// Opens the driver and NVRTC, the first of each list that loads; "" or why not. `cache`: the folder of compiled
// kernels, made at need; one that cannot be written costs a compilation a process. Called again it starts anew.
std::string prepare(const std::vector<std::string>& drivers, const std::vector<std::string>& compilers,
                    const std::string& cache);

// A kernel of this library and where it is loaded. It enters the list of kernels() when the library is loaded.
struct Kernel {
  static constexpr int DEVICES = 32;

  const std::string name;    // as a C++ expression
  const std::string header;  // of its device code: that of the launcher's stem
  std::array<std::atomic<void*>, DEVICES> functions{};
  std::array<std::atomic<size_t>, DEVICES> shared{};  // dynamic bytes that it may have, beyond 48 KiB
  std::mutex loading;

  Kernel(std::string_view signature, std::string_view launcher);
  void forget() {
    for (auto& function : functions) function = nullptr;
    for (auto& bytes : shared) bytes = 0;
  }
};

struct Grid {
  unsigned blocks, threads;
  size_t shared;
  void* stream;
  bool cooperative;  // all blocks at a time, or an error
};

// A failure is kept for cudaGetLastError, which check_launch asks with the op's name at hand.
void launch(Kernel&, const Grid&, void** parameters);
const std::vector<Kernel*>& kernels();
// The machine code (or PTX, if NVRTC does not know the card) of some kernels of one header, and their names in it.
// Throws std::runtime_error with the compiler's words.
struct Compiled {
  std::string code;
  std::vector<std::string> names;
};
Compiled compile(const std::string& header, const std::vector<std::string>& names, int capability);

template <auto* FUNCTION>
constexpr std::string_view signature() {
  return __PRETTY_FUNCTION__;
}

template <auto* FUNCTION>
struct Named;
template <class... P, void (*FUNCTION)(P...)>
struct Named<FUNCTION> {
  inline static Kernel kernel{signature<FUNCTION>(), __BASE_FILE__};
  static void launch(const Grid& grid, P... parameters) {
    void* addresses[] = {&parameters...};
    nvrtc::launch(kernel, grid, addresses);
  }
};
template <auto* FUNCTION>
Named<FUNCTION> named();

}  // namespace fg::cuda::nvrtc

#define FG_LAUNCH_AS(cooperative, function, grid, block, shared_bytes, stream, ...)    \
  decltype(fg::cuda::nvrtc::named<function>())::launch(                                \
      fg::cuda::nvrtc::Grid{static_cast<unsigned>(grid), static_cast<unsigned>(block), \
                            static_cast<size_t>(shared_bytes), stream, cooperative},   \
      __VA_ARGS__)
#define FG_LAUNCH(...) FG_LAUNCH_AS(false, __VA_ARGS__)
#define FG_LAUNCH_COOPERATIVE(...) FG_LAUNCH_AS(true, __VA_ARGS__)
#define FG_ALLOW_SHARED(kernel, bytes) static_cast<void>(bytes)  // launch() sees to it
