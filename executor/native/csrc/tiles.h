// Products on AMX, of bfloat16 or what becomes bfloat16: a tile is a register of 16 rows of 64 bytes, and one instruction multiplies 16 rows by 16
// outputs over 32 values of k, eight times what AVX-512 does meanwhile. The layout of panels serves it as it is: a step of a
// panel, 32 outputs of two values of k each, is one row of two tiles of weights.
//
// The unit sums the even and the odd values of k of a tile apart, so few rows are multiplied here too, as one low tile:
// else a row would have other sums alone than among many. A tile of one row takes no longer than memory takes to bring the
// weights.
//
// Tiles: 0 to 3 sums, by rows and halves of a panel; 4 and 5 rows of the operand; 6 and 7 halves of the weights.

constexpr int64_t kTileSteps = kTileWords;  // steps of a panel that one instruction takes

// The compiler's tile functions do not say which memory they read: what was stored must be there before them.
static inline void settle() { asm volatile("" ::: "memory"); }

struct TileShape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int first, int last, int num_rows, int num_bytes) {
    for (int i = first; i <= last; i++) rows[i] = (uint8_t)num_rows, bytes[i] = (uint16_t)num_bytes;
  }
  void use() const {
    settle();
    _tile_loadconfig(this);
  }
};
static_assert(sizeof(TileShape) == 64, "as the processor reads it");

// Whoever computes on tiles holds one, so that they are given back: the system saves used ones with every thread switch.
struct Tiles {
  ~Tiles() { _tile_release(); }
};

static inline void shape_tiles(int64_t rows) {
  TileShape shape;
  const int height = (int)std::min(rows, kTileHeight);  // whole tiles are read, and what is behind the last row is not used
  shape.set(0, 5, height, 64);
  shape.set(6, 7, kTileSteps, 64);
  shape.use();
}

// Where the words of a panel come from, `kTileSteps` at a time.
struct PlainPanel {
  const uint32_t* words;
  void before(int64_t) {}
  const uint32_t* chunk(int64_t c) const { return words + c * kTileSteps * 32; }
};

// The chunks of a compact panel.
class CompactChunks {
 public:
  CompactChunks(const Linear& l, int64_t panel)
      : expander_(l.exponents), strays_(l, panel), from_(compact_panel(l, panel)), pairs_(l.k / 4) {}

  void expand(int64_t c, uint32_t* to) {
    const int64_t first = c * kPairs, last = std::min(first + kPairs, pairs_);
    const uint8_t* const soon = from_ + first * kPairBytes + kAhead;  // the machine's own prefetching alone is too late
    for (int64_t at = 0; at < kPairs * kPairBytes; at += 64) __builtin_prefetch(soon + at, 0, 3);
    for (int64_t pair = first; pair < last; pair++) {
      uint32_t* words = to + (pair - first) * 64;
      for (int step = 0; step < 2; step++) {
        u32reg b[kPanel];
        expander_.expand(from_ + pair * kPairBytes, step, b);
        put(b, words + step * 32);
      }
    }
    while (strays_.next_pair() < last) {
      const int64_t pair = strays_.next_pair();
      strays_.put(pair, to + (pair - first) * 64);
    }
  }

 private:
  static constexpr int64_t kPairs = kTileSteps / 2, kAhead = 8 << 10;

  const Expander expander_;
  Strays strays_;
  const uint8_t* const from_;
  const int64_t pairs_;
};

// A panel that is expanded a chunk ahead of the one that is multiplied. With `kept` the whole panel stays in `to` for the
// rows that follow, else there are four chunks, used in turn.
template <class Chunks>
class ExpandedPanel {
 public:
  ExpandedPanel(const Linear& l, int64_t panel, uint32_t* to, bool kept) : chunks_(l, panel), to_(to), kept_(kept) {
    chunks_.expand(0, at(0));
  }
  void before(int64_t c) { chunks_.expand(c + 1, at(c + 1)); }
  const uint32_t* chunk(int64_t c) const { return at(c); }

 private:
  uint32_t* at(int64_t c) const { return to_ + (kept_ ? c : c % 4) * kTileSteps * 32; }

  Chunks chunks_;
  uint32_t* const to_;
  const bool kept_;
};

