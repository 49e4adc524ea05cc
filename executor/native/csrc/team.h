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

// What the threads of one call share. Phases are numbered, and each thread goes through all of them in order. A phase is
// over when all its work is done, not when all threads have come: one that the system has put aside between two pieces of
// work holds nobody up, it finds the phase taken and goes on. So only work that is claimed may be relied upon, and what a
// phase reads nobody changes before that phase is over.
struct Phases {
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  struct alignas(64) Hand {  // what a thread works on: phase, first, last in 16, 24 and 24 bits; 0: nothing
    std::atomic<uint64_t> held{0};
  };
  Phases(int num_threads, int num_phases) : phases(num_phases), hands(num_threads) {}

  std::vector<Phase> phases;
  std::vector<Hand> hands;
};

// One thread among those of a call.
class Team {
 public:
  Team(Phases& shared, int thread) : size((int)shared.hands.size()), shared_(shared), thread_(thread) {}

  const int size;

  // Work may be done twice, even late: it writes the same bytes again, to a place that is used for nothing else in this call.
  // Then a thread that the system puts aside within a piece of work holds nobody up either: others do that piece. (A forward
  // of one row has hundreds of phases, each of some ten microseconds, and whoever else needs a core takes it for a hundred.)
  bool repeatable = false;

  // For tests: do every piece again as soon as it is done, when others may be phases ahead.
  static std::atomic<bool>& rehearse() {
    static std::atomic<bool> on{false};
    return on;
  }

  // Do a share of [0, total) by work(first, last), at most `most` at a time: large pieces first, small ones at the end.
  // Returns when all of it is done, by whomever.
  template <class Work>
  void share(int phase, int64_t total, int64_t most, Work&& work) {
    Phases::Phase& p = shared_.phases[phase];
    std::atomic<uint64_t>& held = shared_.hands[thread_].held;
    int64_t first, last;
    while (claim(p, total, most, first, last)) {
      const uint64_t piece = (uint64_t)phase << 48 | (uint64_t)first << 24 | (uint64_t)last;
      held.store(piece, std::memory_order_release);
      work(first, last);
      settle(p, held, piece, last - first);
      if (repeatable && rehearse()) work(first, last);
    }
    for (int spins = 1; p.done.load(std::memory_order_acquire) != total; spins++) {
      if (repeatable && spins % kPatience == 0)
        help(phase, p, work);
      else if (spins < 4096)
        relax();
      else
        sched_yield();  // whoever has the work may need this core
    }
  }

 private:
  static constexpr int kPatience = 256;  // pauses: longer than the last, small pieces take

  template <class Work>
  void help(int phase, Phases::Phase& p, Work&& work) {
    for (Phases::Hand& hand : shared_.hands) {
      const uint64_t piece = hand.held.load(std::memory_order_acquire);
      if (!piece || (int)(piece >> 48) != phase) continue;
      const int64_t first = piece >> 24 & 0xffffff, last = piece & 0xffffff;
      work(first, last);
      settle(p, hand.held, piece, last - first);
    }
  }

  // Whoever comes first counts the piece.
  void settle(Phases::Phase& p, std::atomic<uint64_t>& held, uint64_t piece, int64_t count) {
    if (!repeatable || held.compare_exchange_strong(piece, 0, std::memory_order_acq_rel))
      p.done.fetch_add(count, std::memory_order_acq_rel);
  }

  bool claim(Phases::Phase& p, int64_t total, int64_t most, int64_t& first, int64_t& last) {
    first = p.next.load(std::memory_order_relaxed);
    do {
      if (first >= total) return false;
      int64_t count = (total - first) / (2 * size);
      count = count < 1 ? 1 : count > most ? most : count;
      last = first + count;
    } while (!p.next.compare_exchange_weak(first, last, std::memory_order_acq_rel));
    return true;
  }

  Phases& shared_;
  const int thread_;
};

// Run body(team, thread) on every thread.
void run_team(int num_phases, void (*body)(Team&, int, void*), void* context);

template <class F>
void on_team(int num_phases, F&& body) {
  run_team(num_phases, [](Team& team, int thread, void* f) { (*static_cast<F*>(f))(team, thread); }, &body);
}

}  // namespace pagewire
