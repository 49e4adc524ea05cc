// Paged attention over one layer's slab: store the step's K and V, then every row attends through its block table.
//
// Keys are taken in stretches of kStretch, from position 0 on. A stretch is reduced by itself (scores, maximum, sum, weighted
// values) and the stretches of a query are merged in order, whether one thread did them all or several did one each, so a
// query's result does not depend on the batch, on chunks, or on the number of threads (FlashAttention's online softmax,
// split over KV as in Flash-Decoding).

constexpr int kStretch = 128;  // keys
constexpr int kAttentionRows = std::max((int)kTileHeight, kTileRows);  // queries that are worked together, at most
constexpr int kMaxDim = 512;

static inline int kv_lanes(int32_t kind) { return kind == kFloat32 ? 1 : 2; }
static inline int64_t kv_bytes(int32_t kind) { return kind == kFloat32 ? 4 : kind == kBfloat16 ? 2 : 1; }
static inline int64_t record_bytes(const AttentionLayer& a, int64_t dim) {
  return a.block_size * (dim * kv_bytes(a.kv_kind) + (a.kv_kind == kInt8 ? 4 : 0));
}

// Whether a layer is attended on tiles, all of it: what a query's sums come to depends on that.
static inline bool on_tiles(const AttentionLayer& a) {
#if defined(PAGEWIRE_AMX)
  return a.kv_kind != kFloat32 && a.key_dim % 32 == 0;
#else
  return (void)a, false;
#endif
}
static inline int attention_rows(const AttentionLayer& a) { return on_tiles(a) ? kAttentionRows : kTileRows; }

// The scale of a token's K or V, and the token rounded to it.
static inline float quantise_head(const float* x, int64_t dim, int8_t* to) {
  float top = 0;
  for (int64_t i = 0; i < dim; i++) top = std::max(top, std::abs(x[i]));
  const float inverse = top > 0 ? 127.f / top : 0.f;
  for (int64_t i = 0; i < dim; i++) to[i] = (int8_t)std::nearbyint(x[i] * inverse);
  return top / 127.f;
}

// Scatter one token's numbers into the 16 tokens' places: keys side by side by token, values by number. ONE is the type of
// a number, WORD of what lies together of a key.
template <class ONE, class WORD>
static inline void scatter_key(const ONE* x, int64_t dim, int64_t lane, uint8_t* to) {
  for (int64_t i = 0; i < dim * (int64_t)sizeof(ONE) / (int64_t)sizeof(WORD); i++)
    store((WORD*)to + i * 16 + lane, load<WORD>((const WORD*)x + i));
}
template <class ONE>
static inline void scatter_value(const ONE* x, int64_t dim, int64_t lane, uint8_t* to) {
  ONE* at = (ONE*)to + lane / 2 * dim * 2 + lane % 2;
  for (int64_t i = 0; i < dim; i++) at[i * 2] = x[i];
}

// Write one token's K and V of one head to its slot.
static inline void store_token(const AttentionLayer& a, int64_t slot, int64_t head, const float* key, const float* value) {
  const int64_t block = slot / a.block_size, offset = slot % a.block_size, lane = offset % 16;
  const int64_t key_dim = a.key_dim, value_dim = a.value_dim, index = block * a.num_kv_heads + head;
  uint8_t* const keys = a.keys + index * record_bytes(a, key_dim);
  uint8_t* const values = a.values + index * record_bytes(a, value_dim);
  uint8_t* const key_at = keys + offset / 16 * 16 * key_dim * kv_bytes(a.kv_kind);
  uint8_t* const value_at = values + offset / 16 * 16 * value_dim * kv_bytes(a.kv_kind);
  if (a.kv_kind == kFloat32) {
    scatter_key<float, float>(key, key_dim, lane, key_at);
    std::memcpy((float*)value_at + lane * value_dim, value, value_dim * sizeof(float));
  } else if (a.kv_kind == kBfloat16) {
    alignas(64) uint16_t x[kMaxDim];
    for (int64_t i = 0; i < key_dim; i += 16) store(x + i, narrow(load<f32x16>(key + i)));
    scatter_key<uint16_t, uint32_t>(x, key_dim, lane, key_at);
    for (int64_t i = 0; i < value_dim; i += 16) store(x + i, narrow(load<f32x16>(value + i)));
    scatter_value(x, value_dim, lane, value_at);
  } else {
    alignas(64) int8_t x[kMaxDim];
    ((float*)(keys + a.block_size * key_dim))[offset] = quantise_head(key, key_dim, x);
    scatter_key<int8_t, uint16_t>(x, key_dim, lane, key_at);
    ((float*)(values + a.block_size * value_dim))[offset] = quantise_head(value, value_dim, x);
    scatter_value(x, value_dim, lane, value_at);
  }
}

