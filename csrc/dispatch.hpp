// Which instruction-set tables this binary holds, and which of them this machine can run.
#pragma once

#include <string>

#include "common/kernels.hpp"

namespace fg {

struct Candidate {
  const char* name;
  const Table* table;           // null where the build left it out
  std::string (*unsuitable)();  // why this machine cannot run it, or ""

  // "" if the table is usable, else the reason.
  std::string refusal() const;
};

// Every table of the sources, worst first; ended by a null name.
const Candidate* candidates();
// The table in use: the last usable candidate unless select() forced another.
const Table& current();
// Forces the named table (null: back to the best). Returns "" or the reason for the refusal.
std::string select(const char* name);

}  // namespace fg
