// Detection of instruction sets, the table in use, and scratch memory. Compiled once, with base flags.
#include "dispatch.hpp"

#include <atomic>
#include <cstring>
#include <mutex>
#include <new>

#if defined(FG_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fg {

// The tables that setup.py compiled (FASTGAN_TABLES).
#ifndef FG_TABLES
#define FG_TABLES(X) X(portable)
#endif
#define FG_DECLARE(name)    \
  namespace name {          \
  extern const Table table; \
  }
FG_TABLES(FG_DECLARE)
#define FG_FIND(built) \
  if (std::strcmp(name, #built) == 0) return &built::table;

namespace {

std::string refuse_nothing() { return ""; }

#if defined(FG_X86)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
#if defined(_MSC_VER)
  int v[4];
  __cpuid(v, 0);
  if (static_cast<uint32_t>(v[0]) < leaf) return r;
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
#endif
  return r;
}

bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

// XCR0: the register states that the operating system saves. 0 where it does not say.
uint64_t saved_states() {
  if (!bit(cpuid(1, 0).c, 27)) return 0;  // OSXSAVE
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return static_cast<uint64_t>(hi) << 32 | lo;
#endif
}

std::string refuse_avx2() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  if (!bit(seven.b, 5) || !bit(one.c, 12)) return "the CPU has no AVX2 with FMA";
  if ((saved_states() & 0x6) != 0x6) return "the operating system does not save AVX registers";
  return "";
}

std::string refuse_avx512() {
  if (std::string why = refuse_avx2(); !why.empty()) return why;
  const Registers seven = cpuid(7, 0);
  // F, DQ, BW, VL
  if (!bit(seven.b, 16) || !bit(seven.b, 17) || !bit(seven.b, 30) || !bit(seven.b, 31))
    return "the CPU has no AVX-512 (F, DQ, BW, VL)";
  if ((saved_states() & 0xe6) != 0xe6) return "the operating system does not save AVX-512 registers";
  return "";
}

std::string refuse_avx512_bf16() {
  if (std::string why = refuse_avx512(); !why.empty()) return why;
  return bit(cpuid(7, 1).a, 5) ? "" : "the CPU has no AVX512_BF16";
}

std::string refuse_amx() {
  if (std::string why = refuse_avx512_bf16(); !why.empty()) return why;
  const Registers seven = cpuid(7, 0);
  if (!bit(seven.d, 22) || !bit(seven.d, 24)) return "the CPU has no AMX-BF16";
  if ((saved_states() & (3u << 17)) != (3u << 17)) return "the operating system does not save AMX tiles";
#if defined(__linux__)
  // Linux grants the tile state only on request, once per process: ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA.
  // valgrind and strict seccomp profiles refuse, which is no error.
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return "the kernel refused the AMX tile state to this process";
  return "";
#else
  return "AMX is used on Linux only";
#endif
}

#endif  // FG_X86

const Table* find(const char* name) {
  FG_TABLES(FG_FIND)
  return nullptr;
}

const Candidate all[] = {
    {"portable", find("portable"), refuse_nothing},
#if defined(FG_X86)
    {"avx2", find("avx2"), refuse_avx2},
    {"avx512", find("avx512"), refuse_avx512},
    {"avx512_bf16", find("avx512_bf16"), refuse_avx512_bf16},
    {"amx", find("amx"), refuse_amx},
#endif
    {nullptr, nullptr, nullptr},
};

const Table* best() {
  const Table* found = nullptr;
  for (const Candidate* c = all; c->name; ++c)
    if (c->refusal().empty()) found = c->table;
  return found;
}

std::atomic<const Table*> in_use{nullptr};

}  // namespace

std::string Candidate::refusal() const {
  if (std::string why = unsuitable(); !why.empty()) return why;
  return table ? "" : "this build left it out; reinstall fastgan on this machine, or with FASTGAN_TABLES=all";
}

const Candidate* candidates() { return all; }

