// Linears that read the same rows, with the norm before them and the residual behind; forward and backward.
//
// Rows are worked on in blocks that stay in the caches: a block is normalised, multiplied, and in the backward all its
// gradients are taken, before the next one is read. Threads share the blocks; each has gradients of the weights of its
// own, which are added up in the threads' order, so that equal numbers of threads give equal bits.

#include <omp.h>

#include <vector>

#include "norm.hpp"
#include "products.hpp"
#include "sums.hpp"

namespace {

// The block's rows as the linears see them.
Matrix block_rows(const float* x, long first, long rows, long K, const Norm& norm, float* mean, float* inverse_std,
                  float* normalised) {
    if (!norm.weight) return {x + first * K, K};
    for (long i = 0; i < rows; ++i)
        norm_row(x + (first + i) * K, K, norm, mean + first + i, inverse_std + first + i, normalised + i * K);
    return {normalised, K};
}

}  // namespace

extern "C" {

// out[i] (M, N[i]) = LN(x) weight[i]^T + bias[i] (+ residual, with one output). Without norm_weight the rows are read as
// they are; mean and inverse_std (M) are then not written.
void vat_linear_forward(const float* x, long M, long K, const float* norm_weight, const float* norm_bias, float eps,
                        float* mean, float* inverse_std, int count, const float* const* weight,
                        const float* const* bias, const long* N, const float* residual, float* const* out,
                        int threads) {
    const Norm norm{norm_weight, norm_bias, eps};
    std::vector<std::unique_ptr<Buffer>> packed;
    for (int i = 0; i < count; ++i) {
        packed.emplace_back(new Buffer(padded(N[i]) * K));
        pack_weight(weight[i], K, N[i], true, threads, *packed[i]);
    }
#pragma omp parallel num_threads(threads)
    {
        const Buffer normalised(norm_weight ? BLOCK_ROWS * K : 1);
#pragma omp for schedule(static)
        for (long first = 0; first < M; first += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, M - first);
            const Matrix a = block_rows(x, first, rows, K, norm, mean, inverse_std, normalised);
            for (int i = 0; i < count; ++i) {
                const long width = N[i];
                float* target = out[i] + first * width;
                const float* added = residual ? residual + first * width : nullptr;
                product<Layout::rows>(a, *packed[i], rows, width, K, [&](long m, long n, Vector low, Vector high) {
                    const Pair b = load_row(bias[i], n, width);
                    low += b.low, high += b.high;
                    if (added) {
                        const Pair r = load_row(added + m * width, n, width);
                        low += r.low, high += r.high;
                    }
                    store_row(target + m * width, n, width, low, high);
                });
            }
        }
    }
}

// Gradients of vat_linear_forward: dx (M, K) = residual_gradient + what came through the linears (and the norm);
// dweight[i] (N[i], K), dbias[i] (N[i]), dnorm_weight and dnorm_bias (K). Where nobody asks for them, dweight[i] may be
// null, and dx, with which the norm's gradients are not computed either. residual_gradient may be null.
void vat_linear_backward(const float* x, long M, long K, const float* norm_weight, const float* norm_bias, float eps,
                         const float* mean, const float* inverse_std, int count, const float* const* weight,
                         const float* const* gradient, const long* N, const float* residual_gradient, float* dx,
                         float* const* dweight, float* const* dbias, float* dnorm_weight, float* dnorm_bias,
                         int threads) {
    const Norm norm{norm_weight, norm_bias, eps};
    std::vector<std::unique_ptr<Buffer>> packed;
    long widest = 0;
    for (int i = 0; i < count; ++i) {
        packed.emplace_back(new Buffer(padded(K) * N[i]));
        if (dx) pack_weight(weight[i], N[i], K, false, threads, *packed[i]);
        widest = std::max(widest, N[i]);
    }
    // Of one thread: all weights' gradients, in panels, all biases', the norm's two.
    std::vector<std::unique_ptr<Buffer>> dweight_panels;
    std::vector<float*> targets;
    std::vector<long> sizes;
    for (int i = 0; i < count; ++i) {
        sizes.push_back(dweight[i] ? N[i] * padded(K) : 0);
        dweight_panels.emplace_back(new Buffer(sizes[i]));
        targets.push_back(*dweight_panels[i]);
    }
    targets.insert(targets.end(), dbias, dbias + count);
    sizes.insert(sizes.end(), N, N + count);
    if (norm_weight && dx) {
        targets.insert(targets.end(), {dnorm_weight, dnorm_bias});
        sizes.insert(sizes.end(), {K, K});
    }
    ThreadSums sums(targets, sizes, threads);
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float*> own = sums.start(omp_get_thread_num());
        const Buffer normalised(norm_weight ? BLOCK_ROWS * K : 1), panels_of_x(BLOCK_ROWS * padded(K)),
            tall(BLOCK_ROWS * (widest + TILE_ROWS)), dn(norm_weight ? BLOCK_ROWS * K : 1), block_sums(std::max(widest, 2 * K));
#pragma omp for schedule(static)
        for (long first = 0; first < M; first += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, M - first);
            const float* seen = x + first * K;
            if (norm_weight) {
                for (long i = 0; i < rows; ++i)
                    renorm_row(x + (first + i) * K, K, norm, mean[first + i], inverse_std[first + i], normalised + i * K);
                seen = normalised;
            }
            for (long k = 0; k < K; k += TILE_COLUMNS) pack_rows(seen, K, rows, K, k, panels_of_x + k * rows);
            float* to = !dx ? nullptr : norm_weight ? static_cast<float*>(dn) : dx + first * K;
            for (int i = 0; i < count; ++i) {
                const long width = N[i];
                const float* up = gradient[i] + first * width;
                add_columns(up, rows, width, block_sums, own[count + i]);
                if (dweight[i]) {
                    pack_tall(up, width, rows, width, tall);
                    add_product<Layout::tall>({tall, 0}, panels_of_x, width, K, rows, own[i]);
                }
                if (!to) continue;
                const float* added = norm_weight || !residual_gradient ? nullptr : residual_gradient + first * K;
                product<Layout::rows>({up, width}, *packed[i], rows, K, width,
                                      [&](long m, long n, Vector low, Vector high) {
                                          float* row = to + m * K;
                                          const float* other = i ? row : added ? added + m * K : nullptr;
                                          if (other) {
                                              const Pair o = load_row(other, n, K);
                                              low += o.low, high += o.high;
                                          }
                                          store_row(row, n, K, low, high);
                                      });
            }
            if (norm_weight && dx)
                norm_backward(dn, x + first * K, rows, K, norm, mean + first, inverse_std + first,
                              residual_gradient ? residual_gradient + first * K : nullptr, dx + first * K, block_sums,
                              own[2 * count], own[2 * count + 1]);
        }
    }
    sums.finish();
    for (int i = 0; i < count; ++i)
        if (dweight[i]) unpack(*dweight_panels[i], N[i], K, dweight[i], K);
}
}
