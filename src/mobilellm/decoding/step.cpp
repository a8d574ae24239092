// One token through the network of model/network.py on a CPU. decoding/decoder.py calls it.
//
// Reading the weights bounds decoding, so each is read once, in the type that it is held in, and
// multiplied by float32 activations; sums are float32. Weights are float32, bfloat16, int8 with a
// scale a row, or int4 in groups of 32 with a scale each (quantize/grid.py): their values are
// exactly those of the grid. A row's sum does not depend on the number of threads, nor on which
// thread computes it, so that one prompt gives one text.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "vectors.h"

extern "C" {

enum Kind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

struct Matrix {
  const void *data; // rows one after another; of int4, byte j of a group has columns j and j + 16
  const float *scales; // of int8 one a row, of int4 one for each 32 columns, a row's together
  int64_t rows, columns, kind;
  int64_t rounds; // whether what it multiplies is rounded to 8 bits first (quantize/activations.py)
};

struct Block {
  const float *input_norm, *query_norm, *key_norm, *post_norm; // query and key norm may be null
  Matrix qkv, o, gate_up, down;
};

// One of a token's ways through a block.
struct Application {
  int64_t block, slot;
  int64_t own; // whether it makes keys and values of its own, or attends to those in the slot
};

struct Network {
  int64_t width, heads, kv_heads, head_dim, ffn, blocks, applications;
  double eps;
  const float *norm;
  Matrix embedding, output;
  const Block *block;
  const Application *application;
};

// Keys and values of a cache's slot, each (kv_heads, room, head_dim). A position lies at its number
// modulo `room`: a sliding window has room for no more than it sees.
struct Slot {
  float *keys, *values;
  int64_t room;
};

struct Token {
  int64_t id, position;
  const float *cos, *sin; // of its position, (head_dim / 2)
};

} // extern "C"

namespace {

constexpr int64_t GROUP = 32;
constexpr int SUMS = 4; // of a row at once, so that no addition waits for the one before

typedef int8_t SignedBytes __attribute__((vector_size(16)));

// 16 numbers in memory as 16 of 32 bits. Compilers take the generic form apart.
inline Words of_bytes(const uint8_t *from) {
#if defined(__AVX512F__)
  return bits<Words>(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)));
#elif defined(__AVX2__)
  const __m256i halves[2] = {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)),
                             _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8)))};
  return load<Words>(halves);
#else
  return __builtin_convertvector(load<Bytes>(from), Words);
#endif
}

inline Floats of_integers(const int8_t *from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
  return bits<Floats>(_mm512_cvtepi32_ps(wide));
#elif defined(__AVX2__)
  const __m256i halves[2] = {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)),
                             _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(from + 8)))};
  return __builtin_convertvector(load<Ints>(halves), Floats);
#else
  return __builtin_convertvector(__builtin_convertvector(load<SignedBytes>(from), Ints), Floats);
#endif
}

// The low four bits of each number, as the grid's -8 to 7.
inline Floats of_nibbles(Words words) {
#if defined(__AVX512F__)
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return bits<Floats>(_mm512_permutexvar_ps(bits<__m512i>(words), table));
#else
  return __builtin_convertvector(bits<Ints>(words & 15) - 8, Floats);
#endif
}

// The sum over a row of its numbers times x. One row at a time, by several sums at once: memory gives
// one row after another twice as fast as four rows side by side.
template <class Row> inline float dot(int64_t columns, const float *x, const Row &row) {
  Floats sum[SUMS] = {};
  int64_t c = 0;
  for (; c + SUMS * LANES <= columns; c += SUMS * LANES)
    for (int i = 0; i < SUMS; ++i)
      sum[i] += row.vector(c + i * LANES) * load<Floats>(x + c + i * LANES);
  for (; c + LANES <= columns; c += LANES) sum[0] += row.vector(c) * load<Floats>(x + c);
  float out = total((sum[0] + sum[1]) + (sum[2] + sum[3]));
  for (; c < columns; ++c) out += row.one(c) * x[c];
  return out;
}

struct OfFloat {
  const float *w;
  inline Floats vector(int64_t c) const { return load<Floats>(w + c); }
  inline float one(int64_t c) const { return w[c]; }
};

struct OfHalf {
  const uint16_t *w;
  inline Floats vector(int64_t c) const { return read(w + c); }
  inline float one(int64_t c) const { return single(w[c]); }
};

struct OfByte {
  const int8_t *w;
  inline Floats vector(int64_t c) const { return of_integers(w + c); }
  inline float one(int64_t c) const { return w[c]; }
};

