// Matrix products against packed weights. An output is summed over k in one fixed order, whatever else is in the batch:
// a row's result depends on that row alone, bit for bit.

// What becomes of a tile of results.
struct Epilogue {
  enum Mode { kStore, kAdd, kSiluMul } mode;
  float* out;  // kStore, kAdd: (rows, n) float32; kSiluMul into int8: (rows, n / 2) float32, quantised later
  const float* base;  // kAdd: (rows, n), what is added to; may be `out`
  int64_t stride;
  int32_t next_kind;   // kSiluMul: what the next product reads
  uint32_t* next;      // kSiluMul: its operand's words
  int64_t next_stride;
};

template <int R, int P>
static inline void finish(const Linear& l, const Epilogue& e, int64_t row, int64_t panel, f32reg (&acc)[R][2 * P * kParts]) {
  for (int p = 0; p < P; p++) {
    const int64_t column = (panel + p) * 32;
    for (int r = 0; r < R; r++) {
      f32x16 low = load<f32x16>(&acc[r][2 * p * kParts]), high = load<f32x16>(&acc[r][(2 * p + 1) * kParts]);
      if (l.bias) {
        low += load<f32x16>(l.bias + column);
        high += load<f32x16>(l.bias + column + 16);
      }
      if (e.mode == Epilogue::kSiluMul) {
        const f32x16 y = low / (1.f + vexp(-low)) * high;
        if (e.next_kind >= kInt8)
          store(e.out + (row + r) * e.stride + column / 2, y);
        else
          put_operand(e.next_kind, e.next, e.next_stride, row + r, column / 2, y);
        continue;
      }
      float* to = e.out + (row + r) * e.stride + column;
      const float* base = e.mode == Epilogue::kAdd ? e.base + (row + r) * e.stride + column : nullptr;
      if (column + 32 > l.n) {  // the last panel is padded
        float both[32];
        store(both, low), store(both + 16, high);
        for (int64_t i = 0; column + i < l.n; i++) to[i] = base ? base[i] + both[i] : both[i];
        continue;
      }
      if (base) {
        low += load<f32x16>(base);
        high += load<f32x16>(base + 16);
      }
      store(to, low), store(to + 16, high);
    }
  }
}

#if defined(PAGEWIRE_AVX512)
constexpr int kTileRows = 12, kByteTileRows = 6;  // 24 accumulators of 32 registers
#else
constexpr int kTileRows = 3, kByteTileRows = 3;
#endif

// How a product finds its weights: in a layer as it lies, or (bfloat16) in one panel of it that was expanded.
// kKeptWords: a compact panel, expanded into `words` while it is multiplied.
enum Source { kFloat32Words, kBfloat16Words, kExpandedWords, kCompactWords, kKeptWords, kInt8Words, kInt4Words };

template <int SOURCE>
constexpr int kTile = SOURCE >= kInt8Words ? kByteTileRows : kTileRows;

// Where register `v` of a step lies, counted over panels that begin `stride` words apart.
static inline const uint32_t* panel_register(const uint32_t* w, int64_t stride, int64_t step, int v) {
  return w + v / kPanel * stride + step * 32 + v % kPanel * kRegisterLanes;
}

template <bool FLOAT, int R, int P>
static inline void multiply_words(const Linear& l, const Operand& a, const uint32_t* w, const Fetch& fetch,
                                  f32reg (&acc)[R][2 * P * kParts]) {
  constexpr int V = 2 * P * kParts;
  const int64_t steps = l.k / (FLOAT ? 1 : 2);
  const uint32_t* x = a.words;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = f32reg{};
  for (int64_t s = 0; s < steps; s++) {
    u32reg b[V];
    fetch.step(s);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) b[v] = load<u32reg>(panel_register(w, steps * 32, s, v));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const uint32_t word = x[r * a.stride + s];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        if (FLOAT) {
          float value;
          std::memcpy(&value, &word, 4);
          acc[r][v] += (f32reg)b[v] * value;
        } else {
          acc[r][v] = dot2(acc[r][v], b[v], word);
        }
      }
    }
  }
}

