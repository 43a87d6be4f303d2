// What a frozen policy runs: a linear on a weight packed once, with activation and residual in the same pass.

#include <omp.h>

#include "activation.hpp"
#include "input.hpp"
#include "products.hpp"

extern "C" {

// Floats of a packed weight (N, K).
long vat_packed_size(long N, long K) { return padded(N) * K; }

void vat_pack(const float* weight, long N, long K, float* out, int threads) {
    pack_weight(weight, K, N, true, threads, out);
}

// out (M, N) = residual + activation(x W^T + bias), x as `Input` says. Rows of x, residual and out are `..._row` apart;
// residual may be null, and may be out. `normalised` (M, K) is room for rows that are normalised.
void vat_step_linear(const float* x, long x_row, long M, long K, float eps, const float* table, const int64_t* ids,
                     long tokens, const float* bias, long N, int activation, const float* residual, long residual_row,
                     float* out, long out_row, const float* packed, float* normalised, int threads) {
    const Input input{x, x_row, M, K, eps, table, ids, tokens};
    const Matrix a = input.is_plain() ? Matrix{x, x_row} : Matrix{normalised, K};
    // Each thread has its own range of columns, and so of the weight.
    const long all = panels(N), parts = std::min<long>(threads, all);
#pragma omp parallel num_threads(threads)
    {
        if (!input.is_plain()) {
#pragma omp for schedule(static)
            for (long m = 0; m < M; ++m) input.read(m, normalised + m * K);
        }
#pragma omp for schedule(static)
        for (long part = 0; part < parts; ++part) {
            const long n0 = all * part / parts * TILE_COLUMNS;
            const long n1 = std::min(all * (part + 1) / parts * TILE_COLUMNS, N);
            for (long first = 0; first < M; first += BLOCK_ROWS) {
                const long rows = std::min<long>(BLOCK_ROWS, M - first);
                const float* added = residual ? residual + first * residual_row : nullptr;
                float* target = out + first * out_row;
                product_range<Layout::rows>({a.start + first * a.stride, a.stride}, packed, rows, n0, n1, K,
                                            [&](long m, long n, Vector low, Vector high) {
                    const Pair b = load_row(bias, n, N);
                    low = activate(low + b.low, activation), high = activate(high + b.high, activation);
                    if (added) {
                        const Pair r = load_row(added + m * residual_row, n, N);
                        low += r.low, high += r.high;
                    }
                    store_row(target + m * out_row, n, N, low, high);
                });
            }
        }
    }
}

// out (M, D) = (x - mean) / std of each row; dense.
void vat_step_normalise(const float* x, long M, long D, float eps, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; ++m) normalise_row(x + m * D, D, eps, out + m * D);
}
}
