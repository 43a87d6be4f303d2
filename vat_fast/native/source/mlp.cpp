// x + fc2(gelu(fc1(LN(x)))), forward and backward; the hidden activations never leave the caches but for one copy that
// the backward reads.

#include <omp.h>

#include <vector>

#include "norm.hpp"
#include "products.hpp"
#include "sums.hpp"

namespace {

long blocks(long M) { return (M + BLOCK_ROWS - 1) / BLOCK_ROWS; }

}  // namespace

extern "C" {

// Floats of `hidden`, what the forward keeps for the backward: fc1's output, in blocks of panels.
long vat_mlp_kept(long M, long F) { return blocks(M) * BLOCK_ROWS * padded(F); }

// out (M, D); fc1 (F, D), fc2 (D, F). hidden may be null where no backward follows.
void vat_mlp_forward(const float* x, long M, long D, long F, const float* norm_weight, const float* norm_bias, float eps,
                     float* mean, float* inverse_std, const float* fc1, const float* bias1, const float* fc2,
                     const float* bias2, float* hidden, float* out, int threads) {
    const Norm norm{norm_weight, norm_bias, eps};
    const Buffer packed1(padded(F) * D), packed2(padded(D) * F);
    pack_weight(fc1, D, F, true, threads, packed1);
    pack_weight(fc2, F, D, true, threads, packed2);
#pragma omp parallel num_threads(threads)
    {
        const Buffer normalised(BLOCK_ROWS * D), active(BLOCK_ROWS * padded(F));
#pragma omp for schedule(static)
        for (long first = 0; first < M; first += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, M - first);
            for (long i = 0; i < rows; ++i)
                norm_row(x + (first + i) * D, D, norm, mean + first + i, inverse_std + first + i, normalised + i * D);
            float* kept = hidden ? hidden + first * padded(F) : nullptr;
            product<Layout::rows>({normalised, D}, packed1, rows, F, D, [&](long m, long n, Vector low, Vector high) {
                const Pair b = load_row(bias1, n, F);
                low += b.low, high += b.high;
                const long place = (n / TILE_COLUMNS * BLOCK_ROWS + m) * TILE_COLUMNS;
                if (kept) store(kept + place, low), store(kept + place + LANES, high);
                store(active + place, low * cumulative(low));
                store(active + place + LANES, high * cumulative(high));
            });
            const Matrix a{active, BLOCK_ROWS * TILE_COLUMNS};
            product<Layout::panels>(a, packed2, rows, D, F, [&](long m, long n, Vector low, Vector high) {
                const Pair b = load_row(bias2, n, D), r = load_row(x + (first + m) * D, n, D);
                store_row(out + (first + m) * D, n, D, r.low + low + b.low, r.high + high + b.high);
            });
        }
    }
}

// Gradients of vat_mlp_forward: dx (M, D), dnorm_weight and dnorm_bias (D), dfc1 (F, D), dbias1 (F), dfc2 (D, F), dbias2 (D).
// dfc1 and dfc2 may both be null where nobody asks for them.
void vat_mlp_backward(const float* gradient, const float* x, long M, long D, long F, const float* norm_weight,
                      const float* norm_bias, float eps, const float* mean, const float* inverse_std, const float* fc1,
                      const float* fc2, const float* hidden, float* dx, float* dnorm_weight, float* dnorm_bias,
                      float* dfc1, float* dbias1, float* dfc2, float* dbias2, int threads) {
    const Norm norm{norm_weight, norm_bias, eps};
    const Buffer packed1(padded(D) * F), packed2(padded(F) * D);
    pack_weight(fc1, F, D, false, threads, packed1);
    pack_weight(fc2, D, F, false, threads, packed2);
    // fc1's gradient as its transpose (D, F): so both weights' products read hidden gradients as panels of B.
    const long wanted = dfc1 ? D * padded(F) : 0;
    const Buffer dfc1_panels(wanted), dfc2_panels(wanted);
    ThreadSums sums({dfc1_panels, dbias1, dfc2_panels, dbias2, dnorm_weight, dnorm_bias},
                    {wanted, F, wanted, D, D, D}, threads);
#pragma omp parallel num_threads(threads)
    {
        const std::vector<float*> own = sums.start(omp_get_thread_num());
        const long tall_size = BLOCK_ROWS * (D + TILE_ROWS);
        const Buffer rows_of_n(BLOCK_ROWS * D), tall_n(tall_size), tall_up(tall_size), active(BLOCK_ROWS * TILE_COLUMNS),
            before(BLOCK_ROWS * padded(F)), block_sums(2 * D);
#pragma omp for schedule(static)
        for (long first = 0; first < M; first += BLOCK_ROWS) {
            const long rows = std::min<long>(BLOCK_ROWS, M - first);
            const float* up = gradient + first * D;
            for (long i = 0; i < rows; ++i)
                renorm_row(x + (first + i) * D, D, norm, mean[first + i], inverse_std[first + i], rows_of_n + i * D);
            pack_tall(rows_of_n, D, rows, D, tall_n);
            pack_tall(up, D, rows, D, tall_up);
            add_columns(up, rows, D, block_sums, own[3]);
            for (long n = 0; n < F; n += TILE_COLUMNS) {
                // A panel of the hidden layer: its gradient before GELU, and GELU's output again.
                const float* u = hidden + first * padded(F) + n * BLOCK_ROWS;
                float* du = before + n * BLOCK_ROWS;
                Vector bias_low{}, bias_high{};
                panel_product<Layout::rows>(
                    {up, D}, packed2 + n * D, rows, n, D, [&](long m, long, Vector low, Vector high) {
                        const long place = m * TILE_COLUMNS;
                        auto through = [&](Vector g, long at) {
                            const Vector v = load(u + at);
                            const Vector share = cumulative(v), d = g * (share + v * density(v));
                            store(active + at, v * share);
                            store(du + at, d);
                            return d;
                        };
                        bias_low += through(low, place);
                        bias_high += through(high, place + LANES);
                    });
                const Pair b = load_row(own[1], n, F);
                store_row(own[1], n, F, b.low + bias_low, b.high + bias_high);
                if (!dfc1) continue;
                add_panel<Layout::tall>({tall_n, 0}, du, D, n, rows, own[0]);
                add_panel<Layout::tall>({tall_up, 0}, active, D, n, rows, own[2]);
            }
            const Matrix a{before, BLOCK_ROWS * TILE_COLUMNS};
            // The gradient of the normalised rows takes their place.
            product<Layout::panels>(a, packed1, rows, D, F, [&](long m, long n, Vector low, Vector high) {
                store_row(rows_of_n + m * D, n, D, low, high);
            });
            norm_backward(rows_of_n, x + first * D, rows, D, norm, mean + first, inverse_std + first, up, dx + first * D,
                          block_sums, own[4], own[5]);
        }
    }
    sums.finish();
    if (!dfc1) return;
    unpack_transposed(dfc1_panels, D, F, dfc1);
    unpack(dfc2_panels, D, F, dfc2, F);
}
}