template <int KIND, int R, int P>
static inline void multiply_bytes(const Linear& l, const Operand& a, int64_t row, const uint32_t* w, int64_t panel,
                                  const Fetch& fetch, f32reg (&acc)[R][2 * P * kParts]) {
  constexpr int V = 2 * P * kParts;
  constexpr int kPerGroup = KIND == kInt8 ? 8 : 4;  // stored steps of a group
  const int64_t stride = panel_words(l), group_scales = KIND == kInt8 ? 32 : 64;
  const uint16_t* scales = l.scales + panel * a.groups * group_scales;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = f32reg{};
  for (int64_t g = 0; g < a.groups; g++) {
    i32reg whole[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) whole[r][v] = splat_register(KIND == kInt8 ? -128 * a.sums[a.at(row + r, g)] : 0);
    for (int64_t s = g * kPerGroup; s < (g + 1) * kPerGroup; s++) {
      u32reg b[V];
      fetch.step(s);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) b[v] = load<u32reg>(panel_register(w, stride, s, v));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const uint32_t* x = a.words + (row + r) * a.stride + (KIND == kInt8 ? s : 2 * s);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          if (KIND == kInt8) {
            whole[r][v] = dot4(whole[r][v], b[v], x[0]);
          } else {
            whole[r][v] = dot4(whole[r][v], b[v] & 0x0f0f0f0fu, x[0]);
            whole[r][v] = dot4(whole[r][v], (b[v] >> 4) & 0x0f0f0f0fu, x[1]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const uint16_t* at = scales + (v / kPanel * a.groups + g) * group_scales + v % kPanel * kRegisterLanes;
      const f32reg scale = widen(load<u16reg>(at));
      f32reg least{};
      if (KIND == kInt4) least = widen(load<u16reg>(at + 32));
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const float unit = a.scales[a.at(row + r, g)];
        acc[r][v] += __builtin_convertvector(whole[r][v], f32reg) * (scale * unit);
        if (KIND == kInt4) acc[r][v] += least * (unit * (float)a.sums[a.at(row + r, g)]);
      }
    }
  }
}

// `words`: of the first panel. `last_tile`: no rows come after these, so the next panel is fetched meanwhile. With few rows
// the machine's own prefetching does better.
template <int SOURCE, int R, int P>
static void multiply_tile(const Linear& l, const Operand& a, const uint32_t* words, int64_t row, int64_t panel,
                          bool last_tile, const Epilogue& e) {
  f32reg acc[R][2 * P * kParts];
  Fetch fetch{nullptr, 128};
  if (last_tile && R >= 4) {
    fetch.from = (const uint8_t*)(words + panel_words(l));
    if (SOURCE == kExpandedWords || SOURCE == kCompactWords) fetch = {compact_panel(l, panel + 1), kPairBytes / 2};
  }
  if constexpr (SOURCE == kInt8Words)
    multiply_bytes<kInt8, R, P>(l, a, row, words, panel, fetch, acc);
  else if constexpr (SOURCE == kInt4Words)
    multiply_bytes<kInt4, R, P>(l, a, row, words, panel, fetch, acc);
  else if constexpr (SOURCE == kCompactWords || SOURCE == kKeptWords)
    multiply_compact<R, P, SOURCE == kKeptWords>(l, a.from(row), panel, fetch, const_cast<uint32_t*>(words), acc);
  else
    multiply_words<SOURCE == kFloat32Words, R, P>(l, a.from(row), words, fetch, acc);
  finish<R, P>(l, e, row, panel, acc);
}

// Rows [row, row + rows) against panels [first, last), whose words begin at `words`; rows at most R.
template <int SOURCE, int R>
static inline void multiply_rows(const Linear& l, const Operand& a, const uint32_t* words, int64_t row, int64_t rows,
                                 int64_t first, int64_t last, bool last_tile, const Epilogue& e) {
  if constexpr (R > 1)
    if (rows < R) return multiply_rows<SOURCE, R - 1>(l, a, words, row, rows, first, last, last_tile, e);
  int64_t panel = first;
  const auto tiles = [&](auto count) {
    constexpr int P = decltype(count)::value;
    for (; panel + P <= last; panel += P)
      multiply_tile<SOURCE, R, P>(l, a, words + (panel - first) * panel_words(l), row, panel, last_tile, e);
  };
  if constexpr (R <= 2 && SOURCE != kExpandedWords && SOURCE != kKeptWords) {  // few rows: several panels keep more loads and sums under way
    constexpr int P = std::max(1, SOURCE >= kInt8Words ? 2 / kParts : 4 / kParts / R);
    tiles(std::integral_constant<int, P>());
    if constexpr (P > 2) tiles(std::integral_constant<int, 2>());
  }
  tiles(std::integral_constant<int, 1>());
}

// Tiles [tile, tiles) of the rows, which are dealt evenly: one short tile would read the weights for little work.
template <int SOURCE>
static void multiply_tiles(const Linear& l, const Operand& a, const uint32_t* words, int64_t row, int64_t rows, int64_t tile,
                           int64_t tiles, int64_t first, int64_t last, const Epilogue& e) {
  for (; tile < tiles; tile++) {
    const int64_t from = rows * tile / tiles, to = rows * (tile + 1) / tiles;
    multiply_rows<SOURCE, kTile<SOURCE>>(l, a, words, row + from, to - from, first, last, tile + 1 == tiles, e);
  }
}

