// Which instruction-set tables this binary holds, and which of them this machine can run.
#pragma once

#include <string>

#include "common/kernels.hpp"

namespace fg {

struct Candidate {
  const Table* table;
  std::string (*refusal)();  // "" if the table is usable on this machine, else the reason
};

// Every table of this binary, worst first; ended by a null table.
const Candidate* candidates();
// The table in use: the last usable candidate unless select() forced another.
const Table& current();
// Forces the named table (null: back to the best). Returns "" or the reason for the refusal.
std::string select(const char* name);

}  // namespace fg
