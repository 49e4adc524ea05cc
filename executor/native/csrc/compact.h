// bfloat16 weights in 12 bits a number, without loss: sign and mantissa in a byte, one of 16 exponents in a nibble. Trained
// weights need no more: of 256 exponents fifteen cover all but a few in ten thousand. A step that must read every weight is
// as fast as memory, so a quarter less to read is a quarter less to wait. (Lossless packing of bfloat16 by its exponents is
// known from DFloat11, arXiv:2504.11651; codes of one length cost a handful of instructions instead of a decoder.)
//
//   words [panel][pair of steps]: 64 bytes of signs and mantissas for the first step, 64 for the second, 64 of codes, the
//   first step's in the low nibbles.
//
// Bytes are ordered such that interleaving low and high bytes within 16 byte lanes gives the words of the plain layout.

constexpr int64_t kPairBytes = 192;  // two steps of a panel
constexpr uint8_t kStrayCode = 15;  // exponent 0, which zeros and subnormal numbers have by themselves

static inline int64_t compact_panel_bytes(const Linear& l) { return l.k / 4 * kPairBytes; }
static inline const uint8_t* compact_panel(const Linear& l, int64_t panel) {
  return (const uint8_t*)l.words + panel * compact_panel_bytes(l);
}

typedef uint8_t u8x16 __attribute__((vector_size(16)));

// Codes to words of two bfloat16, a step (32 outputs) at a time.
class Expander {
 public:
  explicit Expander(const uint8_t* exponents) {
    uint8_t high[16], low[16];
    for (int i = 0; i < 16; i++) high[i] = exponents[i] >> 1, low[i] = (uint8_t)(exponents[i] << 7);
#if defined(PAGEWIRE_AVX512)
    high_ = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)high));
    low_ = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)low));
#elif defined(PAGEWIRE_AVX2)
    high_ = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)high));
    low_ = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)low));
#else
    high_ = load<u8x16>(high), low_ = load<u8x16>(low);
#endif
  }

  // `step` is 0 or 1: which of the pair.
  inline void expand(const uint8_t* pair, int step, u32reg (&b)[kPanel]) const {
#if defined(PAGEWIRE_AVX512)
    const __m512i rest = _mm512_loadu_si512(pair + 64 * step), sign = _mm512_set1_epi8((char)0x80);
    __m512i codes = _mm512_loadu_si512(pair + 128);
    if (step) codes = _mm512_srli_epi16(codes, 4);
    codes = _mm512_and_si512(codes, _mm512_set1_epi8(15));
    // the high byte is sign | upper seven bits of the exponent, the low byte its last bit | mantissa
    const __m512i high = _mm512_ternarylogic_epi64(rest, sign, _mm512_shuffle_epi8(high_, codes), 0xea);  // a & b | c
    const __m512i low = _mm512_ternarylogic_epi64(rest, sign, _mm512_shuffle_epi8(low_, codes), 0xba);    // a & ~b | c
    b[0] = (u32x16)_mm512_unpacklo_epi8(low, high);
    b[1] = (u32x16)_mm512_unpackhi_epi8(low, high);
#elif defined(PAGEWIRE_AVX2)
    const __m256i sign = _mm256_set1_epi8((char)0x80), four = _mm256_set1_epi8(15);
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const __m256i rest = _mm256_loadu_si256((const __m256i*)(pair + 64 * step + 32 * half));
      __m256i codes = _mm256_loadu_si256((const __m256i*)(pair + 128 + 32 * half));
      if (step) codes = _mm256_srli_epi16(codes, 4);
      codes = _mm256_and_si256(codes, four);
      const __m256i high = _mm256_or_si256(_mm256_and_si256(rest, sign), _mm256_shuffle_epi8(high_, codes));
      const __m256i low = _mm256_or_si256(_mm256_andnot_si256(sign, rest), _mm256_shuffle_epi8(low_, codes));
      b[half] = (u32reg)_mm256_unpacklo_epi8(low, high);
      b[2 + half] = (u32reg)_mm256_unpackhi_epi8(low, high);
    }
