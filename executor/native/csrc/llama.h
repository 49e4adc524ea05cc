// The whole forward of the Llama family in one call: every thread walks the layers, phase after phase. The residual stream
// and all sums are float32; what enters a product is in the product's own kind.

constexpr int64_t kFewRows = 4;  // every thread prepares them for itself: cheaper than to wait for each other

// Everything that a step writes besides the slab. Rows of a step, and for few rows a private copy for each thread.
struct Workspace {
  float *x, *wide, *middle, *normed;  // residual; QKV; what int8 still has to quantise; one row a thread
  uint32_t *queries, *mixed, *act, *shared_words, *own_words;
  float *shared_scales, *own_scales;
  int32_t *shared_sums, *own_sums;
  Part* parts;
  int64_t words, groups, widest;  // the widest operand: words a row, groups a row, values a row

  Operand shared(const Linear& l) const { return operand(l, shared_words, shared_scales, shared_sums); }
  Operand own(const Linear& l, int thread) const {
    return operand(l, own_words + thread * kFewRows * words, own_scales + thread * kFewRows * groups,
                   own_sums + thread * kFewRows * groups);
  }

 private:
  static Operand operand(const Linear& l, uint32_t* words, float* scales, int32_t* sums) {
    return {words, l.k / per_word(l.kind), scales, sums, l.kind >= kInt8 ? l.k / kGroup : 0};
  }
};

static Workspace lay_out_workspace(const Llama& m, int64_t T, int threads, int64_t num_parts) {
  const AttentionLayer& a = m.layers[0].attention;
  const int64_t heads_dim = (int64_t)a.num_heads * a.value_dim;
  Workspace w;
  w.words = w.groups = 1, w.widest = m.hidden;
  const auto widen_for = [&](const Linear& l) {
    w.words = std::max(w.words, l.k / per_word(l.kind));
    w.widest = std::max(w.widest, l.k);
    if (l.kind >= kInt8) w.groups = std::max(w.groups, l.k / kGroup);
  };
  for (int64_t n = 0; n < m.num_layers; n++)
    for (const Linear* l : {&m.layers[n].qkv, &m.layers[n].o, &m.layers[n].gate_up, &m.layers[n].down}) widen_for(*l);
  widen_for(m.head);
  const auto lay_out = [&](char* base) {
    char* at = base;
    const auto take = [&](auto*& p, int64_t count) {
      p = (std::remove_reference_t<decltype(p)>)at;
      at += (count * (int64_t)sizeof *p + 63) / 64 * 64;
    };
    take(w.x, T * m.hidden);
    take(w.wide, T * m.layers[0].qkv.n);
    take(w.middle, T * std::max(heads_dim, m.intermediate));
    take(w.normed, threads * w.widest);
    take(w.queries, T * a.num_heads * a.key_dim);
    take(w.mixed, T * heads_dim);
    take(w.act, T * m.intermediate);
    take(w.shared_words, T * w.words);
    take(w.own_words, threads * kFewRows * w.words);
    take(w.shared_scales, T * w.groups);
    take(w.own_scales, threads * kFewRows * w.groups);
    take(w.shared_sums, T * w.groups);
    take(w.own_sums, threads * kFewRows * w.groups);
    take(w.parts, num_parts);
    return (int64_t)(at - base);
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
    for (int64_t r = 0; r < rows; r++) prepare(row_of(r, scratch_row), l.k, l, own.from(r));
    return own;
  }
  const Operand shared = w.shared(l);
  team.share(phase, rows, 64, [&](int64_t from, int64_t to) {
    for (; from < to; from++) prepare(row_of(from, scratch_row), l.k, l, shared.from(from));
  });
  return shared;
}

