static inline int per_word(int32_t kind) { return kind == kFloat32 ? 1 : kind == kBfloat16 ? 2 : 4; }

// Sixteen columns of one row of `x` to the operand of a product; float32 and bfloat16 only.
static inline void put_lanes(int32_t kind, uint32_t* row, int64_t column, f32x16 x) {
  if (kind == kFloat32)
    store((float*)row + column, x);
  else
    store((uint16_t*)row + column, narrow(x));
}

// On a machine with tiles an operand of bfloat16 lies in them: 16 rows by 32 columns in one kilobyte, those of the same rows
// one after the other. Else, and in every other kind, it lies row after row. Weights of 8 and 4 bits become bfloat16 there
// (scaled.h); elsewhere the operand becomes bytes, as they are.
#if defined(PAGEWIRE_AMX)
constexpr int64_t kTileHeight = 16, kTileWords = 16;  // rows, and words of a row
static inline bool lies_in_tiles(int32_t kind) { return kind == kBfloat16; }
static inline int32_t operand_kind(const Linear& l) { return l.kind == kFloat32 ? kFloat32 : kBfloat16; }
#else
constexpr int64_t kTileHeight = 1, kTileWords = 1;
static inline bool lies_in_tiles(int32_t) { return false; }
static inline int32_t operand_kind(const Linear& l) { return l.kind >= kInt8 ? kInt8 : l.kind; }
#endif

// The left side of a product: rows of words, and of bytes their scales and sums by group.
struct Operand {
  uint32_t* words;
  int64_t stride;  // words a row
  float* scales;   // (rows, groups)
  int32_t* sums;   // the same, of the bytes
  int64_t groups;

  int64_t at(int64_t row, int64_t group) const { return row * groups + group; }
  Operand from(int64_t row) const {
    return {words + row * stride, stride, scales + at(row, 0), sums + at(row, 0), groups};
  }
};

static inline int64_t whole(int64_t n, int64_t of) { return (n + of - 1) / of * of; }
static inline int64_t operand_rows(int64_t rows) { return whole(rows, kTileHeight); }  // that there must be room for
static inline int64_t operand_stride(const Linear& l) {
  const int64_t words = l.k / per_word(operand_kind(l));
  return lies_in_tiles(operand_kind(l)) ? whole(words, kTileWords) : words;
}
static inline int64_t operand_groups(const Linear& l) { return operand_kind(l) == kInt8 ? l.k / kGroup : 0; }

// Sixteen columns of a row to their place in an operand; float32 and bfloat16 only.
static inline void put_operand(int32_t kind, uint32_t* words, int64_t stride, int64_t row, int64_t column, f32x16 x) {
  if (!lies_in_tiles(kind)) return put_lanes(kind, words + row * stride, column, x);
  const int64_t tile = row / kTileHeight * (stride / kTileWords) + column / (2 * kTileWords);
  put_lanes(kind, words + (tile * kTileHeight + row % kTileHeight) * kTileWords, column % (2 * kTileWords), x);
}

// Quantise one row to signed bytes, a scale for each group.
static inline void quantise(const float* x, const Operand& to, int64_t row) {
  for (int64_t g = 0; g < to.groups; g++) {
    const f32x16 a = load<f32x16>(x + g * kGroup), b = load<f32x16>(x + g * kGroup + 16);
    const float top = highest(vmax(vmax(a, -a), vmax(b, -b)));
    const float inverse = top > 0 ? 127.f / top : 0.f;
    const i32x16 p = __builtin_convertvector(rounded(a * inverse), i32x16);
    const i32x16 q = __builtin_convertvector(rounded(b * inverse), i32x16);
    int8_t* bytes = (int8_t*)(to.words + row * to.stride) + g * kGroup;
    store(bytes, __builtin_convertvector(p, i8x16));
    store(bytes + 16, __builtin_convertvector(q, i8x16));
    const i32x16 both = p + q;
    int32_t total = 0;
    for (int i = 0; i < 16; i++) total += both[i];
    to.scales[to.at(row, g)] = top == top ? top / 127.f : top;  // NaN stays NaN
    to.sums[to.at(row, g)] = total;
  }
}

static inline void prepare(const float* x, const Linear& l, const Operand& to, int64_t row) {
  const int32_t kind = operand_kind(l);
  if (kind == kInt8) return quantise(x, to, row);
  for (int64_t i = 0; i < l.k; i += 16) put_operand(kind, to.words, to.stride, row, i, load<f32x16>(x + i));
}

static inline int64_t panel_words(const Linear& l) {
  const int64_t whole = l.k * 32;  // numbers in a panel
  return l.kind == kFloat32 ? whole : l.kind == kBfloat16 ? whole / 2 : l.kind == kInt8 ? whole / 4 : whole / 8;
}

// What is fetched while a tile is worked: so many bytes in each of its steps, or nothing.
struct Fetch {
  const uint8_t* from;
  int64_t bytes;

  inline void step(int64_t s) const {
    if (!from) return;
    __builtin_prefetch(from + s * bytes, 0, 2);
    __builtin_prefetch(from + s * bytes + bytes / 2, 0, 2);
  }
};
