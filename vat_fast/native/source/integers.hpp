// Matrix products of integers: C (M, N) = A (M, K) B (K, N) in 16 or 8 bits, summed exactly in 32.
//
// Numbers that fill a lane's 32 bits are LANES apart: a block of `together` vectors of K is read and written as words, lane
// l holding l, LANES + l, and so on, so that rounding needs no shuffle. B has the same order along K, in panels as for
// floats: (columns / TILE_COLUMNS, words of K, TILE_COLUMNS). Sums become floats after every DEPTH of K.
#pragma once

#include <cstdint>
#include <cstring>

#include "products.hpp"
#include "shares.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef VAT_INTEGERS  // the tests set these two, to run one processor's instructions on another (tests/native/instructions.hpp)
#if VAT_LANES == 16 && defined(__AVX512BW__)
#define VAT_INTEGERS 512
#elif VAT_LANES == 8 && defined(__AVX2__)
#define VAT_INTEGERS 256
#else
#define VAT_INTEGERS 0  // right everywhere, fast nowhere
#endif
#endif

#ifndef VAT_VNNI
#if (VAT_INTEGERS == 512 && defined(__AVX512VNNI__)) || (VAT_INTEGERS == 256 && defined(__AVXVNNI__))
#define VAT_VNNI 1
#else
#define VAT_VNNI 0
#endif
#endif

typedef int32_t UnalignedInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline IntVector load_ints(const int32_t* p) { return *reinterpret_cast<const UnalignedInts*>(p); }

// c + a_0 b_0 + a_1 b_1 of the 16-bit numbers in every lane.
static inline IntVector add_pairs(IntVector c, IntVector a, IntVector b) {
#if VAT_INTEGERS == 512 && VAT_VNNI
    return (IntVector)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#elif VAT_INTEGERS == 512
    return c + (IntVector)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VAT_INTEGERS == 256 && VAT_VNNI
    return (IntVector)_mm256_dpwssd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b);
#elif VAT_INTEGERS == 256
    return c + (IntVector)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return c + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Whether add_quads sums 8-bit products in 16 bits. Four weights then share a sum, two neighbours in each of the two
// quads: times the largest input they must stay below 2^15. Inputs and weights share these bits evenly.
constexpr bool SHARES_SUMS = VAT_INTEGERS && !VAT_VNNI;
constexpr int INPUT_MOST = SHARES_SUMS ? 181 : 255;
constexpr int SHARED_MOST = 32767 / INPUT_MOST;

// c + the sum of a_i b_i over the four 8-bit numbers in every lane, and again with d and e; a and d are unsigned.
static inline IntVector add_quads(IntVector c, IntVector a, IntVector b, IntVector d, IntVector e) {
#if VAT_INTEGERS == 512 && VAT_VNNI
    return (IntVector)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b), (__m512i)d, (__m512i)e);
#elif VAT_INTEGERS == 512
    const __m512i sums = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)b),
                                          _mm512_maddubs_epi16((__m512i)d, (__m512i)e));
    return c + (IntVector)_mm512_madd_epi16(sums, _mm512_set1_epi16(1));
#elif VAT_INTEGERS == 256 && VAT_VNNI
    return (IntVector)_mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32((__m256i)c, (__m256i)a, (__m256i)b), (__m256i)d,
                                              (__m256i)e);
#elif VAT_INTEGERS == 256
    const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b),
                                          _mm256_maddubs_epi16((__m256i)d, (__m256i)e));
    return c + (IntVector)_mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#else
    for (int bit = 0; bit < 32; bit += 8)
        c += (a >> bit & 255) * (b << (24 - bit) >> 24) + (d >> bit & 255) * (e << (24 - bit) >> 24);
    return c;
#endif
}

// The whole numbers nearest to x, |x| < 2^22: adding 1.5 * 2^23 leaves them in the lowest bits.
static inline IntVector nearest(Vector x) { return (IntVector)(x + 12582912.0f) - 0x4B400000; }

struct Span {
    float low, high;
};

