// The whole forward of the Llama family in one call: every thread walks the layers, phase after phase. The residual stream
// and all sums are float32; what enters a product is in the product's own kind.

constexpr int64_t kFewRows = 4;  // every thread prepares them for itself: cheaper than to wait for each other
constexpr int64_t kMostSpace = 64 << 20;  // bytes of all layers; beyond it (very long contexts) they share one space

// What one layer writes besides the slab. Of few rows every layer has its own, so that its work may be done twice.
struct LayerSpace {
  const float* in;     // residual stream before the layer
  float *between, *out;  // after attention, after the MLP; of many rows all three are one
  float *wide, *attended, *middle;  // QKV; what is still to become bytes, of attention and of the MLP
  uint32_t *queries, *mixed, *act;
  char* parts;
};

// Everything that a step writes besides the slab.
struct Workspace {
  float *x, *normed;  // embeddings of the tokens; one row a thread
  uint32_t *shared_words, *own_words;  // operands: one for all threads, and for few rows a copy for each thread
  float *shared_scales, *own_scales;
  int32_t *shared_sums, *own_sums;
  int64_t words, groups, widest;  // the widest operand: words a row, groups a row, values a row
  char* layers;
  int64_t layer_bytes;  // 0: all layers share one space
  const Llama* model;
  int64_t tokens, num_parts;

  Operand shared(const Linear& l) const { return operand(l, shared_words, shared_scales, shared_sums); }
  Operand own(const Linear& l, int thread) const {
    return operand(l, own_words + thread * operand_rows(kFewRows) * words, own_scales + thread * operand_rows(kFewRows) * groups,
                   own_sums + thread * operand_rows(kFewRows) * groups);
  }
  LayerSpace layer(int64_t n, const float* in) const {
    LayerSpace space;
    lay_out_layer(layers + n * layer_bytes, space);
    space.in = in;
    if (!layer_bytes) space.between = space.out = x;
    return space;
  }
  int64_t lay_out_layer(char* base, LayerSpace& to) const;

 private:
  static Operand operand(const Linear& l, uint32_t* words, float* scales, int32_t* sums) {
    return {words, operand_stride(l), scales, sums, operand_groups(l)};
  }
};

// Hands out what lies one after the other from `base` on.
struct Taker {
  char *base, *at;

  template <class T>
  void operator()(T*& p, int64_t count) {
    p = (T*)at;
    at += (count * (int64_t)sizeof *p + 63) / 64 * 64;
  }
  int64_t bytes() const { return at - base; }
};

inline int64_t Workspace::lay_out_layer(char* base, LayerSpace& to) const {
  const AttentionLayer& a = model->layers[0].attention;
  const int64_t heads_dim = (int64_t)a.num_heads * a.value_dim;
  Taker take{base, base};
  take(to.between, tokens * model->hidden);
  take(to.out, tokens * model->hidden);
  take(to.wide, tokens * model->layers[0].qkv.n);
  take(to.attended, tokens * heads_dim);
  take(to.middle, tokens * model->intermediate);
  take(to.queries, tokens * a.num_heads * a.key_dim);
  take(to.mixed, operand_rows(tokens) * heads_dim);
  take(to.act, operand_rows(tokens) * model->intermediate);
  take(to.parts, num_parts * part_bytes(a.value_dim));
  return take.bytes();
}

static Workspace lay_out_workspace(const Llama& m, int64_t T, int threads, int64_t num_parts) {
  Workspace w;
  w.model = &m, w.tokens = T, w.num_parts = num_parts;
  w.words = w.groups = 1, w.widest = m.hidden;
  const auto widen_for = [&](const Linear& l) {
    w.words = std::max(w.words, operand_stride(l));
    w.widest = std::max(w.widest, l.k);
    w.groups = std::max(w.groups, operand_groups(l));
  };
  for (int64_t n = 0; n < m.num_layers; n++)
    for (const Linear* l : {&m.layers[n].qkv, &m.layers[n].o, &m.layers[n].gate_up, &m.layers[n].down}) widen_for(*l);
  widen_for(m.head);
  LayerSpace unused;
  const int64_t layer_bytes = w.lay_out_layer(nullptr, unused);
  w.layer_bytes = T <= kFewRows && layer_bytes * m.num_layers <= kMostSpace ? layer_bytes : 0;
  const auto lay_out = [&](char* base) {
    Taker take{base, base};
    take(w.x, T * m.hidden);
    take(w.normed, threads * w.widest);
    take(w.shared_words, operand_rows(T) * w.words);
    take(w.own_words, threads * operand_rows(kFewRows) * w.words);
    take(w.shared_scales, operand_rows(T) * w.groups);
    take(w.own_scales, threads * operand_rows(kFewRows) * w.groups);
    take(w.shared_sums, operand_rows(T) * w.groups);
    take(w.own_sums, threads * operand_rows(kFewRows) * w.groups);
    take(w.layers, w.layer_bytes ? w.layer_bytes * m.num_layers : layer_bytes);
    return take.bytes();
  };
  lay_out(scratch(lay_out(nullptr)));
  return w;
}

