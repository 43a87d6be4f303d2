// Rows as a linear of a frozen policy reads them: as they are, or normalised, after FiLM where there is one.
#pragma once

#include <cstdint>

#include "norm.hpp"

// Row m of x (M, K) is at x + m * row. With eps >= 0 it is normalised; with a table (tasks, 2 K) it is before that
// x (1 + gamma) + beta, gamma | beta being row ids[m / tokens].
struct Input {
    const float* x;
    long row, M, K;
    float eps;
    const float* table;
    const int64_t* ids;
    long tokens;

    bool is_plain() const { return eps < 0.0f; }

    // The row, where it is or in `room` (K).
    const float* read(long m, float* room) const {
        const float* own = x + m * row;
        if (is_plain()) return own;
        if (table) {
            const float *gamma = table + ids[m / tokens] * 2 * K, *beta = gamma + K;
            const long whole = K / LANES * LANES;
            for (long k = 0; k < whole; k += LANES)
                store(room + k, load(own + k) * (load(gamma + k) + 1.0f) + load(beta + k));
            for (long k = whole; k < K; ++k) room[k] = own[k] * (gamma[k] + 1.0f) + beta[k];
            own = room;
        }
        normalise_row(own, K, eps, room);
        return room;
    }
};