// The smallest and largest of x * even; even may be null. Both are NaN if a number is.
static inline Span span(const float* x, const float* even, long K) {
    const long whole = K / LANES * LANES;
    Vector low = splat(__builtin_inff()), high = -low;
    IntVector wrong{};
    auto see = [&](Vector v) __attribute__((always_inline)) {
        low = smaller(low, v), high = larger(high, v), wrong |= v != v;
    };
    for (long k = 0; k < whole; k += LANES) see(even ? load(x + k) * load(even + k) : load(x + k));
    for (long k = whole; k < K; ++k) see(splat(even ? x[k] * even[k] : x[k]));
    const float poison = largest((Vector)(wrong & 0x3f800000)) > 0.0f ? __builtin_nanf("") : 0.0f;
    return {poison - largest(-low), poison + largest(high)};
}

// How a row of numbers is written: x is about low + scale * number.
struct Row {
    float low, scale;
};

// Rows to 16 bits, as many levels below zero as above.
struct Signed16 {
    static constexpr long TOGETHER = 2, DEPTH = 128;  // DEPTH in words
    static constexpr int ROWS = TILE_ROWS, LAST = LAST_ROWS;
    static constexpr int MOST = 16383;  // times the sum of a part's weights this must stay below 2^31
    static constexpr bool HAS_LOW = false;

    static Row row(Span s) { return {0.0f, std::max(s.high, -s.low) / MOST}; }

    // A step of K: one word.
    static constexpr long STEP = 1;
    struct Weights {
        IntVector b[2];
    };
    static Weights weights(const int32_t* b) { return {load_ints(b), load_ints(b + LANES)}; }
    static void add(IntVector (&c)[2], const int32_t* a, const Weights& w) {
        const IntVector x = *a - IntVector{};
        c[0] = add_pairs(c[0], x, w.b[0]);
        c[1] = add_pairs(c[1], x, w.b[1]);
    }
};

// Rows to 8 bits without a sign, all levels between the row's smallest and largest number.
struct Unsigned8 {
    static constexpr long TOGETHER = 4, DEPTH = 128;
    static constexpr int ROWS = VAT_INTEGERS == 256 ? 4 : TILE_ROWS;  // four vectors of B want registers too
    static constexpr int LAST = VAT_INTEGERS == 256 ? 2 : LAST_ROWS;
    static constexpr int MOST = INPUT_MOST;
    static constexpr bool HAS_LOW = true;

    static Row row(Span s) { return {s.low, (s.high - s.low) / MOST}; }

    // A step of K: two words.
    static constexpr long STEP = 2;
    struct Weights {
        IntVector first[2], second[2];
    };
    static Weights weights(const int32_t* b) {
        return {{load_ints(b), load_ints(b + LANES)}, {load_ints(b + 2 * LANES), load_ints(b + 3 * LANES)}};
    }
    static void add(IntVector (&c)[2], const int32_t* a, const Weights& w) {
        const IntVector x = a[0] - IntVector{}, y = a[1] - IntVector{};
        c[0] = add_quads(c[0], x, w.first[0], y, w.second[0]);
        c[1] = add_quads(c[1], x, w.first[1], y, w.second[1]);
    }
};

// Words of a row of K numbers; what fills the last block is zero in B.
template <class Format>
static inline long words(long K) {
    constexpr long BLOCK = Format::TOGETHER * LANES;
    return (K + BLOCK - 1) / BLOCK * LANES;
}

// One row in integers; `even` (K) is what each number is multiplied by before, or null.
template <class Format>
static inline Row quantise_row(const float* x, const float* even, long K, int32_t* out) {
    constexpr long BLOCK = Format::TOGETHER * LANES;
    constexpr int BITS = 32 / Format::TOGETHER;
    const Row row = Format::row(span(x, even, K));
    const float inverse = row.scale > 1e-36f ? 1.0f / row.scale : 0.0f;
    auto block = [=](const float* x, const float* even, int32_t* out) __attribute__((always_inline)) {
        IntVector word{};
#pragma GCC unroll 4
        for (int i = 0; i < Format::TOGETHER; ++i) {
            const Vector v = even ? load(x + i * LANES) * load(even + i * LANES) : load(x + i * LANES);
            const IntVector q = nearest((v - row.low) * inverse);
            word |= (i + 1 < Format::TOGETHER ? q & ((1 << BITS) - 1) : q) << (i * BITS);
        }
        store(reinterpret_cast<float*>(out), (Vector)word);
    };
    long k = 0;
    for (; k + BLOCK <= K; k += BLOCK, out += LANES) block(x + k, even ? even + k : nullptr, out);
    if (k < K) {
        float last[BLOCK] = {}, last_even[BLOCK] = {};
        std::memcpy(last, x + k, sizeof(float) * (K - k));
        if (even) std::memcpy(last_even, even + k, sizeof(float) * (K - k));
        block(last, even ? last_even : nullptr, out);
    }
    return row;
}