#else
    for (int lane = 0; lane < 4; lane++) {
      const u8x16 rest = load<u8x16>(pair + 64 * step + 16 * lane);
      u8x16 codes = load<u8x16>(pair + 128 + 16 * lane);
      codes = step ? codes >> 4 : codes & 15;
      const u8x16 high = (rest & 0x80) | __builtin_shuffle(high_, codes);
      const u8x16 low = (rest & 0x7f) | __builtin_shuffle(low_, codes);
      const u8x16 first = __builtin_shuffle(low, high, u8x16{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
      const u8x16 second = __builtin_shuffle(low, high, u8x16{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
      b[lane] = (u32reg)first, b[4 + lane] = (u32reg)second;
    }
#endif
  }

 private:
#if defined(PAGEWIRE_AVX512)
  __m512i high_, low_;
#elif defined(PAGEWIRE_AVX2)
  __m256i high_, low_;
#else
  u8x16 high_, low_;
#endif
};

// A step of a panel to its place in the plain layout.
static inline void put(const u32reg (&b)[kPanel], uint32_t* words) {
#pragma GCC unroll 8
  for (int v = 0; v < kPanel; v++) store(words + v * kRegisterLanes, b[v]);
}

// The strays of one panel, in the order of k.
class Strays {
 public:
  Strays() = default;
  Strays(const Linear& l, int64_t panel) : at_(l.strays + l.stray_starts[panel]), end_(l.strays + l.stray_starts[panel + 1]) {}

  inline int64_t next_pair() const { return at_ < end_ ? at_->k / 4 : INT64_MAX; }

  // Put those of a pair of steps into its words (plain layout), and go on to the next.
  inline void put(int64_t pair, uint32_t* words) {
    for (; next_pair() == pair; at_++)
      ((uint16_t*)words)[(at_->k / 2 % 2 * 32 + at_->lane) * 2 + at_->k % 2] = at_->value;
  }

 private:
  const Stray *at_ = nullptr, *end_ = nullptr;
};

// The same sums as of plain words, bit for bit. With KEEP (and P = 1) the words are kept as well, for the rows that follow.
template <int R, int P, bool KEEP>
static inline void multiply_compact(const Linear& l, const Operand& a, int64_t panel, const Fetch& fetch, uint32_t* keep,
                                    f32reg (&acc)[R][2 * P * kParts]) {
  const Expander expander(l.exponents);
  const uint8_t* const w = compact_panel(l, panel);
  const int64_t panel_bytes = compact_panel_bytes(l), pairs = l.k / 4;
  for (int r = 0; r < R; r++)
    for (int v = 0; v < P * kPanel; v++) acc[r][v] = f32reg{};
  const auto add = [&](int p, int64_t step, const u32reg (&b)[kPanel]) __attribute__((always_inline)) {
    if (KEEP) put(b, keep + step * 32);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const uint32_t word = a.words[r * a.stride + step];
#pragma GCC unroll 8
      for (int v = 0; v < kPanel; v++) acc[r][p * kPanel + v] = dot2(acc[r][p * kPanel + v], b[v], word);
    }
  };
  Strays strays[P];
  for (int p = 0; p < P; p++) strays[p] = Strays(l, panel + p);
  int64_t pair = 0;
  for (;;) {
    int64_t stop = pairs;
    for (int p = 0; p < P; p++) stop = std::min(stop, strays[p].next_pair());
    for (; pair < stop; pair++) {
      fetch.step(2 * pair), fetch.step(2 * pair + 1);
#pragma GCC unroll 4
      for (int p = 0; p < P; p++)
#pragma GCC unroll 2
        for (int step = 0; step < 2; step++) {
          u32reg b[kPanel];
          expander.expand(w + p * panel_bytes + pair * kPairBytes, step, b);
          add(p, 2 * pair + step, b);
        }
    }
    if (pair == pairs) return;
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) {
      alignas(64) uint32_t words[2 * 32];
      for (int step = 0; step < 2; step++) {
        u32reg b[kPanel];
        expander.expand(w + p * panel_bytes + pair * kPairBytes, step, b);
        put(b, words + step * 32);
      }
      strays[p].put(pair, words);
#pragma GCC unroll 2
      for (int step = 0; step < 2; step++) {
        u32reg b[kPanel];
#pragma GCC unroll 8
        for (int v = 0; v < kPanel; v++) b[v] = load<u32reg>(words + step * 32 + v * kRegisterLanes);
        add(p, 2 * pair + step, b);
      }
    }
    pair++;
  }
}

// The exponents that have a code: fifteen in a row from `low` on, and 0.
static inline uint16_t code_of(uint16_t value, uint16_t low) { return (uint16_t)((value >> 7 & 255) - low); }
static inline bool is_stray(uint16_t value, uint16_t low) { return code_of(value, low) > 14 && (value & 0x7f80) != 0; }

static inline int64_t count_strays(const uint16_t* row, int64_t k, uint16_t low) {
  int64_t strays = 0;
  for (int64_t i = 0; i < k; i += 16) {
    uint16_t some = 0;
    for (int64_t j = 0; j < 16; j++) some += is_stray(row[i + j], low);
    strays += some;
  }
  return strays;
}

// One panel from the plain layout.
static inline void compact_from(const Linear& l, int64_t panel, const uint32_t* plain) {
  const uint16_t low = l.exponents[0];
  uint8_t* pair = const_cast<uint8_t*>(compact_panel(l, panel));
  for (int64_t p = 0; p < l.k / 4; p++, pair += kPairBytes, plain += 2 * 32) {
    uint8_t codes[2][64];
    for (int step = 0; step < 2; step++)
      for (int chunk = 0; chunk < 8; chunk++) {
        const uint16_t* from = (const uint16_t*)(plain + step * 32) + chunk * 8;
        const int at = chunk % 4 * 16 + chunk / 4 * 8;
        for (int i = 0; i < 8; i++) {
          const uint16_t value = is_stray(from[i], low) ? 0 : from[i], code = code_of(value, low);
          pair[64 * step + at + i] = (uint8_t)((value >> 8 & 0x80) | (value & 0x7f));
          codes[step][at + i] = (uint8_t)(code > 14 ? kStrayCode : code);
        }
      }
    for (int i = 0; i < 64; i++) pair[128 + i] = (uint8_t)(codes[0][i] | codes[1][i] << 4);
  }
}
