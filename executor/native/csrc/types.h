// What crosses the border to Python: plain structs, mirrored field by field in executor/native/library.py.
#pragma once
#include <cstdint>

namespace pagewire {

enum Kind : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

constexpr int64_t kGroup = 32;  // values of k that share a scale

// y = x @ w.T + bias, w (n, k), packed. Outputs lie in panels of 32; a word holds 4 bytes of consecutive k of one output:
//   words  [panel][step][32]     step: 1, 2, 4 or 8 values of k in float32, bfloat16, int8 (plus 128) or int4
//   scales [panel][group][32]    bfloat16; int8: w = scale * q.   int4: [panel][group][2][32], w = scale * q + lowest
// An int4 word holds step s in its low nibbles and step s + 1 in its high ones.
//
// bfloat16 may lie in 12 bits a number, without loss (`exponents` is set): fifteen exponents in a row are told by
// 4 bits, see compact.h. What has another exponent lies there as zero, and once more among the strays.
struct Stray {
  int32_t k;
  uint16_t lane, value;  // lane: output within the panel; value: bfloat16
};

struct Linear {
  int32_t kind;
  int64_t n, k;
  const uint32_t* words;
  const uint16_t* scales;
  const float* bias;         // (n,) or null
  const uint8_t* exponents;  // (16,) or null: what each code stands for; the last is 0
  const Stray* strays;       // by panel, in the order of k
  const int32_t* stray_starts;  // (panels + 1,)
};

// One attention layer. The slab is [block][kv_head][record]; inside a record, for each 16 tokens:
//   keys   [key_dim / lanes][16 tokens][lanes]      lanes: how many values are in a word of 4 bytes (int8 lies as bfloat16)
//   values [16 / lanes][value_dim][lanes tokens]
// and, of int8, behind them the scales of the tokens (float32).
struct AttentionLayer {
  int32_t kv_kind;
  int32_t num_heads, num_kv_heads, key_dim, value_dim, block_size;
  int64_t window;  // 0: none
  float scale;
  float softcap;  // 0: none
  const float* sinks;  // (num_heads,) or null
  uint8_t *keys, *values;
};

// One step's layout, as executor/batch.py makes it.
struct Step {
  int64_t num_tokens, num_rows, table_stride, num_sampled;
  const int64_t* token_ids;        // (num_tokens,)
  const int64_t* positions;        // (num_tokens,)
  const int64_t* slot_mapping;     // (num_tokens,)
  const int64_t* query_start_loc;  // (num_rows + 1,)
  const int64_t* seq_lens;         // (num_rows,)
  const int32_t* block_tables;     // (num_rows, table_stride)
  const int64_t* logits_indices;   // (num_sampled,)
};

// Rows of numbers in the model's dtype. Strides in elements; the last axis is dense.
struct Rows {
  void* data;
  int32_t kind;  // kFloat32 or kBfloat16
  int64_t stride0, stride1;
};

struct LlamaLayer {
  Linear qkv, o, gate_up, down;  // gate_up: panels hold 16 gates and their 16 ups
  const float *input_norm, *post_norm;
  const float *q_norm, *k_norm;  // (key_dim,) or null
  int32_t rotary;                // 0: this layer has no positions
  AttentionLayer attention;
};

struct Llama {
  int64_t num_layers, hidden, intermediate, vocab, rotary_dim;
  float epsilon;
  int32_t embedding_kind;
  const void* embedding;      // (vocab, hidden) float32 or bfloat16
  const float *cos, *sin;     // (positions, rotary_dim / 2)
  const float* final_norm;
  const LlamaLayer* layers;
  Linear head;
};

}  // namespace pagewire
