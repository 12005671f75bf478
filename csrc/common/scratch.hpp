// Scratch memory of one call, 64-byte aligned and uninitialised. It throws std::bad_alloc, so it is taken outside
// parallel regions.
#pragma once

#include <utility>

#include "common/kernels.hpp"

namespace fg::ISA {

template <class T>
struct Scratch {
  T* data;
  explicit Scratch(int64_t count)
      : data(static_cast<T*>(scratch_acquire(sizeof(T) * static_cast<size_t>(count > 0 ? count : 1)))) {}
  ~Scratch() { scratch_release(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// Packed weights: of one call, or of a program's step, which finds them made in its later runs.
template <class T>
class Packed {
 public:
  T* data;
  explicit Packed(int64_t count) : kept_(std::exchange(kept_of_step(), nullptr)) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(count > 0 ? count : 1);
    if (kept_ && !kept_->block) kept_->block = scratch_acquire(bytes);
    data = static_cast<T*>(kept_ ? kept_->block : scratch_acquire(bytes));
  }
  ~Packed() {
    if (!kept_) scratch_release(data);
  }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  bool made() const { return kept_ && kept_->made; }
  void keep() {  // once they are packed
    if (kept_) kept_->made = true;
  }

 private:
  Kept* kept_;
};

// Several arrays in one block; the constructor sets their pointers: ScratchArrays memory(Array(a, 10), Array(b, 20)).
// Several blocks would crowd others out of the few that are kept.
template <class T>
struct Array {
  T** pointer;
  int64_t bytes;
  Array(T*& p, int64_t count) : pointer(&p), bytes((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64) {}
};

class ScratchArrays {
 public:
  template <class... T>
  explicit ScratchArrays(const Array<T>&... arrays) : block_((arrays.bytes + ...)) {
    char* at = block_.data;
    ((*arrays.pointer = reinterpret_cast<T*>(at), at += arrays.bytes), ...);
  }

 private:
  Scratch<char> block_;
};

}  // namespace fg::ISA
