// The same kernels one at a time, for models whose forward is Transformers' own.

// y = x @ w.T + bias over rows of the model's dtype.
static void linear(const Linear& l, const Rows& x, const Rows& y, int64_t rows) {
  const int64_t words = operand_stride(l), groups = operand_groups(l);
  const int threads = num_threads();
  const int64_t out_bytes = y.kind == kFloat32 ? 0 : rows * l.n * 4;
  char* at = scratch(operand_rows(rows) * words * 4 + operand_rows(rows) * groups * 8 + threads * l.k * 4 + out_bytes + 256);
  const auto take = [&](int64_t bytes) {
    char* p = at;
    at += (bytes + 63) / 64 * 64;
    return p;
  };
  const Operand in{(uint32_t*)take(operand_rows(rows) * words * 4), words, (float*)take(operand_rows(rows) * groups * 4),
                   (int32_t*)take(operand_rows(rows) * groups * 4), groups};
  float* const row_of = (float*)take(threads * l.k * 4);
  float* const out = y.kind == kFloat32 ? (float*)y.data : (float*)take(out_bytes);
  on_team(4, [&](Team& team, int thread) {
    [[maybe_unused]] const Tiles tiles;
    float* row = row_of + thread * l.k;
    team.share(0, rows, 64, [&](int64_t from, int64_t to) {
      for (; from < to; from++) {
        read_row(x.data, x.kind, from * x.stride0, l.k, row);
        prepare(row, l, in, from);
      }
    });
    multiply(team, 1, l, in, rows, {Epilogue::kStore, out, nullptr, l.n, 0, nullptr, 0});
    if (y.kind == kFloat32) return;
    team.share(2, rows, 64, [&](int64_t from, int64_t to) {
      for (; from < to; from++) write_row(y.data, y.kind, from * y.stride0, l.n, out + from * l.n);
    });
  });
}

// Store the step's K and V, then attend. query, key, value: (token, head, dim); out (token, num_heads * value_dim) dense.
static void attention(const AttentionLayer& a, const Step& s, const Rows& query, const Rows& key, const Rows& value,
                      const Rows& out) {
  const int32_t kind = a.kv_kind == kFloat32 ? kFloat32 : kBfloat16;
  const int64_t words = a.key_dim / kv_lanes(a.kv_kind);
  const AttentionWork work = plan_attention(s, a, num_threads());
  const int64_t query_bytes = (s.num_tokens * a.num_heads * words * 4 + 63) / 64 * 64;
  char* at = scratch(query_bytes + work.num_parts * part_bytes(a.value_dim));
  uint32_t* const queries = (uint32_t*)at;
  on_team(5, [&](Team& team, int) {
    [[maybe_unused]] const Tiles tiles;
    float row[kMaxDim], other[kMaxDim];
    team.share(0, s.num_tokens, 16, [&](int64_t from, int64_t to) {
      for (; from < to; from++) {
        for (int64_t h = 0; h < a.num_heads; h++) {
          read_row(query.data, query.kind, from * query.stride0 + h * query.stride1, a.key_dim, row);
          uint32_t* q = queries + (from * a.num_heads + h) * words;
          for (int64_t i = 0; i < a.key_dim; i += 16) put_lanes(kind, q, i, load<f32x16>(row + i));
        }
        for (int64_t h = 0; h < a.num_kv_heads; h++) {
          read_row(key.data, key.kind, from * key.stride0 + h * key.stride1, a.key_dim, row);
          read_row(value.data, value.kind, from * value.stride0 + h * value.stride1, a.value_dim, other);
          store_token(a, s.slot_mapping[from], h, row, other);
        }
      }
    });
    attend(team, 1, s, a, queries, work, at + query_bytes, [&](int64_t token, int64_t column, f32x16 x) {
      put_lanes(out.kind, (uint32_t*)((char*)out.data + token * out.stride0 * (out.kind == kFloat32 ? 4 : 2)), column, x);
    });
  });
}

