// The CUDA driver and NVRTC, as far as csrc/cuda/nvrtc calls them, without a GPU: they write down what they are asked.
// One device of capability 9.0 with 4 multiprocessors, as the emulator has; code is the names of its kernels.
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Kernel {
  std::string name;
};
struct Program {
  std::map<std::string, std::string> lowered;  // expression -> name
  std::string options;
};

std::string text;
std::string failing;                              // the function that reports an error
std::map<std::string, std::vector<int>> watched;  // part of a kernel's name -> bytes of each of its parameters
int current = 0;

int status(const char* function) { return failing == function ? 700 : 0; }
void say(const std::string& line) { text += line + "\n"; }

}  // namespace

extern "C" {

// ---- what the test asks --------------------------------------------------------------------------------------------

const char* fake_text() { return text.c_str(); }
void fake_reset() {
  text.clear();
  failing.clear();
  watched.clear();
}
void fake_fail(const char* function) { failing = function; }
void fake_watch(const char* part, const int* bytes, int count) { watched[part].assign(bytes, bytes + count); }

// ---- the driver ----------------------------------------------------------------------------------------------------

int cuInit(unsigned) { return status("cuInit"); }
int cuGetErrorString(int, const char** message) {
  *message = "a planted error";
  return 0;
}
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetName(char* name, int, int) {
  std::strcpy(name, "fake");
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = size_t{1} << 34;
  return 0;
}
int cuDeviceGetAttribute(int* value, int which, int) {
  // multiprocessors, L2 bytes, capability, shared bytes of a multiprocessor, cooperative, of a block, reserved
  const std::map<int, int> values{
      {16, 4}, {38, 1 << 20}, {75, 9}, {76, 0}, {81, 100 << 10}, {95, 1}, {97, (100 << 10) - 1024}, {111, 1024}};
  *value = values.at(which);
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  say("retain");
  *context = &current;
  return 0;
}
int cuCtxGetCurrent(void** context) {
  *context = current ? &current : nullptr;
  return 0;
}
int cuCtxSetCurrent(void*) {
  current = 1;
  return 0;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  static int before = 0;
  std::swap(before, *mode);
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  say("load");
  *module = const_cast<void*>(image);
  return std::strncmp(static_cast<const char*>(image), "fake:", 5) ? 209 : status("cuModuleLoadData");
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = new Kernel{name};  // the process is a test's: nothing is freed
  return 0;
}
int cuFuncSetAttribute(void* function, int which, int value) {
  say("attribute " + static_cast<Kernel*>(function)->name + " " + std::to_string(which) + " " + std::to_string(value));
  return 0;
}

int cuMemsetD8Async(unsigned long long, unsigned char value, size_t bytes, void*) {
  say("memset " + std::to_string(value) + " " + std::to_string(bytes));
  return status("cuMemsetD8Async");
}

static int launch(const char* verb, void* function, unsigned grid, unsigned block, unsigned shared, void** parameters) {
  const std::string& name = static_cast<Kernel*>(function)->name;
  std::string line = std::string(verb) + " " + name + " " + std::to_string(grid) + " " + std::to_string(block) + " " +
                     std::to_string(shared);
  for (const auto& [part, bytes] : watched) {
    if (name.find(part) == std::string::npos) continue;
    for (size_t i = 0; i < bytes.size(); ++i) {
      line += " ";
      for (int b = bytes[i] - 1; b >= 0; --b) {
        const unsigned char byte = static_cast<const unsigned char*>(parameters[i])[b];
        line += "0123456789abcdef"[byte >> 4];
        line += "0123456789abcdef"[byte & 15];
      }
    }
  }
  say(line);
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned,
                   unsigned shared, void*, void** parameters, void**) {
  launch("launch", function, grid, block, shared, parameters);
  return status("cuLaunchKernel");
}
int cuLaunchCooperativeKernel(void* function, unsigned grid, unsigned, unsigned, unsigned block, unsigned, unsigned,
                              unsigned shared, void*, void** parameters) {
  launch("cooperate", function, grid, block, shared, parameters);
  return status("cuLaunchCooperativeKernel");
}

// ---- NVRTC ---------------------------------------------------------------------------------------------------------

const char* nvrtcGetErrorString(int) { return "a planted error of NVRTC"; }
int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 0;
  return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
  *count = 3;
  return 0;
}
int nvrtcGetSupportedArchs(int* archs) {
  archs[0] = 75, archs[1] = 80, archs[2] = 90;
  return 0;
}
int nvrtcCreateProgram(Program** program, const char*, const char*, int, const char* const*, const char* const*) {
  *program = new Program;
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  return 0;
}
int nvrtcAddNameExpression(Program* program, const char* expression) {
  std::string name = expression;
  for (char& c : name)
    if (c == ' ') c = '_';
  program->lowered[expression] = name;
  return 0;
}
int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  for (int i = 0; i < count; ++i) program->options += std::string(options[i]) + " ";
  for (const auto& [expression, name] : program->lowered) say("compile " + name + " " + program->options);
  return status("nvrtcCompileProgram");
}
int nvrtcGetLoweredName(Program* program, const char* expression, const char** name) {
  *name = program->lowered.at(expression).c_str();
  return 0;
}
int nvrtcGetProgramLogSize(Program*, size_t* size) {
  *size = sizeof "the compiler's own words";
  return 0;
}
int nvrtcGetProgramLog(Program*, char* log) {
  std::strcpy(log, "the compiler's own words");
  return 0;
}
static std::string code_of(Program* program) {
  std::string code = "fake:";
  for (const auto& [expression, name] : program->lowered) code += name + "\n";
  return code;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  *size = code_of(program).size();
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* code) {
  std::memcpy(code, code_of(program).data(), code_of(program).size());
  return 0;
}
int nvrtcGetPTXSize(Program* program, size_t* size) { return nvrtcGetCUBINSize(program, size); }
int nvrtcGetPTX(Program* program, char* code) { return nvrtcGetCUBIN(program, code); }
}
