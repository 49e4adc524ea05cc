// The threads of one call: they walk its phases together, claim work in pieces, and wait for each other between phases.
#pragma once
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pagewire {

static inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Phases are numbered, and each thread goes through all of them in order. A phase is over when all its work is done, not
// when all threads have come: one that the system has put aside between two pieces of work holds nobody up, it finds the
// phase taken and goes on. So only work that is claimed may be relied upon, and what a phase reads nobody changes before
// that phase is over.
class Team {
 public:
  explicit Team(int size, int num_phases) : size(size), phases_(num_phases) {}

  const int size;

  // Do a share of [0, total) by work(first, last), at most `most` at a time: large pieces first, small ones at the end.
  // Returns when all of it is done, by whomever.
  template <class Work>
  void share(int phase, int64_t total, int64_t most, Work&& work) {
    Phase& p = phases_[phase];
    int64_t first, last;
    while (claim(p, total, most, first, last)) {
      work(first, last);
      p.done.fetch_add(last - first, std::memory_order_acq_rel);
    }
    for (int spins = 0; p.done.load(std::memory_order_acquire) != total; spins++) {
      if (spins < 4096)
        relax();
      else
        sched_yield();  // whoever has the work may need this core
    }
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  bool claim(Phase& p, int64_t total, int64_t most, int64_t& first, int64_t& last) {
    first = p.next.load(std::memory_order_relaxed);
    do {
      if (first >= total) return false;
      int64_t count = (total - first) / (2 * size);
      count = count < 1 ? 1 : count > most ? most : count;
      last = first + count;
    } while (!p.next.compare_exchange_weak(first, last, std::memory_order_acq_rel));
    return true;
  }

  std::vector<Phase> phases_;
};

// Run body(team, thread) on every thread.
void run_team(int num_phases, void (*body)(Team&, int, void*), void* context);

template <class F>
void on_team(int num_phases, F&& body) {
  run_team(num_phases, [](Team& team, int thread, void* f) { (*static_cast<F*>(f))(team, thread); }, &body);
}

}  // namespace pagewire
