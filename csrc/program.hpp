// A program: a list of kernels with their structs filled in, which one call runs. The shapes and the numbers are in the
// frames of its steps; a pointer is a slot, an index into the addresses that run() is given, or such a slot and bytes
// behind it. So one program serves every call of its shapes, whatever the tensors' addresses, and memory that only the
// steps use (outputs between them, their scratch) may lie in one tensor.
//
// This file is the CPU's: the launchers of CUDA ask for a workspace, step by step.
#pragma once

#include <atomic>
#include <mutex>

#include "binding.hpp"

namespace fg::binding {

class Program {
 public:
  // `function` with its arguments as a call has them, but for pointers, which are slots (an integer, a pair of a slot
  // and bytes, or None for "absent"), and for the threads, which run() is given.
  void append(const Function& function, PyObject* const* arguments, size_t count) {
    const size_t wanted = function.fields.size() - 1;
    if (count != wanted) refuse_count(function, wanted, count);
    Step step{&function, std::vector<std::byte>(function.bytes), {}, {}};
    for (size_t i = 0; i < wanted; ++i)
      read(function, function.fields[i], arguments[i], step.frame.data(),
           [&](const Field& field, PyObject* object, std::byte* to) {
             if (field.kind != Kind::POINTER) refuse(std::string(function.name) + " cannot be a step of a program");
             put(to, static_cast<void*>(nullptr));
             if (object != Py_None) step.pointers.push_back(pointer(function.name, field, object));
           });
    put(step.frame.data() + function.threads, 1);
    function.check(function.name, step.frame.data());
    for (const Pointer& p : step.pointers) slots = std::max(slots, p.slot + 1);
    steps.push_back(std::move(step));
  }

  // From now on the weights that a step packs in its first run serve all later ones: they must not change.
  void keep_weights() { keeps = true; }

  ~Program() {
    for (Step& step : steps) scratch_release(step.kept.block);
  }

  // Every step in order, without the GIL.
  void run(int threads, const std::vector<void*>& addresses) const {
    if (addresses.size() < slots)
      refuse("Program: run() must be given an address for each of its " + text(static_cast<int64_t>(slots)) +
             " slots, got " + text(static_cast<int64_t>(addresses.size())));
    const Unlocked gil;
    const std::unique_lock<std::mutex> turn = packing();
    for (const Step& step : steps) {
      Frame frame;  // of this call: another thread may run the program, too
      std::memcpy(frame.bytes, step.frame.data(), step.frame.size());
      put(frame.bytes + step.function->threads, threads);
      for (const Pointer& p : step.pointers)
        if (void* base = addresses[p.slot]) put(frame.bytes + p.offset, static_cast<char*>(base) + p.bytes);
      const Keeping weights(keeps ? &step.kept : nullptr);
      step.function->run(frame.bytes);
    }
    if (turn.owns_lock()) packed_by = &current();
  }

 private:
  struct Pointer {
    size_t offset;  // in the frame
    size_t slot;
    int64_t bytes;
  };
  struct Step {
    const Function* function;
    std::vector<std::byte> frame;
    std::vector<Pointer> pointers;
    mutable Kept kept;
  };
  struct Keeping {
    explicit Keeping(Kept* kept) { kept_of_step() = kept; }
    ~Keeping() { kept_of_step() = nullptr; }
  };
  std::vector<Step> steps;
  size_t slots = 0;
  bool keeps = false;
  mutable std::atomic<const Table*> packed_by{nullptr};  // whose layout the kept weights have
  mutable std::mutex first_run;

  // Held while weights are packed that are kept.
  std::unique_lock<std::mutex> packing() const {
    if (!keeps || packed_by == &current()) return {};
    std::unique_lock<std::mutex> turn(first_run);
    if (packed_by != &current())
      for (const Step& step : steps) scratch_release(std::exchange(step.kept, {}).block);
    return turn;
  }