// A tile of ROWS rows over the words k0 <= k < k1 of K, on top of `carried` as for floats.
template <class Format, int ROWS, class Epilogue>
static inline void integer_tile(const int32_t* a, const int32_t* b, long m, long n, long K, long k0, long k1,
                                float* carried, Epilogue& done) {
    IntVector c[ROWS][2] = {};
    const int32_t* row = a + m * K;
    b += k0 * TILE_COLUMNS;
#pragma GCC unroll 4
    for (long k = k0; k < k1; k += Format::STEP, b += Format::STEP * TILE_COLUMNS) {
        const typename Format::Weights w = Format::weights(b);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; ++i) Format::add(c[i], row + i * K + k, w);
    }
    for (int i = 0; i < ROWS; ++i) {
        Vector sums[2];
        for (int j = 0; j < 2; ++j) {
            sums[j] = __builtin_convertvector(c[i][j], Vector);
            if (k0) sums[j] += load(carried + i * TILE_COLUMNS + j * LANES);
            if (k1 < K) store(carried + i * TILE_COLUMNS + j * LANES, sums[j]);
        }
        if (k1 >= K) done(m + i, n, sums[0], sums[1]);
    }
}

template <class Format, int ROWS, class Epilogue>
static inline void last_integer_rows(const int32_t* a, const int32_t* b, long m, long M, long n, long K, long k0,
                                     long k1, float* carried, long between, Epilogue& done) {
    if (m + ROWS <= M) {
        integer_tile<Format, ROWS>(a, b, m, n, K, k0, k1, carried + m * between, done);
        m += ROWS;
    }
    if constexpr (ROWS > 1) last_integer_rows<Format, ROWS / 2>(a, b, m, M, n, K, k0, k1, carried, between, done);
}

// Rows that are worked on together: all where A stays in the second cache and sums need not be carried, else a block.
template <class Format>
static inline long rows_together(long M, long K) {
    if (K <= Format::DEPTH && M * K <= (1L << 16)) return M;
    const long blocks = (M + BLOCK_ROWS - 1) / BLOCK_ROWS, each = (M + blocks - 1) / blocks;
    return std::min<long>((each + Format::ROWS - 1) / Format::ROWS * Format::ROWS, BLOCK_ROWS);
}

// One share of C (M, N); K counts words, rows of A are dense. Before the rows of a panel are done, `epilogue.begin(n)` is
// called, then `epilogue(m, n, low, high)` for each, with the sums as floats.
template <class Format, class Epilogue>
static void integer_product(const int32_t* a, const int32_t* b, const Share& share, long K, Epilogue& epilogue) {
    float carried[PANELS_TOGETHER * TILE_COLUMNS * BLOCK_ROWS];
    // With one part of K nothing is carried, and there is no room for all rows.
    const long between = K <= Format::DEPTH ? 0 : TILE_COLUMNS;
    auto done = [&](long m, long n, Vector low, Vector high)
                    __attribute__((always_inline)) { epilogue(share.first + m, n, low, high); };
    a += share.first * K;
    for (long k0 = 0; k0 < K; k0 += Format::DEPTH) {
        const long k1 = std::min<long>(k0 + Format::DEPTH, K);
        for (long n = share.n0; n < share.n1; n += TILE_COLUMNS) {
            const int32_t* panel = b + n * K;
            float* sums = carried + (n - share.n0) * BLOCK_ROWS;
            if (k1 >= K) epilogue.begin(n);
            long m = 0;
            for (; m + Format::ROWS <= share.rows; m += Format::ROWS)
                integer_tile<Format, Format::ROWS>(a, panel, m, n, K, k0, k1, sums + m * between, done);
            last_integer_rows<Format, Format::LAST>(a, panel, m, share.rows, n, K, k0, k1, sums, between, done);
        }
    }
}