const Table& current() {
  const Table* t = in_use.load(std::memory_order_acquire);
  if (!t) in_use.store(t = best(), std::memory_order_release);
  return *t;
}

std::string select(const char* name) {
  if (!name) {
    in_use.store(best(), std::memory_order_release);
    return "";
  }
  for (const Candidate* c = all; c->name; ++c) {
    if (std::strcmp(c->name, name) != 0) continue;
    std::string why = c->refusal();
    if (why.empty()) in_use.store(c->table, std::memory_order_release);
    return why;
  }
  return "fastgan has no such table";
}

bool translates_many_pages() noexcept {
#if defined(FG_X86)
  return refuse_avx512_bf16().empty();
#else
  return false;
#endif
}

void prefer_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(block) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(block) + bytes) / page * page;
  // A refusal (no such pages on this system) leaves the small ones.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Scratch memory: a block carries its size in a header of one alignment unit and returns to a short list. The list
// keeps at most 8 blocks, and never more than 256 MB; the best fit that wastes less than half of itself is reused.
namespace {

constexpr size_t ALIGN = 64;
constexpr size_t MAX_BLOCKS = 8;
constexpr size_t MAX_BYTES = size_t{256} << 20;
constexpr size_t HUGE_FROM = size_t{4} << 20;  // bytes from which a block asks for huge pages, of 2 MB on x86

std::mutex scratch_mutex;
char* kept[MAX_BLOCKS];
size_t kept_count = 0;
size_t kept_bytes = 0;
size_t held_bytes = 0;  // kept or in use: all that came from the system and has not gone back
size_t most_bytes = 0;  // the highest held_bytes since scratch_highest(true)

size_t& size_of(char* block) { return *reinterpret_cast<size_t*>(block); }

char* take_kept(size_t need) {
  std::lock_guard<std::mutex> lock(scratch_mutex);
  size_t best_index = kept_count;
  for (size_t i = 0; i < kept_count; ++i) {
    const size_t have = size_of(kept[i]);
    if (have < need || have / 2 > need + 4096) continue;
    if (best_index == kept_count || have < size_of(kept[best_index])) best_index = i;
  }
  if (best_index == kept_count) return nullptr;
  char* block = kept[best_index];
  kept[best_index] = kept[--kept_count];
  kept_bytes -= size_of(block);
  return block;
}

}  // namespace

void* scratch_acquire(size_t bytes) {
  const size_t need = (bytes + ALIGN - 1) / ALIGN * ALIGN;
  if (need < bytes) throw std::bad_alloc();
  if (char* block = take_kept(need)) return block + ALIGN;
  char* block = static_cast<char*>(::operator new(need + ALIGN, std::align_val_t{ALIGN}));
  if (need >= HUGE_FROM) prefer_huge_pages(block, need + ALIGN);
  size_of(block) = need;
  std::lock_guard<std::mutex> lock(scratch_mutex);
  held_bytes += need;
  most_bytes = held_bytes > most_bytes ? held_bytes : most_bytes;
  return block + ALIGN;
}

void scratch_release(void* pointer) noexcept {
  if (!pointer) return;
  char* block = static_cast<char*>(pointer) - ALIGN;
  {
    std::lock_guard<std::mutex> lock(scratch_mutex);
    if (kept_count < MAX_BLOCKS && kept_bytes + size_of(block) <= MAX_BYTES) {
      kept[kept_count++] = block;
      kept_bytes += size_of(block);
      return;
    }
    held_bytes -= size_of(block);
  }
  ::operator delete(block, std::align_val_t{ALIGN});
}

Kept*& kept_of_step() noexcept {
  thread_local Kept* kept_here = nullptr;
  return kept_here;
}

size_t scratch_highest(bool restart) noexcept {
  std::lock_guard<std::mutex> lock(scratch_mutex);
  const size_t highest = most_bytes;
  if (restart) most_bytes = held_bytes;
  return highest;
}

}  // namespace fg
