// Matrix products of small blocks that stay in the caches: C (M, N) = A (M, K) B (K, N), an epilogue on every tile.
//
// B comes in panels of TILE_COLUMNS columns, (columns / TILE_COLUMNS, K, TILE_COLUMNS), padded with zeros. A is read
// where it is. A tile of C is kept in registers while K runs; a panel of B stays in the first cache while M runs.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>

#include "simd.hpp"

constexpr int BLOCK_ROWS = 96;  // rows of a block: with its activations it fits into the second cache
constexpr int BLOCK_DEPTH = 256;  // of K at a time, so that a panel of B fits into the first cache

static inline long panels(long columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS; }
static inline long padded(long columns) { return panels(columns) * TILE_COLUMNS; }

// Memory for floats, aligned to a cache line, not initialised.
class Buffer {
   public:
    explicit Buffer(long floats)
        : start_(static_cast<float*>(::operator new[](sizeof(float) * std::max(floats, 1L), std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete[](start_, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator float*() const { return start_; }

   private:
    float* start_;
};

// Panel n / TILE_COLUMNS of B (K, N) with rows `stride` apart.
static inline void pack_rows(const float* b, long stride, long K, long N, long n, float* out) {
    const long width = std::min<long>(TILE_COLUMNS, N - n);
    for (long k = 0; k < K; ++k, out += TILE_COLUMNS) {
        const float* row = b + k * stride + n;
        if (width == TILE_COLUMNS) {
            store(out, load(row));
            store(out + LANES, load(row + LANES));
        } else {
            std::memset(out, 0, sizeof(float) * TILE_COLUMNS);
            std::memcpy(out, row, sizeof(float) * width);
        }
    }
}

// Panel n / TILE_COLUMNS of the transpose of B (N, K) with rows `stride` apart.
static inline void pack_transposed(const float* b, long stride, long K, long N, long n, float* out) {
    const long width = std::min<long>(TILE_COLUMNS, N - n);
    const long whole = width == TILE_COLUMNS ? K / LANES * LANES : 0;
    for (long k = 0; k < whole; k += LANES)
        for (long j = 0; j < TILE_COLUMNS; j += LANES) {
            Vector square[LANES];
            for (int i = 0; i < LANES; ++i) square[i] = load(b + (n + j + i) * stride + k);
            transpose(square);
            for (int i = 0; i < LANES; ++i) store(out + (k + i) * TILE_COLUMNS + j, square[i]);
        }
    for (long k = whole; k < K; ++k)
        for (long j = 0; j < TILE_COLUMNS; ++j)
            out[k * TILE_COLUMNS + j] = j < width ? b[(n + j) * stride + k] : 0.0f;
}

// All panels of B (K, N), or of the transpose of B (N, K), packed by all threads.
static inline void pack_weight(const float* b, long K, long N, bool transposed, int threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n += TILE_COLUMNS) {
        if (transposed)
            pack_transposed(b, K, K, N, n, out + n * K);
        else
            pack_rows(b, N, K, N, n, out + n * K);
    }
}

// The transpose of A (K, M), rows `stride` apart, as (M / TILE_ROWS, K, TILE_ROWS); what is beyond M is zero.
static inline void pack_tall(const float* a, long stride, long K, long M, float* out) {
    for (long m = 0; m < M; m += TILE_ROWS) {
        const long width = std::min<long>(TILE_ROWS, M - m);
        for (long k = 0; k < K; ++k, out += TILE_ROWS) {
            const float* row = a + k * stride + m;
            for (long j = 0; j < TILE_ROWS; ++j) out[j] = j < width ? row[j] : 0.0f;
        }
    }
}

// Where A's elements are. Element (m, k) of row block m / TILE_ROWS ...
enum class Layout {
    rows,    // m * stride + k: rows of contiguous numbers
    columns,  // k * stride + m: a transpose that is not made
    panels,  // (k / TILE_COLUMNS, m, k % TILE_COLUMNS) with `stride` between panels: what products write as panels
    tall,    // (m / TILE_ROWS, k, m % TILE_ROWS): what pack_tall writes
};

struct Matrix {
    const float* start;
    long stride;
};

template <Layout layout>
static inline const float* row_start(Matrix a, long m, long K) {
    if (layout == Layout::rows) return a.start + m * a.stride;
    if (layout == Layout::columns) return a.start + m;
    if (layout == Layout::panels) return a.start + m * TILE_COLUMNS;
    return a.start + m / TILE_ROWS * TILE_ROWS * K + m % TILE_ROWS;
}

// A tile of ROWS rows: sums over k0 <= k < k1 on top of `carried`, which takes them back unless this is the end of K.
template <Layout layout, int ROWS, class Epilogue>
static inline void tile(Matrix a, const float* b, long m, long n, long K, long k0, long k1, float* carried, Epilogue& done) {
    Vector c[ROWS][2];
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < 2; ++j)
            c[i][j] = k0 ? load(carried + i * TILE_COLUMNS + j * LANES) : Vector{};
    const float* row = row_start<layout>(a, m, K);
    auto step = [&](const float* element, long between_rows) __attribute__((always_inline)) {
        const Vector b0 = load(b), b1 = load(b + LANES);
        b += TILE_COLUMNS;
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) {
            const Vector x = splat(element[i * between_rows]);
            c[i][0] += x * b0;
            c[i][1] += x * b1;
        }
    };
    b += k0 * TILE_COLUMNS;
    if (layout == Layout::rows) {
#pragma GCC unroll 4
        for (long k = k0; k < k1; ++k) step(row + k, a.stride);
    } else if (layout == Layout::columns) {
#pragma GCC unroll 4
        for (long k = k0; k < k1; ++k) step(row + k * a.stride, 1);
    } else if (layout == Layout::tall) {
#pragma GCC unroll 4
        for (long k = k0; k < k1; ++k) step(row + k * TILE_ROWS, 1);
    } else {
        for (long k = k0; k < k1; k += TILE_COLUMNS) {
            const float* panel = row + k / TILE_COLUMNS * a.stride;
            const long width = std::min<long>(TILE_COLUMNS, k1 - k);
#pragma GCC unroll 4
            for (long i = 0; i < width; ++i) step(panel + i, TILE_COLUMNS);
        }
    }
    if (k1 < K) {
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < 2; ++j) store(carried + i * TILE_COLUMNS + j * LANES, c[i][j]);
    } else {
        for (int i = 0; i < ROWS; ++i) done(m + i, n, c[i][0], c[i][1]);
    }
}

