// A step of Muon by the bfloat16 units of a processor with AMX. kernels/muon_step.py calls it.
//
// A thread takes matrix after matrix: gradient and momentum are read once, the direction lies in its
// caches while Newton-Schulz iterates, and the last iteration writes to the weights. Of the products
// x x^T and its square, which are symmetric, a half is computed. Sums are float32, factors bfloat16;
// the first iteration divides by the norm, so that no pass is spent on that.
//
// In the caches a matrix lies upright: m rows of n >= m numbers, filled up to 32 with zeros.

#include <atomic>
#include <cmath>

#include "tiles.h"

extern "C" {

struct Moved { // a matrix (rows, columns) whose rows lie one after another
  const float *gradient;
  float *momentum, *weight;
  int64_t rows, columns;
  float amount; // of the gradient in the momentum; 1 - momentum
  float kept;   // of the weight
  float scale;  // of the orthogonalized direction, which is taken from the weight
};

struct Step {
  const Moved *matrices;
  int64_t count;
  int64_t iterations;
  float a, b, c; // x <- a x + (b x x^T + c (x x^T)^2) x
  float least;   // of the norm
  int64_t threads;
};

static_assert(sizeof(Moved) == 56 && sizeof(Step) == 48, "kernels/muon_step.py has the same");

} // extern "C"

#ifdef HAS_TILES

namespace {

// Four squares of 16: what a block of 32 consists of.
struct Block {
  Floats squares[2][2][LANES];
};

// The block whose rows are `of(half, c, r)`: of its halves of 16 rows, their two squares.
template <class Of> inline Block block_of(Of of) {
  Block block;
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t c = 0; c < 2; ++c)
      for (int64_t r = 0; r < LANES; ++r) block.squares[half][c][r] = of(half, c, r);
  return block;
}

inline void transpose(Floats *rows) {
  Words words[LANES];
  std::memcpy(words, rows, sizeof words);
  transpose(words);
  std::memcpy(rows, words, sizeof words);
}

// Tiles of a matrix of m x n numbers: 16 rows and 32 columns each, row of tiles after row of tiles.
inline uint16_t *tile_of(uint16_t *tiles, int64_t across, int64_t row, int64_t column) {
  return tiles + (row * across + column) * TILE;
}

// A block as two tiles at `to`, whose next row of tiles is `step` behind; and, with `turned`, the
// same tiles with pairs of columns as lines: what the transposed matrix is as the second factor.
inline void write_tiles(const Block &block, uint16_t *to, uint16_t *turned, int64_t step) {
  for (int64_t half = 0; half < 2; ++half) {
    uint16_t *const tile = to + half * step;
    for (int64_t r = 0; r < LANES; ++r)
      for (int64_t c = 0; c < 2; ++c) write(tile + r * SIDE + c * LANES, block.squares[half][c][r]);
    if (!turned) continue;
    Words lines[LANES];
    std::memcpy(lines, tile, sizeof lines);
    transpose(lines);
    std::memcpy(turned + half * step, lines, sizeof lines);
  }
}

// The two tiles of a block as pairs of rows: what the matrix is as the second factor.
inline void write_pairs(const uint16_t *from, int64_t step, uint16_t *to) {
  for (int64_t c = 0; c < 2; ++c)
    for (int64_t p = 0; p < LANES; ++p) {
      const uint16_t *const row = from + p / 8 * step + p % 8 * 2 * SIDE + c * LANES;
      store(to + c * TILE + p * SIDE, words_of(row) | words_of(row + SIDE) << 16);
    }
}

// Sums of two rows of tiles times two columns of them, `steps` tiles long; tiles of the second
// factor are `next` apart and its columns `other`.
inline void multiply(const uint16_t *A, int64_t row, const uint16_t *B, int64_t next, int64_t other,
                     int64_t steps, float *sums) {
  __asm__ volatile("" ::: "memory"); // what is read has been written
  EACH_SUM(_tile_zero);
  for (int64_t step = 0; step < steps; ++step, A += TILE, B += next) {
    TAKE(4, 5, A, A + row);
    TAKE(6, 7, B, B + other);
    MULTIPLY;
  }
  EACH_SUM(KEEP_SUM);
  __asm__ volatile("" ::: "memory");
}

