// What gcc makes of csrc/cpu's OpenMP, on threads that the thread sanitizer can follow: of libgomp's own barriers it
// sees nothing, so that with it every kernel would be reported.
//
// A dynamic loop deals its iterations out in turn, one of the orders that it may take, so that every thread has work
// however late it starts. No lock is taken for that: it would order what two threads do, and hide their races.
#include <omp.h>
#include <pthread.h>

#include <vector>

namespace {

struct Thread {
  int index = 0, team = 1;
  pthread_barrier_t* barrier = nullptr;
  long next = 0, end = 0;  // of the loop at hand
};
thread_local Thread self;

struct Start {
  Thread thread;
  void (*body)(void*);
  void* data;
};

void* enter(void* given) {
  const auto* start = static_cast<const Start*>(given);
  self = start->thread;
  start->body(start->data);
  return nullptr;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return self.index; }
int omp_get_num_threads() { return self.team; }

void GOMP_barrier() { pthread_barrier_wait(self.barrier); }

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned /*flags*/) {
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, threads);
  const int team = static_cast<int>(threads);
  std::vector<Start> starts;
  for (int i = 0; i < team; ++i) starts.push_back({{i, team, &barrier}, body, data});
  std::vector<pthread_t> others(threads);
  for (int i = 1; i < team; ++i) pthread_create(&others[i], nullptr, enter, &starts[i]);
  const Thread before = self;
  enter(&starts[0]);
  self = before;
  for (int i = 1; i < team; ++i) pthread_join(others[i], nullptr);
  pthread_barrier_destroy(&barrier);
}

// The kernels' loops count up by one, in chunks of one.
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) {
  if (self.next >= self.end) return false;
  *first = self.next;
  *last = self.next + 1;
  self.next += self.team;
  return true;
}
bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long /*step*/, long /*chunk*/, long* first,
                                          long* last) {
  self.next = begin + self.index;
  self.end = end;
  return GOMP_loop_nonmonotonic_dynamic_next(first, last);
}
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
