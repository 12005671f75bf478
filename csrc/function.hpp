// A kernel as data: its name, the fields of its structs, and functions that check and run it on a frame, which is the
// structs in a row. binding.hpp makes a Python function of it, program.hpp a step of a program.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "checks.hpp"
#include "common/kernels.hpp"
#include "dispatch.hpp"
#ifdef FG_CUDA
#include "cuda/kernels.hpp"
#endif

namespace fg::binding {

enum class Kind : uint8_t { SIZE, FLAG, FLOAT, DOUBLE, CODE, THREADS, STRIDES, POINTER, TENSORS, CONV };

template <class T>
constexpr Kind kind_of() {
  if constexpr (std::is_pointer_v<T>) return Kind::POINTER;
  if constexpr (std::is_enum_v<T>) return Kind::CODE;
  if constexpr (std::is_same_v<T, int64_t>) return Kind::SIZE;
  if constexpr (std::is_same_v<T, bool>) return Kind::FLAG;
  if constexpr (std::is_same_v<T, float>) return Kind::FLOAT;
  if constexpr (std::is_same_v<T, double>) return Kind::DOUBLE;
  if constexpr (std::is_same_v<T, Threads>) return Kind::THREADS;
  if constexpr (std::is_same_v<T, Strides>) return Kind::STRIDES;
  if constexpr (std::is_same_v<T, AdamTensors>) return Kind::TENSORS;
}

template <class T>
constexpr int last_code(int last_dtype) {
  if constexpr (std::is_same_v<T, DType>) return last_dtype;
  if constexpr (std::is_same_v<T, Act>) return ACT_GELU_TANH;
  if constexpr (std::is_same_v<T, Loss>) return LOSS_RELATIVISTIC;
  if constexpr (std::is_same_v<T, Side>) return SIDE_G;
  return 0;
}

enum class Place : uint8_t { FIRST, ARGUMENTS, SHAPE, LAST };  // in a call

struct Field {
  const char* name;
  Kind kind;
  Place place;
  uint16_t offset;  // in a frame
  int last;         // of codes
};

// A kernel as its Python function and the programs (program.hpp) see it.
struct Function {
  const char* name;
  std::vector<Field> fields;  // in the order of a call
  uint16_t bytes = 0;         // of a frame
  uint16_t threads = 0;       // where they lie in it
  void (*check)(const char* name, const std::byte* frame) = nullptr;
  int64_t (*run)(const std::byte* frame) = nullptr;
};

// As a call gives them.
inline void order(std::vector<Field>& fields) {
  std::stable_sort(fields.begin(), fields.end(), [](const Field& a, const Field& b) { return a.place < b.place; });
}

struct alignas(8) Frame {
  std::byte bytes[768];  // at least those of any kernel's structs
};

// Lists the fields of structs that lie in a row, for a Function.
struct Lister {
  Function& f;
  bool core_takes_threads;
  int last_dtype;
  bool shape = false;

  template <class T>
  void add(const char* name, size_t offset) {
    constexpr Kind kind = kind_of<T>();
    const auto at = static_cast<uint16_t>(f.bytes + offset);
    Place place = shape ? Place::SHAPE : Place::ARGUMENTS;
    if (kind == Kind::THREADS) {
      f.threads = at;
      if (!core_takes_threads) return;
      place = Place::LAST;
    }
    if (shape && std::is_same_v<T, DType>) place = Place::FIRST;
    f.fields.push_back({name, kind, place, at, last_code<T>(last_dtype)});
  }

  template <class Struct>
  void append(bool is_shape) {
    static_assert(alignof(Struct) == 8 && std::is_trivially_copyable_v<Struct>);
    shape = is_shape;
    const size_t before = f.fields.size();
    if constexpr (std::is_same_v<Struct, ConvShape>)
      f.fields.push_back({"conv", Kind::CONV, Place::FIRST, f.bytes, 0});
    else
      Struct::each_field(*this);
#ifdef FG_CUDA
    if (std::is_same_v<Struct, cuda::Target>)
      for (size_t i = before; i < f.fields.size(); ++i) f.fields[i].place = Place::LAST;
#endif
    f.bytes = static_cast<uint16_t>(f.bytes + sizeof(Struct));
  }
};

// ---------------------------------------------------------------------------------------------- the two cores

struct Cpu {
  static const Table& table() { return current(); }
  static constexpr bool TAKES_THREADS = true;
  static constexpr DType LAST_DTYPE = BF16, LAST_CONV_DTYPE = BF16;
};

#ifdef FG_CUDA
// A kernel that needs device memory and gets a workspace of 0 launches nothing and returns the bytes: call it again.
struct Cuda {
  static const cuda::Table& table() { return cuda::table(); }
  static constexpr bool TAKES_THREADS = false;                      // its kernels do not ask
  static constexpr DType LAST_DTYPE = F16, LAST_CONV_DTYPE = TF32;  // float in memory, multiplied in TF32
};
#endif

// A kernel as a Function: MEMBER of Core's table, checked and run on a frame.
template <class Core, auto MEMBER>
struct Bound;
template <class Core, class Table, class Result, class... Structs, Result (*Table::*MEMBER)(const Structs&...)>
struct Bound<Core, MEMBER> {
  static_assert((sizeof(Structs) + ...) <= sizeof(Frame));

  inline static Function function;

  static void describe(const char* name) {
    constexpr bool conv = (std::is_same_v<Structs, ConvShape> || ...);
    function = {name, {}, 0, 0, check, run};
    Lister lister{function, Core::TAKES_THREADS, conv ? Core::LAST_CONV_DTYPE : Core::LAST_DTYPE};
    constexpr size_t structs = sizeof...(Structs) - (Core::TAKES_THREADS ? 0 : 1);  // but for the target
    (lister.append<Structs>(structs > 1 && function.bytes == 0), ...);
    order(function.fields);
  }

 private:
  template <class F>
  static int64_t with_structs(const std::byte* frame, const F& f) {
    size_t next = 0;
    const std::byte* const places[] = {frame + std::exchange(next, next + sizeof(Structs))...};
    return [&]<size_t... I>(std::index_sequence<I...>) {
      return f(*reinterpret_cast<const Structs*>(places[I])...);
    }(std::index_sequence_for<Structs...>());
  }
  static void check(const char* name, const std::byte* frame) {
    with_structs(frame, [&](const auto&... structs) { return check_call(name, structs...), 0; });
  }
  static int64_t run(const std::byte* frame) {
    return with_structs(frame, [](const auto&... structs) -> int64_t {
      if constexpr (std::is_void_v<Result>)
        return (Core::table().*MEMBER)(structs...), 0;
      else
        return (Core::table().*MEMBER)(structs...);
    });
  }
};

template <class T>
void put(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

}  // namespace fg::binding
