// Products of 8 and 4 bits on AMX. One instruction sums a group of weights for 16 rows and 16 outputs, exactly. What it gave is
// stored, and added to float sums by vector instructions, in the order of the few rows' kernel: a row has the same bits in
// both. These additions take longer than the products: a vector of 16 sums is converted, its scale multiplied, and both
// multiplied and added.
//
// Tiles: 0 and 1 sums; 2 and 3 rows of the operand; 4 to 7 groups of weights, which stay while rows go through them.

// Rows: fewer take the tile unit as long, and AVX-512 less. Of 4 bits a group's sums need a fourth instruction.
constexpr int64_t fewest_on_tiles(int32_t kind) { return kind == kInt8 ? 16 : 64; }
constexpr int64_t kRowsAtOnce = 128;  // that go through four groups before the next four

constexpr int64_t kGroupWords = kGroup / 4;  // of a row of the operand, and steps of a panel of bytes
template <int KIND>
constexpr int64_t kGroupScales = KIND == kInt8 ? 32 : 64;
template <int KIND>
constexpr int64_t kFetched = KIND == kInt8 ? 512 : 256;  // bytes of a group of half a panel

static inline void shape_byte_tiles(int64_t rows) {
  TileShape shape;
  const int height = (int)std::min(rows, kTileHeight);  // whole tiles are read, and what is behind the last row is not used
  shape.set(0, 1, height, 64);
  shape.set(2, 3, height, kGroup);
  shape.set(4, 7, kGroupWords, 64);
  shape.use();
}

// A panel as signed bytes, for all the rows.
template <int KIND>
static void sign_panel(const Linear& l, int64_t panel, uint32_t* to) {
  const int64_t words = panel_words(l);
  const uint32_t* const from = l.words + panel * words;
  const uint32_t* const soon = from + (16 << 10) / 4;  // the machine's own prefetching alone is too late
  for (int64_t i = 0; i < words; i += 32) {
    __builtin_prefetch(soon + i, 0, 3);
    __builtin_prefetch(soon + i + 16, 0, 3);
    for (int64_t half = 0; half < 32; half += 16) {
      const u32x16 w = load<u32x16>(from + i + half);
      if (KIND == kInt8) {
        store(to + i + half, w ^ 0x80808080u);
      } else {
        store(to + 2 * i + half, w & 0x0f0f0f0fu);
        store(to + 2 * i + half + 32, (w >> 4) & 0x0f0f0f0fu);
      }
    }
  }
}

