// Causal attention with gradients on a CPU. kernels/flash.py calls it.
//
// FlashAttention-2 (arXiv 2307.08691): a tile of scores at a time, of which only the softmax's
// logarithm is kept; nothing above the diagonal is computed but within a tile. The products of
// tiles are oneDNN's, through the functions of torch that are given in `Products`; what stands
// between two products is one pass over a tile that the caches hold.
//
// Numbers are float32, or bfloat16 with float32 sums.

#include <cmath>
#include <vector>

#include "vectors.h"

extern "C" {

// C (M, N) (+)= A (M, K) B (K, N), row after row with these distances. B of bfloat16 has pairs of
// rows interleaved.
typedef void (*HalfProduct)(int64_t M, int64_t N, int64_t K, int64_t a, int64_t b, int64_t c,
                            bool add, const uint16_t *A, const uint16_t *B, float *C, bool pairs);
typedef void (*FloatProduct)(int64_t M, int64_t N, int64_t K, int64_t a, int64_t b, int64_t c,
                             bool add, const float *A, const float *B, float *C, bool pairs);
typedef void (*Release)(bool pairs);

struct Products {
  HalfProduct half;
  FloatProduct single;
  Release release; // of what a thread holds for its products
};

// (batch, heads, length, head_dim), the last one after another; distances in numbers.
struct Array {
  void *data;
  int64_t batch, head, row;
};

struct Attention {
  Products products;
  int64_t half; // whether numbers are bfloat16
  int64_t batch, heads, kv_heads, length, head_dim;
  double scale;
  Array query, key, value, out; // key and value have kv_heads
  float *log_total;             // (batch, heads, length): log of the softmax's sum
  const uint8_t *mask;          // 1 where a query (row) may see a key; null for causality alone
  int64_t mask_batch, mask_row;
  void *space; // of mobilellm_attention_space bytes
  int64_t threads;
  Array grad, grad_query, grad_key, grad_value; // of the gradients alone
};

static_assert(sizeof(Array) == 32 && sizeof(Attention) == 384, "kernels/flash.py has the same");

} // extern "C"

