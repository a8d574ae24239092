// Matrix products with float32 results by the bfloat16 units of a processor with AMX, of float32 and
// of bfloat16 numbers. kernels/bf16x6.py calls it.
//
// A float32 number is the sum of three bfloat16 numbers: its leading eight bits, the next eight, and
// the last eight. Of the nine products of such parts the six largest are summed in float32; the three
// others are below its rounding. cuBLAS has the same by nine products; Intel's MKL calls the parts
// BF16x3.
//
// C (M, N) (+)= A (M, K) B (K, N). A block of B lies in parts in the second cache; of A panels of 32
// rows come to it. Both are in tiles of 1 KiB, as the units take them: 16 lines of 32 numbers along K,
// of which k and k + 16 lie side by side.
//
// The units are fast enough that memory counts. Where A's rows do not lie one after another, a few
// panels are read at once, so that each k gives a whole stretch, and the lines of the next step are
// asked for in advance. A large C goes past the caches, which saves its reading (docs/log.md).

#include "tiles.h"

extern "C" {

// Numbers at data[i * row + k * column], one of the two being 1; of B, i counts its columns.
struct Matrix {
  const void *data;
  int64_t row, column;
};

struct Product {
  Matrix A, B;
  float *C; // rows one after another
  int64_t M, N, K;
  int64_t parts; // of a number: 3 of float32, 1 of bfloat16
  int64_t add;   // to what C has
  int64_t threads;
};

static_assert(sizeof(Product) == 104, "kernels/bf16x6.py has the same");

} // extern "C"

#ifdef HAS_TILES

namespace {

// What was fastest for a kind of number: bytes of a block of B; its depth, and that where each k of A
// is on a page of its own; panels of such an A at once; steps over which sums stay in tiles.
template <class Number> struct Kind;

template <> struct Kind<float> {
  static constexpr int64_t PARTS = 3, BLOCK = 1000 << 10, DEPTH = 1024, PAGES = 384, PANELS = 8,
                           STEPS = 4;
};

template <> struct Kind<uint16_t> {
  static constexpr int64_t PARTS = 1, BLOCK = 1000 << 10, DEPTH = 1024, PAGES = 1024, PANELS = 8,
                           STEPS = 16;
};

constexpr int64_t LARGE = 1 << 20; // bytes of a C that goes past the caches

template <class Number> constexpr int64_t step_of() { // numbers of a panel's 32 k
  return Kind<Number>::PARTS * 2 * TILE;
}

inline Words leading(Floats x) { return (bits<Words>(x) + 0x8000u) & 0xffff0000u; }

// x as the sum of three numbers, each in the upper halves of its words.
inline void split(Floats x, Words *parts) {
  parts[0] = leading(x);
  x -= bits<Floats>(parts[0]);
  parts[1] = leading(x);
  parts[2] = bits<Words>(x - bits<Floats>(parts[1]));
}

// The parts of 16 numbers, of which `count` exist, in the lower halves of words.
inline void parts(const float *from, int64_t count, Words *found) {
  split(numbers(from, count), found);
  for (int64_t p = 0; p < Kind<float>::PARTS; ++p) found[p] >>= 16;
}

inline void parts(const uint16_t *from, int64_t count, Words *found) {
  if (count >= LANES) {
    *found = words_of(from);
    return;
  }
  uint16_t some[LANES] = {};
  if (count > 0) std::memcpy(some, from, count * sizeof *from);
  *found = words_of(some);
}

// The parts of 16 rows and 32 k, of which `rows` and `deep` exist, as tiles: a line a row (A), or a
// line a pair of k (B).
template <class Number>
inline void pack_tiles(const Matrix &x, int64_t i, int64_t rows, int64_t k, int64_t deep,
                       bool line_a_row, uint16_t *to) {
  constexpr int64_t PARTS = Kind<Number>::PARTS;
  const Number *const data = static_cast<const Number *>(x.data);
  Words lines[PARTS][LANES];
  const bool along = x.column == 1;
  for (int64_t l = 0; l < LANES; ++l) {
    Words low[PARTS] = {}, high[PARTS] = {};
    if (along) {
      const Number *from = data + (i + l) * x.row + k;
      if (l < rows) parts(from, deep, low), parts(from + LANES, deep - LANES, high);
    } else {
      const Number *from = data + (k + l) * x.column + i;
      if (l < deep) parts(from, rows, low);
      if (l + LANES < deep) parts(from + LANES * x.column, rows, high);
      __builtin_prefetch(from + SIDE * x.column);
      __builtin_prefetch(from + (SIDE + LANES) * x.column);
    }
    for (int64_t p = 0; p < PARTS; ++p) lines[p][l] = low[p] | high[p] << 16;
  }
  for (int64_t p = 0; p < PARTS; ++p) {
    if (along != line_a_row) transpose(lines[p]);
    for (int64_t l = 0; l < LANES; ++l) store(to + p * 2 * TILE + l * SIDE, lines[p][l]);
  }
}

// Of 32 rows, of which `rows` exist, those numbers from k on: a step after another.
template <class Number>
inline void pack(const Matrix &x, int64_t i, int64_t rows, int64_t k, int64_t deep, bool line_a_row,
                 uint16_t *to) {
  for (const int64_t end = k + deep; k < end; k += SIDE, to += step_of<Number>())
    for (int64_t half = 0; half < 2; ++half)
      pack_tiles<Number>(x, i + half * LANES, rows - half * LANES, k, end - k, line_a_row,
                         to + half * TILE);
}

#define TAKE_A(part) TAKE(4, 5, A + 2 * (part) * TILE, A + (2 * (part) + 1) * TILE)
#define TAKE_B(part) TAKE(6, 7, B + 2 * (part) * TILE, B + (2 * (part) + 1) * TILE)

// Sums (32, 32) in four tiles (+)= a panel of A times one of B, over so many steps.
template <class Number>
inline void multiply(const uint16_t *A, const uint16_t *B, int64_t steps, float *sums, bool add) {
  __asm__ volatile("" ::: "memory"); // what is read has been written
  if (add) {
    EACH_SUM(TAKE_SUM);
  } else {
    EACH_SUM(_tile_zero);
  }
  for (int64_t step = 0; step < steps; ++step, A += step_of<Number>(), B += step_of<Number>())
    if constexpr (Kind<Number>::PARTS == 1) {
      TAKE_A(0); TAKE_B(0); MULTIPLY;
    } else { // small products first
      TAKE_A(0); TAKE_B(2); MULTIPLY;
      TAKE_B(1); MULTIPLY;
      TAKE_A(1); MULTIPLY;
      TAKE_B(0); MULTIPLY;
      TAKE_A(2); MULTIPLY;
      TAKE_A(0); MULTIPLY;
    }
  EACH_SUM(KEEP_SUM);
  __asm__ volatile("" ::: "memory");
}

// Sums as `multiply` leaves them, those rows and columns that exist, into C; with `past` past the
// caches.
inline void write_sums(const float *sums, float *C, int64_t row, int64_t rows, int64_t columns,
                       bool add, bool past) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t first = 0; first < columns; first += LANES) {
      const int64_t tile = r / LANES * 2 + first / LANES, count = std::min(LANES, columns - first);
      Floats found = load<Floats>(sums + tile * SUM / 4 + r % LANES * LANES);
      float *const to = C + r * row + first;
      if (add) found += numbers(to, count);
      if (count < LANES) std::memcpy(to, &found, count * sizeof(float));
      else if (past) _mm512_stream_ps(to, bits<__m512>(found));
      else write(to, found);
    }
}

