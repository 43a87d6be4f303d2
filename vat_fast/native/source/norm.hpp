// LayerNorm of rows, and its gradient.
#pragma once

#include <cmath>
#include <cstring>

#include "simd.hpp"

struct Norm {
    const float *weight, *bias;
    float eps;
};

struct Moments {
    float mean, inverse_std;
};

static inline Moments moments(const float* x, long D, float eps) {
    const long whole = D / LANES * LANES;
    Vector total{};
    for (long d = 0; d < whole; d += LANES) total += load(x + d);
    float s = sum(total);
    for (long d = whole; d < D; ++d) s += x[d];
    const float mean = s / D;
    // Squares of what is left without the mean: their sum does not cancel.
    Vector squares{};
    for (long d = 0; d < whole; d += LANES) {
        const Vector c = load(x + d) - mean;
        squares += c * c;
    }
    float q = sum(squares);
    for (long d = whole; d < D; ++d) q += (x[d] - mean) * (x[d] - mean);
    return {mean, 1.0f / std::sqrt(q / D + eps)};
}

// out = (x - mean) / std of one row.
static inline void normalise_row(const float* x, long D, float eps, float* out) {
    const Moments m = moments(x, D, eps);
    const long whole = D / LANES * LANES;
    for (long d = 0; d < whole; d += LANES) store(out + d, (load(x + d) - m.mean) * m.inverse_std);
    for (long d = whole; d < D; ++d) out[d] = (x[d] - m.mean) * m.inverse_std;
}

// out = (x - mean) / std * weight + bias of one row whose moments are known.
static inline void renorm_row(const float* x, long D, const Norm& norm, float m, float r, float* out) {
    const long whole = D / LANES * LANES;
    for (long d = 0; d < whole; d += LANES)
        store(out + d, (load(x + d) - m) * r * load(norm.weight + d) + load(norm.bias + d));
    for (long d = whole; d < D; ++d) out[d] = (x[d] - m) * r * norm.weight[d] + norm.bias[d];
}

// The same, and the moments.
static inline void norm_row(const float* x, long D, const Norm& norm, float* mean, float* inverse_std, float* out) {
    const Moments m = moments(x, D, norm.eps);
    *mean = m.mean, *inverse_std = m.inverse_std;
    renorm_row(x, D, norm, m.mean, m.inverse_std, out);
}

// dx = residual + r (g - mean(g) - xhat mean(g xhat)) with g = dn * weight; residual may be null. Adds to the gradients of
// weight and bias.
static inline void norm_row_backward(const float* dn, const float* x, long D, const Norm& norm, float m, float r,
                                     const float* residual, float* dx, float* dweight, float* dbias) {
    const long whole = D / LANES * LANES;
    Vector gs{}, gxs{};
    for (long d = 0; d < whole; d += LANES) {
        const Vector up = load(dn + d), xhat = (load(x + d) - m) * r, g = up * load(norm.weight + d);
        gs += g;
        gxs += g * xhat;
        store(dweight + d, load(dweight + d) + up * xhat);
        store(dbias + d, load(dbias + d) + up);
    }
    float g_mean = sum(gs), gx_mean = sum(gxs);
    for (long d = whole; d < D; ++d) {
        const float xhat = (x[d] - m) * r, g = dn[d] * norm.weight[d];
        g_mean += g, gx_mean += g * xhat;
        dweight[d] += dn[d] * xhat, dbias[d] += dn[d];
    }
    g_mean /= D, gx_mean /= D;
    for (long d = 0; d < whole; d += LANES) {
        const Vector xhat = (load(x + d) - m) * r;
        const Vector own = (load(dn + d) * load(norm.weight + d) - g_mean - xhat * gx_mean) * r;
        store(dx + d, residual ? load(residual + d) + own : own);
    }
    for (long d = whole; d < D; ++d) {
        const float own = (dn[d] * norm.weight[d] - g_mean - (x[d] - m) * r * gx_mean) * r;
        dx[d] = residual ? residual[d] + own : own;
    }
}

// norm_row_backward for M rows, residual (M, D) or null; block_sums has room for 2 D floats.
static inline void norm_backward(const float* dn, const float* x, long M, long D, const Norm& norm, const float* mean,
                                 const float* inverse_std, const float* residual, float* dx, float* block_sums,
                                 float* dweight, float* dbias) {
    std::memset(block_sums, 0, sizeof(float) * 2 * D);
    for (long m = 0; m < M; ++m)
        norm_row_backward(dn + m * D, x + m * D, D, norm, mean[m], inverse_std[m], residual ? residual + m * D : nullptr,
                          dx + m * D, block_sums, block_sums + D);
    for (long d = 0; d < D; ++d) dweight[d] += block_sums[d], dbias[d] += block_sums[D + d];
}
