// Activations of a linear's output.
#pragma once

#include "simd.hpp"

enum Activation { none, gelu, gelu_tanh, relu };

// GELU's tanh form: x / (1 + e^(-2 sqrt(2 / pi) (x + 0.044715 x^3))).
static inline Vector tanh_gelu(Vector x) { return x / (1.0f + exponential((x * x * 0.044715f + 1.0f) * x * -1.59576912f)); }

static inline Vector activate(Vector x, int kind) {
    if (kind == gelu) return x * cumulative(x);
    if (kind == gelu_tanh) return tanh_gelu(x);
    if (kind == relu) return larger(Vector{}, x);  // in this order NaN stays
    return x;
}