template <int SOURCE>
static void multiply_panels(const Linear& l, const Operand& a, int64_t row, int64_t rows, int64_t first, int64_t last,
                            const Epilogue& e) {
  const int64_t tiles = (rows + kTile<SOURCE> - 1) / kTile<SOURCE>;
  const uint32_t* words = l.words + first * panel_words(l);
  if (SOURCE != kCompactWords || tiles == 1)
    return multiply_tiles<SOURCE>(l, a, words, row, rows, 0, tiles, first, last, e);
  static thread_local std::vector<uint32_t> buffer;
  buffer.resize(panel_words(l) + 16);
  uint32_t* const plain = (uint32_t*)(((uintptr_t)buffer.data() + 63) / 64 * 64);
  for (int64_t panel = first; panel < last; panel++) {  // each is expanded once, with the first tile
    multiply_rows<kKeptWords, kTile<SOURCE>>(l, a, plain, row, rows / tiles, panel, panel + 1, false, e);
    multiply_tiles<kExpandedWords>(l, a, plain, row, rows, 1, tiles, panel, panel + 1, e);
  }
}

#if defined(PAGEWIRE_AMX)
#include "scaled.h"
#include "tiles.h"
#else
struct Tiles {};
#endif

// One phase: all threads, until every panel is done.
static void multiply(Team& team, int phase, const Linear& l, const Operand& a, int64_t rows, const Epilogue& e) {
  constexpr int64_t kBandRows = 384;  // rows that meet a panel while it is in the cache
  const int64_t panels = (l.n + 31) / 32, bands = (rows + kBandRows - 1) / kBandRows;
#if defined(PAGEWIRE_AMX)
  if (l.kind != kFloat32) shape_tiles(rows);
#endif
  team.share(phase, panels * bands, rows <= kTileRows ? 8 : 4, [&](int64_t from, int64_t to) {
    while (from < to) {
      const int64_t band = from / panels, first = from % panels;
      const int64_t last = std::min(panels, first + (to - from));
      from += last - first;
      const int64_t row = band * kBandRows, count = std::min(rows - row, kBandRows);
#if defined(PAGEWIRE_AMX)
      if (l.kind == kFloat32)
        multiply_panels<kFloat32Words>(l, a, row, count, first, last, e);
      else
        multiply_on_tiles(l, a, row, count, first, last, e);
#else
      switch (l.kind) {
        case kFloat32: multiply_panels<kFloat32Words>(l, a, row, count, first, last, e); break;
        case kBfloat16:
          if (l.exponents)
            multiply_panels<kCompactWords>(l, a, row, count, first, last, e);
          else
            multiply_panels<kBfloat16Words>(l, a, row, count, first, last, e);
          break;
        case kInt8: multiply_panels<kInt8Words>(l, a, row, count, first, last, e); break;
        default: multiply_panels<kInt4Words>(l, a, row, count, first, last, e);
      }
#endif
    }
  });
}

// A group of weights as whole numbers: [-127, 127] for int8, [0, 15] for int4.
struct Quantised {
  f32x16 q[2];
  uint16_t scale, least;
};

static inline Quantised quantise_group(const float* x, int32_t kind) {
  const f32x16 v[2] = {load<f32x16>(x), load<f32x16>(x + 16)};
  Quantised best;
  if (kind == kInt8) {
    best.scale = narrow(highest(vmax(vmax(v[0], -v[0]), vmax(v[1], -v[1]))) / 127.f), best.least = 0;
    const float unit = widen(best.scale), inverse = unit != 0 ? 1.f / unit : 0.f;
    for (int i = 0; i < 2; i++) best.q[i] = vmax(-vmax(-rounded(v[i] * inverse), splat(-127.f)), splat(-127.f));
    return best;
  }
  const float high = highest(vmax(v[0], v[1])), low = -highest(vmax(-v[0], -v[1]));
  float least_error = INFINITY;
  for (int cut = 0; cut < 8; cut++) {  // a little of the range may be given up for finer steps: take the least error
    const float keep = 1.f - 0.02f * cut, middle = (high + low) / 2;
    Quantised now;
    now.least = narrow(middle + (low - middle) * keep);
    now.scale = narrow((high - low) * keep / 15.f);
    const float least = widen(now.least), unit = widen(now.scale), inverse = unit != 0 ? 1.f / unit : 0.f;
    f32x16 errors = splat(0.f);
    for (int i = 0; i < 2; i++) {
      const f32x16 whole = rounded((v[i] - least) * inverse);
      now.q[i] = vmax(-vmax(-whole, splat(-15.f)), splat(0.f));
      const f32x16 error = v[i] - (now.q[i] * unit + least);
      errors += error * error;
    }
    if (sum(errors) < least_error) least_error = sum(errors), best = now;
  }
  return best;
}
