// The instructions on integers of AVX-512BW, AVX512-VNNI and AVX-VNNI written out, number by number as Intel's Intrinsics
// Guide describes them, so that what is written for such processors runs on any other. Forced in front of the sources.
#pragma once

#include <cstdint>
#include <immintrin.h>

namespace written_out {

template <class Vector, class Number>
struct Numbers {
    static constexpr int COUNT = sizeof(Vector) / sizeof(Number);
    typedef Number Lanes __attribute__((vector_size(sizeof(Vector))));
    Lanes lanes;
    explicit Numbers(Vector v) : lanes((Lanes)v) {}
    Number operator[](int i) const { return lanes[i]; }
};

static inline int16_t saturated(int32_t x) { return x > INT16_MAX ? INT16_MAX : x < INT16_MIN ? INT16_MIN : x; }
static inline int32_t wrapped(int64_t x) { return (int32_t)(uint32_t)(uint64_t)x; }

// c + a_0 b_0 + a_1 b_1 of signed 16-bit numbers in every 32 bits: VPMADDWD with c zero, VPDPWSSD.
template <class Vector>
static inline Vector pairs(Vector c, Vector a, Vector b) {
    const Numbers<Vector, int16_t> x(a), y(b);
    const Numbers<Vector, int32_t> z(c);
    typename Numbers<Vector, int32_t>::Lanes out{};
    for (int i = 0; i < Numbers<Vector, int32_t>::COUNT; ++i)
        out[i] = wrapped((int64_t)z[i] + (int64_t)x[2 * i] * y[2 * i] + (int64_t)x[2 * i + 1] * y[2 * i + 1]);
    return (Vector)out;
}

// a_0 b_0 + a_1 b_1 in every 16 bits, saturated; a without, b with a sign: VPMADDUBSW.
template <class Vector>
static inline Vector byte_pairs(Vector a, Vector b) {
    const Numbers<Vector, uint8_t> x(a);
    const Numbers<Vector, int8_t> y(b);
    typename Numbers<Vector, int16_t>::Lanes out{};
    for (int i = 0; i < Numbers<Vector, int16_t>::COUNT; ++i)
        out[i] = saturated((int32_t)x[2 * i] * y[2 * i] + (int32_t)x[2 * i + 1] * y[2 * i + 1]);
    return (Vector)out;
}

// c + the sum of four a_i b_i in every 32 bits; a without, b with a sign: VPDPBUSD.
template <class Vector>
static inline Vector quads(Vector c, Vector a, Vector b) {
    const Numbers<Vector, uint8_t> x(a);
    const Numbers<Vector, int8_t> y(b);
    const Numbers<Vector, int32_t> z(c);
    typename Numbers<Vector, int32_t>::Lanes out{};
    for (int i = 0; i < Numbers<Vector, int32_t>::COUNT; ++i) {
        int64_t sum = z[i];
        for (int j = 4 * i; j < 4 * i + 4; ++j) sum += (int32_t)x[j] * y[j];
        out[i] = wrapped(sum);
    }
    return (Vector)out;
}

// Sums of 16-bit numbers that wrap: VPADDW.
template <class Vector>
static inline Vector sums(Vector a, Vector b) {
    const Numbers<Vector, uint16_t> x(a), y(b);
    return (Vector)(x.lanes + y.lanes);
}

template <class Vector>
static inline Vector same(int16_t x) {
    return (Vector)(typename Numbers<Vector, int16_t>::Lanes{} + x);
}

}  // namespace written_out

#define _mm512_madd_epi16(a, b) written_out::pairs<__m512i>(__m512i{}, a, b)
#define _mm512_dpwssd_epi32(c, a, b) written_out::pairs<__m512i>(c, a, b)
#define _mm256_dpwssd_avx_epi32(c, a, b) written_out::pairs<__m256i>(c, a, b)
#define _mm512_maddubs_epi16(a, b) written_out::byte_pairs<__m512i>(a, b)
#define _mm512_add_epi16(a, b) written_out::sums<__m512i>(a, b)
#define _mm512_set1_epi16(x) written_out::same<__m512i>(x)
#define _mm512_dpbusd_epi32(c, a, b) written_out::quads<__m512i>(c, a, b)
#define _mm256_dpbusd_avx_epi32(c, a, b) written_out::quads<__m256i>(c, a, b)
