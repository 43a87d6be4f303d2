// softmax(scale Q K^T) V of every head, forward and backward. Rows of queries, keys and values may lie anywhere with equal
// strides, as in a packed projection; scores stay in the second cache and are computed again in the backward.
//
//     P = softmax(s Q K^T), O = P V;   dV = P^T dO, dP = dO V^T, dS = P (dP - sum(dO O)), dQ = s dS K, dK = s dS^T Q

#include <omp.h>

#include <cmath>

#include "products.hpp"
#include "shares.hpp"

namespace {

constexpr long QUERY_ROWS = 48;  // scores at a time: with the panels of keys and values they fit into the second cache

// Rows of one head: element (b, t, h, i) is at start + b * batch + t * row + h * d + i.
struct Heads {
    const float* start;
    long batch, row;

    const float* head(long b, long h, long d) const { return start + b * batch + h * d; }
};

// A row of scores has room for whole panels, and rows do not all begin in the same lines of the cache.
long score_stride(long S) { return padded(S) + (padded(S) % 256 ? 0 : TILE_COLUMNS); }

void pack_all_rows(const float* x, long stride, long K, long N, float* out) {
    for (long n = 0; n < N; n += TILE_COLUMNS) pack_rows(x, stride, K, N, n, out + n * K);
}

void pack_all_transposed(const float* x, long stride, long K, long N, float* out) {
    for (long n = 0; n < N; n += TILE_COLUMNS) pack_transposed(x, stride, K, N, n, out + n * K);
}

// Scores of one query to weights that do not sum to one yet; the sum and the largest score are returned.
float exponentiate(float* scores, long S, float* largest_score) {
    const long whole = S / LANES * LANES;
    float top = scores[0];
    if (whole) {
        Vector found = load(scores);
        for (long s = LANES; s < whole; s += LANES) found = larger(found, load(scores + s));
        top = largest(found);
    }
    for (long s = whole; s < S; ++s) top = std::max(top, scores[s]);
    Vector totals{};
    for (long s = 0; s < whole; s += LANES) {
        const Vector e = exponential(load(scores + s) - top);
        store(scores + s, e);
        totals += e;
    }
    float total = sum(totals);
    if (whole < S) {
        float rest[LANES];
        store(rest, exponential(load(scores + whole) - top));  // the row has room for it
        for (long s = whole; s < S; ++s) total += scores[s] = rest[s - whole];
    }
    *largest_score = top;
    return total;
}

}  // namespace

