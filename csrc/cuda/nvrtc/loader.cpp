#include "cuda/nvrtc/loader.hpp"

#include <cxxabi.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <stdexcept>
#include <string_view>
#include <utility>

#include "cuda/device.hpp"
#include "cuda/nvrtc/prototypes.hpp"
#include "cuda/nvrtc/toolkit/cuda_runtime.h"
#include "device_sources.hpp"  // written by setup.py

namespace fg::cuda::nvrtc {
namespace {

namespace files = std::filesystem;

// ---------------------------------------------------------------------------------------------- the two libraries

struct Libraries {
#define FG_POINTER(result, name, parameters) result(*name) parameters = nullptr;
  FG_DRIVER(FG_POINTER)
  FG_COMPILER(FG_POINTER)
#undef FG_POINTER
  int major = 0, minor = 0;  // of NVRTC
  std::vector<int> archs;    // that it knows, in order
  files::path cache;
};
Libraries lib;  // filled by prepare
std::atomic<bool> prepared{false};
thread_local std::string failure;

void* open_first(const std::vector<std::string>& names, std::string* why) {
  for (const std::string& name : names) {
    if (void* handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    *why += (why->empty() ? "" : "; ") + std::string(dlerror());
  }
  if (names.empty()) *why = "none was named";
  return nullptr;
}

// Throws what the driver says of its status.
void check(int status, const char* what) {
  if (status == SUCCESS) return;
  const char* text = nullptr;
  if (lib.cuGetErrorString(status, &text) != SUCCESS || !text) text = "unknown error";
  throw std::runtime_error(std::string(what) + ": " + text);
}

void check_compiler(int status, const char* what) {
  if (status != SUCCESS) throw std::runtime_error(std::string(what) + ": " + lib.nvrtcGetErrorString(status));
}

int attribute(int device, int which) {
  int value = 0;
  check(lib.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
  return value;
}

// torch makes a device's primary context current where it sets the device. A thread without one has set none, so its
// device is 0: the runtime would bind that context at its first launch, and so does this.
int current_device() {
  Context context = nullptr;
  check(lib.cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  int device = 0;
  if (!context) {
    check(lib.cuDeviceGet(&device, 0), "cuDeviceGet");
    check(lib.cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    check(lib.cuCtxSetCurrent(context), "cuCtxSetCurrent");
  }
  check(lib.cuCtxGetDevice(&device), "cuCtxGetDevice");
  if (device < 0 || device >= Kernel::DEVICES)
    throw std::runtime_error("devices 0.." + std::to_string(Kernel::DEVICES - 1) + " are known, got " +
                             std::to_string(device));
  return device;
}

int capability_of(int device) { return 10 * attribute(device, CAPABILITY_MAJOR) + attribute(device, CAPABILITY_MINOR); }

// ---------------------------------------------------------------------------------------------- compiling

// Machine code of x.y runs on x.z, z >= y; a card of a generation that NVRTC does not know takes PTX of the newest one.
std::string arch_option(int capability) {
  int best = 0;
  for (int arch : lib.archs)
    if (arch <= capability && arch / 10 == capability / 10) best = arch;
  if (best) return "sm_" + std::to_string(best);
  for (int arch : lib.archs)
    if (arch <= capability) best = arch;
  if (!best) throw std::runtime_error("NVRTC compiles for no card as old as sm_" + std::to_string(capability));
  return "compute_" + std::to_string(best);
}

struct ProgramOwner {
  Program program = nullptr;
  ~ProgramOwner() {
    if (program) lib.nvrtcDestroyProgram(&program);
  }
};

std::string log_of(Program program) {
  size_t size = 0;
  if (lib.nvrtcGetProgramLogSize(program, &size) != SUCCESS || size < 2) return "it says nothing";
  std::string text(size, '\0');
  lib.nvrtcGetProgramLog(program, text.data());
  return text.substr(0, std::min<size_t>(size - 1, 4000));
}

// ---------------------------------------------------------------------------------------------- the cache on disk

uint64_t fnv(std::string_view text, uint64_t hash) {
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3u;
  return hash;
}

std::string hexadecimal(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// A file is one line of what it is, one of what it holds, and the code. The name is a hash of the first line, the line
// itself is compared: a collision costs a compilation, never another kernel.
struct CacheFile {
  std::string identity;
  files::path path;

  CacheFile(const Kernel& kernel, const std::string& arch)
      : identity("fastgan " DEVICE_SOURCES_HASH " nvrtc " + std::to_string(lib.major) + "." +
                 std::to_string(lib.minor) + " " + arch + " " + kernel.name) {
    const uint64_t one = fnv(identity, 0xcbf29ce484222325u), two = fnv(identity, one ^ 0x9e3779b97f4a7c15u);
    path = lib.cache / (hexadecimal(one) + hexadecimal(two) + ".bin");
  }

  static std::string summary(const Compiled& c) {
    return c.names[0] + " " + std::to_string(c.code.size()) + " " + hexadecimal(fnv(c.code, 0xcbf29ce484222325u));
  }

  // Empty code: no such file, or it is damaged.
  Compiled read() const {
    std::ifstream file(path, std::ios::binary);
    std::string first, second;
    if (!std::getline(file, first) || first != identity || !std::getline(file, second)) return {};
    Compiled c{{std::istreambuf_iterator<char>(file), {}}, {second.substr(0, second.find(' '))}};
    return summary(c) == second ? c : Compiled{};
  }

  // Two processes may both write: each its own file, renamed in one step.
  void write(const Compiled& c) const {
    std::error_code ignored;
    files::create_directories(lib.cache, ignored);
    static std::atomic<unsigned> count{0};
    const files::path fresh = path.string() + "." + std::to_string(getpid()) + "-" + std::to_string(count++) + ".new";
    bool written = false;
    {
      std::ofstream file(fresh, std::ios::binary);
      file << identity << '\n' << summary(c) << '\n' << c.code;
      written = file.flush().good();
    }
    if (written)
      files::rename(fresh, path, ignored);
    else
      files::remove(fresh, ignored);
  }
};

// ---------------------------------------------------------------------------------------------- loading

Function load_into_driver(const Compiled& c) {
  Module module = nullptr;
  Function function = nullptr;
  check(lib.cuModuleLoadData(&module, c.code.c_str()), "cuModuleLoadData");
  check(lib.cuModuleGetFunction(&function, module, c.names[0].c_str()), "cuModuleGetFunction");
  return function;
}

// A load allocates, which a stream under capture forbids this thread unless it asks for the relaxed mode.
struct RelaxedCapture {
  int mode = CAPTURE_RELAXED;
  RelaxedCapture() { lib.cuThreadExchangeStreamCaptureMode(&mode); }
  ~RelaxedCapture() { lib.cuThreadExchangeStreamCaptureMode(&mode); }
};

Function load(Kernel& kernel, int device) {
  const std::lock_guard<std::mutex> lock(kernel.loading);
  if (void* loaded = kernel.functions[device].load()) return loaded;
  const RelaxedCapture relaxed;
  const int capability = capability_of(device);
  const CacheFile file(kernel, arch_option(capability));
  Function function = nullptr;
  if (const Compiled kept = file.read(); !kept.code.empty()) try {
      function = load_into_driver(kept);
    } catch (const std::runtime_error&) {  // the file is whole, but this driver refuses it: compile anew
    }
  if (!function) {
    const Compiled fresh = compile({kernel.name}, capability);
    function = load_into_driver(fresh);
    file.write(fresh);
  }
  kernel.functions[device].store(function);
  return function;
}

// Beyond 48 KiB a kernel has to be told once.
void allow_shared(Kernel& kernel, int device, Function function, size_t bytes) {
  if (bytes <= 48 << 10 || kernel.shared[device].load() >= bytes) return;
  const std::lock_guard<std::mutex> lock(kernel.loading);  // two threads: the larger size has to stay
  if (kernel.shared[device].load() >= bytes) return;
  check(lib.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_BYTES, static_cast<int>(bytes)), "cuFuncSetAttribute");
  kernel.shared[device].store(bytes);
}

Function ready(Kernel& kernel, size_t shared, int* device) {
  if (!prepared.load(std::memory_order_acquire)) throw std::runtime_error("prepare() must come before a launch");
  *device = current_device();
  Function function = kernel.functions[*device].load(std::memory_order_acquire);
  if (!function) function = load(kernel, *device);
  allow_shared(kernel, *device, function, shared);
  return function;
}

// Filled while the library is loaded, in one thread.
std::vector<Kernel*>& registry() {
  static std::vector<Kernel*> all;
  return all;
}

// In C++'s words: a type's own name, a number's digits, true or false.
std::string spelled(const Argument& a) {
  if (a.kind == Argument::TRUTH) return a.value ? "true" : "false";
  if (a.kind == Argument::NUMBER) return std::to_string(a.value);
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(a.type->name(), nullptr, nullptr, &status),
                                                    std::free);
  if (!text) throw std::runtime_error(std::string("a kernel's template argument has no name: ") + a.type->name());
  return text.get();
}

}  // namespace

Kernel& kernel_of(const std::string& name) {
  for (Kernel* kernel : registry())
    if (kernel->name == name) return *kernel;
  return *registry().emplace_back(new Kernel(name));  // for as long as the library is there
}

std::string expression(const char* name, std::initializer_list<Argument> arguments) {
  std::string text;
  for (const Argument& a : arguments) text += (text.empty() ? "<" : ", ") + spelled(a);
  return name + text + (text.empty() ? "" : ">");
}

const std::vector<Kernel*>& kernels() { return registry(); }

std::string headers_of(const std::string& name) {
  const auto in_a_word = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; };
  std::set<std::string> words;
  for (auto at = name.begin(); at != name.end();) {
    const auto begin = std::find_if(at, name.end(), in_a_word);
    words.emplace(begin, at = std::find_if_not(begin, name.end(), in_a_word));
  }
  std::set<std::string> headers;
  for (const auto& [defined, header] : DEVICE_DEFINITIONS)
    if (words.contains(defined)) headers.insert(header);
  std::string text;
  for (const std::string& header : headers) text += "#include \"" + header + "\"\n";
  return text;
}

Compiled compile(const std::vector<std::string>& names, int capability) {
  const std::string text = headers_of(names.at(0)) + "using namespace fg::cuda;\n";
  ProgramOwner owner;
  check_compiler(lib.nvrtcCreateProgram(&owner.program, text.c_str(), "fastgan.cu", std::size(DEVICE_SOURCES),
                                        DEVICE_SOURCES, DEVICE_SOURCE_NAMES),
                 "nvrtcCreateProgram");
  for (const std::string& name : names)
    check_compiler(lib.nvrtcAddNameExpression(owner.program, name.c_str()), "nvrtcAddNameExpression");
  const std::string arch = arch_option(capability), option = "--gpu-architecture=" + arch;
  const char* options[] = {option.c_str(), "--std=c++20"};
  if (lib.nvrtcCompileProgram(owner.program, 2, options) != SUCCESS)
    throw std::runtime_error("NVRTC must compile " + names[0] + " for " + arch + ", got: " + log_of(owner.program));

  const bool machine_code = arch.starts_with("sm_");
  size_t size = 0;
  check_compiler((machine_code ? lib.nvrtcGetCUBINSize : lib.nvrtcGetPTXSize)(owner.program, &size), "nvrtc's size");
  Compiled c{std::string(size, '\0'), {}};
  check_compiler((machine_code ? lib.nvrtcGetCUBIN : lib.nvrtcGetPTX)(owner.program, c.code.data()), "nvrtc's code");
  for (const std::string& name : names) {
    const char* lowered = nullptr;
    check_compiler(lib.nvrtcGetLoweredName(owner.program, name.c_str(), &lowered), "nvrtcGetLoweredName");
    c.names.emplace_back(lowered);
  }
  return c;
}

std::string prepare(const std::vector<std::string>& drivers, const std::vector<std::string>& compilers,
                    const std::string& cache) {
  static std::mutex once;
  const std::lock_guard<std::mutex> lock(once);
  prepared = false;
  for (Kernel* kernel : registry()) kernel->forget();
  std::string why;
  void* driver = open_first(drivers, &why);
  if (!driver) return "the CUDA driver does not load (" + why + ")";
  why.clear();
  void* compiler = open_first(compilers, &why);
  if (!compiler) return "NVRTC does not load (" + why + ")";
#define FG_RESOLVE(handle, result, name, parameters)                       \
  lib.name = reinterpret_cast<result(*) parameters>(dlsym(handle, #name)); \
  if (!lib.name) return std::string(#handle " has no ") + #name + "; it is too old";
#define FG_RESOLVE_DRIVER(result, name, parameters) FG_RESOLVE(driver, result, name, parameters)
#define FG_RESOLVE_COMPILER(result, name, parameters) FG_RESOLVE(compiler, result, name, parameters)
  FG_DRIVER(FG_RESOLVE_DRIVER)
  FG_COMPILER(FG_RESOLVE_COMPILER)
  try {
    int count = 0;
    check(lib.cuInit(0), "cuInit");
    check_compiler(lib.nvrtcVersion(&lib.major, &lib.minor), "nvrtcVersion");
    check_compiler(lib.nvrtcGetNumSupportedArchs(&count), "nvrtcGetNumSupportedArchs");
    lib.archs.resize(static_cast<size_t>(count));
    check_compiler(lib.nvrtcGetSupportedArchs(lib.archs.data()), "nvrtcGetSupportedArchs");
    std::sort(lib.archs.begin(), lib.archs.end());
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  if (lib.major < 12) return "NVRTC must be 12.0 or newer (C++20), got " + std::to_string(lib.major);
  lib.cache = cache;
  prepared.store(true, std::memory_order_release);
  return "";
}

void launch(Kernel& kernel, const Grid& grid, void** parameters) {
  try {
    int device = 0;
    Function function = ready(kernel, grid.shared, &device);
    const auto shared = static_cast<unsigned>(grid.shared);
    if (grid.cooperative)
      check(lib.cuLaunchCooperativeKernel(function, grid.blocks, 1, 1, grid.threads, 1, 1, shared, grid.stream,
                                          parameters),
            "cuLaunchCooperativeKernel");
    else
      check(
          lib.cuLaunchKernel(function, grid.blocks, 1, 1, grid.threads, 1, 1, shared, grid.stream, parameters, nullptr),
          "cuLaunchKernel");
  } catch (const std::exception& error) {
    failure = error.what();
  }
}

}  // namespace fg::cuda::nvrtc

// ------------------------------------------------------------------------------------------------ the runtime's part

using namespace fg::cuda::nvrtc;

static thread_local std::string told;

cudaError_t cudaGetLastError() {
  told = std::exchange(failure, "");
  return told.empty() ? cudaSuccess : cudaErrorUnknown;
}

const char* cudaGetErrorString(cudaError_t) { return told.c_str(); }

cudaError_t cudaGetDevice(int* device) {
  try {
    *device = current_device();
    return cudaSuccess;
  } catch (const std::exception& error) {
    failure = error.what();
    return cudaErrorUnknown;
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  return lib.cuDeviceGetAttribute && lib.cuDeviceGetAttribute(value, which, device) == SUCCESS ? cudaSuccess
                                                                                               : cudaErrorUnknown;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  try {
    check(lib.cuMemsetD8Async(reinterpret_cast<uintptr_t>(memory), static_cast<unsigned char>(value), bytes, stream),
          "cuMemsetD8Async");
    return cudaSuccess;
  } catch (const std::exception& error) {
    failure = error.what();
    return cudaErrorUnknown;
  }
}

namespace fg::cuda {

int runtime_version() { return 1000 * lib.major + 10 * lib.minor; }

int driver_version() {
  int version = 0;
  return lib.cuDriverGetVersion && lib.cuDriverGetVersion(&version) == SUCCESS ? version : 0;
}

std::string devices(std::vector<Device>* found) {
  found->clear();
  if (!prepared) return "the driver has not been asked yet";
  try {
    int count = 0;
    check(lib.cuDeviceGetCount(&count), "cuDeviceGetCount");
    for (int i = 0; i < count; ++i) {
      char name[256] = "";
      size_t bytes = 0;
      check(lib.cuDeviceGetName(name, sizeof name, i), "cuDeviceGetName");
      check(lib.cuDeviceTotalMem_v2(&bytes, i), "cuDeviceTotalMem");
      found->push_back({name, attribute(i, CAPABILITY_MAJOR), attribute(i, CAPABILITY_MINOR),
                        attribute(i, MULTIPROCESSORS), bytes, static_cast<size_t>(attribute(i, SHARED_BYTES_OPTIN)),
                        static_cast<size_t>(attribute(i, L2_BYTES))});
    }
    return count ? "" : "the driver sees no device";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace fg::cuda
