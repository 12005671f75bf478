// Owner of a scratch block; several arrays are cut from one block, each aligned to 64 bytes.
#pragma once

#include <cstddef>

#include "common/kernels.hpp"

namespace fg::ISA {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : block_(static_cast<char*>(scratch_acquire(bytes))) {}
  ~Scratch() { scratch_release(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* cut(size_t count) {
    T* array = reinterpret_cast<T*>(block_ + used_);
    used_ += bytes_for<T>(count);
    return array;
  }
  template <class T>
  static size_t bytes_for(size_t count) {
    return (count * sizeof(T) + 63) / 64 * 64;
  }

 private:
  char* block_;
  size_t used_ = 0;
};

}  // namespace fg::ISA
