// What a frozen policy runs: a linear on a weight packed once, with activation and residual in the same pass.

#include <omp.h>

#include "activation.hpp"
#include "input.hpp"
#include "products.hpp"
#include "shares.hpp"

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
    const Shares shares(M, N, BLOCK_ROWS, threads);
#pragma omp parallel num_threads(threads)
    {
        if (!input.is_plain()) {
#pragma omp for schedule(dynamic, 16)
            for (long m = 0; m < M; ++m) input.read(m, normalised + m * K);
        }
#pragma omp for schedule(dynamic)
        for (long share = 0; share < shares.count(); ++share) {
            const Share s = shares[share];
            const float* added = residual ? residual + s.first * residual_row : nullptr;
            float* target = out + s.first * out_row;
            product_range<Layout::rows>({a.start + s.first * a.stride, a.stride}, packed, s.rows, s.n0, s.n1, K,
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

// out (M, D) = (x - mean) / std of each row; dense.
void vat_step_normalise(const float* x, long M, long D, float eps, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long m = 0; m < M; ++m) normalise_row(x + m * D, D, eps, out + m * D);
}
}