// Prepare every row for a product. A thread's own copy may be made of rows that have changed since; then the product is
// over, and the copy is not used.
template <class RowOf>
static Operand prepare_rows(Team& team, int thread, int phase, const Workspace& w, const Linear& l, int64_t rows,
                            RowOf&& row_of) {
  float* scratch_row = w.normed + thread * w.widest;
  if (rows <= kFewRows) {
    const Operand own = w.own(l, thread);
    for (int64_t r = 0; r < rows; r++) prepare(row_of(r, scratch_row), l, own, r);
    return own;
  }
  const Operand shared = w.shared(l);
  team.share(phase, rows, 64, [&](int64_t from, int64_t to) {
    for (; from < to; from++) prepare(row_of(from, scratch_row), l, shared, from);
  });
  return shared;
}

// QK norm, rotary embedding and the store of one token's heads.
static void place_token(const Llama& m, const LlamaLayer& layer, const Step& s, int64_t token, const LayerSpace& w) {
  const AttentionLayer& a = layer.attention;
  const float* row = w.wide + token * layer.qkv.n;
  const float* values = row + (int64_t)(a.num_heads + a.num_kv_heads) * a.key_dim;
  const int64_t half = m.rotary_dim / 2, D = a.key_dim, words = D / kv_lanes(a.kv_kind);
  const float *cos = m.cos + s.positions[token] * half, *sin = m.sin + s.positions[token] * half;
  float head[kMaxDim];
  for (int64_t h = 0; h < a.num_heads + a.num_kv_heads; h++) {
    const bool is_key = h >= a.num_heads;
    if (layer.q_norm)
      rms_norm(row + h * D, is_key ? layer.k_norm : layer.q_norm, D, m.epsilon, head);
    else
      std::memcpy(head, row + h * D, D * sizeof(float));
    if (layer.rotary) rotate(head, cos, sin, m.rotary_dim);
    if (is_key) {
      const int64_t kv_head = h - a.num_heads;
      store_token(a, s.slot_mapping[token], kv_head, head, values + kv_head * a.value_dim);
      continue;
    }
    uint32_t* to = w.queries + (token * a.num_heads + h) * words;
    for (int64_t i = 0; i < D; i += 16) put_lanes(a.kv_kind == kFloat32 ? kFloat32 : kBfloat16, to, i, load<f32x16>(head + i));
  }
}

