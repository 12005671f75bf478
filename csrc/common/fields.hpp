// Structs that know the names of their fields: FG_STRUCT(Name, (type, field), ...) declares struct Name with these
// fields, and Name::each_field(visitor), which calls visitor.add<type>("field", offset) for each of them in order.
// binding.hpp makes a kernel's Python function of these lists, so that no argument is written down twice.
#pragma once

#include <cstddef>

// FG_EACH(f, (a, b), (c, d)) is f(a, b) f(c, d). A macro does not expand itself: FG_SCAN rescans the text 64 times.
#define FG_SCAN(...) FG_SCAN3(FG_SCAN3(FG_SCAN3(FG_SCAN3(__VA_ARGS__))))
#define FG_SCAN3(...) FG_SCAN2(FG_SCAN2(FG_SCAN2(FG_SCAN2(__VA_ARGS__))))
#define FG_SCAN2(...) FG_SCAN1(FG_SCAN1(FG_SCAN1(FG_SCAN1(__VA_ARGS__))))
#define FG_SCAN1(...) __VA_ARGS__
#define FG_EACH(f, ...) FG_SCAN(FG_EACH_STEP(f, __VA_ARGS__))
#define FG_EACH_STEP(f, head, ...) f head __VA_OPT__(FG_EACH_AGAIN FG_EMPTY()()(f, __VA_ARGS__))
#define FG_EACH_AGAIN() FG_EACH_STEP
#define FG_EMPTY()

#define FG_FIELD(type, field) type field;
#define FG_VISIT_FIELD(type, field) visitor.template add<type>(#field, offsetof(Self, field));
#define FG_STRUCT(name, ...)                   \
  struct name {                                \
    using Self = name;                         \
    FG_EACH(FG_FIELD, __VA_ARGS__)             \
    template <class Visitor>                   \
    static void each_field(Visitor& visitor) { \
      FG_EACH(FG_VISIT_FIELD, __VA_ARGS__)     \
    }                                          \
  }