extern "C" {

// out (B, T, H, d) has strides too; log_sum (B, H, T), each query's log of the sum of e^score for the backward, may be
// null.
void vat_attention_forward(const float* q, long q_batch, long q_row, const float* k, const float* v, long kv_batch,
                           long kv_row, long B, long T, long S, long H, long d, float scale, float* out,
                           long out_batch, long out_row, float* log_sum, int threads) {
    const Heads queries{q, q_batch, q_row}, keys{k, kv_batch, kv_row}, values{v, kv_batch, kv_row};
    const long stride = score_stride(S);
    // Few heads are cut into ranges of their queries, so that threads have something to share out (shares.hpp).
    const long parts = std::max(1L, std::min((T + QUERY_ROWS - 1) / QUERY_ROWS, cuts(B * H, threads)));
#pragma omp parallel num_threads(threads)
    {
        const Buffer keys_transposed(d * padded(S)), values_packed(S * padded(d)), scores(QUERY_ROWS * stride);
#pragma omp for schedule(dynamic) collapse(2)
        for (long bh = 0; bh < B * H; ++bh)
            for (long part = 0; part < parts; ++part) {
                const long b = bh / H, h = bh % H, end = T * (part + 1) / parts;
                pack_all_transposed(keys.head(b, h, d), kv_row, d, S, keys_transposed);
                pack_all_rows(values.head(b, h, d), kv_row, S, d, values_packed);
                for (long t0 = T * part / parts; t0 < end; t0 += QUERY_ROWS) {
                    const long rows = std::min(QUERY_ROWS, end - t0);
                    product<Layout::rows>({queries.head(b, h, d) + t0 * q_row, q_row}, keys_transposed, rows, S, d,
                                          [&](long m, long n, Vector low, Vector high) {
                                              store(scores + m * stride + n, low * scale);
                                              store(scores + m * stride + n + LANES, high * scale);
                                          });
                    float inverse[QUERY_ROWS];
                    for (long i = 0; i < rows; ++i) {
                        float top;
                        const float total = exponentiate(scores + i * stride, S, &top);
                        inverse[i] = 1.0f / total;
                        if (log_sum) log_sum[bh * T + t0 + i] = top + std::log(total);
                    }
                    float* target = out + b * out_batch + t0 * out_row + h * d;
                    product<Layout::rows>({scores, stride}, values_packed, rows, d, S,
                                          [&](long m, long n, Vector low, Vector high) {
                                              store_row(target + m * out_row, n, d, low * inverse[m], high * inverse[m]);
                                          });
                }
            }
    }
}

// Gradients of vat_attention_forward into dq, dk, dv, laid out with the strides of their own; gradient and out are dense.
void vat_attention_backward(const float* gradient, const float* out, const float* log_sum, const float* q, long q_batch,
                            long q_row, const float* k, const float* v, long kv_batch, long kv_row, long B, long T,
                            long S, long H, long d, float scale, float* dq, long dq_batch, long dq_row, float* dk,
                            float* dv, long dkv_batch, long dkv_row, int threads) {
    const Heads queries{q, q_batch, q_row}, keys{k, kv_batch, kv_row}, values{v, kv_batch, kv_row};
    const long stride = score_stride(S), out_row = H * d;
#pragma omp parallel num_threads(threads)
    {
        const Buffer keys_transposed(d * padded(S)), values_transposed(d * padded(S)), keys_packed(S * padded(d)),
            q_packed(QUERY_ROWS * padded(d)), up_packed(QUERY_ROWS * padded(d)), weights(QUERY_ROWS * stride),
            dscores(QUERY_ROWS * stride), dk_panels(S * padded(d)),
            dv_panels(S * padded(d));
#pragma omp for schedule(static)
        for (long bh = 0; bh < B * H; ++bh) {
            const long b = bh / H, h = bh % H;
            pack_all_transposed(keys.head(b, h, d), kv_row, d, S, keys_transposed);
            pack_all_transposed(values.head(b, h, d), kv_row, d, S, values_transposed);
            pack_all_rows(keys.head(b, h, d), kv_row, S, d, keys_packed);
            std::memset(dk_panels, 0, sizeof(float) * S * padded(d));
            std::memset(dv_panels, 0, sizeof(float) * S * padded(d));
            for (long t0 = 0; t0 < T; t0 += QUERY_ROWS) {
                const long rows = std::min(QUERY_ROWS, T - t0), place = ((b * T + t0) * H + h) * d;
                const float *own_q = queries.head(b, h, d) + t0 * q_row, *up = gradient + place;
                const float* lse = log_sum + bh * T + t0;
                float delta[QUERY_ROWS];
                for (long i = 0; i < rows; ++i) {
                    delta[i] = 0;
                    for (long j = 0; j < d; ++j) delta[i] += up[i * out_row + j] * out[place + i * out_row + j];
                }
                product<Layout::rows>({own_q, q_row}, keys_transposed, rows, S, d,
                                      [&](long m, long n, Vector low, Vector high) {
                                          float* row = weights + m * stride + n;
                                          store(row, exponential(low * scale - lse[m]));
                                          store(row + LANES, exponential(high * scale - lse[m]));
                                      });
                product<Layout::rows>({up, out_row}, values_transposed, rows, S, d,
                                      [&](long m, long n, Vector low, Vector high) {
                                          const float* p = weights + m * stride + n;
                                          float* row = dscores + m * stride + n;
                                          store(row, load(p) * (low - delta[m]) * scale);
                                          store(row + LANES, load(p + LANES) * (high - delta[m]) * scale);
                                      });
                pack_all_rows(own_q, q_row, rows, d, q_packed);
                pack_all_rows(up, out_row, rows, d, up_packed);
                add_product<Layout::columns>({weights, stride}, up_packed, S, d, rows, dv_panels);
                add_product<Layout::columns>({dscores, stride}, q_packed, S, d, rows, dk_panels);
                float* target = dq + b * dq_batch + t0 * dq_row + h * d;
                product<Layout::rows>({dscores, stride}, keys_packed, rows, d, S,
                                      [&](long m, long n, Vector low, Vector high) {
                                          store_row(target + m * dq_row, n, d, low, high);
                                      });
            }
            const long place = b * dkv_batch + h * d;
            unpack(dk_panels, S, d, dk + place, dkv_row);
            unpack(dv_panels, S, d, dv + place, dkv_row);
        }
    }
}
}