// `rows`: a tile of the operand, and `below` the one of the next 16 rows.
template <bool BOTH>
static inline void multiply_chunk(const uint32_t* rows, const uint32_t* below, const uint32_t* words) {
  settle();
  _tile_loadd(4, rows, 64);
  _tile_loadd(6, words, 128);
  _tile_loadd(7, words + 16, 128);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (BOTH) {
    _tile_loadd(5, below, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// The same as `finish`, for many rows of one panel.
static inline void finish_rows(const Linear& l, const Epilogue& e, int64_t row, int64_t rows, int64_t panel,
                               const float (*sums)[32]) {
  const int64_t column = panel * 32;
  const f32x16 low_bias = l.bias ? load<f32x16>(l.bias + column) : splat(0.f);
  const f32x16 high_bias = l.bias ? load<f32x16>(l.bias + column + 16) : splat(0.f);
  const bool padded = column + 32 > l.n;
  if (e.mode == Epilogue::kSiluMul) {
    for (int64_t r = 0; r < rows; r++) {
      const f32x16 low = load<f32x16>(sums[r]) + low_bias, high = load<f32x16>(sums[r] + 16) + high_bias;
      put_operand(e.next_kind, e.next, e.next_stride, row + r, column / 2, low / (1.f + vexp(-low)) * high);
    }
  } else if (e.mode == Epilogue::kStore && !padded) {
    for (int64_t r = 0; r < rows; r++) {
      float* to = e.out + (row + r) * e.stride + column;
      store(to, load<f32x16>(sums[r]) + low_bias), store(to + 16, load<f32x16>(sums[r] + 16) + high_bias);
    }
  } else if (e.mode == Epilogue::kAdd && !padded) {
    for (int64_t r = 0; r < rows; r++) {
      float* to = e.out + (row + r) * e.stride + column;
      const float* base = e.base + (row + r) * e.stride + column;
      store(to, load<f32x16>(sums[r]) + low_bias + load<f32x16>(base));
      store(to + 16, load<f32x16>(sums[r] + 16) + high_bias + load<f32x16>(base + 16));
    }
  } else {
    for (int64_t r = 0; r < rows; r++) {
      f32x16 acc[1][2] = {{load<f32x16>(sums[r]), load<f32x16>(sums[r] + 16)}};
      finish<1, 1>(l, e, row + r, panel, acc);
    }
  }
}

// Rows [row, row + rows), at most 32, against one panel; `row` is a multiple of 16.
template <bool BOTH, class Panel>
static void multiply_tile_rows(const Linear& l, const Operand& a, Panel&& panel, int64_t row, int64_t rows, int64_t number,
                               const Fetch& fetch, const Epilogue& e) {
  const int64_t chunks = l.k / (2 * kTileSteps), next = a.stride * kTileHeight;  // words of 16 rows
  const uint32_t* const tiles = a.words + row * a.stride;
  _tile_zero(0);
  _tile_zero(1);
  if (BOTH) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t c = 0; c < chunks; c++) {
    panel.before(c);
    if (fetch.from)
      for (int64_t s = 0; s < kTileSteps; s++) fetch.step(c * kTileSteps + s);
    const uint32_t* const rows_at = tiles + c * kTileHeight * kTileWords;
    multiply_chunk<BOTH>(rows_at, rows_at + next, panel.chunk(c));
  }
  if (l.k % (2 * kTileSteps)) {  // half a chunk: the other half is zero on both sides
    constexpr int64_t kHalf = kTileSteps / 2;
    alignas(64) uint32_t left[2][kTileHeight * kTileWords] = {}, right[kTileSteps * 32] = {};
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = r / kTileHeight * next + (chunks * kTileHeight + r % kTileHeight) * kTileWords;
      std::memcpy(left[r / kTileHeight] + r % kTileHeight * kTileWords, tiles + at, kHalf * 4);
    }
    std::memcpy(right, panel.chunk(chunks), kHalf * 32 * 4);
    multiply_chunk<BOTH>(left[0], left[1], right);
  }
  alignas(64) float sums[2 * kTileHeight][32];
  _tile_stored(0, sums[0], 128);
  _tile_stored(1, sums[0] + 16, 128);
  if (BOTH) {
    _tile_stored(2, sums[kTileHeight], 128);
    _tile_stored(3, sums[kTileHeight] + 16, 128);
  }
  finish_rows(l, e, row, rows, number, sums);
}

// Rows [row, row + rows) against panels [first, last), after `shape_tiles` of all the product's rows.
static void multiply_on_tiles(const Linear& l, const Operand& a, int64_t row, int64_t rows, int64_t first, int64_t last,
                              const Epilogue& e) {
  constexpr int64_t kBoth = 2 * kTileHeight;
  static thread_local std::vector<uint32_t> buffer;
  buffer.resize(l.k * 16 + 16);
  uint32_t* const plain = (uint32_t*)(((uintptr_t)buffer.data() + 63) / 64 * 64);
  for (int64_t panel = first; panel < last; panel++) {
    for (int64_t from = row; from < row + rows; from += kBoth) {
      const int64_t count = std::min(kBoth, row + rows - from);
      const bool last_tile = from + count == row + rows;
      Fetch fetch{nullptr, 0};
      if (last_tile && from != row) {  // with few rows the machine's own prefetching does better
        if (l.exponents)
          fetch = {compact_panel(l, panel + 1), kPairBytes / 2};
        else
          fetch = {(const uint8_t*)(l.words + (panel + 1) * panel_words(l)), panel_words(l) * 8 / l.k};
      }
      const auto run = [&](auto&& from_panel) __attribute__((always_inline)) {
        if (count > kTileHeight)
          multiply_tile_rows<true>(l, a, from_panel, from, count, panel, fetch, e);
        else
          multiply_tile_rows<false>(l, a, from_panel, from, count, panel, fetch, e);
      };
      if (l.kind == kBfloat16 && !l.exponents)
        run(PlainPanel{l.words + panel * panel_words(l)});
      else if (from != row)
        run(PlainPanel{plain});
      else if (l.kind == kBfloat16)
        run(ExpandedPanel<CompactChunks>(l, panel, plain, !last_tile));
      else if (l.kind == kInt8)
        run(ExpandedPanel<ScaledChunks<kInt8>>(l, panel, plain, !last_tile));
      else
        run(ExpandedPanel<ScaledChunks<kInt4>>(l, panel, plain, !last_tile));
    }
  }
}