// What is left of a panel of C behind the last whole tile, in tiles of 2^i rows.
template <Layout layout, int ROWS, class Epilogue>
static inline void last_rows(Matrix a, const float* b, long m, long M, long n, long K, long k0, long k1, float* carried,
                             Epilogue& done) {
    if (m + ROWS <= M) {
        tile<layout, ROWS>(a, b, m, n, K, k0, k1, carried + m * TILE_COLUMNS, done);
        m += ROWS;
    }
    if constexpr (ROWS > 1) last_rows<layout, ROWS / 2>(a, b, m, M, n, K, k0, k1, carried, done);
}

// One panel of C, columns n .. n + TILE_COLUMNS, over k0 <= k < k1 of A (M, K) B; M is at most BLOCK_ROWS, `b` is that
// panel of B. Between the parts of K, `carried` keeps the sums; the last one gives each row to `done(m, n, low, high)`.
template <Layout layout, class Epilogue>
static inline void panel_part(Matrix a, const float* b, long M, long n, long K, long k0, long k1, float* carried,
                              Epilogue& done) {
    long m = 0;
    for (; m + TILE_ROWS <= M; m += TILE_ROWS)
        tile<layout, TILE_ROWS>(a, b, m, n, K, k0, k1, carried + m * TILE_COLUMNS, done);
    last_rows<layout, LAST_ROWS>(a, b, m, M, n, K, k0, k1, carried, done);
}