inline Floats sum_of(const float *sums, int64_t half, int64_t c, int64_t r) {
  return load<Floats>(sums + (half * 2 + c) * SUM / 4 + r * LANES);
}

// Where a block of an upright matrix lies in memory: squares change places where it is turned.
struct Place {
  const Moved &of;
  bool turned;

  // Calls with the square's place and how many of its rows and columns exist.
  template <class Act> void squares(int64_t i, int64_t j, Act act) const {
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t c = 0; c < 2; ++c) {
        int64_t row = i * SIDE + half * LANES, column = j * SIDE + c * LANES;
        if (turned) std::swap(row, column);
        act(half, c, row * of.columns + column, std::min(LANES, of.rows - row),
            std::min(LANES, of.columns - column));
      }
  }
};

inline void put(float *to, Floats x, int64_t count) {
  if (count >= LANES) store(to, x);
  else if (count > 0) std::memcpy(to, &x, count * sizeof *to);
}

// The block of the direction: momentum takes the gradient in, which looks ahead by it (Nesterov).
inline Floats direction(const Place &place, int64_t i, int64_t j, Block &block) {
  const Moved &of = place.of;
  Floats squares = {};
  place.squares(i, j, [&](int64_t half, int64_t c, int64_t at, int64_t rows, int64_t columns) {
    Floats *const found = block.squares[half][c];
    for (int64_t r = 0; r < LANES; ++r, at += of.columns) {
      found[r] = Floats{};
      if (r >= rows || columns <= 0) continue;
      const Floats gradient = numbers(of.gradient + at, columns);
      Floats momentum = numbers(of.momentum + at, columns);
      momentum += of.amount * (gradient - momentum);
      put(of.momentum + at, momentum, columns);
      found[r] = momentum - (momentum - gradient) * of.amount;
      squares += found[r] * found[r];
    }
    if (place.turned) transpose(found);
  });
  return squares;
}

inline void take_from_weight(const Place &place, int64_t i, int64_t j, Block &block) {
  const Moved &of = place.of;
  place.squares(i, j, [&](int64_t half, int64_t c, int64_t at, int64_t rows, int64_t columns) {
    Floats *const update = block.squares[half][c];
    if (place.turned) transpose(update);
    for (int64_t r = 0; r < rows; ++r, at += of.columns)
      if (columns > 0)
        put(of.weight + at, numbers(of.weight + at, columns) * of.kept - update[r] * of.scale,
            columns);
  });
}

struct Orthogonalizer {
  const Step &step;
  Space<uint16_t> x_space, turned_space, pairs_space, gram_space, gram_turned_space, power_space;
  Space<float> sum_space;
  int64_t down = 0, across = 0; // blocks of x
  uint16_t *x = nullptr, *turned = nullptr, *pairs = nullptr, *gram = nullptr,
           *gram_turned = nullptr, *power = nullptr;
  float *sums = nullptr;

  explicit Orthogonalizer(const Step &step) : step(step) {}

  void write_x(int64_t i, int64_t j, const Block &block) {
    uint16_t *const to = tile_of(x, across, 2 * i, j);
    write_tiles(block, to, tile_of(turned, across, 2 * i, j), across * TILE);
    write_pairs(to, across * TILE, pairs + (i * across + j) * 2 * TILE);
  }