namespace {

constexpr int64_t ROWS = 64, KEYS = 256; // of a tile: queries and keys (docs/log.md)
constexpr float HIDDEN = -INFINITY;

inline Floats broadcast(float x) { return Floats{} + x; }

inline Floats up_to(int64_t count) { // 1 in the first `count` lanes as a choice, 0 in the others
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return bits<Floats>(lane < int32_t(std::clamp<int64_t>(count, 0, LANES)));
}

inline Floats chosen(Floats which, Floats yes, Floats no) { return bits<Ints>(which) ? yes : no; }

inline int64_t padded(int64_t n, int64_t to = LANES) { return (n + to - 1) / to * to; }

template <class T> struct Head { // of one array
  T *data;
  int64_t row;
  T *at(int64_t position) const { return data + position * row; }
};

template <class T> Head<T> head_of(const Array &array, int64_t b, int64_t h) {
  return {static_cast<T *>(array.data) + b * array.batch + h * array.head, array.row};
}

inline Words part(const uint32_t *from, int64_t count) { // 0 from there on
  if (count >= LANES) return load<Words>(from);
  Words found = {};
  if (count > 0) std::memcpy(&found, from, count * sizeof *from);
  return found;
}

// Rows of words, x (n, m), as columns: `put(k, j, words)` is given 16 of column k, those of the rows
// from j on; what lies beyond n is 0.
template <class Put> void columns(const uint32_t *x, int64_t row, int64_t n, int64_t m, Put put) {
  Words tile[LANES];
  for (int64_t j = 0; j < n; j += LANES)
    for (int64_t k = 0; k < m; k += LANES) {
      for (int64_t i = 0; i < LANES; ++i)
        tile[i] = j + i < n ? part(x + (j + i) * row + k, m - k) : Words{};
      transpose(tile);
      for (int64_t i = 0; i < std::min(LANES, m - k); ++i) put(k + i, j, tile[i]);
    }
}

inline const uint32_t *words(const void *data) { return static_cast<const uint32_t *>(data); }

// B of a product, (D, n) of which column j is row j of x (n, D), in the form that products want;
// `width` numbers (pairs) a row, a multiple of 16, of which those from n on are 0.
void transposed_operand(Head<float> x, int64_t n, int64_t D, float *to, int64_t width) {
  columns(words(x.data), x.row, n, D,
          [&](int64_t d, int64_t j, Words found) { store(to + d * width + j, found); });
  for (int64_t d = 0; d < D; ++d)
    std::fill(to + d * width + padded(n), to + (d + 1) * width, 0.0f);
}

void transposed_operand(Head<uint16_t> x, int64_t n, int64_t D, uint16_t *to, int64_t width) {
  columns(words(x.data), x.row / 2, n, D / 2,
          [&](int64_t d, int64_t j, Words found) { store(to + 2 * (d * width + j), found); });
  for (int64_t d = 0; d < D / 2; ++d)
    std::fill(to + 2 * (d * width + padded(n)), to + 2 * (d + 1) * width, 0);
}

// B of a product, (n, D) as it stands, rows from n up to `all` 0.
void operand(Head<float> x, int64_t n, int64_t D, float *to, int64_t all) {
  for (int64_t j = 0; j < n; ++j) std::memcpy(to + j * D, x.at(j), D * sizeof(float));
  std::fill(to + n * D, to + all * D, 0.0f);
}

void interleave(const uint16_t *even, const uint16_t *odd, int64_t count, uint16_t *to) {
  int64_t d = 0;
  for (; d + LANES <= count; d += LANES)
    store(to + 2 * d, words_of(even + d) | words_of(odd + d) << 16);
  for (; d < count; ++d) {
    to[2 * d] = even[d];
    to[2 * d + 1] = odd[d];
  }
}

void operand(Head<uint16_t> x, int64_t n, int64_t D, uint16_t *to, int64_t all) {
  const std::vector<uint16_t> zeros(n % 2 ? D : 0);
  for (int64_t j = 0; j < n; j += 2)
    interleave(x.at(j), j + 1 < n ? x.at(j + 1) : zeros.data(), D, to + j * D);
  std::fill(to + padded(n, 2) * D, to + all * D, 0);
}

// (n, D) -> (D, all) without pairs, columns from n on 0.
void transposed(Head<float> x, int64_t n, int64_t D, float *to, int64_t all) {
  transposed_operand(x, n, D, to, all);
}

void transposed(Head<uint16_t> x, int64_t n, int64_t D, uint16_t *to, int64_t all) {
  columns(words(x.data), x.row / 2, n, D / 2, [&](int64_t d, int64_t j, Words found) {
    store(to + 2 * d * all + j, halves_of(found & 0xffff));
    store(to + (2 * d + 1) * all + j, halves_of(found >> 16));
  });
  for (int64_t d = 0; d < D; ++d) std::fill(to + d * all + padded(n), to + (d + 1) * all, 0);
}

// What is written to rows of T: (D, width) numbers, transposed, n rows of it.
template <class T> void write_transposed(const float *x, int64_t width, Head<T> to, int64_t n,
                                         int64_t D) {
  columns(words(x), width, D, n, [&](int64_t r, int64_t d, Words found) {
    if (d + LANES <= D) return write(to.at(r) + d, bits<Floats>(found));
    T few[LANES];
    write(few, bits<Floats>(found));
    std::memcpy(to.at(r) + d, few, (D - d) * sizeof(T));
  });
}

template <class T> float dot(const T *a, const T *b, int64_t n) {
  Floats sums = {};
  int64_t d = 0;
  for (; d + LANES <= n; d += LANES) sums += read(a + d) * read(b + d);
  float sum = total(sums);
  for (; d < n; ++d) sum += single(a[d]) * single(b[d]);
  return sum;
}

template <class T> constexpr bool is_half = sizeof(T) == sizeof(uint16_t);

struct Multiply {
  const Products &by;
  void operator()(int64_t M, int64_t N, int64_t K, const uint16_t *A, int64_t a, const uint16_t *B,
                  int64_t b, float *C, int64_t c, bool add) const {
    by.half(M, N, K, a, b, c, add, A, B, C, true);
  }
  void operator()(int64_t M, int64_t N, int64_t K, const float *A, int64_t a, const float *B,
                  int64_t b, float *C, int64_t c, bool add) const {
    by.single(M, N, K, a, b, c, add, A, B, C, false);
  }
};

struct Tile {
  int64_t row, rows, key, keys; // the first and how many
};

// Whether a mask hides all of a tile.
bool all_hidden(const Attention &call, int64_t b, const Tile &tile) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    const uint8_t *seen = call.mask + b * call.mask_batch + (tile.row + r) * call.mask_row;
    const int64_t end = std::min(tile.key + tile.keys, tile.row + r + 1);
    for (int64_t c = tile.key; c < end; ++c)
      if (seen[c]) return false;
  }
  return true;
}