// All rows, 16 by 16, through G groups of half a panel, to the float sums in `total`. While the sums of one group are added by
// vector instructions, the tile unit is at the next but one, and those of the next are stored. `next`: what is fetched
// meanwhile, half of the next panel, or null.
template <int KIND, int G>
static inline void multiply_groups(const Operand& a, int64_t rows, int64_t group, const uint32_t* words,
                                   const uint16_t* scales, const uint8_t* next, float (*total)[32]) {
  constexpr int64_t kStored = kGroupWords * 32;  // words of a group of a panel
  alignas(64) int32_t sums[4][kTileHeight][16];
  const int64_t stride = a.stride * 4, blocks = (rows + kTileHeight - 1) / kTileHeight, count = blocks * G;
  words += group * kStored;
  settle();
  _tile_loadd(4, words, 128);
  if (G > 1) _tile_loadd(5, words + kStored, 128);
  if (G > 2) _tile_loadd(6, words + 2 * kStored, 128);
  if (G > 3) _tile_loadd(7, words + 3 * kStored, 128);
  const auto sum = [&](int64_t block, int g) __attribute__((always_inline)) {
    const uint32_t* const at = a.words + block * kTileHeight * a.stride + (group + g) * kGroupWords;
    switch (g) {
      case 0:
        _tile_zero(0);
        _tile_loadd(2, at, stride);
        _tile_dpbssd(0, 2, 4);
        break;
      case 1:
        _tile_zero(1);
        _tile_loadd(3, at, stride);
        _tile_dpbssd(1, 3, 5);
        break;
      case 2:
        _tile_zero(0);
        _tile_loadd(2, at, stride);
        _tile_dpbssd(0, 2, 6);
        break;
      default:
        _tile_zero(1);
        _tile_loadd(3, at, stride);
        _tile_dpbssd(1, 3, 7);
    }
  };
  const auto keep = [&](int64_t item, int g) __attribute__((always_inline)) {
    if (g % 2) {
      _tile_stored(1, sums[item % 4], 64);
    } else {
      _tile_stored(0, sums[item % 4], 64);
    }
    settle();
  };
  f32x16 scale[G], least[G];
#pragma GCC unroll 4
  for (int g = 0; g < G; g++) {
    scale[g] = widen(load<u16x16>(scales + (group + g) * kGroupScales<KIND>));
    if (KIND == kInt4) least[g] = widen(load<u16x16>(scales + (group + g) * kGroupScales<KIND> + 32));
  }
  sum(0, 0);
  keep(0, 0);
  if (count > 1) sum(1 / G, 1 % G);
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t item = block * G;
    float(*const to)[32] = total + block * kTileHeight;
    f32x16 acc[kTileHeight];
#pragma GCC unroll 16
    for (int r = 0; r < kTileHeight; r++) acc[r] = group ? load<f32x16>(to[r]) : splat(0.f);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      if (item + g + 1 < count) keep(item + g + 1, (g + 1) % G);
      if (item + g + 2 < count) sum(block + (g + 2) / G, (g + 2) % G);
      if (next && block == 0)
        for (int64_t at = 0; at < kFetched<KIND>; at += 64) __builtin_prefetch(next + (group + g) * kFetched<KIND> + at, 0, 2);
      const int32_t(*const whole)[16] = sums[(item + g) % 4];
      const int64_t at = (block * a.groups + group + g) * kTileHeight;
      const float* const units = a.scales + at;
#pragma GCC unroll 16
      for (int r = 0; r < kTileHeight; r++) {
        acc[r] += __builtin_convertvector(load<i32x16>(whole[r]), f32x16) * (scale[g] * units[r]);
        if (KIND == kInt4) acc[r] += least[g] * (units[r] * (float)a.sums[at + r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kTileHeight; r++) store(to[r], acc[r]);
  }
}

// Rows [row, row + rows) against panels [first, last), after `shape_byte_tiles` of all the product's rows.
template <int KIND>
static void multiply_bytes_on_tiles(const Linear& l, const Operand& a, int64_t row, int64_t rows, int64_t first, int64_t last,
                                    const Epilogue& e) {
  static thread_local std::vector<uint32_t> buffer;
  buffer.resize(a.groups * kGroupWords * 32 + 16);
  uint32_t* const words = (uint32_t*)(((uintptr_t)buffer.data() + 63) / 64 * 64);
  alignas(64) float total[kRowsAtOnce][32];
  for (int64_t panel = first; panel < last; panel++) {
    sign_panel<KIND>(l, panel, words);
    const uint16_t* const scales = l.scales + panel * a.groups * kGroupScales<KIND>;
    for (int64_t from = row; from < row + rows; from += kRowsAtOnce) {
      const int64_t count = std::min(kRowsAtOnce, row + rows - from);
      const Operand some = a.from(from);
      for (int64_t half = 0; half < 32; half += 16) {
        float(*const to)[32] = (float(*)[32])(total[0] + half);
        const uint8_t* const next =  // the first rows bring it
            from == row ? (const uint8_t*)(l.words + (panel + 1) * panel_words(l)) + half / 16 * a.groups * kFetched<KIND> : nullptr;
        int64_t group = 0;
        for (; group + 4 <= a.groups; group += 4)
          multiply_groups<KIND, 4>(some, count, group, words + half, scales + half, next, to);
        switch (a.groups - group) {
          case 3: multiply_groups<KIND, 3>(some, count, group, words + half, scales + half, next, to); break;
          case 2: multiply_groups<KIND, 2>(some, count, group, words + half, scales + half, next, to); break;
          case 1: multiply_groups<KIND, 1>(some, count, group, words + half, scales + half, next, to);
        }
      }
      for (int64_t r = 0; r < count; r += kTileHeight)
        finish_rows(l, e, from + r, std::min(kTileHeight, count - r), panel, total + r);
    }
  }
}