// logits (num_sampled, vocab) float32; normed (num_sampled, hidden) what they are made of, where that is not null.
static void llama_forward(const Llama& m, const Step& s, float* logits, float* normed) {
  constexpr int kPhases = 13;
  const int64_t T = s.num_tokens, hidden = m.hidden;
  const int threads = num_threads();
  std::vector<AttentionWork> works;  // layers that see equally far share one
  std::vector<std::pair<int64_t, size_t>> by_window;
  std::vector<size_t> work_of;
  int64_t num_parts = 0;
  for (int64_t n = 0; n < m.num_layers; n++) {
    const AttentionLayer& a = m.layers[n].attention;
    auto found = std::find_if(by_window.begin(), by_window.end(), [&](auto& each) { return each.first == a.window; });
    if (found == by_window.end()) {
      by_window.emplace_back(a.window, works.size());
      work_of.push_back(works.size());
      works.push_back(plan_attention(s, a, threads));
      num_parts = std::max(num_parts, works.back().num_parts);
    } else {
      work_of.push_back(found->second);
    }
  }
  const Workspace w = lay_out_workspace(m, T, threads, num_parts);

  on_team(m.num_layers * kPhases + 4, [&](Team& team, int thread) {
    [[maybe_unused]] const Tiles tiles;
    team.repeatable = w.layer_bytes != 0;
    team.share(0, T, 64, [&](int64_t from, int64_t to) {
      for (; from < to; from++)
        read_row(m.embedding, m.embedding_kind, s.token_ids[from] * hidden, hidden, w.x + from * hidden);
    });
    int phase = 0;
    const float* x = w.x;
    for (int64_t n = 0; n < m.num_layers; n++) {
      const LlamaLayer& layer = m.layers[n];
      const AttentionLayer& a = layer.attention;
      const LayerSpace space = w.layer(n, x);
      const int64_t heads_dim = (int64_t)a.num_heads * a.value_dim;
      phase = 1 + n * kPhases;
      const auto normed = [&](const float* rows, const float* weight) {
        return [&m, rows, weight, hidden](int64_t r, float* row) {
          rms_norm(rows + r * hidden, weight, hidden, m.epsilon, row);
          return row;
        };
      };
      const auto rows_of = [](float* rows, int64_t dim) { return [=](int64_t r, float*) { return rows + r * dim; }; };

      Operand in = prepare_rows(team, thread, phase, w, layer.qkv, T, normed(space.in, layer.input_norm));
      multiply(team, phase + 1, layer.qkv, in, T, {Epilogue::kStore, space.wide, nullptr, layer.qkv.n, 0, nullptr, 0});
      team.share(phase + 2, T, 16, [&](int64_t from, int64_t to) {
        for (; from < to; from++) place_token(m, layer, s, from, space);
      });

      const int32_t mixed_kind = operand_kind(layer.o);
      const bool direct = mixed_kind != kInt8;
      const int64_t mixed_words = operand_stride(layer.o);
      attend(team, phase + 3, s, a, space.queries, works[work_of[n]], space.parts,
             [&](int64_t token, int64_t column, f32x16 value) {
               if (direct)
                 put_operand(mixed_kind, space.mixed, mixed_words, token, column, value);
               else
                 store(space.attended + token * heads_dim + column, value);
             });
      in = {space.mixed, mixed_words, nullptr, nullptr, 0};
      if (!direct) in = prepare_rows(team, thread, phase + 6, w, layer.o, T, rows_of(space.attended, heads_dim));
      multiply(team, phase + 7, layer.o, in, T, {Epilogue::kAdd, space.between, space.in, hidden, 0, nullptr, 0});

      const int32_t act_kind = operand_kind(layer.down);
      const int64_t act_words = operand_stride(layer.down);
      in = prepare_rows(team, thread, phase + 8, w, layer.gate_up, T, normed(space.between, layer.post_norm));
      multiply(team, phase + 9, layer.gate_up, in, T,
               {Epilogue::kSiluMul, space.middle, nullptr, m.intermediate, act_kind, space.act, act_words});
      in = {space.act, act_words, nullptr, nullptr, 0};
      if (act_kind == kInt8) in = prepare_rows(team, thread, phase + 10, w, layer.down, T, rows_of(space.middle, m.intermediate));
      multiply(team, phase + 11, layer.down, in, T, {Epilogue::kAdd, space.out, space.between, hidden, 0, nullptr, 0});
      x = space.out;
    }
    if (s.num_sampled == 0) return;
    phase = 1 + m.num_layers * kPhases;
    const Operand in = prepare_rows(team, thread, phase, w, m.head, s.num_sampled, [&](int64_t r, float* row) {
      rms_norm(x + s.logits_indices[r] * hidden, m.final_norm, hidden, m.epsilon, row);
      return row;
    });
    multiply(team, phase + 1, m.head, in, s.num_sampled, {Epilogue::kStore, logits, nullptr, m.vocab, 0, nullptr, 0});
    if (!normed) return;
    team.share(phase + 2, s.num_sampled, 16, [&](int64_t from, int64_t to) {
      for (; from < to; from++)
        rms_norm(x + s.logits_indices[from] * hidden, m.final_norm, hidden, m.epsilon, normed + from * hidden);
    });
  });
}
