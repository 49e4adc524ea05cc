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

// Phases are numbered; each has a counter from which work is claimed. All counters are zero when the call begins.
class Team {
 public:
  explicit Team(int size, int num_phases) : size(size), claims_(num_phases) {}

  const int size;

  // Wait until every thread is here. Yields after a while: a thread that is waited for may need this core.
  void barrier() {
    if (size == 1) return;
    const uint32_t turn = turn_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; spins++) {
      if (spins < 4096)
        relax();
      else
        sched_yield();
    }
  }

  // Claim the next piece of [0, total): large pieces first, small ones at the end, at most `most`. False when all is taken.
  bool claim(int phase, int64_t total, int64_t most, int64_t& first, int64_t& last) {
    std::atomic<int64_t>& next = claims_[phase].next;
    first = next.load(std::memory_order_relaxed);
    do {
      if (first >= total) return false;
      int64_t size_now = (total - first) / (2 * size);
      size_now = size_now < 1 ? 1 : size_now > most ? most : size_now;
      last = first + size_now;
    } while (!next.compare_exchange_weak(first, last, std::memory_order_relaxed));
    return true;
  }

 private:
  struct alignas(64) Claim {
    std::atomic<int64_t> next{0};
  };
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
  std::vector<Claim> claims_;
};

// Run body(team, thread) on every thread.
void run_team(int num_phases, void (*body)(Team&, int, void*), void* context);

template <class F>
void on_team(int num_phases, F&& body) {
  run_team(num_phases, [](Team& team, int thread, void* f) { (*static_cast<F*>(f))(team, thread); }, &body);
}

}  // namespace pagewire
