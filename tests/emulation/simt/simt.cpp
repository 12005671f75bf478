// The scheduler behind simt.hpp. Compile it without sanitizers: it tells theirs about fibers through weak hooks.
#include "simt.hpp"

#include <sys/mman.h>

#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <unordered_map>

#define WEAK __attribute__((weak))
extern "C" {
void* __tsan_create_fiber(unsigned) WEAK;
void __tsan_destroy_fiber(void*) WEAK;
void __tsan_switch_to_fiber(void*, unsigned) WEAK;
void* __tsan_get_current_fiber() WEAK;
void __tsan_acquire(void*) WEAK;
void __tsan_release(void*) WEAK;
void __sanitizer_start_switch_fiber(void**, const void*, size_t) WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) WEAK;
}

// swapcontext would make two system calls a switch: these ten instructions run a block of 256 threads ten times faster.
#if defined(__x86_64__)
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.hidden simt_switch
.type simt_switch,@function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
#else
#include <ucontext.h>
#endif

namespace simt {

Settings settings;
std::vector<Region> regions;
std::vector<Launch> launches;
Thread* current = nullptr;

namespace {

constexpr size_t STACK = 64 << 10, STATIC_SHARED = 48 << 10, RED_ZONE = 64;
constexpr size_t UNASKED = 48 << 10;  // dynamic shared memory that a kernel may have without FG_ALLOW_SHARED

enum class State { READY, YIELDED, BARRIER, WARP, DONE };

struct Copy {
  void* to;
  const void* from;
  unsigned bytes, valid, group;
};
// No heap where kernels run, whose reuse would look like a race.
constexpr unsigned COPIES = 256;  // cp.async in flight a thread
constexpr unsigned SLOTS = 32;    // FG_SHARED of a block

struct Block;

struct Fiber {
  Thread context;
  Block* block;
  State state;
  Where where;
  Meeting meeting;
  unsigned mask;
  uint64_t word, *out;
  void* stack_pointer;
  char* stack;
  void *race_context, *own_race_context, *fake_stack;
  bool fenced;
  uint64_t touched;  // by atomics since the last fence: a bit for each of fence_tokens
  Copy copies[COPIES];
  unsigned pending, group;                           // copies not done; groups committed so far
  std::unordered_map<const void*, uint32_t> visits;  // call site -> accesses so far, while counting
#if !defined(__x86_64__)
  ucontext_t machine;
#endif
};

struct Access {
  const void* site;
  uint32_t visit;
  int warp;
  uintptr_t address;
  unsigned bytes;
  bool shared;
};

struct Block {
  std::vector<Fiber*> fibers;
  char *shared, *dynamic;
  size_t shared_used, dynamic_bytes;
  std::pair<const void*, void*> slots[SLOTS];
  unsigned slots_used, barriers_passed, delay;
  char start_token, barrier_token[2], warp_token[32], end_token;
  void* race_context;
  std::vector<Access> accesses;
};

std::vector<std::unique_ptr<Fiber>> pool;
Fiber* running = nullptr;
void *host_pointer, *host_race, *host_fake;
const void* host_stack;
size_t host_stack_bytes;
const std::function<void()>* kernel_body;
const char* kernel_name = "";
std::string failure;
char fence_tokens[64];
#if !defined(__x86_64__)
ucontext_t host_machine;
#endif

void race_release(void* token) {
  if (__tsan_release) __tsan_release(token);
}
void race_acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}
void race_switch(void* context) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(context, 1);  // 1: switching itself orders nothing
}

// Of a block's own tokens. Between blocks its threads are one context, and the next block's tokens lie at the same
// addresses: what a barrier published there would order the next block behind this one and hide their races.
void race_publish(const Block& block, void* token) {
  if (!block.race_context) race_release(token);
}
void race_learn(const Block& block, void* token) {
  if (!block.race_context) race_acquire(token);
}

std::string place(const Thread& t) {
  const auto triple = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  return "block " + triple(t.block.x, t.block.y, t.block.z) + " thread " + triple(t.thread.x, t.thread.y, t.thread.z);
}

