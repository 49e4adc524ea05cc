// The border to Python: C names, plain structs, no torch. Everything is called from one thread at a time.
#include <sys/mman.h>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <new>

#include "kernels.h"

namespace pagewire {
#if defined(PAGEWIRE_KNOWS_AMX)
namespace amx { extern const Kernels kernels; }
#endif
#if defined(__x86_64__)
namespace avx512 { extern const Kernels kernels; }
namespace avx2 { extern const Kernels kernels; }
#endif
namespace baseline { extern const Kernels kernels; }

namespace {

const char* const kIsaNames[] = {"baseline", "avx2", "avx512", "amx"};

// Tiles are large, so the system gives them only to a process that asks.
bool may_use_tiles() {
#if defined(PAGEWIRE_KNOWS_AMX) && defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

int find_best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return may_use_tiles() ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

int best_isa() {
  static const int best = find_best_isa();
  return best;
}

const Kernels& table(int isa) {
#if defined(PAGEWIRE_KNOWS_AMX)
  if (isa == 3) return amx::kernels;
#endif
#if defined(__x86_64__)
  if (isa == 2) return avx512::kernels;
  if (isa == 1) return avx2::kernels;
#endif
  return baseline::kernels;
}

int isa = best_isa();
int threads = 1;
// libgomp's way to run a function on a team, and to count it: of the libgomp that torch has loaded, so that all use one pool
void (*borrowed)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
int (*team_size)() = nullptr;

}  // namespace

int num_threads() { return threads; }

char* scratch(int64_t bytes) {
  static char* held = nullptr;
  static int64_t size = 0;
  if (bytes > size) {
    if (held) munmap(held, size);
    size = (bytes + bytes / 4 + (2 << 20)) / (2 << 20) * (2 << 20);
    void* taken = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (taken == MAP_FAILED) {
      held = nullptr, size = 0;
      throw std::bad_alloc();
    }
    held = static_cast<char*>(taken);
#if defined(MADV_HUGEPAGE)
    madvise(held, size, MADV_HUGEPAGE);
#endif
  }
  return held;
}

void run_team(int num_phases, void (*body)(Team&, int, void*), void* context) {
  struct Call {
    Phases phases;
    int num_phases;
    void (*body)(Team&, int, void*);
    void* context;
    std::atomic<int> next{0};

    void alone() {
      Phases own(1, num_phases);
      Team team(own, 0);
      body(team, 0, context);
    }
  } call{{threads, num_phases}, num_phases, body, context};
  if (threads == 1) return call.alone();
  borrowed(
      [](void* p) {
        Call& c = *static_cast<Call*>(p);
        const int thread = c.next.fetch_add(1);
        if (team_size() == (int)c.phases.hands.size()) {
          Team team(c.phases, thread);
          c.body(team, thread, c.context);
        } else if (thread == 0) {  // fewer threads than asked for, a limit of the machine: nobody may wait for the missing
          c.alone();
        }
      },
      &call, (unsigned)threads, 0);
}

}  // namespace pagewire

using namespace pagewire;

extern "C" {

// Sizes of the structs, so that the other side can see that it means the same.
void pagewire_sizes(int64_t* to) {
  const int64_t sizes[] = {sizeof(Linear), sizeof(AttentionLayer), sizeof(Step), sizeof(Rows), sizeof(LlamaLayer), sizeof(Llama)};
  std::memcpy(to, sizes, sizeof sizes);
}
const char* pagewire_isa() { return kIsaNames[isa]; }
int pagewire_use_isa(const char* name) {  // 0 when this machine has it
  for (int i = 0; i <= best_isa(); i++)
    if (!std::strcmp(name, kIsaNames[i])) return isa = i, 0;
  return 1;
}
void pagewire_use_threads(int count, void* gomp_parallel, void* omp_get_num_threads) {
  borrowed = reinterpret_cast<decltype(borrowed)>(gomp_parallel);
  team_size = reinterpret_cast<decltype(team_size)>(omp_get_num_threads);
  threads = borrowed && team_size && count > 1 ? count : 1;
}
void pagewire_rehearse(int on) { Team::rehearse() = on != 0; }
void pagewire_llama_forward(const Llama* m, const Step* s, float* logits, float* normed) {
  table(isa).llama_forward(*m, *s, logits, normed);
}
void pagewire_linear(const Linear* l, const Rows* x, const Rows* y, int64_t rows) { table(isa).linear(*l, *x, *y, rows); }
void pagewire_attention(const AttentionLayer* a, const Step* s, const Rows* q, const Rows* k, const Rows* v, const Rows* out) {
  table(isa).attention(*a, *s, *q, *k, *v, *out);
}
void pagewire_norm(const Rows* x, const Rows* residual, const float* weight, float epsilon, int64_t rows, int64_t n, const Rows* y) {
  table(isa).norm(*x, residual, weight, epsilon, rows, n, *y);
}
void pagewire_silu_mul(const Rows* gate, const Rows* up, int64_t rows, int64_t n, const Rows* y) {
  table(isa).silu_mul(*gate, *up, rows, n, *y);
}
void pagewire_pack(const Rows* from, const int64_t* row_of, const Linear* to) { table(isa).pack(*from, row_of, *to); }
int64_t pagewire_survey(const Rows* from, const int64_t* row_of, int64_t n, int64_t k, uint8_t* exponents, int32_t* starts) {
  return table(isa).survey(*from, row_of, n, k, exponents, starts);
}
}