// QK norm, rotary embedding and the store of one token's heads.
static void place_token(const Llama& m, const LlamaLayer& layer, const Step& s, int64_t token, const Workspace& w) {
  const AttentionLayer& a = layer.attention;
  float* row = w.wide + token * layer.qkv.n;
  const int64_t half = m.rotary_dim / 2, D = a.key_dim, words = D / kv_lanes(a.kv_kind);
  const float *cos = m.cos + s.positions[token] * half, *sin = m.sin + s.positions[token] * half;
  for (int64_t h = 0; h < a.num_heads + a.num_kv_heads; h++) {
    float* head = row + h * D;
    const bool is_key = h >= a.num_heads;
    if (layer.q_norm) rms_norm(head, is_key ? layer.k_norm : layer.q_norm, D, m.epsilon, head);
    if (layer.rotary) rotate(head, cos, sin, m.rotary_dim);
    if (is_key) continue;
    uint32_t* to = w.queries + (token * a.num_heads + h) * words;
    for (int64_t i = 0; i < D; i += 16) put_lanes(a.kv_kind == kFloat32 ? kFloat32 : kBfloat16, to, i, load<f32x16>(head + i));
  }
  for (int64_t h = 0; h < a.num_kv_heads; h++)
    store_token(a, s.slot_mapping[token], h, row + (a.num_heads + h) * D,
                row + (a.num_heads + a.num_kv_heads) * D + h * a.value_dim);
}

// logits (num_sampled, vocab) float32.
static void llama_forward(const Llama& m, const Step& s, float* logits) {
  constexpr int kPhases = 12;
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
    team.share(0, T, 64, [&](int64_t from, int64_t to) {
      for (; from < to; from++)
        read_row(m.embedding, m.embedding_kind, s.token_ids[from] * hidden, hidden, w.x + from * hidden);
    });
    int phase = 0;
    for (int64_t n = 0; n < m.num_layers; n++) {
      const LlamaLayer& layer = m.layers[n];
      const AttentionLayer& a = layer.attention;
      const int64_t heads_dim = (int64_t)a.num_heads * a.value_dim;
      phase = 1 + n * kPhases;
      const auto normed_by = [&](const float* weight) {
        return [&w, &m, weight, hidden](int64_t r, float* row) {
          rms_norm(w.x + r * hidden, weight, hidden, m.epsilon, row);
          return row;
        };
      };
      const auto middle_of = [&](int64_t dim) { return [&w, dim](int64_t r, float*) { return w.middle + r * dim; }; };

      Operand in = prepare_rows(team, thread, phase, w, layer.qkv, T, normed_by(layer.input_norm));
      multiply(team, phase + 1, layer.qkv, in, T, {Epilogue::kStore, w.wide, layer.qkv.n, 0, nullptr, 0});
      team.share(phase + 2, T, 16, [&](int64_t from, int64_t to) {
        for (; from < to; from++) place_token(m, layer, s, from, w);
      });

      const bool direct = layer.o.kind < kInt8;
      const int64_t mixed_words = heads_dim / per_word(layer.o.kind);
      attend(team, phase + 3, s, a, w.queries, works[work_of[n]], w.parts, [&](int64_t token, int64_t column, f32x16 x) {
        if (direct)
          put_lanes(layer.o.kind, w.mixed + token * mixed_words, column, x);
        else
          store(w.middle + token * heads_dim + column, x);
      });
      in = {w.mixed, mixed_words, nullptr, nullptr, 0};
      if (!direct) in = prepare_rows(team, thread, phase + 5, w, layer.o, T, middle_of(heads_dim));
      multiply(team, phase + 6, layer.o, in, T, {Epilogue::kAdd, w.x, hidden, 0, nullptr, 0});

      const bool straight = layer.down.kind < kInt8;
      const int64_t act_words = m.intermediate / per_word(layer.down.kind);
      in = prepare_rows(team, thread, phase + 7, w, layer.gate_up, T, normed_by(layer.post_norm));
      multiply(team, phase + 8, layer.gate_up, in, T,
               {Epilogue::kSiluMul, w.middle, m.intermediate, layer.down.kind, w.act, act_words});
      in = {w.act, act_words, nullptr, nullptr, 0};
      if (!straight) in = prepare_rows(team, thread, phase + 9, w, layer.down, T, middle_of(m.intermediate));
      multiply(team, phase + 10, layer.down, in, T, {Epilogue::kAdd, w.x, hidden, 0, nullptr, 0});
    }
    if (s.num_sampled == 0) return;
    phase = 1 + m.num_layers * kPhases;
    const Operand in = prepare_rows(team, thread, phase, w, m.head, s.num_sampled, [&](int64_t r, float* row) {
      rms_norm(w.x + s.logits_indices[r] * hidden, m.final_norm, hidden, m.epsilon, row);
      return row;
    });
    multiply(team, phase + 1, m.head, in, s.num_sampled, {Epilogue::kStore, logits, m.vocab, 0, nullptr, 0});
  });
}
