// Sixteen lanes of arithmetic, written once in the compiler's vector extensions: one AVX-512 register, two of AVX2, four of
// SSE2. The order of every sum is therefore the same on every machine; only the fused steps (dot2, dot4) may round apart.
//
// This file is read once per instruction set (see isa.inc); everything in it lives in that set's namespace.

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

// What is one register here. The inner loops of products are written in these: what is wider than a register the compiler
// keeps in memory, and a sum that goes there and back with each step costs many times what the step does.
#if defined(PAGEWIRE_AVX512)
constexpr int kParts = 1;  // registers that hold sixteen lanes
#elif defined(PAGEWIRE_AVX2)
constexpr int kParts = 2;
#else
constexpr int kParts = 4;
#endif
constexpr int kRegisterLanes = 16 / kParts;
constexpr int kPanel = 2 * kParts;  // registers that hold a step of a panel
typedef float f32reg __attribute__((vector_size(64 / kParts)));
typedef int32_t i32reg __attribute__((vector_size(64 / kParts)));
typedef uint32_t u32reg __attribute__((vector_size(64 / kParts)));
typedef uint16_t u16reg __attribute__((vector_size(32 / kParts)));

template <class V, class T>
static inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
static inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
static inline f32x16 splat(float x) { return f32x16{} + x; }
static inline i32x16 splat(int32_t x) { return i32x16{} + x; }
static inline u32x16 splat(uint32_t x) { return u32x16{} + x; }

static inline f32x16 vmax(f32x16 a, f32x16 b) {  // b where either is NaN
#if defined(PAGEWIRE_AVX512)
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
static inline f32reg splat_register(float x) { return f32reg{} + x; }
static inline i32reg splat_register(int32_t x) { return i32reg{} + x; }
static inline f32x16 widen(u16x16 bf16) { return (f32x16)(__builtin_convertvector(bf16, u32x16) << 16); }

#if !defined(PAGEWIRE_AVX512)
static inline f32reg widen(u16reg bf16) { return (f32reg)(__builtin_convertvector(bf16, u32reg) << 16); }
#endif

static inline u16x16 narrow(f32x16 x) {  // to bfloat16, nearest even; NaN stays NaN
#if defined(PAGEWIRE_AVX512)
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  u32x16 u = (u32x16)x;
  u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : splat(0x7fc0u), u16x16);
#endif
}
static inline float widen(uint16_t bf16) {
  uint32_t u = (uint32_t)bf16 << 16;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
static inline uint16_t narrow(float x) { return narrow(splat(x))[0]; }

// Halves are put together until one number is left: the order of a sum is fixed.
template <class Join>
static inline float fold(f32x16 v, Join join) {
  f32x8 a[2];
  std::memcpy(a, &v, 64);
  const f32x8 eight = join(a[0], a[1]);
  f32x4 b[2];
  std::memcpy(b, &eight, 32);
  const f32x4 four = join(b[0], b[1]);
  return join(join(four[0], four[2]), join(four[1], four[3]));
}
static inline float sum(f32x16 v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
static inline float highest(f32x16 v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

static inline f32x16 rounded(f32x16 x) {  // to whole numbers, of less than 2^22
  const f32x16 magic = splat(12582912.f);  // 1.5 * 2^23: adding it leaves no room for a fraction
  return (x + magic) - magic;
}
static inline f32x16 vexp(f32x16 x) {  // e^x to about 1e-7; 0 below -87.3, also for -inf; NaN for NaN
#if defined(PAGEWIRE_AVX512)
  // lanes that come out as zero are left out: a result below the least normal number takes a hundred times as long
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
#else
  x = vmax(splat(-104.f), x);
  x = x > splat(88.7f) ? splat(88.7f) : x;
#endif
  const f32x16 n = rounded(x * 1.44269504f);
  const f32x16 r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  f32x16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
#if defined(PAGEWIRE_AVX512)
  return (f32x16)_mm512_maskz_scalef_ps(some, (__m512)y, (__m512)n);
#else
  const f32x16 scale = (f32x16)((__builtin_convertvector(n, i32x16) + 127) << 23);
  return x < splat(-87.3f) ? splat(0.f) : y * scale;
#endif
}

// c + the products of two bfloat16 pairs. `w` holds a pair a lane, `a` is one pair for all lanes.
static inline f32reg dot2(f32reg c, u32reg w, uint32_t a) {
#if defined(PAGEWIRE_AVX512)
  return (f32x16)_mm512_dpbf16_ps((__m512)c, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)a));
#else
  c += (f32reg)(w << 16) * widen((uint16_t)a);
  return c + (f32reg)(w & 0xffff0000u) * widen((uint16_t)(a >> 16));
#endif
}

// c + the products of four bytes: `w` holds four unsigned ones a lane, `a` four signed ones for all lanes. Exact.
static inline i32reg dot4(i32reg c, u32reg w, uint32_t a) {
#if defined(PAGEWIRE_AVX512)
  return (i32x16)_mm512_dpbusd_epi32((__m512i)c, (__m512i)w, _mm512_set1_epi32((int)a));
#elif defined(PAGEWIRE_AVX2)
  const int32_t low = (int8_t)a & 0xffff, high = (int32_t)((uint32_t)(int32_t)(int8_t)(a >> 16) << 16);
  const int32_t low1 = (int8_t)(a >> 8) & 0xffff, high1 = (int32_t)((uint32_t)(int32_t)(int8_t)(a >> 24) << 16);
  const __m256i even = _mm256_madd_epi16((__m256i)(w & 0x00ff00ffu), _mm256_set1_epi32(low | high));
  const __m256i odd = _mm256_madd_epi16((__m256i)((w >> 8) & 0x00ff00ffu), _mm256_set1_epi32(low1 | high1));
  return c + (i32reg)_mm256_add_epi32(even, odd);
#else
  for (int byte = 0; byte < 4; byte++)
    c += (i32reg)((w >> (8 * byte)) & 0xffu) * (int32_t)(int8_t)(a >> (8 * byte));
  return c;
#endif
}
