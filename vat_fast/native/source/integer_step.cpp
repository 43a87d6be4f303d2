// Linears of a frozen policy in integers: weights rounded once, each row of the input when it is read.

#include <omp.h>

#include "activation.hpp"
#include "integers.hpp"

namespace {

template <class Format>
void linear(const float* x, long x_row, long M, long K, const float* even, const int32_t* packed, const float* scale,
            const float* sums, const float* bias, long N, int activation, const float* residual, long residual_row,
            float* out, long out_row, int32_t* numbers, Row* rows, int threads) {
    const long width = words<Format>(K), all = panels(N), parts = std::min<long>(threads, all);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long m = 0; m < M; ++m) rows[m] = quantise_row<Format>(x + m * x_row, even, K, numbers + m * width);
#pragma omp for schedule(static)
        for (long part = 0; part < parts; ++part) {
            const long n0 = all * part / parts * TILE_COLUMNS;
            const long n1 = std::min(all * (part + 1) / parts * TILE_COLUMNS, N);
            for (long first = 0; first < M; first += BLOCK_ROWS) {
                auto done = [&](long m, long n, Vector low, Vector high) __attribute__((always_inline)) {
                    m += first;
                    const Row row = rows[m];
                    const Pair s = load_row(scale, n, N), b = load_row(bias, n, N);
                    low = low * (s.low * row.scale) + b.low, high = high * (s.high * row.scale) + b.high;
                    if (Format::HAS_LOW) {
                        const Pair t = load_row(sums, n, N);
                        low += t.low * row.low, high += t.high * row.low;
                    }
                    low = activate(low, activation), high = activate(high, activation);
                    if (residual) {
                        const Pair r = load_row(residual + m * residual_row, n, N);
                        low += r.low, high += r.high;
                    }
                    store_row(out + m * out_row, n, N, low, high);
                };
                const long count = std::min<long>(BLOCK_ROWS, M - first);
                integer_product<Format>(numbers + first * width, packed, count, n0, n1, width, done);
            }
        }
    }
}

}  // namespace

extern "C" {

// What the processor has for integers: the width of its vectors, 0 if there are no instructions for them.
int vat_integers() { return VAT_INTEGERS; }

// How much the weights that share a 16-bit sum may be together in 8 bits (add_quads); 0 if none do.
int vat_shared_most() { return SHARES_SUMS ? SHARED_MOST : 0; }

// Numbers in a vector of floats, which the layout of packed integers follows.
int vat_lanes() { return LANES; }

// out (M, N) = residual + activation(x W^T + bias) as vat_step_linear, with W[n][k] = scale[n] * packed number and rows of
// x * even rounded to `bits` (16 or 8). sums[n] is the sum of W[n] (read in 8 bits). `numbers`, of M rows of words, and
// `rows` (M, 2) are room to work in.
void vat_integer_linear(int bits, const float* x, long x_row, long M, long K, const float* even, const int32_t* packed,
                        const float* scale, const float* sums, const float* bias, long N, int activation,
                        const float* residual, long residual_row, float* out, long out_row, int32_t* numbers,
                        float* rows, int threads) {
    (bits == 16 ? linear<Signed16> : linear<Unsigned8>)(x, x_row, M, K, even, packed, scale, sums, bias, N, activation,
                                                        residual, residual_row, out, out_row, numbers,
                                                        reinterpret_cast<Row*>(rows), threads);
}
}
