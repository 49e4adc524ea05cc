// One table of kernels for each instruction set; api.cpp chooses.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <utility>
#include <vector>

#include "team.h"
#include "types.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define PAGEWIRE_KNOWS_AMX  // the compiler does
#endif

namespace pagewire {

struct Kernels {
  void (*llama_forward)(const Llama&, const Step&, float* logits, float* normed);
  void (*linear)(const Linear&, const Rows& x, const Rows& y, int64_t rows);
  void (*attention)(const AttentionLayer&, const Step&, const Rows& query, const Rows& key, const Rows& value,
                    const Rows& out);
  void (*norm)(const Rows& x, const Rows* residual, const float* weight, float epsilon, int64_t rows, int64_t n,
               const Rows& y);
  void (*silu_mul)(const Rows& gate, const Rows& up, int64_t rows, int64_t n, const Rows& y);
  void (*pack)(const Rows& from, const int64_t* row_of, const Linear& to);
  int64_t (*survey)(const Rows& from, const int64_t* row_of, int64_t n, int64_t k, uint8_t* exponents,
                          int32_t* stray_starts);
};

int num_threads();
char* scratch(int64_t bytes);  // one buffer for the whole process, aligned to 64; what it held is lost

}  // namespace pagewire