std::string report(const char* rule, Where where, const Thread* t, const std::string& text) {
  std::string message = std::string("simt: ") + rule + " in " + kernel_name;
  if (where.line) message += std::string(" at ") + where.file + ":" + std::to_string(where.line);
  return message + (t ? ", " + place(*t) : "") + ": " + text;
}

// ------------------------------------------------------------------------------------------------ fibers

void to_host(bool dying = false) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(dying ? nullptr : &running->fake_stack, host_stack, host_stack_bytes);
  race_switch(host_race);
#if defined(__x86_64__)
  simt_switch(&running->stack_pointer, host_pointer);
#else
  swapcontext(&running->machine, &host_machine);
#endif
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(running->fake_stack, &host_stack, &host_stack_bytes);
}

void to_fiber(Fiber* f) {
  running = f;
  current = &f->context;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&host_fake, f->stack, STACK);
  race_switch(f->race_context);
#if defined(__x86_64__)
  simt_switch(&host_pointer, f->stack_pointer);
#else
  swapcontext(&host_machine, &f->machine);
#endif
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(host_fake, nullptr, nullptr);
  current = nullptr;
}

void entry() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
  race_acquire(&running->block->start_token);
  (*kernel_body)();
  race_release(&running->block->end_token);
  running->state = State::DONE;
  to_host(true);
}

void start(Fiber* f) {
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f->stack) + STACK) & ~uintptr_t{63});
  *--top = nullptr;  // the entry's own return address: never used
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f->stack_pointer = top;
#else
  getcontext(&f->machine);
  f->machine.uc_stack.ss_sp = f->stack;
  f->machine.uc_stack.ss_size = STACK;
  f->machine.uc_link = nullptr;
  makecontext(&f->machine, entry, 0);
#endif
}

// ------------------------------------------------------------------------------------------------ counts

// Distinct bytes and 32-byte sectors of one warp instruction, added to the tensor that it touches.
void count_global(std::vector<Access>::iterator begin, std::vector<Access>::iterator end) {
  for (auto& region : regions) {
    std::vector<std::pair<uintptr_t, uintptr_t>> spans;
    for (auto a = begin; a != end; ++a)
      if (a->address >= region.begin && a->address < region.begin + region.bytes)
        spans.emplace_back(a->address, a->address + a->bytes);
    std::sort(spans.begin(), spans.end());
    uintptr_t covered = 0, sector = 0;
    for (const auto& [first, last] : spans) {
      const uintptr_t fresh = std::max(first, covered);
      if (last > fresh) region.requested += last - fresh;
      covered = std::max(covered, last);
      const uintptr_t from = std::max(first / 32, sector), to = (last - 1) / 32 + 1;
      if (to > from) region.sectors += to - from;
      sector = std::max(sector, to);
    }
  }
}

// Shared memory serves 32 banks of 4 bytes at a time: 32 lanes of 4 bytes, 16 of 8, 8 of 16. A wavefront more for every
// further word that lanes of one such phase want of the same bank.
void count_shared(std::vector<Access>::iterator begin, std::vector<Access>::iterator end, Launch& launch) {
  const unsigned bytes = begin->bytes;
  const auto lanes = static_cast<ptrdiff_t>(bytes <= 4 ? 32 : 128 / bytes);
  for (auto phase = begin; phase < end; phase += std::min(lanes, end - phase)) {
    std::vector<uintptr_t> words;
    for (auto a = phase; a != phase + std::min(lanes, end - phase); ++a)
      for (unsigned b = 0; b < std::max(bytes, 4u); b += 4) words.push_back((a->address + b) / 4);
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    unsigned banks[32] = {}, most = 0;
    for (uintptr_t w : words) most = std::max(most, ++banks[w % 32]);
    launch.shared_wavefronts += most;
    launch.shared_ideal += 1;
  }
}