  static Pointer pointer(const char* op, const Field& field, PyObject* object) {
    PyObject *slot = object, *bytes = nullptr;
    if (PyTuple_Check(object) && PyTuple_GET_SIZE(object) == 2) {
      slot = PyTuple_GET_ITEM(object, 0);
      bytes = PyTuple_GET_ITEM(object, 1);
    }
    const int64_t index = integer(op, field.name, slot), behind = bytes ? integer(op, field.name, bytes) : 0;
    within(op, field.name, index, 0, 1 << 20);
    return {field.offset, static_cast<size_t>(index), behind};
  }
};

inline const Function& cpu_function(const std::string& name) {
#define FG_FIND(kernel, ...) \
  if (name == #kernel) return Bound<Cpu, &Table::kernel>::function;
  FG_CPU_KERNELS(FG_FIND)
  refuse("Program: a step must be a kernel of this module, got " + name);
}

// program.append("conv2d", ...)
inline PyObject* append_step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    if (count < 1) throw py::type_error("Program: append() must be given the name of a kernel, got nothing");
    const auto name = py::cast<std::string>(py::handle(arguments[0]));
    py::cast<Program&>(py::handle(self)).append(cpu_function(name), arguments + 1, static_cast<size_t>(count) - 1);
    Py_RETURN_NONE;
  });
}

inline std::vector<void*> addresses(PyObject* const* objects, Py_ssize_t count) {
  std::vector<void*> found;
  found.reserve(static_cast<size_t>(count));
  for (Py_ssize_t i = 0; i < count; ++i) found.push_back(host_address("a converted chain", "every tensor", objects[i]));
  return found;
}

// program.run(threads, *addresses)
inline PyObject* run_program(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    if (count < 1) throw py::type_error("Program: run() must be given the number of threads, got nothing");
    const int64_t threads = integer("Program", "threads", arguments[0]);
    within("Program", "threads", threads, 1, LAST_THREADS);
    py::cast<const Program&>(py::handle(self)).run(static_cast<int>(threads), addresses(arguments + 1, count - 1));
    Py_RETURN_NONE;
  });
}

// program.run_parts(threads, parts, x_bytes, y_bytes, *addresses)
inline PyObject* run_program_in_parts(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&]() -> PyObject* {
    if (count < 7) throw py::type_error("Program: run_parts() must be given four numbers and slots 0 to 2, got less");
    const int64_t threads = integer("Program", "threads", arguments[0]);
    const int64_t parts = integer("Program", "parts", arguments[1]);
    within("Program", "threads", threads, 1, LAST_THREADS);
    within("Program", "parts", parts, 1, 1 << 30);
    const int64_t x_bytes = integer("Program", "x_bytes", arguments[2]);
    const int64_t y_bytes = integer("Program", "y_bytes", arguments[3]);
    std::vector<void*> at = addresses(arguments + 4, count - 4);
    const Program& program = py::cast<const Program&>(py::handle(self));
    for (int64_t part = 0; part < parts; ++part) {
      program.run(static_cast<int>(threads), at);
      at[1] = static_cast<char*>(at[1]) + x_bytes;
      at[2] = static_cast<char*>(at[2]) + y_bytes;
    }
    Py_RETURN_NONE;
  });
}

// program.keep_weights()
inline PyObject* keep_weights(PyObject* self, PyObject* const*, Py_ssize_t) {
  return translated([&]() -> PyObject* {
    py::cast<Program&>(py::handle(self)).keep_weights();
    Py_RETURN_NONE;
  });
}

inline void bind_program(py::module_& m) {
  static PyMethodDef append, keep, run, run_parts;
  py::class_<Program> type(m, "Program", "Kernels of this module that one call runs.");
  type.def(py::init<>());
  define_method(type, &append, "append", append_step,
                "(kernel, *arguments): one step; pointers are slots, (slot, bytes) or None, and there are no threads.");
  define_method(type, &keep, "keep_weights", keep_weights,
                "(): the weights that the first run packs serve all later ones; they must not change.");
  define_method(type, &run, "run", run_program, "(threads, *addresses): every step, with an address for each slot.");
  define_method(type, &run_parts, "run_parts", run_program_in_parts,
                "(threads, parts, x_bytes, y_bytes, *addresses): run() as often, the addresses of slots 1 and 2 these "
                "bytes further each time.");
}

}  // namespace fg::binding