// y = weight * x / rms(x) over rows; with `residual`, x += residual first, and the sum is kept in `residual`.
static void norm(const Rows& x, const Rows* residual, const float* weight, float epsilon, int64_t rows, int64_t n,
                 const Rows& y) {
  const int threads = num_threads();
  float* const row_of = (float*)scratch(threads * n * 8);
  on_team(1, [&](Team& team, int thread) {
    float *row = row_of + thread * n * 2, *other = row + n;
    team.share(0, rows, 64, [&](int64_t from, int64_t to) {
      for (; from < to; from++) {
        read_row(x.data, x.kind, from * x.stride0, n, row);
        if (residual) {
          read_row(residual->data, residual->kind, from * residual->stride0, n, other);
          for (int64_t i = 0; i < n; i++) row[i] += other[i];
          write_row(residual->data, residual->kind, from * residual->stride0, n, row);
        }
        rms_norm(row, weight, n, epsilon, row);
        write_row(y.data, y.kind, from * y.stride0, n, row);
      }
    });
  });
}

// y = silu(gate) * up over rows of n.
static void silu_mul(const Rows& gate, const Rows& up, int64_t rows, int64_t n, const Rows& y) {
  const int threads = num_threads();
  float* const row_of = (float*)scratch(threads * n * 8);
  on_team(1, [&](Team& team, int thread) {
    float *a = row_of + thread * n * 2, *b = a + n;
    team.share(0, rows, 64, [&](int64_t from, int64_t to) {
      for (; from < to; from++) {
        read_row(gate.data, gate.kind, from * gate.stride0, n, a);
        read_row(up.data, up.kind, from * up.stride0, n, b);
        for (int64_t i = 0; i + 16 <= n; i += 16) {
          const f32x16 g = load<f32x16>(a + i);
          store(a + i, g / (1.f + vexp(-g)) * load<f32x16>(b + i));
        }
        write_row(y.data, y.kind, from * y.stride0, n, a);
      }
    });
  });
}

// A row of weights in bfloat16, where it lies or put into `buffer`.
static inline const uint16_t* bfloat16_row(const Rows& from, int64_t row, int64_t k, uint16_t* buffer) {
  if (from.kind == kBfloat16) return (const uint16_t*)from.data + row * from.stride0;
  const float* x = (const float*)from.data + row * from.stride0;
  for (int64_t i = 0; i < k; i += 16) store(buffer + i, narrow(load<f32x16>(x + i)));
  return buffer;
}

// Choose the exponents that get codes, by the rows of every eighth panel, and count the strays of all panels: `exponents`
// (16,), `stray_starts` (panels + 1,). Returns how many there are in all.
static int64_t survey(const Rows& from, const int64_t* row_of, int64_t n, int64_t k, uint8_t* exponents,
                      int32_t* stray_starts) {
  const int64_t panels = (n + 31) / 32;
  const int threads = num_threads();
  uint16_t* const buffers = (uint16_t*)scratch(threads * k * 2);
  int64_t counts[256 + 15] = {};
  for (int64_t output = 0; output < n; output++) {
    if (output / 32 % 8) continue;
    const uint16_t* row = bfloat16_row(from, row_of[output], k, buffers);
    for (int64_t i = 0; i < k; i++) counts[row[i] >> 7 & 255]++;
  }
  int64_t most = -1;
  for (int low = 1; low <= 241; low++) {  // 0 has a code by itself
    int64_t covered = 0;
    for (int i = 0; i < 15; i++) covered += counts[low + i];
    if (covered > most) most = covered, exponents[0] = (uint8_t)low;
  }
  for (int i = 1; i < 15; i++) exponents[i] = (uint8_t)(exponents[0] + i);
  exponents[15] = 0;
  on_team(1, [&](Team& team, int thread) {
    uint16_t* const buffer = buffers + thread * k;
    team.share(0, panels, 8, [&](int64_t first, int64_t last) {
      for (; first < last; first++) {
        int64_t strays = 0;
        for (int64_t output = first * 32; output < std::min(n, first * 32 + 32); output++)
          strays += count_strays(bfloat16_row(from, row_of[output], k, buffer), k, exponents[0]);
        stray_starts[first + 1] = (int32_t)strays;
      }
    });
  });
  int64_t total = 0;
  stray_starts[0] = 0;
  for (int64_t panel = 1; panel <= panels; panel++) {
    total += stray_starts[panel];
    stray_starts[panel] += stray_starts[panel - 1];
  }
  return total;
}

