// Vectors of float, the functions of them that the kernels need, and how many there are on this processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#ifndef VAT_LANES  // the tests set it, to run the wide layout on narrow processors
#if defined(__AVX512F__)
#define VAT_LANES 16
#elif defined(__AVX__)
#define VAT_LANES 8
#else
#define VAT_LANES 4
#endif
#endif
constexpr int LANES = VAT_LANES;

// A tile of the output in registers: TILE_ROWS x (2 * LANES) sums, two vectors of B and one of A, 27 of 32 registers with
// AVX-512, 15 of 16 with AVX, 11 else. LAST_ROWS is the largest power of two below.
constexpr int TILE_ROWS = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;
constexpr int LAST_ROWS = LANES == 16 ? 8 : LANES == 8 ? 4 : 2;
constexpr int TILE_COLUMNS = 2 * LANES;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVector __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline Vector load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
static inline void store(float* p, Vector v) { *reinterpret_cast<Unaligned*>(p) = v; }
static inline Vector splat(float x) { return x - Vector{}; }
static inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }
static inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define VAT_SHUFFLES 1
#endif
#endif

#ifdef VAT_SHUFFLES
// v with lanes STEP apart exchanged.
template <int STEP, std::size_t... L>
static inline Vector crossed(Vector v, std::index_sequence<L...>) {
    return __builtin_shufflevector(v, v, (L ^ STEP)...);
}

// All lanes joined by `join`, in every lane.
template <int STEP = LANES / 2, class Join>
static inline Vector joined(Vector v, Join join) {
    v = join(v, crossed<STEP>(v, std::make_index_sequence<LANES>()));
    if constexpr (STEP > 1) return joined<STEP / 2>(v, join);
    return v;
}

static inline float sum(Vector v) { return joined(v, [](Vector a, Vector b) { return a + b; })[0]; }
static inline float largest(Vector v) { return joined(v, larger)[0]; }

// Exchanges the off-diagonal STEP x STEP blocks of every 2 STEP x 2 STEP block.
template <int STEP, std::size_t... L>
static inline void exchange(Vector (&r)[LANES], std::index_sequence<L...>) {
    for (int i = 0; i < LANES; ++i) {
        if (i & STEP) continue;
        const Vector a = r[i], b = r[i + STEP];
        r[i] = __builtin_shufflevector(a, b, (L & STEP ? LANES + L - STEP : L)...);
        r[i + STEP] = __builtin_shufflevector(a, b, (L & STEP ? LANES + L : L + STEP)...);
    }
}

template <int STEP = 1>
static inline void transpose(Vector (&r)[LANES]) {
    exchange<STEP>(r, std::make_index_sequence<LANES>());
    if constexpr (2 * STEP < LANES) transpose<2 * STEP>(r);
}
#else
static inline float sum(Vector v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

static inline float largest(Vector v) {
    float found = v[0];
    for (int i = 1; i < LANES; ++i) found = v[i] > found ? v[i] : found;
    return found;
}

static inline void transpose(Vector (&r)[LANES]) {
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const float kept = r[i][j];
            r[i][j] = r[j][i], r[j][i] = kept;
        }
}
#endif

// e^x to 2 units in the last place; below -87 it stays at e^-87. NaN stays NaN: a comparison with it is false, and then
// `larger` and `smaller` return their second argument.
static inline Vector exponential(Vector x) {
    x = smaller(splat(88.0f), larger(splat(-87.0f), x));
    // Adding 1.5 * 2^23 rounds to an integer n, which then stands in the lowest bits.
    const Vector shifted = x * 1.44269504f + 12582912.0f;
    const Vector n = shifted - 12582912.0f;
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2, in two parts; |r| <= 0.35
    // The power series of e^r, in pairs: a long chain of dependent operations would leave the processor waiting.
    const Vector r2 = r * r, r4 = r2 * r2;
    const Vector high = (r * 1.98412698e-4f + 1.38888889e-3f) * r2 + (r * 8.33333333e-3f + 4.16666667e-2f);
    const Vector low = (r * 1.66666667e-1f + 0.5f) * r2 + (r + 1.0f);
    const Vector p = high * r4 + low;
    return (Vector)((IntVector)p + ((IntVector)shifted << 23));
}

// erf(x) with an absolute error of 3e-7: x P(x^2) / Q(x^2), fitted to |x| <= 3.92 (1.6e-8 in exact arithmetic), beyond
// which erf is 1 to 3e-8.
static inline Vector error_function(Vector x) {
    x = smaller(splat(3.92f), larger(splat(-3.92f), x));
    const Vector t = x * x, t2 = t * t, t4 = t2 * t2;
    const Vector p = (t * 2.03473996e-6f + 2.87479258e-4f) * t4 +
                     ((t * 3.86831278e-3f + 5.30604345e-2f) * t2 + (t * 1.92763693e-1f + 1.12837902f));
    const Vector q = (t * 3.80706868e-5f + 1.18811201e-3f) * t4 +
                     ((t * 1.51722657e-2f + 1.15084470e-1f) * t2 + (t * 5.04164041e-1f + 1.0f));
    return x * p / q;
}

// The cumulative function of the normal distribution: GELU is u cumulative(u).
static inline Vector cumulative(Vector u) { return error_function(u * 0.707106781f) * 0.5f + 0.5f; }

// Its density; GELU's derivative is cumulative(u) + u density(u).
static inline Vector density(Vector u) { return exponential(u * u * -0.5f) * 0.398942280f; }