// Sets scores (rows, width) that a query may not see to -inf.
void hide(const Attention &call, int64_t b, const Tile &tile, float *scores, int64_t width) {
  const bool diagonal = tile.key + width > tile.row + 1;
  if (!diagonal && !call.mask) return;
  for (int64_t r = 0; r < tile.rows; ++r) {
    float *line = scores + r * width;
    if (call.mask) {
      const uint8_t *seen =
          call.mask + b * call.mask_batch + (tile.row + r) * call.mask_row + tile.key;
      for (int64_t c = 0; c < tile.keys; ++c)
        if (!seen[c]) line[c] = HIDDEN;
    }
    const int64_t visible = std::clamp<int64_t>(tile.row + r + 1 - tile.key, 0, width);
    std::fill(line + visible, line + width, HIDDEN);
  }
}

template <class T> struct Forward {
  const Attention &call;
  const int64_t T_, D, K, G, whole; // whole: positions and what pads them
  T *keys, *values;                 // operands of each (batch, key head)

  explicit Forward(const Attention &call)
      : call(call), T_(call.length), D(call.head_dim), K(call.kv_heads), G(call.heads / K),
        whole(padded(T_, 32)), keys(static_cast<T *>(call.space)),
        values(keys + call.batch * K * whole * D) {}

  void pack(int64_t n) const {
    const int64_t b = n / K, h = n % K;
    transposed_operand(head_of<T>(call.key, b, h), T_, D, keys + n * whole * D, whole);
    operand(head_of<T>(call.value, b, h), T_, D, values + n * whole * D, whole);
  }

  void rows(int64_t b, int64_t h, int64_t first, std::vector<float> &space) const {
    const int64_t n = std::min<int64_t>(ROWS, T_ - first);
    const T *key = keys + (b * K + h / G) * whole * D, *value = values + (b * K + h / G) * whole * D;
    const auto query = head_of<T>(call.query, b, h), out = head_of<T>(call.out, b, h);
    const Multiply multiply{call.products};
    space.resize(ROWS * (2 * KEYS + D + 2));
    float *scores = space.data(), *sums = scores + ROWS * KEYS, *peaks = sums + ROWS * D,
          *totals = peaks + ROWS;
    T *powers = reinterpret_cast<T *>(totals + ROWS);
    std::fill(sums, sums + n * D, 0.0f);
    std::fill(peaks, peaks + n, HIDDEN);
    std::fill(totals, totals + n, 0.0f);
    for (int64_t start = 0; start < first + n; start += KEYS) {
      const int64_t c = std::min<int64_t>(KEYS, first + n - start), width = padded(c, 32);
      const Tile tile{first, n, start, c};
      if (call.mask && all_hidden(call, b, tile)) continue;
      multiply(n, width, D, query.at(first), query.row, key + (is_half<T> ? 2 : 1) * start, whole,
               scores, width, false);
      hide(call, b, tile, scores, width);
      for (int64_t r = 0; r < n; ++r) soften(scores + r * width, width, powers + r * width,
                                             peaks[r], totals[r], sums + r * D);
      multiply(n, D, width, powers, width, value + start * D, D, sums, D, true);
    }
    for (int64_t r = 0; r < n; ++r) {
      const float share = 1.0f / totals[r];
      T *to = out.at(first + r);
      int64_t d = 0;
      for (; d + LANES <= D; d += LANES) write(to + d, load<Floats>(sums + r * D + d) * share);
      for (; d < D; ++d) write_one(to + d, sums[r * D + d] * share);
      call.log_total[(b * call.heads + h) * T_ + first + r] = peaks[r] + std::log(totals[r]);
    }
  }

  // A row of scores becomes powers of e, relative to the row's peak so far.
  void soften(const float *scores, int64_t width, T *powers, float &peak, float &sum,
              float *sums) const {
    const float scale = float(call.scale);
    Floats highest = load<Floats>(scores);
    for (int64_t c = LANES; c < width; c += LANES) {
      const Floats x = load<Floats>(scores + c);
      highest = x > highest ? x : highest;
    }
    const float before = peak;
    peak = std::max(before, largest(highest) * scale);
    if (peak == HIDDEN) { // nothing is seen yet
      std::fill(powers, powers + width, T(0));
      return;
    }
    Floats added = {};
    for (int64_t c = 0; c < width; c += LANES) {
      const Floats x = load<Floats>(scores + c) * scale - peak;
      const Floats power = x > broadcast(-87.0f) ? exponential(x) : Floats{};
      added += power;
      write(powers + c, power);
    }
    if (before == HIDDEN) {
      sum = total(added);
      return;
    }
    const float kept = std::exp(before - peak);
    sum = sum * kept + total(added);
    if (kept != 1.0f)
      for (int64_t d = 0; d < D; ++d) sums[d] *= kept;
  }

  void run() const {
    const int64_t blocks = (T_ + ROWS - 1) / ROWS, heads = call.batch * call.heads;
#pragma omp parallel num_threads(call.threads)
    {
      std::vector<float> space;
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < call.batch * K; ++n) pack(n);
#pragma omp for schedule(dynamic) // the longest first
      for (int64_t i = 0; i < blocks * heads; ++i)
        rows(i % heads / call.heads, i % call.heads, (blocks - 1 - i / heads) * ROWS, space);
      call.products.release(is_half<T>);
    }
  }
};

