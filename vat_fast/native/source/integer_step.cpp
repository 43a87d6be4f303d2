// Linears of a frozen policy in integers: weights rounded once, each row of the input when it is read.

#include <omp.h>

#include "activation.hpp"
#include "input.hpp"
#include "integers.hpp"

namespace {

// From sums to the linear's output.
template <class Format>
class Output {
   public:
    Output(const Row* rows, const float* scale, const float* sums, const float* bias, long N, int activation,
           const float* residual, long residual_row, float* out, long out_row)
        : rows_(rows), scale_(scale), sums_(sums), bias_(bias), N_(N), activation_(activation), residual_(residual),
          residual_row_(residual_row), out_(out), out_row_(out_row) {}

    // The columns from n on are next.
    void begin(long n) {
        whole_ = n + TILE_COLUMNS <= N_;
        panel_scale_ = load_row(scale_, n, N_), panel_bias_ = load_row(bias_, n, N_);
        if (Format::HAS_LOW) panel_sums_ = load_row(sums_, n, N_);
    }

    inline __attribute__((always_inline)) void operator()(long m, long n, Vector low, Vector high) const {
        const Row row = rows_[m];
        low = low * row.scale * panel_scale_.low + panel_bias_.low;
        high = high * row.scale * panel_scale_.high + panel_bias_.high;
        if (Format::HAS_LOW) low += panel_sums_.low * row.low, high += panel_sums_.high * row.low;
        if (activation_) low = activate(low, activation_), high = activate(high, activation_);
        float* target = out_ + m * out_row_;
        const float* added = residual_ ? residual_ + m * residual_row_ : nullptr;
        if (whole_) {
            if (added) low += load(added + n), high += load(added + n + LANES);
            store(target + n, low), store(target + n + LANES, high);
        } else {
            if (added) {
                const Pair r = load_row(added, n, N_);
                low += r.low, high += r.high;
            }
            store_row(target, n, N_, low, high);
        }
    }

   private:
    const Row* rows_;
    const float *scale_, *sums_, *bias_;
    const long N_;
    const int activation_;
    const float* residual_;
    const long residual_row_;
    float* out_;
    const long out_row_;
    bool whole_ = false;
    Pair panel_scale_, panel_bias_, panel_sums_;
};

template <class Format>
void linear(const Input& input, const float* even, const int32_t* packed, const float* scale, const float* sums,
            const float* bias, long N, int activation, const float* residual, long residual_row, float* out,
            long out_row, int32_t* numbers, Row* rows, int threads) {
    const long M = input.M, K = input.K, width = words<Format>(K);
    const Shares shares(M, N, rows_together<Format>(M, width), threads);
#pragma omp parallel num_threads(threads)
    {
        const Buffer room(input.is_plain() ? 1 : K);
#pragma omp for schedule(dynamic, 16)
        for (long m = 0; m < M; ++m) rows[m] = quantise_row<Format>(input.read(m, room), even, K, numbers + m * width);
#pragma omp for schedule(dynamic)
        for (long share = 0; share < shares.count(); ++share) {
            Output<Format> output(rows, scale, sums, bias, N, activation, residual, residual_row, out, out_row);
            integer_product<Format>(numbers, packed, shares[share], width, output);
        }
    }
}

}  // namespace

extern "C" {

// What the processor has for integers: the width of its vectors, 0 if there are no instructions for them.
int vat_integers() { return VAT_INTEGERS; }

// How much the weights that share a 16-bit sum may be together in 8 bits (add_quads); 0 if none do.
int vat_shared_most() { return SHARES_SUMS ? SHARED_MOST : 0; }

// The largest number that a row of x is rounded to.
int vat_input_most(int bits) { return bits == 16 ? Signed16::MOST : Unsigned8::MOST; }

// Numbers in a vector of floats, which the layout of packed integers follows.
int vat_lanes() { return LANES; }

// out (M, N) = residual + activation(x W^T + bias) as vat_step_linear, with W[n][k] = scale[n] * packed number and rows of
// x * even rounded to `bits` (16 or 8). sums[n] is the sum of W[n] (read in 8 bits). `numbers`, of M rows of words, and
// `rows` (M, 2) are room to work in.
void vat_integer_linear(const float* x, long x_row, long M, long K, float eps, const float* table, const int64_t* ids,
                        long tokens, const float* bias, long N, int activation, const float* residual,
                        long residual_row, float* out, long out_row, int bits, const float* even,
                        const int32_t* packed, const float* scale, const float* sums, int32_t* numbers, float* rows,
                        int threads) {
    (bits == 16 ? linear<Signed16> : linear<Unsigned8>)({x, x_row, M, K, eps, table, ids, tokens}, even, packed, scale,
                                                        sums, bias, N, activation, residual, residual_row, out, out_row,
                                                        numbers, reinterpret_cast<Row*>(rows), threads);
}
}