// One panel of C.
template <Layout layout, class Epilogue>
static void panel_product(Matrix a, const float* b, long M, long n, long K, Epilogue done) {
    float carried[BLOCK_ROWS * TILE_COLUMNS];
    for (long k0 = 0; k0 < K; k0 += BLOCK_DEPTH)
        panel_part<layout>(a, b, M, n, K, k0, std::min<long>(k0 + BLOCK_DEPTH, K), carried, done);
}

// Columns n0 .. n1 of C (M, N), n0 at the start of a panel. A few panels take a part of K together, so that this part of A
// stays in the second cache.
template <Layout layout, class Epilogue>
static void product_range(Matrix a, const float* b, long M, long n0, long n1, long K, Epilogue done) {
    constexpr long GROUP = 8 * TILE_COLUMNS;
    float carried[GROUP * BLOCK_ROWS];
    for (long group = n0; group < n1; group += GROUP) {
        const long end = std::min(group + GROUP, n1);
        for (long k0 = 0; k0 < K; k0 += BLOCK_DEPTH)
            for (long n = group; n < end; n += TILE_COLUMNS)
                panel_part<layout>(a, b + n * K, M, n, K, k0, std::min<long>(k0 + BLOCK_DEPTH, K),
                                   carried + (n - group) * BLOCK_ROWS, done);
    }
}

// All of C.
template <Layout layout, class Epilogue>
static void product(Matrix a, const float* b, long M, long N, long K, Epilogue done) {
    product_range<layout>(a, b, M, 0, N, K, done);
}

// Two vectors to and from columns n .. of a row that may end in between.
static inline void store_row(float* row, long n, long N, Vector low, Vector high) {
    if (n + TILE_COLUMNS <= N) {
        store(row + n, low);
        store(row + n + LANES, high);
        return;
    }
    float both[TILE_COLUMNS];
    store(both, low);
    store(both + LANES, high);
    std::memcpy(row + n, both, sizeof(float) * (N - n));
}

struct Pair {
    Vector low, high;
};

static inline Pair load_row(const float* row, long n, long N) {
    if (n + TILE_COLUMNS <= N) return {load(row + n), load(row + n + LANES)};
    float both[TILE_COLUMNS] = {};
    std::memcpy(both, row + n, sizeof(float) * (N - n));
    return {load(both), load(both + LANES)};
}

// C (M, N) += A B in panel n / TILE_COLUMNS; C is in panels as B is, (N / TILE_COLUMNS, M, TILE_COLUMNS), so that it is
// read and written in one line of memory. K is at most BLOCK_DEPTH.
template <Layout layout>
static void add_panel(Matrix a, const float* b, long M, long n, long K, float* c) {
    c += n * M;
    auto add = [=](long m, long, Vector low, Vector high) {
        float* row = c + m * TILE_COLUMNS;
        store(row, load(row) + low);
        store(row + LANES, load(row + LANES) + high);
    };
    long m = 0;
    for (; m + TILE_ROWS <= M; m += TILE_ROWS) tile<layout, TILE_ROWS>(a, b, m, n, K, 0, K, c, add);
    last_rows<layout, LAST_ROWS>(a, b, m, M, n, K, 0, K, c, add);
}

// The same in all panels.
template <Layout layout>
static void add_product(Matrix a, const float* b, long M, long N, long K, float* c) {
    for (long n = 0; n < N; n += TILE_COLUMNS, b += K * TILE_COLUMNS) add_panel<layout>(a, b, M, n, K, c);
}

// C (M, N) from its panels into rows `stride` apart.
static inline void unpack(const float* c, long M, long N, float* out, long stride) {
    for (long n = 0; n < N; n += TILE_COLUMNS)
        for (long m = 0; m < M; ++m, c += TILE_COLUMNS)
            store_row(out + m * stride, n, N, load(c), load(c + LANES));
}

// The transpose of C (M, N), dense (N, M).
static inline void unpack_transposed(const float* c, long M, long N, float* out) {
    for (long n = 0; n < N; n += TILE_COLUMNS, c += M * TILE_COLUMNS)
        for (long j = 0; j < std::min<long>(TILE_COLUMNS, N - n); ++j)
            for (long m = 0; m < M; ++m) out[(n + j) * M + m] = c[m * TILE_COLUMNS + j];
}