  // A block of a symmetric matrix, and the one on the other side of its diagonal.
  void write_both(uint16_t *to, uint16_t *turned, int64_t i, int64_t j, Block &block) {
    const auto at = [&](uint16_t *tiles, int64_t row, int64_t column) {
      return tiles ? tile_of(tiles, down, 2 * row, column) : nullptr;
    };
    write_tiles(block, at(to, i, j), at(turned, i, j), down * TILE);
    if (i == j) return;
    for (auto &row : block.squares)
      for (auto &square : row) transpose(square);
    for (int64_t r = 0; r < LANES; ++r) std::swap(block.squares[0][1][r], block.squares[1][0][r]);
    write_tiles(block, at(to, j, i), at(turned, j, i), down * TILE);
  }

  // gram = x x^T / norm^2, with `inverse` 1 / norm.
  void multiply_by_itself(float inverse) {
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = i; j < down; ++j) {
        multiply(tile_of(x, across, 2 * i, 0), across * TILE, tile_of(turned, across, 2 * j, 0),
                 TILE, across * TILE, across, sums);
        Block block = block_of([&](int64_t half, int64_t c, int64_t r) {
          return sum_of(sums, half, c, r) * inverse * inverse;
        });
        write_both(gram, gram_turned, i, j, block);
      }
  }

  // power = b gram + c gram^2
  void square() {
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = i; j < down; ++j) {
        multiply(tile_of(gram, down, 2 * i, 0), down * TILE, tile_of(gram_turned, down, 2 * j, 0),
                 TILE, down * TILE, down, sums);
        Block block = block_of([&](int64_t half, int64_t c, int64_t r) {
          return step.b * read(tile_of(gram, down, 2 * i + half, j) + r * SIDE + c * LANES) +
                 step.c * sum_of(sums, half, c, r);
        });
        write_both(power, nullptr, i, j, block);
      }
  }

  // x = (a x + power x) / norm; the last one goes to the weights.
  void move(const Place &place, float inverse, bool last) {
    for (int64_t j = 0; j < across; ++j) {
      for (int64_t i = 0; i < down; ++i)
        multiply(tile_of(power, down, 2 * i, 0), down * TILE, pairs + j * 2 * TILE,
                 across * 2 * TILE, TILE, down, sums + i * SUM);
      for (int64_t i = 0; i < down; ++i) {
        Block block = block_of([&](int64_t half, int64_t c, int64_t r) {
          return inverse * (step.a * read(tile_of(x, across, 2 * i + half, j) + r * SIDE + c * LANES) +
                            sum_of(sums + i * SUM, half, c, r));
        });
        if (last) take_from_weight(place, i, j, block);
        else write_x(i, j, block);
      }
    }
  }

  void run(const Moved &matrix) {
    const Place place{matrix, matrix.rows > matrix.columns};
    down = parts_of(std::min(matrix.rows, matrix.columns), SIDE);
    across = parts_of(std::max(matrix.rows, matrix.columns), SIDE);
    for (auto [space, to] : {std::pair(&x_space, &x), {&turned_space, &turned}, {&pairs_space, &pairs}})
      *to = space->of(down * across * SUM);
    for (auto [space, to] : {std::pair(&gram_space, &gram), {&gram_turned_space, &gram_turned},
                             {&power_space, &power}})
      *to = space->of(down * down * SUM);
    sums = sum_space.of(down * SUM);
    Floats squares = {};
    for (int64_t i = 0; i < down; ++i)
      for (int64_t j = 0; j < across; ++j) {
        Block block;
        squares += direction(place, i, j, block);
        write_x(i, j, block);
      }
    float inverse = 1 / std::max(std::sqrt(total(squares)), step.least);
    for (int64_t n = 1; n <= step.iterations; ++n, inverse = 1) {
      multiply_by_itself(inverse);
      square();
      move(place, inverse, n == step.iterations);
    }
  }
};

} // namespace

#endif

extern "C" {

void mobilellm_muon(const Step *step) {
#ifdef HAS_TILES
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(step->threads)
  {
    const Tiles tiles;
    _tile_loadconfig(&tiles);
    Orthogonalizer own(*step);
    for (int64_t i; (i = next++) < step->count;) own.run(step->matrices[i]);
    _tile_release();
  }
#endif
}

} // extern "C"
