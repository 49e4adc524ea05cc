// Work on one row at a time: norms, rotary embedding, reading and writing rows of the model's dtype.

static inline void read_row(const void* from, int32_t kind, int64_t offset, int64_t n, float* to) {
  int64_t i = 0;
  if (kind == kFloat32) {
    std::memcpy(to, (const float*)from + offset, n * sizeof(float));
    return;
  }
  const uint16_t* row = (const uint16_t*)from + offset;
  for (; i + 16 <= n; i += 16) store(to + i, widen(load<u16x16>(row + i)));
  for (; i < n; i++) to[i] = widen(row[i]);
}

static inline void write_row(void* to, int32_t kind, int64_t offset, int64_t n, const float* from) {
  int64_t i = 0;
  if (kind == kFloat32) {
    std::memcpy((float*)to + offset, from, n * sizeof(float));
    return;
  }
  uint16_t* row = (uint16_t*)to + offset;
  for (; i + 16 <= n; i += 16) store(row + i, narrow(load<f32x16>(from + i)));
  for (; i < n; i++) row[i] = narrow(from[i]);
}

// to = weight * x / sqrt(mean(x^2) + epsilon); n is a multiple of 16. `to` may be `x`.
static inline void rms_norm(const float* x, const float* weight, int64_t n, float epsilon, float* to) {
  f32x16 squares = splat(0.f);
  for (int64_t i = 0; i < n; i += 16) {
    const f32x16 v = load<f32x16>(x + i);
    squares += v * v;
  }
  const float inverse = 1.f / std::sqrt(sum(squares) / (float)n + epsilon);
  for (int64_t i = 0; i < n; i += 16) store(to + i, load<f32x16>(x + i) * inverse * load<f32x16>(weight + i));
}

// Rotate the first `dim` numbers of a head; number i turns with number i + dim / 2.
static inline void rotate(float* head, const float* cos, const float* sin, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + 16 <= half; i += 16) {
    const f32x16 a = load<f32x16>(head + i), b = load<f32x16>(head + half + i);
    const f32x16 c = load<f32x16>(cos + i), s = load<f32x16>(sin + i);
    store(head + i, a * c - b * s);
    store(head + half + i, b * c + a * s);
  }
  for (; i < half; i++) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}