// The k-th visit of a call site by the lanes of a warp is one instruction of that warp.
void count(Block& block, Launch& launch) {
  auto& all = block.accesses;
  const auto key = [](const Access& a) { return std::tie(a.shared, a.warp, a.site, a.visit, a.bytes); };
  std::stable_sort(all.begin(), all.end(), [&](const Access& a, const Access& b) { return key(a) < key(b); });
  for (auto begin = all.begin(); begin != all.end();) {
    auto end = begin;
    while (end != all.end() && key(*end) == key(*begin)) ++end;
    begin->shared ? count_shared(begin, end, launch) : count_global(begin, end);
    begin = end;
  }
  all.clear();
}

void note(const void* site, const void* p, unsigned bytes, bool shared) {
  const uint32_t visit = running->visits[site]++;
  running->block->accesses.push_back(
      {site, visit, running->context.warp, reinterpret_cast<uintptr_t>(p), bytes, shared});
}

// ------------------------------------------------------------------------------------------------ blocks

void open_block(Block& block, unsigned index, dim3 grid, dim3 size, size_t dynamic_bytes, Fiber** fibers, size_t n,
                void* creator) {
  const bool apart = __tsan_create_fiber && settings.race == Race::BETWEEN;
  if (apart)  // new stacks below: the last block's locals are forgotten
    for (size_t t = 0; t < n; ++t) free(fibers[t]->stack);
  // what the block's memory was before is nobody's business but the creator's
  race_switch(creator);
  block.shared = static_cast<char*>(malloc(STATIC_SHARED));
  block.dynamic = static_cast<char*>(aligned_alloc(128, (dynamic_bytes + 255) / 128 * 128));
  std::memset(block.shared, 0xFF, STATIC_SHARED);  // NaN in every float type
  std::memset(block.dynamic, 0xFF, dynamic_bytes);
  if (apart)
    for (size_t t = 0; t < n; ++t) fibers[t]->stack = static_cast<char*>(malloc(STACK));
  block.race_context = apart ? __tsan_create_fiber(0) : nullptr;
  race_switch(host_race);
  block.shared_used = 0;
  block.dynamic_bytes = dynamic_bytes;
  block.slots_used = 0;
  block.barriers_passed = 0;
  block.fibers.assign(fibers, fibers + n);
  for (size_t t = 0; t < n; ++t) {
    Fiber* f = fibers[t];
    const auto i = static_cast<unsigned>(t);
    f->context = {{i % size.x, i / size.x % size.y, i / size.x / size.y},
                  {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y},
                  size,
                  grid,
                  static_cast<int>(t % 32),
                  static_cast<int>(t / 32),
                  block.dynamic};
    f->block = &block;
    f->state = State::READY;
    f->fake_stack = nullptr;
    f->fenced = false;
    f->touched = 0;
    f->pending = f->group = 0;
    f->visits.clear();
    // a context costs a millisecond: threads keep theirs, and are ordered behind the host by the start token
    if (__tsan_create_fiber && !block.race_context && !f->own_race_context)
      f->own_race_context = __tsan_create_fiber(0);
    f->race_context = block.race_context ? block.race_context : f->own_race_context;
    start(f);
  }
  if (!apart) race_release(&block.start_token);
}

void close_block(Block& block) {
  race_acquire(&block.end_token);
  if (block.race_context) __tsan_destroy_fiber(block.race_context);
  free(block.shared);
  free(block.dynamic);
}

[[noreturn]] void refuse(const char* rule, const Fiber* f, const std::string& text) {
  throw std::runtime_error(report(rule, f->where, &f->context, text));
}