// Queries of one row and KV head that are worked together: query i is token i / group of the row, head i % group.
struct Item {
  int32_t row, kv_head, first, count;  // queries [first, first + count)
  int32_t first_stretch, last_stretch;
  int64_t part = -1;        // where the partial result lies, or -1: this item does all and writes the output
  int32_t num_rows = 1;     // more: query i is of row + i / group, each of one token, and all begin with the same blocks
  int64_t begin = -1;       // the part that has what comes before the first stretch, if any,
  int32_t begin_query = 0;  // and which of its queries is the first here
};

struct AttentionWork {
  std::vector<Item> shared;  // stretches that several rows have in common, each a part
  std::vector<Item> items;   // in the order they are claimed; after the shared ones
  std::vector<Item> merges;  // what is put together of parts; `part` is the first
  int64_t num_parts = 0;
};

// How many whole stretches two rows begin with that lie in the same blocks and that both see.
static inline int64_t common_stretches(const Step& s, const AttentionLayer& a, int64_t row, int64_t other) {
  const int64_t keys = std::min(s.seq_lens[row], s.seq_lens[other]) / kStretch * kStretch;
  const int64_t most = (keys + a.block_size - 1) / a.block_size;
  const int32_t *x = s.block_tables + row * s.table_stride, *y = s.block_tables + other * s.table_stride;
  int64_t same = 0;
  while (same < most && x[same] == y[same]) same++;
  return std::min(keys, same * a.block_size) / kStretch;
}

// Rows of one token that begin alike (a prompt in common, choices of one request) read what they share once, as many as fit
// into a tile of queries. A query's sums stay what they are: its stretches are merged in the same order.
static void share_prefixes(const Step& s, const AttentionLayer& a, AttentionWork& work) {
  const int64_t group = a.num_heads / a.num_kv_heads, fit = attention_rows(a) / group;
  const auto is_single = [&](int64_t row) { return s.query_start_loc[row + 1] - s.query_start_loc[row] == 1; };
  std::vector<std::pair<int64_t, int64_t>> found(s.num_rows, {-1, 0});  // by row: number of the shared part, place in it
  std::vector<int64_t> length;                                         // stretches, by number
  for (int64_t first = 0, last; first < s.num_rows; first = last) {
    int64_t stretches = INT64_MAX;
    for (last = first + 1; is_single(first) && last < s.num_rows && last - first < fit && is_single(last); last++) {
      const int64_t common = std::min(stretches, common_stretches(s, a, last - 1, last));
      if (common == 0 || (last - first > 1 && common < (stretches + 1) / 2)) break;  // one that has less would cost the others
      stretches = common;
    }
    if (last - first < 2) continue;
    for (int64_t row = first; row < last; row++) found[row] = {(int64_t)length.size(), row - first};
    for (int64_t head = 0; head < a.num_kv_heads; head++) {
      Item item{(int32_t)first, (int32_t)head, 0, (int32_t)((last - first) * group), 0, (int32_t)stretches};
      item.num_rows = (int32_t)(last - first), item.part = work.num_parts++;
      work.shared.push_back(item);
    }
    length.push_back(stretches);
  }
  for (Item& item : work.items) {
    const auto [number, place] = found[item.row];
    if (number < 0) continue;
    item.first_stretch = (int32_t)length[number];
    item.begin = number * a.num_kv_heads + item.kv_head, item.begin_query = (int32_t)(place * group);
  }
}