// A panel of bfloat16 to `words`, in the plain layout; its strays to `stray`, if it shall be compact.
static void pack_bfloat16(const Rows& from, const int64_t* row_of, const Linear& l, int64_t panel, uint16_t* buffer,
                          uint32_t* words) {
  Stray* const strays = const_cast<Stray*>(l.strays) + (l.exponents ? l.stray_starts[panel] : 0);
  Stray* stray = strays;
  for (int64_t lane = 0; lane < 32; lane++) {
    const int64_t output = panel * 32 + lane;
    if (output >= l.n) {
      for (int64_t s = 0; s < l.k / 2; s++) words[s * 32 + lane] = 0;
      continue;
    }
    const uint16_t* row = bfloat16_row(from, row_of[output], l.k, buffer);
    for (int64_t s = 0; s < l.k / 2; s++) std::memcpy(words + s * 32 + lane, row + 2 * s, 4);
    if (!l.exponents || !count_strays(row, l.k, l.exponents[0])) continue;
    for (int64_t i = 0; i < l.k; i++)
      if (is_stray(row[i], l.exponents[0])) *stray++ = {(int32_t)i, (uint16_t)lane, row[i]};
  }
  std::sort(strays, stray, [](const Stray& a, const Stray& b) { return a.k < b.k; });
  if (l.exponents) compact_from(l, panel, words);
}

// Put weights (n, k) of the model's dtype into panels; `row_of` names the weights' row of each output, n of them.
static void pack(const Rows& from, const int64_t* row_of, const Linear& l) {
  const int64_t panels = (l.n + 31) / 32, k = l.k, groups = l.kind >= kInt8 ? k / kGroup : 0;
  const int64_t steps = k / per_word(l.kind), stored = l.kind == kInt4 ? steps / 2 : steps;
  const int64_t buffer = k * 4 + (l.exponents ? panel_words(l) * 4 : 0);  // a row, and a panel still to be made compact
  char* const buffers = scratch(num_threads() * buffer);
  on_team(1, [&](Team& team, int thread) {
    float* row = (float*)(buffers + thread * buffer);
    team.share(0, panels, 8, [&](int64_t first, int64_t last) {
      for (; first < last; first++) {
        uint32_t* const to = l.exponents ? (uint32_t*)(row + k) : const_cast<uint32_t*>(l.words) + first * stored * 32;
        if (l.kind == kBfloat16) {
          pack_bfloat16(from, row_of, l, first, (uint16_t*)row, to);
          continue;
        }
        for (int64_t lane = 0; lane < 32; lane++) {
          const int64_t output = first * 32 + lane;
          if (output < l.n)
            read_row(from.data, from.kind, row_of[output] * from.stride0, k, row);
          else
            std::memset(row, 0, k * sizeof(float));
          uint32_t* words = to + lane;
          if (l.kind == kFloat32)
            for (int64_t s = 0; s < steps; s++) std::memcpy(words + s * 32, row + s, 4);
          else
            for (int64_t g = 0; g < groups; g++) {
              const Quantised group = quantise_group(row + g * kGroup, l.kind);
              uint16_t* scale = const_cast<uint16_t*>(l.scales) + (first * groups + g) * (l.kind == kInt4 ? 64 : 32) + lane;
              scale[0] = group.scale;
              if (l.kind == kInt4) scale[32] = group.least;
              uint8_t q[kGroup];
              for (int64_t i = 0; i < kGroup; i++) q[i] = (uint8_t)((int)group.q[i / 16][i % 16] + (l.kind == kInt8 ? 128 : 0));
              for (int64_t i = 0; i < kGroup; i += 4)
                if (l.kind == kInt8)
                  std::memcpy(words + (g * kGroup + i) / 4 * 32, q + i, 4);
                else if (i % 8 == 0)
                  for (int64_t b = 0; b < 4; b++)
                    ((uint8_t*)(words + (g * kGroup + i) / 8 * 32))[b] = (uint8_t)(q[i + b] | q[i + 4 + b] << 4);
            }
        }
      }
    });
  });
}