bool release_warp(Block& block, size_t first) {
  const size_t n = block.fibers.size();
  bool progress = false;
  for (size_t t = first; t < std::min(n, first + 32); ++t) {
    Fiber* f = block.fibers[t];
    if (f->state != State::WARP) continue;
    bool all = true;
    for (size_t i = 0; i < 32; ++i) {
      if (!(f->mask >> i & 1)) continue;
      if (first + i >= n || block.fibers[first + i]->state == State::DONE)
        refuse("warp", f, "the mask names lane " + std::to_string(i) + ", which has exited or does not exist");
      const Fiber* other = block.fibers[first + i];
      all = all && other->state == State::WARP && other->mask == f->mask;
    }
    if (!all) continue;
    for (size_t i = 0; i < 32; ++i) {
      if (!(f->mask >> i & 1)) continue;
      Fiber* other = block.fibers[first + i];
      if (other->meeting != f->meeting || other->where.line != f->where.line)
        refuse("warp", other,
               "lanes meet at different operations (another at line " + std::to_string(f->where.line) + ")");
      for (size_t j = 0; j < 32; ++j) other->out[j] = f->mask >> j & 1 ? block.fibers[first + j]->word : ~uint64_t{0};
    }
    for (size_t i = 0; i < 32; ++i)
      if (f->mask >> i & 1) block.fibers[first + i]->state = State::READY;
    progress = true;
  }
  return progress;
}

bool release_barrier(Block& block) {
  size_t waiting = 0, done = 0;
  const Fiber* first = nullptr;
  for (const Fiber* f : block.fibers) {
    done += f->state == State::DONE;
    if (f->state != State::BARRIER) continue;
    ++waiting;
    if (!first) first = f;
  }
  if (!waiting || waiting + done < block.fibers.size()) return false;
  if (done) refuse("barrier", first, std::to_string(done) + " threads of the block exited before this __syncthreads");
  for (Fiber* f : block.fibers) {
    if (f->where.line != first->where.line)
      refuse("barrier", f, "others of the block wait at line " + std::to_string(first->where.line));
    f->state = State::READY;
  }
  ++block.barriers_passed;
  return true;
}

// Runs resident blocks to their end. With a seed some start late: in step they would meet without a barrier.
void run(std::vector<Block>& blocks, std::mt19937& rng) {
  std::vector<Fiber*> order;
  for (Block& block : blocks) {
    order.insert(order.end(), block.fibers.begin(), block.fibers.end());
    block.delay = settings.seed && blocks.size() > 1 ? rng() % 64 : 0;
  }
  int idle = 0;
  for (size_t done = 0; done < order.size();) {
    bool progress = false;
    if (settings.seed) std::shuffle(order.begin(), order.end(), rng);
    for (Fiber* f : order) {
      if (f->block->delay || (f->state != State::READY && f->state != State::YIELDED)) continue;
      const bool spins = f->state == State::YIELDED;
      f->state = State::READY;
      to_fiber(f);
      if (!failure.empty()) throw std::runtime_error(failure);
      progress |= !(spins && f->state == State::YIELDED);
    }
    for (Block& block : blocks) {
      progress |= block.delay > 0;
      block.delay -= block.delay > 0;
      for (size_t warp = 0; warp < block.fibers.size(); warp += 32) progress |= release_warp(block, warp);
      progress |= release_barrier(block);
    }
    done = static_cast<size_t>(
        std::count_if(order.begin(), order.end(), [](const Fiber* f) { return f->state == State::DONE; }));
    idle = progress ? 0 : idle + 1;
    if (idle > 100)
      for (const Fiber* f : order)
        if (f->state != State::DONE) refuse("deadlock", f, "waits for ever");
  }
}

Fiber* fiber(size_t i) {
  while (pool.size() <= i) {
    pool.push_back(std::make_unique<Fiber>());
    pool.back()->stack = static_cast<char*>(malloc(STACK));
  }
  return pool[i].get();
}

}  // namespace

// ------------------------------------------------------------------------------------------------ what kernels call

void fail(const char* rule, Where where, const std::string& text) {
  failure = report(rule, where, current, text);
  to_host(true);
  __builtin_unreachable();  // the host throws and never comes back to this fiber
}

void barrier(Where where) {
  Block* block = running->block;
  running->where = where;
  running->state = State::BARRIER;
  void* token = &block->barrier_token[block->barriers_passed & 1];
  race_publish(*block, token);
  to_host();
  race_learn(*block, token);
}