// Cut a step into items; the same for every layer of a shape. Few queries are also split over their keys.
static AttentionWork plan_attention(const Step& s, const AttentionLayer& a, int num_threads) {
  AttentionWork work;
  const int64_t group = a.num_heads / a.num_kv_heads, most = attention_rows(a);
  std::vector<Item> whole;
  for (int64_t row = s.num_rows - 1; row >= 0; row--) {  // prompts lie last; their last queries see most
    const int64_t tokens = s.query_start_loc[row + 1] - s.query_start_loc[row], queries = tokens * group;
    for (int64_t tile = (queries - 1) / most; tile >= 0; tile--)
      for (int64_t head = 0; head < a.num_kv_heads; head++) {
        const int64_t first = tile * most, count = std::min<int64_t>(most, queries - first);
        const int64_t before = s.seq_lens[row] - tokens;
        const int64_t seen = before + (first + count - 1) / group + 1;  // keys that the last of them sees
        const int64_t hidden = a.window ? std::max<int64_t>(0, before + first / group + 1 - a.window) : 0;
        whole.push_back({(int32_t)row, (int32_t)head, (int32_t)first, (int32_t)count, (int32_t)(hidden / kStretch),
                         (int32_t)((seen + kStretch - 1) / kStretch)});
      }
  }
  const bool split = num_threads > 1 && (int64_t)whole.size() < 8 * num_threads;
  for (Item item : whole) {
    if (!split || item.last_stretch - item.first_stretch < 2) {
      work.items.push_back(item);
      continue;
    }
    Item merge = item;
    merge.part = work.num_parts;
    work.merges.push_back(merge);
    for (int32_t stretch = merge.first_stretch; stretch < merge.last_stretch; stretch++) {
      item.first_stretch = stretch, item.last_stretch = stretch + 1, item.part = work.num_parts++;
      work.items.push_back(item);
    }
  }
  if (!split && a.window == 0 && 2 * group <= most) share_prefixes(s, a, work);
  return work;
}

// A partial result of up to kAttentionRows queries, of which there are at most 16.
struct Part {
  float most[16], total[16];
  float out[kAttentionRows * kMaxDim];  // [query][value_dim]
};

// Parts lie closer than a whole Part would: of `out` only so much is there as heads of `value_dim` need.
static inline int64_t part_bytes(int64_t value_dim) {
  return (int64_t)offsetof(Part, out) + kAttentionRows * value_dim * (int64_t)sizeof(float);
}
static inline Part& part_at(char* parts, int64_t n, int64_t value_dim) { return *(Part*)(parts + n * part_bytes(value_dim)); }

static inline void clear(Part& p, int64_t dim) {
  store(p.most, splat(-INFINITY)), store(p.total, splat(0.f));
  std::memset(p.out, 0, kAttentionRows * dim * sizeof(float));
}

// Put the keys of `b` behind those of `a`. To put them behind none is to take them as they are.
static inline void merge(Part& a, const Part& b, int count, int64_t dim) {
  const f32x16 before = load<f32x16>(a.most), behind = load<f32x16>(b.most);
  const f32x16 most = vmax(before, behind);
  const auto nothing = behind == splat(-INFINITY);  // it saw nothing
  float keep[16], add[16];
  store(keep, nothing ? splat(1.f) : vexp(before - most));
  store(add, nothing ? splat(0.f) : vexp(behind - most));
  store(a.most, nothing ? before : most);
  store(a.total, load<f32x16>(a.total) * load<f32x16>(keep) + load<f32x16>(b.total) * load<f32x16>(add));
  for (int r = 0; r < count; r++)
    for (int64_t i = 0; i < dim; i += 16)
      store(a.out + r * dim + i, load<f32x16>(a.out + r * dim + i) * keep[r] + load<f32x16>(b.out + r * dim + i) * add[r]);
}

// Queries [first, first + count) of `from` become the first ones of `to`.
static inline void take_queries(Part& to, const Part& from, int first, int count, int64_t dim) {
  store(to.most, splat(-INFINITY)), store(to.total, splat(0.f));
  for (int r = 0; r < count; r++) to.most[r] = from.most[first + r], to.total[r] = from.total[first + r];
  std::memcpy(to.out, from.out + first * dim, count * dim * sizeof(float));
}

// Sixteen tokens of int8 to bfloat16 pairs, as if they had been stored so.
static inline void widen_bytes(const int8_t* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += 16)
    store(to + i, narrow(__builtin_convertvector(load<i8x16>(from + i), f32x16)));
}

// What a stretch needs to find its blocks.
struct Stretch {
  const AttentionLayer& layer;
  const int32_t* table;
  int64_t kv_head, first_key, num_keys;  // keys [first_key, first_key + num_keys) hold something

