// Kernels without nvcc: each is compiled by NVRTC at its first launch, for the card that it runs on, and kept on disk.
//
// The launchers (.cu) are compiled by the host's C++ compiler against nvrtc/toolkit and do not notice: FG_LAUNCH hands
// the kernel under its declared name to the loader instead of starting it. The device code (.cuh) lies in this library
// as text, so that it can never be of another version than the launchers' parameters. Neither toolkit nor driver is
// needed to build: both libraries are opened by name, through prototypes of our own.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <initializer_list>
#include <mutex>
#include <string>
#include <type_traits>
#include <typeinfo>
#include <vector>

namespace fg::cuda::nvrtc {

// Opens the driver and NVRTC, the first of each list that loads; "" or why not. `cache`: the folder of compiled
// kernels, made at need; one that cannot be written costs a compilation a process. Called again it starts anew.
std::string prepare(const std::vector<std::string>& drivers, const std::vector<std::string>& compilers,
                    const std::string& cache);

// A kernel of this library and where it is loaded. It enters the list of kernels() when the library is loaded.
struct Kernel {
  static constexpr int DEVICES = 32;

  const std::string name;  // as a C++ expression
  std::array<std::atomic<void*>, DEVICES> functions{};
  std::array<std::atomic<size_t>, DEVICES> shared{};  // dynamic bytes that it may have, beyond 48 KiB
  std::mutex loading;

  explicit Kernel(const std::string& name) : name(name) {}
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
// Includes of the device code that defines what stands in a kernel's expression, a line a header. With the headers of
// all ops NVRTC 13.5 took half a second more for every kernel (Zen 5, quiet), 1.4 s on a busy Zen 1.
std::string headers_of(const std::string& name);
// The machine code (or PTX, if NVRTC does not know the card) of kernels with the same headers, and their names in it.
// Throws std::runtime_error with the compiler's words.
struct Compiled {
  std::string code;
  std::vector<std::string> names;
};
Compiled compile(const std::vector<std::string>& names, int capability);

// The kernel of this expression, entered into kernels() at the first call.
Kernel& kernel_of(const std::string& name);

struct Argument {  // of a template
  enum { TYPE, TRUTH, NUMBER } kind;
  const std::type_info* type;
  int64_t value;
};
template <class T>
Argument argument() {
  return {Argument::TYPE, &typeid(T), 0};
}
template <auto VALUE>
Argument argument() {
  constexpr bool truth = std::is_same_v<decltype(VALUE), bool>;
  return {truth ? Argument::TRUTH : Argument::NUMBER, nullptr, static_cast<int64_t>(VALUE)};
}

// name<arguments, ...> in C++'s words, or the name alone. One function for 301 kernels: spelled out in each, the names
// took a tenth of the launchers' compile time.
std::string expression(const char* name, std::initializer_list<Argument> arguments);

// FUNCTION under the name that FG_KERNEL declares.
template <auto* FUNCTION, class Declared>
struct Launched;
template <class... P, void (*FUNCTION)(P...), class Declared>
struct Launched<FUNCTION, Declared> {
  inline static Kernel& kernel = kernel_of(Declared::name());
  static void launch(const Grid& grid, P... parameters) {
    void* addresses[] = {&parameters...};
    nvrtc::launch(kernel, grid, addresses);
  }
};

}  // namespace fg::cuda::nvrtc

#define FG_KERNEL(name, ...) (name __VA_OPT__(, ) __VA_ARGS__)  // in brackets: one argument of FG_LAUNCH_AS
#define FG_FUNCTION(name, ...) name __VA_OPT__(<__VA_ARGS__>)
#define FG_NAME(name, ...) fg::cuda::nvrtc::expression(#name, {__VA_OPT__(FG_SPELLED(__VA_ARGS__))})
#define FG_SPELLED(one, ...) fg::cuda::nvrtc::argument<one>() __VA_OPT__(, FG_SPELLED_2(__VA_ARGS__))
#define FG_SPELLED_2(one, ...) fg::cuda::nvrtc::argument<one>() __VA_OPT__(, FG_SPELLED_3(__VA_ARGS__))
#define FG_SPELLED_3(one) fg::cuda::nvrtc::argument<one>()
#define FG_LAUNCH_AS(cooperative, kernel, grid, block, shared_bytes, stream, ...)                              \
  [&] {                                                                                                        \
    struct Declared {                                                                                          \
      static std::string name() { return FG_NAME kernel; }                                                     \
    };                                                                                                         \
    fg::cuda::nvrtc::Launched<FG_FUNCTION kernel, Declared>::launch(                                           \
        {static_cast<unsigned>(grid), static_cast<unsigned>(block), static_cast<size_t>(shared_bytes), stream, \
         cooperative},                                                                                         \
        __VA_ARGS__);                                                                                          \
  }()
#define FG_LAUNCH(...) FG_LAUNCH_AS(false, __VA_ARGS__)
#define FG_LAUNCH_COOPERATIVE(...) FG_LAUNCH_AS(true, __VA_ARGS__)
#define FG_ALLOW_SHARED(kernel, bytes) static_cast<void>(bytes)  // launch() sees to it
