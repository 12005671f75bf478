// What `fastgan doctor` asks of the CUDA runtime that this library was linked with.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace fg::cuda {

struct Device {
  std::string name;
  int major, minor;
  int multiprocessors;
  size_t global_bytes;
  size_t shared_bytes_optin;  // the most shared memory that one block may ask for
  size_t l2_bytes;
};

int runtime_version();                            // 1000 * major + 10 * minor
int driver_version();                             // 0: no driver
std::string devices(std::vector<Device>* found);  // "" or why the runtime sees none

}  // namespace fg::cuda