  const uint8_t* tokens(bool values, int64_t group16) const {  // the 16 tokens that start at first_key + 16 * group16
    const int64_t position = first_key + group16 * 16, dim = values ? layer.value_dim : layer.key_dim;
    return record(values, position) + position % layer.block_size / 16 * 16 * dim * kv_bytes(layer.kv_kind);
  }
  const float* scales(bool values, int64_t group16) const {
    const int64_t position = first_key + group16 * 16, dim = values ? layer.value_dim : layer.key_dim;
    return (const float*)(record(values, position) + layer.block_size * dim) + position % layer.block_size;
  }
  int64_t token_bytes(bool values) const {  // of 16 tokens
    return (values ? layer.value_dim : layer.key_dim) * 16 * kv_bytes(layer.kv_kind);
  }

 private:
  const uint8_t* record(bool values, int64_t position) const {
    const int64_t dim = values ? layer.value_dim : layer.key_dim;
    const int64_t block = table[position / layer.block_size];
    return (values ? layer.values : layer.keys) + (block * layer.num_kv_heads + kv_head) * record_bytes(layer, dim);
  }
};

// Fetches a stretch into the second cache while the one before is worked, a little in each step: all at once would stop the
// core, which has only so many lines under way. Keys first, then values.
class Ahead {
 public:
  explicit Ahead(const Stretch* stretch) : stretch_(stretch), groups_(stretch ? (stretch->num_keys + 15) / 16 : 0) {}

  inline void step() {
    if (left_ == 0 && !turn()) return;
    __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(at_ + 64, 0, 2);
    at_ += 128, left_ -= 128;
  }

 private:
  bool turn() {
    if (group_ == groups_) {
      if (values_ || groups_ == 0) return false;
      values_ = true, group_ = 0;
    }
    at_ = stretch_->tokens(values_, group_++);
    left_ = (stretch_->token_bytes(values_) + 127) / 128 * 128;
    return true;
  }

  const Stretch* stretch_;
  const int64_t groups_;
  const uint8_t* at_ = nullptr;
  int64_t left_ = 0, group_ = 0;
  bool values_ = false;
};

template <int R, int V>
static inline void clear(f32reg (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = f32reg{};
}

template <bool FLOAT, int R, int V>
static inline void accumulate(const uint32_t* a, int64_t stride, const uint32_t* (&b)[V], int64_t step, int64_t steps,
                              Ahead& ahead, f32reg (&acc)[R][V * kParts]) {
  for (int64_t s = 0; s < steps; s++) {
    u32reg w[V * kParts];
    ahead.step();
#pragma GCC unroll 8
    for (int v = 0; v < V * kParts; v++) w[v] = load<u32reg>(b[v / kParts] + s * step + v % kParts * kRegisterLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const uint32_t word = a[r * stride + s];
#pragma GCC unroll 8
      for (int v = 0; v < V * kParts; v++) {
        if (FLOAT) {
          float value;
          std::memcpy(&value, &word, 4);
          acc[r][v] += (f32reg)w[v] * value;
        } else {
          acc[r][v] = dot2(acc[r][v], w[v], word);
        }
      }
    }
  }
}

// From scores to weights: what each of `rows` queries may not see is masked, and the part gets their maxima and sums. Query r
// sees keys [low[r], high[r]) of the stretch.
template <bool FLOAT>
static inline void weigh(const Stretch& s, int rows, const int64_t* low, const int64_t* high, float (*scores)[kStretch],
                         uint32_t (*weights)[kStretch / (FLOAT ? 1 : 2)], Part& part) {
  const AttentionLayer& a = s.layer;
  const bool bytes = a.kv_kind == kInt8;
  const int64_t groups = (s.num_keys + 15) / 16;
  constexpr int V = kStretch / 16;
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  alignas(64) float tops[16], totals[16];
  store(tops, splat(-INFINITY)), store(totals, splat(0.f));
  for (int r = 0; r < rows; r++) {
    float* row = scores[r];
    if (a.softcap != 0)
      for (int64_t i = 0; i < groups * 16; i++) row[i] = a.softcap * std::tanh(row[i] / a.softcap);
    const i32x16 from = lanes - (int32_t)low[r], to = lanes - (int32_t)high[r];
    f32x16 x[V], most = splat(-INFINITY);  // what nobody scored, behind the last key, is masked too
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
      const i32x16 seen = (from + 16 * i >= 0) & (to + 16 * i < 0);
      x[i] = seen ? load<f32x16>(row + 16 * i) : splat(-INFINITY);
      most = vmax(x[i], most);
    }
    tops[r] = highest(most);
    if (low[r] < high[r] && tops[r] == -INFINITY) tops[r] = NAN;  // scores of NaN or -inf alone: say so
    const f32x16 top = splat(tops[r] == -INFINITY ? 0.f : tops[r]);
    f32x16 total = splat(0.f);
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) x[i] = vexp(x[i] - top);
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) total += x[i];
    if (bytes)
      for (int64_t i = 0; i < groups; i++)  // the scales of unused places may be NaN
        x[i] = x[i] == 0.f ? x[i] : x[i] * load<f32x16>(s.scales(true, i));