void meet(Meeting kind, unsigned mask, uint64_t mine, uint64_t out[32], Where where) {
  Fiber* f = running;
  f->where = where;
  f->state = State::WARP;
  f->meeting = kind;
  f->mask = mask;
  f->word = mine;
  f->out = out;
  void* token = &f->block->warp_token[f->context.warp];
  if (kind == Meeting::SYNC) race_publish(*f->block, token);  // only __syncwarp orders memory, a shuffle does not
  to_host();
  if (kind == Meeting::SYNC) race_learn(*f->block, token);
}

void yield() {
  running->where = {"__nanosleep", 1};
  running->state = State::YIELDED;
  to_host();
}

// A fence before an atomic publishes what came before; a fence after an atomic sees what that atomic's others
// published.
static size_t token_of(void* p) { return reinterpret_cast<uintptr_t>(p) / 4 % sizeof fence_tokens; }

void fence() {
  for (size_t i = 0; i < sizeof fence_tokens; ++i)
    if (running->touched >> i & 1) race_acquire(&fence_tokens[i]);
  running->touched = 0;
  running->fenced = true;
}
void before_atomic(void* p) {
  if (running->fenced) race_release(&fence_tokens[token_of(p)]);
}
void after_atomic(void* p) { running->touched |= uint64_t{1} << token_of(p); }

__attribute__((noinline)) void global_access(const void* p, unsigned bytes, bool write) {
  if (regions.empty()) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (const Region& r : regions)
    if (address >= r.begin && address + bytes <= r.begin + r.bytes) {
      if (address % bytes)
        fail("global memory", {"", 0}, std::to_string(bytes) + " bytes at an address that is no multiple");
      if (settings.counting) note(__builtin_return_address(0), p, bytes, false);
      return;
    }
  int64_t nearest = INT64_MAX;
  for (const Region& r : regions) {
    const auto behind = static_cast<int64_t>(address - (r.begin + r.bytes));
    if (std::abs(behind) < std::abs(nearest)) nearest = behind;
  }
  fail("global memory", {"", 0},
       std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes outside every tensor, " +
           std::to_string(nearest) + " bytes from the end of the nearest");
}

__attribute__((noinline)) void shared_access(const void* p, unsigned bytes) {
  const Block& block = *running->block;
  const auto* at = static_cast<const char*>(p);
  const bool fixed = at >= block.shared && at + bytes <= block.shared + STATIC_SHARED;
  if (!fixed && (at < block.dynamic || at + bytes > block.dynamic + block.dynamic_bytes))
    fail("shared memory", {"", 0},
         std::to_string(bytes) + " bytes outside the block's, " + std::to_string(at - block.dynamic) +
             " bytes from the begin of its " + std::to_string(block.dynamic_bytes) + " dynamic ones");
  if (settings.counting) note(__builtin_return_address(0), p, bytes, true);
}

void count_product() { ++launches.back().products; }

void* shared_memory(const void* key, size_t bytes) {
  Block& block = *running->block;
  for (unsigned i = 0; i < block.slots_used; ++i)
    if (block.slots[i].first == key) return block.slots[i].second;
  char* p = block.shared + block.shared_used;
  block.shared_used += (bytes + 15) / 16 * 16;
  if (block.shared_used > STATIC_SHARED || block.slots_used == SLOTS)
    fail("shared memory", {"", 0}, "more than 48 KiB or 32 arrays of static shared memory");
  block.slots[block.slots_used++] = {key, p};
  return p;
}

void copy_later(void* shared, const void* global, unsigned bytes, unsigned valid) {
  if (running->pending == COPIES) fail("cp.async", {"", 0}, "more than 256 copies of a thread are in flight");
  running->copies[running->pending++] = {shared, global, bytes, valid, running->group};
}
void commit_copies() { ++running->group; }
void wait_copies(int groups_in_flight) {
  unsigned kept = 0;
  for (unsigned i = 0; i < running->pending; ++i) {
    const Copy c = running->copies[i];
    if (c.group + static_cast<unsigned>(groups_in_flight) >= running->group) {
      running->copies[kept++] = c;
      continue;
    }
    std::memcpy(c.to, c.from, c.valid);
    std::memset(static_cast<char*>(c.to) + c.valid, 0, c.bytes - c.valid);
  }
  running->pending = kept;
}