template <class T> struct Backward {
  const Attention &call;
  const int64_t T_, D, K, G, whole, parts; // parts: of the queries of a head
  T *keys;                                 // (D, whole) of each (batch, key head)
  float *by_key, *by_value;                // (T, D) of each (batch, head, part)

  explicit Backward(const Attention &call)
      : call(call), T_(call.length), D(call.head_dim), K(call.kv_heads), G(call.heads / K),
        whole(padded(T_, 32)), parts(parts_of(call)),
        by_key(static_cast<float *>(call.space)),
        by_value(by_key + call.batch * call.heads * parts * T_ * D) {
    keys = reinterpret_cast<T *>(by_value + call.batch * call.heads * parts * T_ * D);
  }

  // A head's queries are divided where there are fewer heads than would keep all threads at work.
  static int64_t parts_of(const Attention &call) {
    const int64_t heads = call.batch * call.heads, blocks = (call.length + ROWS - 1) / ROWS;
    return std::clamp<int64_t>((2 * call.threads + heads - 1) / heads, 1, blocks);
  }

  // The first block of queries of a part: parts have about equal areas under the diagonal.
  int64_t first_block(int64_t part) const {
    const int64_t blocks = (T_ + ROWS - 1) / ROWS;
    return std::min(blocks, int64_t(std::lround(blocks * std::sqrt(double(part) / parts))));
  }

  void pack(int64_t n) const {
    transposed(head_of<T>(call.key, n / K, n % K), T_, D, keys + n * whole * D, whole);
  }

  struct Space {
    std::vector<float> floats;
    std::vector<T> numbers;
  };

  void part(int64_t unit, Space &space) const {
    const int64_t b = unit / parts / call.heads, h = unit / parts % call.heads;
    float *dk = by_key + unit * T_ * D, *dv = by_value + unit * T_ * D;
    const int64_t last = std::min(T_, first_block(unit % parts + 1) * ROWS);
    std::fill(dk, dk + last * D, 0.0f);
    std::fill(dv, dv + last * D, 0.0f);
    space.floats.resize(ROWS * (2 * KEYS + D + 2));
    space.numbers.resize(ROWS * (4 * D + 3 * KEYS));
    for (int64_t block = first_block(unit % parts); block * ROWS < last; ++block)
      rows(b, h, block * ROWS, dk, dv, space);
  }

  void rows(int64_t b, int64_t h, int64_t first, float *dk, float *dv, Space &space) const {
    const int64_t n = std::min<int64_t>(ROWS, T_ - first), wide = padded(n);
    const auto query = head_of<T>(call.query, b, h), out = head_of<T>(call.out, b, h),
               grad = head_of<T>(call.grad, b, h), by_query = head_of<T>(call.grad_query, b, h),
               key = head_of<T>(call.key, b, h / G), value = head_of<T>(call.value, b, h / G);
    const T *across = keys + (b * K + h / G) * whole * D;
    const Multiply multiply{call.products};
    float *scores = space.floats.data(), *by_power = scores + ROWS * KEYS,
          *dq = by_power + ROWS * KEYS, *logs = dq + ROWS * D, *deltas = logs + ROWS;
    T *q_across = space.numbers.data(), *g_across = q_across + ROWS * D, *q = g_across + ROWS * D,
      *g = q + ROWS * D, *powers = g + ROWS * D, *by_score = powers + ROWS * KEYS,
      *paired = by_score + ROWS * KEYS;
    const Head<T> q_rows{query.at(first), query.row}, g_rows{grad.at(first), grad.row};
    transposed_operand(q_rows, n, D, q_across, wide);
    transposed_operand(g_rows, n, D, g_across, wide);
    operand(q_rows, n, D, q, wide);
    operand(g_rows, n, D, g, wide);
    for (int64_t r = 0; r < wide; ++r) {
      logs[r] = r < n ? call.log_total[(b * call.heads + h) * T_ + first + r] : 0.0f;
      deltas[r] = r < n ? dot(g_rows.at(r), out.at(first + r), D) : 0.0f;
    }
    bool begun = false;
    for (int64_t start = 0; start < first + n; start += KEYS) {
      const int64_t c = std::min<int64_t>(KEYS, first + n - start);
      const Tile tile{first, n, start, c};
      if (call.mask && all_hidden(call, b, tile)) continue;
      // All lie as (keys, rows): their products with rows need no transposed copy then.
      multiply(c, wide, D, key.at(start), key.row, q_across, wide, scores, wide, false);
      multiply(c, wide, D, value.at(start), value.row, g_across, wide, by_power, wide, false);
      between(b, tile, wide, scores, by_power, logs, deltas, powers, by_score, paired);
      multiply(c, D, wide, powers, wide, g, D, dv + start * D, D, true);
      multiply(c, D, wide, by_score, wide, q, D, dk + start * D, D, true);
      multiply(D, wide, padded(c, 2), across + start, whole, is_half<T> ? paired : by_score, wide,
               dq, wide, begun);
      begun = true;
    }
    if (!begun) std::fill(dq, dq + D * wide, 0.0f);
    write_transposed(dq, wide, Head<T>{by_query.at(first), by_query.row}, n, D);
  }

  // From scores and the gradient by their softmax: the softmax, and the gradient by the scores,
  // (keys, wide) each; of bfloat16 the latter with pairs of its rows interleaved too.
  void between(int64_t b, const Tile &tile, int64_t wide, const float *scores,
               const float *by_power, const float *logs, const float *deltas, T *powers, T *by_score,
               T *paired) const {
    const float scale = float(call.scale);
    const bool diagonal = tile.key + tile.keys > tile.row + 1;
    uint8_t seen[ROWS];
    for (int64_t c = 0; c < padded(tile.keys, 2); ++c) {
      if (c == tile.keys) { // an odd number of keys
        std::fill(by_score + c * wide, by_score + (c + 1) * wide, T(0));
      } else {
        const int64_t hidden = tile.key + c - tile.row; // rows before it may not see this key
        if (call.mask)
          for (int64_t r = 0; r < wide; ++r)
            seen[r] = r < tile.rows && call.mask[b * call.mask_batch +
                                                 (tile.row + r) * call.mask_row + tile.key + c];
        for (int64_t r = 0; r < wide; r += LANES) {
          Floats p = exponential(load<Floats>(scores + c * wide + r) * scale - load<Floats>(logs + r));
          if (diagonal && hidden > r) p = chosen(up_to(hidden - r), Floats{}, p);
          if (call.mask) {
            const Ints allowed = __builtin_convertvector(load<Bytes>(seen + r), Ints) != 0;
            p = allowed ? p : Floats{};
          }
          const Floats by = (load<Floats>(by_power + c * wide + r) - load<Floats>(deltas + r)) * p;
          write(powers + c * wide + r, p);
          write(by_score + c * wide + r, by * scale);
        }
      }
      if constexpr (is_half<T>)
        if (c % 2)
          interleave(by_score + (c - 1) * wide, by_score + c * wide, wide, paired + (c - 1) * wide);
    }
  }

  // Gradients by a position's key and value: sums over the heads that share them, and over those
  // parts whose queries see it.
  void reduce(int64_t b, int64_t h, int64_t t) const {
    const int64_t first = (b * call.heads + h * G) * parts;
    int64_t none = 0;
    while (t >= first_block(none + 1) * ROWS) ++none;
    sum(by_key, first, none, t, head_of<T>(call.grad_key, b, h).at(t));
    sum(by_value, first, none, t, head_of<T>(call.grad_value, b, h).at(t));
  }

  void sum(const float *of, int64_t first, int64_t none, int64_t t, T *to) const {
    for (int64_t d = 0; d < D; d += LANES) {
      const int64_t lanes = std::min(LANES, D - d);
      Floats sums = {};
      for (int64_t g = 0; g < G; ++g)
        for (int64_t p = none; p < parts; ++p)
          sums += bits<Floats>(::part(words(of + ((first + g * parts + p) * T_ + t) * D + d), lanes));
      T found[LANES];
      write(found, sums);
      std::memcpy(to + d, found, lanes * sizeof(T));
    }
  }

  void run() const {
    const int64_t units = call.batch * call.heads * parts;
#pragma omp parallel num_threads(call.threads)
    {
      Space space;
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < call.batch * K; ++n) pack(n);
#pragma omp for schedule(dynamic)
      for (int64_t unit = 0; unit < units; ++unit) part(unit, space);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < call.batch * K * T_; ++i) reduce(i / T_ / K, i / T_ % K, i % T_);
      call.products.release(is_half<T>);
    }
  }
};

} // namespace

extern "C" {

// Bytes that `space` must have for the output (backward 0) or for the gradients (1).
int64_t mobilellm_attention_space(const Attention *call, int64_t backward) {
  const int64_t size = call->half ? 2 : 4, positions = padded(call->length, 32) * call->head_dim;
  const int64_t operands = call->batch * call->kv_heads * positions * size;
  if (!backward) return 2 * operands;
  return operands + 2 * 4 * call->batch * call->heads * Backward<float>::parts_of(*call) *
                        call->length * call->head_dim;
}

void mobilellm_attention(const Attention *call) {
  call->half ? Forward<uint16_t>(*call).run() : Forward<float>(*call).run();
}

void mobilellm_attention_gradients(const Attention *call) {
  call->half ? Backward<uint16_t>(*call).run() : Backward<float>(*call).run();
}

} // extern "C"