#pragma GCC unroll 8
    for (int i = 0; i < V; i++) {
      if (FLOAT)
        store((float*)weights[r] + 16 * i, x[i]);
      else
        store((uint16_t*)weights[r] + 16 * i, narrow(x[i]));
    }
    totals[r] = sum(total);
  }
  // each number of the part is written once, as it stays: another thread may be reading what it wrote there itself
  store(part.most, load<f32x16>(tops)), store(part.total, load<f32x16>(totals));
}

// The values of each 16 keys of the stretch. Bytes are widened into `wide`; the last 16, where some are missing, lie in `tail`.
template <bool FLOAT>
static inline void find_values(const Stretch& s, uint16_t* wide, uint32_t* tail, const uint32_t* (&values)[kStretch / 16]) {
  const AttentionLayer& a = s.layer;
  const bool bytes = a.kv_kind == kInt8;
  const int64_t groups = (s.num_keys + 15) / 16;
  for (int64_t g = 0; g < groups; g++) {
    values[g] = (const uint32_t*)s.tokens(true, g);
    if (bytes) {
      uint16_t* to = wide + g * 16 * a.value_dim;
      widen_bytes((const int8_t*)values[g], 16 * a.value_dim, to);
      values[g] = (const uint32_t*)to;
    }
    const int64_t valid = s.num_keys - g * 16;
    if (valid < 16) {  // what lies behind the last key may be NaN, and a weight of zero does not silence that
      std::memcpy(tail, values[g], 16 * a.value_dim * (FLOAT ? 4 : 2));
      for (int64_t k = valid; k < 16; k++)
        for (int64_t i = 0; i < a.value_dim; i++) {
          if (FLOAT)
            tail[k * a.value_dim + i] = 0;
          else
            ((uint16_t*)tail)[(k / 2) * a.value_dim * 2 + i * 2 + k % 2] = 0;
        }
      values[g] = tail;
    }
  }
}

// R queries (words, dense) against one stretch.
template <bool FLOAT, int R>
static void attend_stretch(const Stretch& s, const Stretch* next, const uint32_t* query, const int64_t* low,
                           const int64_t* high, Part& part) {
  constexpr int L = FLOAT ? 1 : 2;
  const AttentionLayer& a = s.layer;
  const bool bytes = a.kv_kind == kInt8;
  const int64_t groups = (s.num_keys + 15) / 16;
  const int64_t key_words = a.key_dim / L;
  Ahead ahead(next);
  alignas(64) float scores[R][kStretch];
  alignas(64) uint32_t weights[R][kStretch / L];
  alignas(64) static thread_local uint16_t wide[kStretch * kMaxDim];  // int8 made bfloat16
  alignas(64) static thread_local uint32_t tail[16 * kMaxDim];

  for (int64_t g = 0; g < groups; g += 2) {
    const int64_t last = std::min(g + 1, groups - 1);
    const uint32_t* b[2] = {(const uint32_t*)s.tokens(false, g), (const uint32_t*)s.tokens(false, last)};
    if (bytes)
      for (int v = 0; v < 2; v++) {
        uint16_t* to = wide + v * 16 * a.key_dim;
        widen_bytes((const int8_t*)b[v], 16 * a.key_dim, to);
        b[v] = (const uint32_t*)to;
      }
    f32reg acc[R][2 * kParts];
    clear(acc);
    accumulate<FLOAT, R, 2>(query, key_words, b, 16, key_words, ahead, acc);
    f32x16 scale[2] = {splat(a.scale), splat(a.scale)};
    if (bytes) {
      scale[0] *= load<f32x16>(s.scales(false, g));
      scale[1] *= load<f32x16>(s.scales(false, last));
    }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < 2; v++) store(&scores[r][g * 16 + v * 16], load<f32x16>(&acc[r][v * kParts]) * scale[v]);
  }

  weigh<FLOAT>(s, R, low, high, scores, weights, part);

  const uint32_t* values[kStretch / 16];
  find_values<FLOAT>(s, wide, tail, values);
  int64_t d = 0;
  for (; d + 32 <= a.value_dim; d += 32) {
    f32reg acc[R][2 * kParts];
    clear(acc);
    for (int64_t g = 0; g < groups; g++) {
      const uint32_t* b[2] = {values[g] + d, values[g] + d + 16};
      accumulate<FLOAT, R, 2>(weights[0] + g * 16 / L, kStretch / L, b, a.value_dim, 16 / L, ahead, acc);
    }
    for (int r = 0; r < R; r++) std::memcpy(part.out + r * a.value_dim + d, acc[r], sizeof acc[r]);
  }
  if (d < a.value_dim) {
    f32reg acc[R][kParts];
    clear(acc);
    for (int64_t g = 0; g < groups; g++) {
      const uint32_t* b[1] = {values[g] + d};
      accumulate<FLOAT, R, 1>(weights[0] + g * 16 / L, kStretch / L, b, a.value_dim, 16 / L, ahead, acc);
    }
    for (int r = 0; r < R; r++) std::memcpy(part.out + r * a.value_dim + d, acc[r], sizeof acc[r]);
  }
}