thread_local Space<uint16_t> block_space, panel_space;
thread_local Space<float> sum_space;

template <class Number> void run(const Product &call) {
  const int64_t rows = parts_of(call.M, SIDE), columns = parts_of(call.N, SIDE); // in panels
  const bool along = call.A.column == 1;
  using Of = Kind<Number>;
  constexpr int64_t STEP = step_of<Number>();
  const int64_t depth =
      parts_of(parts_of(call.K, parts_of(call.K, along ? Of::DEPTH : Of::PAGES)), SIDE) * SIDE;
  const int64_t panel = depth / SIDE * STEP;
  const int64_t most = std::max<int64_t>(2, Of::BLOCK / (panel * sizeof(uint16_t)));
  const int64_t width = parts_of(columns, parts_of(columns, most));
  const int64_t own = parts_of(rows, call.threads); // panels of A for a thread
  const int64_t panels = along ? 1 : parts_of(own, parts_of(own, Of::PANELS));
  const bool large = call.M * call.N * int64_t(sizeof(float)) > LARGE && call.N % LANES == 0 &&
                     uintptr_t(call.C) % 64 == 0;
  uint16_t *const block = block_space.of(width * panel);
#pragma omp parallel num_threads(call.threads)
  {
    const Tiles tiles;
    _tile_loadconfig(&tiles);
    uint16_t *const of_A = panel_space.of(panels * panel);
    float *const sums = sum_space.of(width * SUM);
    const auto here = [&](int64_t i) { return std::min(SIDE, call.M - i * SIDE); };
    for (int64_t k = 0; k < call.K; k += depth) {
      const int64_t deep = std::min(depth, call.K - k), steps = parts_of(deep, SIDE);
      const int64_t stretch = parts_of(steps, parts_of(steps, Of::STEPS));
      const bool add = call.add || k > 0, past = large && k + depth >= call.K;
      for (int64_t n = 0; n < columns; n += width) {
        const int64_t wide = std::min(width, columns - n);
        const auto there = [&](int64_t j) { return std::min(SIDE, call.N - (n + j) * SIDE); };
#pragma omp for schedule(static)
        for (int64_t j = 0; j < wide; ++j)
          pack<Number>(call.B, (n + j) * SIDE, there(j), k, deep, false, block + j * panel);
        const auto multiply_panels = [&](int64_t first, int64_t end) {
          for (int64_t s = 0; s < steps; ++s)
            for (int64_t i = first; i < end; ++i)
              pack<Number>(call.A, i * SIDE, here(i), k + s * SIDE, std::min(SIDE, deep - s * SIDE), true,
                   of_A + (i - first) * panel + s * STEP);
          for (int64_t i = first; i < end; ++i) {
            for (int64_t s = 0; s < steps; s += stretch)
              for (int64_t j = 0; j < wide; ++j)
                multiply<Number>(of_A + (i - first) * panel + s * STEP, block + j * panel + s * STEP,
                         std::min(stretch, steps - s), sums + j * SUM, s > 0);
            for (int64_t j = 0; j < wide; ++j)
              write_sums(sums + j * SUM, call.C + i * SIDE * call.N + (n + j) * SIDE, call.N,
                         here(i), there(j), add, past);
          }
        };
#pragma omp for schedule(static)
        for (int64_t part = 0; part < call.threads; ++part) { // all have as many, to one
          const int64_t end = rows * (part + 1) / call.threads;
          for (int64_t first = rows * part / call.threads; first < end; first += panels)
            multiply_panels(first, std::min(end, first + panels));
        }
      }
    }
    _mm_sfence(); // what went past the caches is there for other threads
    _tile_release();
  }
}

} // namespace

#endif

extern "C" {

void mobilellm_bf16x6(const Product *call) {
#ifdef HAS_TILES
  call->parts == 1 ? run<uint16_t>(*call) : run<float>(*call);
#endif
}

} // extern "C"