static std::mutex one_at_a_time;
static std::unordered_map<std::string, size_t> allowed;  // by FG_ALLOW_SHARED

void allow_shared(const char* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (bytes > static_cast<size_t>(settings.card.shared_block()))
    throw std::runtime_error(std::string("simt: ") + kernel + ": no block of this card may have " +
                             std::to_string(bytes) + " bytes of shared memory");
  allowed[kernel] = bytes;
}

void launch(const char* kernel, dim3 grid, dim3 size, size_t dynamic_bytes, bool cooperative,
            const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const size_t n = size_t{size.x} * size.y * size.z, blocks = size_t{grid.x} * grid.y * grid.z;
  kernel_name = kernel;
  kernel_body = &body;
  failure.clear();
  const Card& card = settings.card;
  const std::string asked = std::to_string(n) + " threads a block, " + std::to_string(blocks) + " blocks and " +
                            std::to_string(dynamic_bytes) + " bytes of dynamic shared memory";
  if (!n || n > 1024 || size.z > 64 || !blocks || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(report("launch", {"", 0}, nullptr, "no card takes " + asked));
  if (dynamic_bytes > std::max(UNASKED, allowed[kernel]))
    throw std::runtime_error(report("launch", {"", 0}, nullptr, "more shared memory than was asked for: " + asked));
  const size_t most = std::min<size_t>(Card::THREADS / n, card.shared / (dynamic_bytes + Card::RESERVED));
  if (cooperative && (!card.cooperative || blocks > most * card.multiprocessors))
    throw std::runtime_error(report("cooperative launch", {"", 0}, nullptr, "the card does not hold " + asked));
  launches.push_back({kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(n), dynamic_bytes, cooperative});
  std::mt19937 rng(settings.seed);
  const size_t ran = settings.last_blocks ? std::min<size_t>(settings.last_blocks, blocks) : blocks;
  std::vector<unsigned> order(ran);
  for (size_t i = 0; i < ran; ++i) order[i] = static_cast<unsigned>(blocks - ran + i);
  if (settings.seed) std::shuffle(order.begin(), order.end(), rng);
  host_race = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
  const size_t resident = cooperative ? ran : 1;
  std::vector<Block> living(resident);
  std::vector<Fiber*> fibers(resident * n);
  for (size_t i = 0; i < fibers.size(); ++i) fibers[i] = fiber(i);
  // blocks are born of a context that knows nothing of earlier blocks
  const bool apart = __tsan_create_fiber && settings.race == Race::BETWEEN;
  void* creator = apart ? __tsan_create_fiber(0) : host_race;
  for (size_t next = 0; next < ran; next += resident) {
    for (size_t b = 0; b < resident; ++b)
      open_block(living[b], order[next + b], grid, size, dynamic_bytes, &fibers[b * n], n, creator);
    run(living, rng);
    for (Block& block : living) {
      if (settings.counting) count(block, launches.back());
      close_block(block);
    }
  }
  if (apart) __tsan_destroy_fiber(creator);
}

}  // namespace simt

// ------------------------------------------------------------------------------------------------ half precision

float __half2float(__half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, exponent = v.bits >> 10 & 31;
  const uint32_t fraction = v.bits & 0x3ff;
  if (exponent == 31) return simt::unpack<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return std::ldexp(static_cast<float>(fraction), -24) * (sign ? -1.0f : 1.0f);
  return simt::unpack<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

__half __float2half_rn(float f) {
  const auto u = static_cast<uint32_t>(simt::pack(f));
  const auto sign = static_cast<uint16_t>(u >> 16 & 0x8000);
  if (f != f) return {static_cast<uint16_t>(sign | 0x7e00)};
  const float size = std::fabs(f);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  if (size < 0x1p-14f)  // subnormal: a multiple of 2^-24, rounded to even by nearbyint
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)))};
  const uint32_t rounded = (u & 0x7fffffff) + 0xfff + (u >> 13 & 1);
  return {static_cast<uint16_t>(sign | (rounded - (112u << 23)) >> 13)};
}
