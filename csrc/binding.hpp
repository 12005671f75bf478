// The kernels as Python functions over raw addresses, for every core that has them: fastgan._C binds the CPU's and,
// where it was built with nvcc, CUDA's as fastgan._C.cuda; tests/emulation binds CUDA's compiled for the emulator.
//
// A function takes the fields of its kernel's structs by position: a convolution's shape, as Conv() packs it; the
// dtype; the arguments; the rest of the shape; and last the threads, or in CUDA the workspace and the stream. One loop
// over the list of fields (common/fields.hpp) serves them all: it fills a frame, which is the structs in a row.
//
// A pointer is an address, a tensor (anything with data_ptr()), or None or 0 for "absent". Shapes, dtypes, strides and
// lifetimes are the caller's business (fastgan/ops checks them); checks.hpp refuses only what would crash or divide by
// zero. Every kernel runs without the GIL.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "function.hpp"

namespace fg::binding {

namespace py = pybind11;

using Address = uintptr_t;

constexpr int LAST_THREADS = 1 << 16;

// ---------------------------------------------------------------------------------------------- reading a call

[[noreturn]] inline void refuse_type(const char* op, const char* name, const char* wanted, PyObject* got) {
  PyErr_Clear();
  throw py::type_error(std::string(op) + ": " + name + " must be " + wanted + ", got " + Py_TYPE(got)->tp_name);
}

inline int64_t integer(const char* op, const char* name, PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) refuse_type(op, name, "an integer of 64 bits", object);
  return value;
}

inline double real(const char* op, const char* name, PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) refuse_type(op, name, "a number", object);
  return value;
}

inline void* address(const char* op, const char* name, PyObject* object) {
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  if (object == Py_None) return nullptr;
  if (PyLong_CheckExact(object)) {
    void* value = PyLong_AsVoidPtr(object);
    if (!value && PyErr_Occurred()) refuse_type(op, name, "an address", object);
    return value;
  }
  const auto number = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, data_ptr));
  if (!number) refuse_type(op, name, "a tensor, an address or None", object);
  return PyLong_AsVoidPtr(number.ptr());
}

// The same for a kernel that runs here: an address of another device's memory would end the process (30 ns a tensor).
inline void* host_address(const char* op, const char* name, PyObject* object) {
  static PyObject* const is_cpu = PyUnicode_InternFromString("is_cpu");
  if (object != Py_None && !PyLong_CheckExact(object)) {
    const auto here = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, is_cpu));
    if (!here) PyErr_Clear();  // a storage, which has an address and no such property
    if (here.ptr() == Py_False) {
      const auto device = py::str(py::handle(object).attr("device")).cast<std::string>();
      throw std::invalid_argument(std::string(op) + ": " + name + " must be on the CPU, as the others are, got " +
                                  device + "; move it with .to()");
    }
  }
  return address(op, name, object);
}

using Reader = void* (*)(const char* op, const char* name, PyObject* object);

// (parameter, gradient, exp_avg, exp_avg_sq, average, step, elements) each, in the list's memory.
inline AdamTensors adam_tensors(const char* op, PyObject* list, std::vector<AdamTensor>* kept, Reader read) {
  if (!PyList_Check(list)) refuse_type(op, "tensors", "a list of tuples", list);
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    PyObject* row = PyList_GET_ITEM(list, i);
    if (!PyTuple_Check(row) || PyTuple_GET_SIZE(row) != 7) refuse_type(op, "tensors", "a list of 7-tuples", row);
    void* p[6];
    for (int k = 0; k < 6; ++k) p[k] = read(op, "tensors", PyTuple_GET_ITEM(row, k));
    const auto floats = [&](int k) { return static_cast<float*>(p[k]); };
    kept->push_back({floats(0), floats(1), floats(2), floats(3), floats(4), floats(5),
                     integer(op, "elements", PyTuple_GET_ITEM(row, 6))});
  }
  return {kept->data(), static_cast<int64_t>(kept->size())};
}

inline void read_strides(const char* op, const char* name, PyObject* tuple, std::byte* to) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 4) refuse_type(op, name, "a tuple of 4 strides", tuple);
  Strides strides;
  for (int i = 0; i < 4; ++i) strides[i] = integer(op, name, PyTuple_GET_ITEM(tuple, i));
  std::memcpy(to, strides, sizeof strides);
}

// Everything but pointers and lists of tensors, whose meaning is the reader's: pointer(field, object, to).
template <class Pointer>
void read(const Function& f, const Field& field, PyObject* object, std::byte* frame, const Pointer& pointer) {
  std::byte* to = frame + field.offset;
  switch (field.kind) {
    case Kind::SIZE:
      return put(to, integer(f.name, field.name, object));
    case Kind::FLAG: {
      const int truth = PyObject_IsTrue(object);
      if (truth < 0) refuse_type(f.name, field.name, "True or False", object);
      return put(to, truth != 0);
    }
    case Kind::FLOAT:
      return put(to, static_cast<float>(real(f.name, field.name, object)));
    case Kind::DOUBLE:
      return put(to, real(f.name, field.name, object));
    case Kind::CODE: {
      const int64_t code = integer(f.name, field.name, object);
      within(f.name, field.name, code, 0, field.last);
      return put(to, static_cast<int>(code));
    }
    case Kind::THREADS: {
      const int64_t count = integer(f.name, field.name, object);
      within(f.name, field.name, count, 1, LAST_THREADS);
      return put(to, static_cast<int>(count));
    }
    case Kind::STRIDES:
      return read_strides(f.name, field.name, object, to);
    case Kind::CONV:
      if (!PyBytes_Check(object) || PyBytes_GET_SIZE(object) != sizeof(ConvShape))
        refuse_type(f.name, field.name, "what Conv(...) gives", object);
      std::memcpy(to, PyBytes_AS_STRING(object), sizeof(ConvShape));
      return;
    case Kind::POINTER:
    case Kind::TENSORS:
      return pointer(field, object, to);
  }
}