template <bool FLOAT, int R>
static inline void attend_count(int count, const Stretch& s, const Stretch* next, const uint32_t* query,
                                const int64_t* low, const int64_t* high, Part& part) {
  if constexpr (R > 1)
    if (count < R) return attend_count<FLOAT, R - 1>(count, s, next, query, low, high, part);
  attend_stretch<FLOAT, R>(s, next, query, low, high, part);
}

#if defined(PAGEWIRE_AMX)
// Tiles: 0 to 3 sums; 4 and 5 queries and 16 keys, over 32 numbers; 6 and 7 weights and 16 columns of values, over 16 keys.
static inline void shape_attention_tiles() {
  TileShape shape;
  shape.set(0, 5, kTileHeight, 64);
  shape.set(6, 6, kTileHeight, 32);
  shape.set(7, 7, 8, 64);
  shape.use();
}

// Queries against 16, 32, 48 or 64 keys at once, `keys` holding each 16: into `scores`, rows of a stretch.
template <int N>
static inline void score(const uint32_t* query, int64_t key_words, const uint32_t* const* keys, float* scores, Ahead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t w = 0; w < key_words; w += 16) {
    for (int i = 0; i < 2 * N; i++) ahead.step();
    settle();
    _tile_loadd(4, query + w, key_words * 4);
    _tile_loadd(5, keys[0] + w * 16, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (N > 1) {
      _tile_loadd(5, keys[1] + w * 16, 64);
      _tile_dpbf16ps(1, 4, 5);
    }
    if (N > 2) {
      _tile_loadd(5, keys[2] + w * 16, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if (N > 3) {
      _tile_loadd(5, keys[3] + w * 16, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, scores, kStretch * 4);
  if (N > 1) _tile_stored(1, scores + 16, kStretch * 4);
  if (N > 2) _tile_stored(2, scores + 32, kStretch * 4);
  if (N > 3) _tile_stored(3, scores + 48, kStretch * 4);
}

// The weighted sums of N times 16 columns of the values, from `column` on.
template <int N>
static inline void add_values(const uint32_t* weights, const uint32_t* const* values, int64_t groups, int64_t value_dim,
                              int64_t column, float* out, Ahead& ahead) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t g = 0; g < groups; g++) {
    const uint32_t* const v = values[g] + column;
    for (int i = 0; i < 2 * N; i++) ahead.step();
    settle();
    _tile_loadd(6, weights + g * 8, kStretch * 2);
    _tile_loadd(7, v, value_dim * 4);
    _tile_dpbf16ps(0, 6, 7);
    if (N > 1) {
      _tile_loadd(7, v + 16, value_dim * 4);
      _tile_dpbf16ps(1, 6, 7);
    }
    if (N > 2) {
      _tile_loadd(7, v + 32, value_dim * 4);
      _tile_dpbf16ps(2, 6, 7);
    }
    if (N > 3) {
      _tile_loadd(7, v + 48, value_dim * 4);
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, out + column, value_dim * 4);
  if (N > 1) _tile_stored(1, out + column + 16, value_dim * 4);
  if (N > 2) _tile_stored(2, out + column + 32, value_dim * 4);
  if (N > 3) _tile_stored(3, out + column + 48, value_dim * 4);
}

// Up to 16 queries against one stretch. Behind the last query others are read, computed and written, and used by nobody.
static void attend_stretch_on_tiles(int count, const Stretch& s, const Stretch* next, const uint32_t* query,
                                    const int64_t* low, const int64_t* high, Part& part) {
  const AttentionLayer& a = s.layer;
  const bool bytes = a.kv_kind == kInt8;
  const int64_t groups = (s.num_keys + 15) / 16, key_words = a.key_dim / 2;
  Ahead ahead(next);
  alignas(64) float scores[kTileHeight][kStretch];
  alignas(64) uint32_t weights[kTileHeight][kStretch / 2];
  alignas(64) static thread_local uint16_t wide[kStretch * kMaxDim];  // int8 made bfloat16
  alignas(64) static thread_local uint32_t tail[16 * kMaxDim];

  for (int64_t g = 0; g < groups; g += 4) {
    const int64_t num = std::min<int64_t>(4, groups - g);
    const uint32_t* keys[4];
    for (int64_t i = 0; i < num; i++) {
      keys[i] = (const uint32_t*)s.tokens(false, g + i);
      if (!bytes) continue;
      uint16_t* to = wide + i * 16 * a.key_dim;
      widen_bytes((const int8_t*)keys[i], 16 * a.key_dim, to);
      keys[i] = (const uint32_t*)to;
    }
    float* const to = scores[0] + g * 16;
    switch (num) {
      case 4: score<4>(query, key_words, keys, to, ahead); break;
      case 3: score<3>(query, key_words, keys, to, ahead); break;
      case 2: score<2>(query, key_words, keys, to, ahead); break;
      default: score<1>(query, key_words, keys, to, ahead);
    }
  }
  for (int64_t g = 0; g < groups; g++) {
    const f32x16 scale = bytes ? a.scale * load<f32x16>(s.scales(false, g)) : splat(a.scale);
    for (int r = 0; r < count; r++) store(scores[r] + g * 16, load<f32x16>(scores[r] + g * 16) * scale);
  }
  weigh<false>(s, count, low, high, scores, weights, part);

  const uint32_t* values[kStretch / 16];
  find_values<false>(s, wide, tail, values);
  int64_t column = 0;
  for (; column + 64 <= a.value_dim; column += 64)
    add_values<4>(weights[0], values, groups, a.value_dim, column, part.out, ahead);
  switch ((a.value_dim - column) / 16) {
    case 3: return add_values<3>(weights[0], values, groups, a.value_dim, column, part.out, ahead);
    case 2: return add_values<2>(weights[0], values, groups, a.value_dim, column, part.out, ahead);
    case 1: return add_values<1>(weights[0], values, groups, a.value_dim, column, part.out, ahead);
    default: return;
  }
}
#endif

static inline Stretch stretch_of(const Step& step, const AttentionLayer& a, const Item& item, int64_t n) {
  const int64_t group = a.num_heads / a.num_kv_heads, first = n * kStretch;
  const int64_t tokens = step.query_start_loc[item.row + 1] - step.query_start_loc[item.row];
  int64_t seen = step.seq_lens[item.row] - tokens + (item.first + item.count - 1) / group + 1;
  if (item.num_rows > 1) seen = item.last_stretch * kStretch;
  return {a, step.block_tables + item.row * step.table_stride, item.kv_head, first,
          std::min<int64_t>(kStretch, seen - first)};
}

// The stretches of one item, merged into `whole`, which begins with what the item begins with. `queries`: (num_tokens,
// num_heads, key_dim) as words. `following` is what this thread works on next, if that is known: its keys are fetched meanwhile.
static void attend_item(const Step& step, const AttentionLayer& a, const uint32_t* queries, const Item& item,
                        const Stretch* following, const char* parts, Part& whole) {
  const int64_t L = kv_lanes(a.kv_kind), words = a.key_dim / L, group = a.num_heads / a.num_kv_heads;
  alignas(64) uint32_t query[kAttentionRows * kMaxDim];
  int64_t position[kAttentionRows];
  for (int r = 0; r < item.count; r++) {
    const int64_t place = (item.first + r) / group, head = item.kv_head * group + (item.first + r) % group;
    const int64_t row = item.num_rows > 1 ? item.row + place : item.row, before = item.num_rows > 1 ? 0 : place;
    const int64_t start = step.query_start_loc[row], tokens = step.query_start_loc[row + 1] - start;
    std::memcpy(query + r * words, queries + ((start + before) * a.num_heads + head) * words, words * 4);
    position[r] = step.seq_lens[row] - tokens + before;
  }
  if (item.begin >= 0)
    take_queries(whole, part_at(const_cast<char*>(parts), item.begin, a.value_dim), item.begin_query, item.count, a.value_dim);
  static thread_local Part part;
  for (int64_t n = item.first_stretch; n < item.last_stretch; n++) {
    const Stretch s = stretch_of(step, a, item, n);
    const Stretch after = n + 1 < item.last_stretch ? stretch_of(step, a, item, n + 1) : s;
    const Stretch* next = n + 1 < item.last_stretch ? &after : following;
    int64_t low[kAttentionRows], high[kAttentionRows];
    for (int r = 0; r < item.count; r++) {
      low[r] = a.window ? std::max<int64_t>(0, position[r] + 1 - a.window - s.first_key) : 0;
      high[r] = position[r] + 1 - s.first_key;
    }
    const bool is_first = n == item.first_stretch && item.begin < 0;
    Part& to = is_first ? whole : part;
    if (a.kv_kind == kFloat32)
      attend_count<true, kTileRows>(item.count, s, next, query, low, high, to);
    else if (!on_tiles(a))
      attend_count<false, kTileRows>(item.count, s, next, query, low, high, to);
#if defined(PAGEWIRE_AMX)
    else
      attend_stretch_on_tiles(item.count, s, next, query, low, high, to);
#endif
    if (!is_first) merge(whole, part, item.count, a.value_dim);
  }
}

// Divide by the sums and hand each query's result to `put(token, column, lanes)`, a row being all heads' values.
template <class Put>
static inline void finish_item(const Step& step, const AttentionLayer& a, const Item& item, Part& whole, Put&& put) {
  const int64_t group = a.num_heads / a.num_kv_heads, start = step.query_start_loc[item.row];
  for (int r = 0; r < item.count; r++) {
    const int64_t token = start + (item.first + r) / group, head = item.kv_head * group + (item.first + r) % group;
    float total = whole.total[r], keep = 1;
    if (a.sinks) {
      const float most = std::max(whole.most[r], a.sinks[head]);
      keep = std::exp(whole.most[r] - most);
      total = total * keep + std::exp(a.sinks[head] - most);
    }
    const float inverse = keep / total;
    for (int64_t i = 0; i < a.value_dim; i += 16)
      put(token, head * a.value_dim + i, load<f32x16>(whole.out + r * a.value_dim + i) * inverse);
  }
}

// Three phases, the first claimed from `phase`. All K and V of the step must be stored before.
template <class Put>
static void attend(Team& team, int phase, const Step& step, const AttentionLayer& a, const uint32_t* queries,
                   const AttentionWork& work, char* parts, Put&& put) {
  static thread_local Part whole;
#if defined(PAGEWIRE_AMX)
  shape_attention_tiles();
#endif
  const auto work_through = [&](const std::vector<Item>& items, int64_t from, int64_t to, auto&& done) {
    for (; from < to; from++) {
      const Item &item = items[from], &after = items[from + 1 < to ? from + 1 : from];
      const Stretch next = stretch_of(step, a, after, after.first_stretch);
      const Stretch* following = from + 1 < to ? &next : nullptr;
      const bool one = item.last_stretch - item.first_stretch == 1 && item.part >= 0;  // written once, as it stays
      Part& result = one ? part_at(parts, item.part, a.value_dim) : whole;
      attend_item(step, a, queries, item, following, parts, result);
      if (!one) done(item);
    }
  };
  team.share(phase, work.shared.size(), 4, [&](int64_t from, int64_t to) {
    work_through(work.shared, from, to, [&](const Item& item) {
      take_queries(part_at(parts, item.part, a.value_dim), whole, 0, item.count, a.value_dim);
    });
  });
  team.share(phase + 1, work.items.size(), 16, [&](int64_t from, int64_t to) {
    work_through(work.items, from, to, [&](const Item& item) { finish_item(step, a, item, whole, put); });
  });
  team.share(phase + 2, work.merges.size(), 4, [&](int64_t from, int64_t to) {
    for (; from < to; from++) {
      const Item& item = work.merges[from];
      clear(whole, a.value_dim);
      for (int64_t n = 0; n < item.last_stretch - item.first_stretch; n++)
        merge(whole, part_at(parts, item.part + n, a.value_dim), item.count, a.value_dim);
      finish_item(step, a, item, whole, put);
    }
  });
}