inline float dot_of_int4(const uint8_t *w, const float *scales, int64_t columns, const float *x) {
  const int64_t groups = columns / GROUP;
  Floats sum[SUMS] = {};
  const auto group = [&](int64_t g) {
    const Words words = of_bytes(w + g * (GROUP / 2));
    const float *at = x + g * GROUP;
    return (of_nibbles(words) * load<Floats>(at) +
            of_nibbles(words >> 4) * load<Floats>(at + LANES)) * scales[g];
  };
  int64_t g = 0;
  for (; g + SUMS <= groups; g += SUMS)
    for (int i = 0; i < SUMS; ++i) sum[i] += group(g + i);
  for (; g < groups; ++g) sum[0] += group(g);
  return total((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// out[i] is the sum of row begin + i, up to the row before `end`.
inline void product(const Matrix &m, int64_t begin, int64_t end, const float *x, float *out) {
  const int64_t n = m.columns;
  for (int64_t row = begin; row < end; ++row) switch (m.kind) {
    case FLOAT32: out[row - begin] = dot(n, x, OfFloat{(const float *)m.data + row * n}); break;
    case BFLOAT16: out[row - begin] = dot(n, x, OfHalf{(const uint16_t *)m.data + row * n}); break;
    case INT8:
      out[row - begin] = dot(n, x, OfByte{(const int8_t *)m.data + row * n}) * m.scales[row];
      break;
    default:
      out[row - begin] =
          dot_of_int4((const uint8_t *)m.data + row * (n / 2), m.scales + row * (n / GROUP), n, x);
    }
}

// One row as float32.
inline void row_of(const Matrix &m, int64_t row, float *out) {
  const int64_t n = m.columns;
  for (int64_t c = 0; c < n; ++c) switch (m.kind) {
    case FLOAT32: out[c] = ((const float *)m.data)[row * n + c]; break;
    case BFLOAT16: out[c] = single(((const uint16_t *)m.data)[row * n + c]); break;
    case INT8: out[c] = ((const int8_t *)m.data)[row * n + c] * m.scales[row]; break;
    default: {
      const int64_t g = (row * n + c) / GROUP, j = c % GROUP;
      const uint8_t both = ((const uint8_t *)m.data)[g * LANES + j % LANES];
      out[c] = (int(j < LANES ? both & 15 : both >> 4) - 8) * m.scales[g];
    }
    }
}

inline void normalize(const float *x, const float *weight, int64_t n, float eps, float *out) {
  const float scale = 1.0f / std::sqrt(dot(n, x, OfFloat{x}) / float(n) + eps);
  for (int64_t c = 0; c < n; ++c) out[c] = x[c] * scale * weight[c];
}

// As fake_int8 of quantize/activations.py, in place.
inline void round_to_8_bits(float *x, int64_t n) {
  float low = 0, high = 0;
  for (int64_t c = 0; c < n; ++c) low = std::min(low, x[c]), high = std::max(high, x[c]);
  const float scale = std::max((high - low) / 255.0f, 1.17549435e-38f);
  const float zero = std::nearbyint(-128.0f - low / scale);
  for (int64_t c = 0; c < n; ++c) {
    const float step = std::nearbyint(x[c] / scale) + zero;
    x[c] = (std::min(std::max(step, -128.0f), 127.0f) - zero) * scale;
  }
}

// A head normalized, where there is a norm, and turned by the angles of its position.
inline void turn(float *head, const float *norm, float eps, int64_t n, const float *cos,
                 const float *sin) {
  if (norm) normalize(head, norm, n, eps, head);
  for (int64_t i = 0; i < n / 2; ++i) {
    const float first = head[i], second = head[i + n / 2];
    head[i] = first * cos[i] - second * sin[i];
    head[i + n / 2] = second * cos[i] + first * sin[i];
  }
}

template <int V>
inline void mix(const float *values, const float *weights, int64_t seen, int64_t n, float factor,
                float *out) {
  Floats sum[V] = {};
  for (int64_t s = 0; s < seen; ++s)
    for (int v = 0; v < V; ++v) sum[v] += load<Floats>(values + s * n + v * LANES) * weights[s];
  for (int v = 0; v < V; ++v) store(out + v * LANES, sum[v] * factor);
}

// What one query head sees in `seen` keys and values. `weights` has room for `seen` numbers and 15
// more.
inline void attend(const float *query, const float *keys, const float *values, int64_t seen,
                   int64_t n, float *weights, float *out) {
  const float scale = 1.0f / std::sqrt(float(n));
  product(Matrix{keys, nullptr, seen, n, FLOAT32, 0}, 0, seen, query, weights);
  float best = weights[0];
  for (int64_t s = 1; s < seen; ++s) best = std::max(best, weights[s]);
  for (int64_t s = seen; s % LANES; ++s) weights[s] = -INFINITY;
  Floats whole = {};
  for (int64_t s = 0; s < seen; s += LANES) {
    const Floats e = exponential((load<Floats>(weights + s) - best) * scale);
    store(weights + s, e);
    if (s + LANES <= seen) whole += e;
  }
  float sum = total(whole);
  for (int64_t s = seen / LANES * LANES; s < seen; ++s) sum += weights[s];
  const float factor = 1.0f / sum;
  int64_t c = 0;
  for (; c + 4 * LANES <= n; c += 4 * LANES)
    mix<4>(values + c, weights, seen, n, factor, out + c);
  for (; c + LANES <= n; c += LANES) mix<1>(values + c, weights, seen, n, factor, out + c);
  for (; c < n; ++c) {
    float one = 0;
    for (int64_t s = 0; s < seen; ++s) one += values[s * n + c] * weights[s];
    out[c] = one * factor;
  }
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

constexpr int SPINS = 50000; // before a waiting thread lets others run: one or two milliseconds

// The threads of a decoder. They share the rows of a product by taking chunks of them, and wait for
// one another behind each.
class Team {
public:
  explicit Team(int64_t size) : size_(size) {}

  // How many threads take part from now on; only while none of them works.
  void resize(int64_t size) { size_ = size; }

  // Chunks of `count`, in multiples of `step`, until none is left; all threads call it alike.
  template <class Work> void share(int64_t count, int64_t step, Work work) {
    const int64_t chunks = 4 * size_, rows = (count + chunks - 1) / chunks;
    const int64_t chunk = (rows + step - 1) / step * step;
    for (int64_t begin; (begin = next_.fetch_add(chunk)) < count;)
      work(begin, std::min(count, begin + chunk));
    wait();
  }

  void wait() {
    const int64_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;)
      if (++spins < SPINS) pause();
      else std::this_thread::yield();
  }

private:
  int64_t size_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> phase_{0};
};

struct Room { // of one thread
  std::vector<float> input, rows, weights;
};

class Decoder {
public:
  Decoder(const Network &net, int64_t threads)
      : net_(net), blocks_(net.block, net.block + net.blocks),
        applications_(net.application, net.application + net.applications), team_(threads),
        rooms_(threads),
        x_(net.width), qkv_((net.heads + 2 * net.kv_heads) * net.head_dim),
        heads_(net.heads * net.head_dim), act_(net.ffn) {
    const int64_t longest = std::max({net.width, net.ffn, net.heads * net.head_dim});
    for (Room &room : rooms_) room.input.resize(longest), room.rows.resize(longest);
    for (int64_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
  }

  ~Decoder() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ending_ = true;
      calls_.fetch_add(1, std::memory_order_release);
    }
    called_.notify_all();
    for (std::thread &worker : workers_) worker.join();
  }

  void step(const Slot *slots, const Token &token, float *logits, int64_t threads) {
    slots_ = slots, token_ = token, logits_ = logits;
    for (Room &room : rooms_)
      if (int64_t(room.weights.size()) < token.position + 1 + LANES)
        room.weights.resize(2 * (token.position + 1) + LANES);
    {
      // A worker that comes late, out of a step without it, must not meet the next one by half.
      const std::lock_guard<std::mutex> lock(mutex_);
      active_ = std::min<int64_t>(std::max<int64_t>(1, threads), rooms_.size());
      team_.resize(active_);
      calls_.fetch_add(1, std::memory_order_release);
    }
    if (active_ > 1) called_.notify_all();
    run(rooms_[0], true);
  }

private:
  void serve(int64_t number) {
    for (int64_t seen = 0;;) {
      for (int spins = 0; calls_.load(std::memory_order_acquire) == seen && spins < SPINS; ++spins)
        pause();
      {
        std::unique_lock<std::mutex> lock(mutex_);
        called_.wait(lock, [&] { return calls_.load(std::memory_order_relaxed) != seen; });
        seen = calls_.load(std::memory_order_relaxed);
        if (ending_) return;
        if (number >= active_) continue;
      }
      run(rooms_[number], false);
    }
  }

  // x normalized into the thread's own memory, or copied there, and rounded where `matrix` asks.
  const float *input(Room &room, const float *x, const float *norm, const Matrix &matrix) {
    if (!norm && !matrix.rounds) return x;
    const int64_t n = matrix.columns;
    if (norm) normalize(x, norm, n, float(net_.eps), room.input.data());
    else std::copy(x, x + n, room.input.data());
    if (matrix.rounds) round_to_8_bits(room.input.data(), n);
    return room.input.data();
  }

  // What a product adds to the residual stream.
  void add(Room &room, const Matrix &matrix, const float *x) {
    const float *in = input(room, x, nullptr, matrix);
    team_.share(net_.width, 1, [&](int64_t begin, int64_t end) {
      product(matrix, begin, end, in, room.rows.data());
      for (int64_t r = begin; r < end; ++r) x_[r] += room.rows[r - begin];
    });
  }

  void run(Room &room, bool first) {
    const Network &net = net_;
    const int64_t D = net.head_dim, q = net.heads * D, kv = net.kv_heads * D;
    const float *cos = token_.cos, *sin = token_.sin;
    const float eps = float(net.eps);
    if (first) row_of(net.embedding, token_.id, x_.data());
    team_.wait();
    for (const Application &application : applications_) {
      const Block &block = blocks_[application.block];
      const bool own = application.own;
      const Slot &slot = slots_[application.slot];
      const int64_t place = token_.position % slot.room;
      const int64_t seen = std::min(token_.position + 1, slot.room);

      const float *in = input(room, x_.data(), block.input_norm, block.qkv);
      team_.share(own ? q + 2 * kv : q, 1, [&](int64_t begin, int64_t end) {
        product(block.qkv, begin, end, in, qkv_.data() + begin);
      });
      team_.share(own ? net.heads + net.kv_heads : net.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t h = begin; h < end; ++h) {
          float *head = qkv_.data() + h * D;
          turn(head, h < net.heads ? block.query_norm : block.key_norm, eps, D, cos, sin);
          if (h < net.heads) continue;
          const int64_t at = ((h - net.heads) * slot.room + place) * D;
          std::copy(head, head + D, slot.keys + at);
          std::copy(head + kv, head + kv + D, slot.values + at);
        }
      });
      team_.share(net.heads, 1, [&](int64_t begin, int64_t end) {
        for (int64_t h = begin; h < end; ++h) {
          const int64_t at = h / (net.heads / net.kv_heads) * slot.room * D;
          attend(qkv_.data() + h * D, slot.keys + at, slot.values + at, seen, D,
                 room.weights.data(), heads_.data() + h * D);
        }
      });
      add(room, block.o, heads_.data());
      in = input(room, x_.data(), block.post_norm, block.gate_up);
      team_.share(net.ffn, LANES, [&](int64_t begin, int64_t end) {
        float *gate = act_.data() + begin, *up = room.rows.data();
        product(block.gate_up, begin, end, in, gate);
        product(block.gate_up, net.ffn + begin, net.ffn + end, in, up);
        int64_t f = 0;
        for (; f + LANES <= end - begin; f += LANES) {
          const Floats g = load<Floats>(gate + f), least = Floats{} - 80.0f;
          const Floats away = -(g > least ? g : least);
          store(gate + f, g * load<Floats>(up + f) / (1.0f + exponential(away)));
        }
        for (; f < end - begin; ++f) gate[f] *= up[f] / (1.0f + std::exp(-gate[f]));
      });
      add(room, block.down, act_.data());
    }
    const float *in = input(room, x_.data(), net.norm, net.output);
    team_.share(net.output.rows, 1, [&](int64_t begin, int64_t end) {
      product(net.output, begin, end, in, logits_ + begin);
    });
  }

  const Network net_;
  const std::vector<Block> blocks_;
  const std::vector<Application> applications_;
  Team team_;
  std::vector<Room> rooms_;
  std::vector<float> x_, qkv_, heads_, act_; // of all threads
  const Slot *slots_ = nullptr;
  Token token_{};
  float *logits_ = nullptr;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable called_;
  std::atomic<int64_t> calls_{0};
  int64_t active_ = 1; // threads of the newest call
  bool ending_ = false;
};

} // namespace

extern "C" {

// A decoder with its threads. What `net` points at is copied, but for the weights themselves.
void *mobilellm_open(const Network *net, int64_t threads) {
  return new Decoder(*net, std::max<int64_t>(1, threads));
}

// Logits (output.rows) of what follows a token. The slots hold all that it sees of the positions
// before it, and get its own keys and values. At most `threads` of the decoder's take part.
void mobilellm_step(void *decoder, const Slot *slots, int64_t token, int64_t position,
                    const float *cos, const float *sin, float *logits, int64_t threads) {
  static_cast<Decoder *>(decoder)->step(slots, Token{token, position, cos, sin}, logits, threads);
}

void mobilellm_close(void *decoder) { delete static_cast<Decoder *>(decoder); }

} // extern "C"
