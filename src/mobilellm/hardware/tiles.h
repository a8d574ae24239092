// The units of a processor with AMX: eight tiles of 16 lines of 64 bytes, which multiply bfloat16 and
// sum in float32. kernels/amx.py loads what includes this.
//
// C (32, 32) is four tiles, 0 to 3; of A two tiles of 16 rows and 32 k, and of B two of 16 pairs of
// k and 16 columns, a line a pair, are multiplied at a time.

#pragma once

#include <cstdlib>

#include "vectors.h"

#if defined(__linux__) && defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#endif

// Whether this process may use the units: the kernel of the machine gives them on demand.
extern "C" int64_t mobilellm_tiles_allowed() {
#ifdef HAS_TILES
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18; // asm/prctl.h
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
  return 0;
#endif
}

namespace {

constexpr int64_t SIDE = 2 * LANES;    // of a block of C, and k of a tile
constexpr int64_t TILE = LANES * SIDE; // numbers of bfloat16
constexpr int64_t SUM = SIDE * SIDE;   // of a block of C

inline int64_t parts_of(int64_t n, int64_t by) { return (n + by - 1) / by; }

inline Floats numbers(const float *from, int64_t count) { // 0 from there on
  if (count >= LANES) return load<Floats>(from);
  Floats found = {};
  if (count > 0) std::memcpy(&found, from, count * sizeof *from);
  return found;
}

#ifdef HAS_TILES

// Compilers have some of these as statements, and want tiles as literals.
#define EACH_SUM(act) act(0); act(1); act(2); act(3)
#define TAKE_SUM(tile) _tile_loadd(tile, sums + (tile) * SUM / 4, 64)
#define KEEP_SUM(tile) _tile_stored(tile, sums + (tile) * SUM / 4, 64)
#define TAKE(tile, next, from, other) _tile_loadd(tile, from, 64); _tile_loadd(next, other, 64)
#define MULTIPLY_ROWS(sum, next, tile) _tile_dpbf16ps(sum, tile, 6); _tile_dpbf16ps(next, tile, 7)
#define MULTIPLY MULTIPLY_ROWS(0, 1, 4); MULTIPLY_ROWS(2, 3, 5)

struct alignas(64) Tiles { // of 16 lines of 64 bytes
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#endif

// Memory of one thread, which grows as it is asked for more.
template <class T> class Space {
  void *data = nullptr;
  int64_t size = 0;

public:
  T *of(int64_t numbers) {
    if (numbers > size) {
      std::free(data);
      size = numbers;
      data = std::aligned_alloc(64, parts_of(numbers * sizeof(T), 64) * 64);
      if (!data) std::abort();
    }
    return static_cast<T *>(data);
  }
  ~Space() { std::free(data); }
};

} // namespace
