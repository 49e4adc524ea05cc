// Weights of 8 and 4 bits as bfloat16, scaled, for AMX. A group of 32 values of k is what one tile instruction takes, so it is
// expanded while the one before it is multiplied (tiles.h), once for all the rows. Few rows are multiplied in this way too: a
// row must have the same bits alone and in a crowd.
//
// Activations stay bfloat16. Quantised as well, as on machines without AMX, the sums of each group would have to be scaled
// and added by vector instructions for every row, which takes four times as long as their product.

// scale * q, of 16 outputs. A byte becomes 2^15 + byte by lying in the mantissa of 2^15, so there is nothing to convert.
//
// What is below bfloat16 is cut off, not rounded, which takes no instruction. For that the scale is 1/384 too large, a third
// to two thirds of the last bit of a product: so errors are zero on average, a product that fits bfloat16 comes out as it is,
// and none is wrong by more than two thirds of its last bit (rounded: by half).
class Scaler {
 public:
  static constexpr float kTooLarge = 1.f + 1.f / 384;

  // Of int8, whose bytes are q + 128. 15 bits of the scale, so that nothing is rounded: zero is zero.
  explicit Scaler(u16x16 scale) : scale_((f32x16)((u32x16)(widen(scale) * kTooLarge) & 0xfffffe00u)) {
    rest_ = scale_ * -(32768.f + 128.f);
  }
  // Of int4: scale * q + least.
  Scaler(u16x16 scale, u16x16 least) : scale_(widen(scale) * kTooLarge) {
    rest_ = widen(least) * kTooLarge - scale_ * 32768.f;
  }

  // Bytes of four values of k to words of two.
  inline void expand(u32x16 bytes, u32x16& first, u32x16& second) const {
    const __m512i w = (__m512i)bytes, base = _mm512_set1_epi32(0x47000000);
    const auto put = [&](int byte) __attribute__((always_inline)) {  // where 2^15 has its last byte but one
      const __m512i from = _mm512_set4_epi32((12 + byte) << 8, (8 + byte) << 8, (4 + byte) << 8, byte << 8);
      return _mm512_mask_shuffle_epi8(base, 0x2222222222222222, w, from);
    };
    const __m512i second_byte = _mm512_ternarylogic_epi32(w, _mm512_set1_epi32(0xff00), base, 0xea);  // a & b | c
    first = cut(scaled(put(0)), scaled(second_byte));
    second = cut(scaled(put(2)), scaled(put(3)));
  }

 private:
  inline __m512i scaled(__m512i x) const {
    return (__m512i)_mm512_fmadd_ps((__m512)x, (__m512)scale_, (__m512)rest_);
  }
  static inline u32x16 cut(__m512i low, __m512i high) {  // their upper halves
    const __m512i upper = _mm512_set4_epi32(0x0f0e, 0x0b0a, 0x0706, 0x0302);
    return (u32x16)_mm512_mask_shuffle_epi8(high, 0x3333333333333333, low, upper);
  }

  f32x16 scale_, rest_;
};

// The chunks of a panel: each is a group.
template <int KIND>
class ScaledChunks {
 public:
  ScaledChunks(const Linear& l, int64_t panel)
      : groups_(l.k / kGroup), words_(l.words + panel * panel_words(l)), scales_(l.scales + panel * groups_ * kScales) {}

  // What comes later is fetched meanwhile, a line at a time: the machine's own prefetching alone is too late.
  void expand(int64_t group, uint32_t* to) {
    if (group == groups_) return;
    const uint32_t *words = words_ + group * kWords, *soon = words + kAhead * kWords;
    const uint16_t *scales = scales_ + group * kScales, *scales_soon = scales + kAhead * kScales;
    for (int64_t at = 0; at < kScales; at += 32) __builtin_prefetch(scales_soon + at, 0, 3);
    for (int half = 0; half < 32; half += 16) {
      const Scaler scaler = scaler_of(scales + half);
#pragma GCC unroll 8
      for (int64_t step = 0; step < kWords / 32; step++, soon += 16) {
        __builtin_prefetch(soon, 0, 3);
        const u32x16 w = load<u32x16>(words + step * 32 + half);
        if (KIND == kInt8) {
          put(scaler, w, to + step * 64 + half);
        } else {
          put(scaler, w & 0x0f0f0f0fu, to + step * 128 + half);
          put(scaler, (w >> 4) & 0x0f0f0f0fu, to + step * 128 + 64 + half);
        }
      }
    }
  }

 private:
  static constexpr int64_t kWords = kGroup * 32 / (KIND == kInt8 ? 4 : 8), kScales = KIND == kInt8 ? 32 : 64;  // of a group
  static constexpr int64_t kAhead = (8 << 10) / (kWords * 4);  // groups

  static inline Scaler scaler_of(const uint16_t* scales) {
    if constexpr (KIND == kInt8)
      return Scaler(load<u16x16>(scales));
    else
      return Scaler(load<u16x16>(scales), load<u16x16>(scales + 32));
  }
  static inline void put(const Scaler& scaler, u32x16 bytes, uint32_t* to) {
    u32x16 first, second;
    scaler.expand(bytes, first, second);
    store(to, first), store(to + 32, second);
  }

  const int64_t groups_;
  const uint32_t* const words_;
  const uint16_t* const scales_;
};