inline void refuse_count(const Function& f, size_t wanted, size_t got) {
  std::string names;
  for (size_t i = 0; i < wanted; ++i) names += (i ? ", " : "") + std::string(f.fields[i].name);
  throw py::type_error(std::string(f.name) + " takes " + std::to_string(wanted) + " arguments, got " +
                       std::to_string(got) + ": " + names);
}

// ---------------------------------------------------------------------------------------------- a call

struct Unlocked {  // the GIL is free
  PyThreadState* state = PyEval_SaveThread();
  ~Unlocked() { PyEval_RestoreThread(state); }
};

// What body() returns, its exceptions as Python's.
template <class Body>
PyObject* translated(const Body& body) noexcept {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::type_error& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <Reader READ>
PyObject* call(const Function& f, PyObject* const* arguments, Py_ssize_t count) {
  return translated([&] {
    if (static_cast<size_t>(count) != f.fields.size()) refuse_count(f, f.fields.size(), static_cast<size_t>(count));
    Frame frame;
    std::vector<AdamTensor> tensors;
    put(frame.bytes + f.threads, 1);  // of a core that takes none
    for (size_t i = 0; i < f.fields.size(); ++i)
      read(f, f.fields[i], arguments[i], frame.bytes, [&](const Field& field, PyObject* object, std::byte* to) {
        if (field.kind == Kind::POINTER)
          put(to, READ(f.name, field.name, object));
        else
          put(to, adam_tensors(f.name, object, &tensors, READ));
      });
    f.check(f.name, frame.bytes);
    int64_t answer = 0;
    {
      const Unlocked gil;
      answer = f.run(frame.bytes);
    }
    return PyLong_FromLongLong(answer);
  });
}

// Conv(N, C, ...): a checked ConvShape as bytes.
inline PyObject* pack_conv(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  static const Function f = [] {
    Function conv{"Conv", {}, 0, 0};
    Lister lister{conv, true, 0};
    ConvShape::each_field(lister);
    return conv;
  }();
  return translated([&] {
    if (static_cast<size_t>(count) != f.fields.size()) refuse_count(f, f.fields.size(), static_cast<size_t>(count));
    ConvShape shape;
    auto* bytes = reinterpret_cast<std::byte*>(&shape);
    for (size_t i = 0; i < f.fields.size(); ++i)
      read(f, f.fields[i], arguments[i], bytes, [](const Field&, PyObject*, std::byte*) {});
    check("Conv", shape);
    return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(bytes), sizeof shape);
  });
}

// ---------------------------------------------------------------------------------------------- the module

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// `method` lives as long as the module does.
inline PyMethodDef* filled(PyMethodDef* method, const char* name, Fast function, const char* text) {
  *method = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, text};
  return method;
}

inline void define(py::module_& m, PyMethodDef* method, const char* name, Fast function, const char* text) {
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_New(filled(method, name, function, text), nullptr));
}

// Python sees to it that `self` is of the type.
inline void define_method(py::handle type, PyMethodDef* method, const char* name, Fast function, const char* text) {
  auto* of = reinterpret_cast<PyTypeObject*>(type.ptr());
  type.attr(name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(of, filled(method, name, function, text)));
}

// A Python function of a kernel; it lives as long as the module does.
struct Method {
  PyMethodDef method;
  std::string signature;

  void define(py::module_& m, const Function& f, Fast function) {
    for (const Field& field : f.fields) signature += (signature.empty() ? "(" : ", ") + std::string(field.name);
    signature = f.name + signature + ")";
    binding::define(m, &method, f.name, function, signature.c_str());
  }
};

template <class Core, auto MEMBER>
void bind(py::module_& m, const char* name) {
  using K = Bound<Core, MEMBER>;
  constexpr Reader READS = std::is_same_v<Core, Cpu> ? host_address : address;
  static Method method;
  K::describe(name);
  method.define(m, K::function, [](PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return call<READS>(K::function, arguments, count);
  });
}

inline void bind_conv_shape(py::module_& m) {
  static PyMethodDef method;
  define(
      m, &method, "Conv", pack_conv,
      "Geometry of a forward convolution x[N,C,H,W] -> y[N,K,OH,OW], packed: (N, C, H, W, K, OH, OW, R, S, stride_h, "
      "stride_w, pad_h, pad_w, dil_h, dil_w, groups)");
}

#define FG_BIND_CPU(kernel, ...) bind<Cpu, &Table::kernel>(m, #kernel);
inline void bind_cpu(py::module_& m){FG_CPU_KERNELS(FG_BIND_CPU)}
#ifdef FG_CUDA
#define FG_BIND_CUDA(kernel, ...) bind<Cuda, &cuda::Table::kernel>(m, #kernel);
inline void bind_cuda(py::module_& m) {
  FG_CUDA_KERNELS(FG_BIND_CUDA)
}
#endif

}  // namespace fg::binding
