// Sums over rows that several threads work on: gradients of weights and biases.
#pragma once

#include <cstring>
#include <vector>

#include "products.hpp"

// One set of arrays for each thread; the first thread's is where the result belongs.
class ThreadSums {
   public:
    ThreadSums(const std::vector<float*>& targets, const std::vector<long>& sizes, int threads)
        : targets_(targets), sizes_(sizes) {
        long all = 0;
        for (const long size : sizes) all += size;
        for (int i = 1; i < threads; ++i) others_.emplace_back(new Buffer(all));
        started_.assign(threads, false);
    }

    // This thread's arrays, zero.
    std::vector<float*> start(int thread) {
        std::vector<float*> own = arrays(thread);
        for (size_t i = 0; i < own.size(); ++i) std::memset(own[i], 0, sizeof(float) * sizes_[i]);
        started_[thread] = true;
        return own;
    }

    // Adds the other threads' to the first one's, in their order.
    void finish() {
        for (size_t t = 1; t < started_.size(); ++t) {
            if (!started_[t]) continue;
            const std::vector<float*> own = arrays(t);
            for (size_t i = 0; i < own.size(); ++i)
                for (long j = 0; j < sizes_[i]; ++j) targets_[i][j] += own[i][j];
        }
    }

   private:
    std::vector<float*> arrays(size_t thread) const {
        if (!thread) return targets_;
        std::vector<float*> own;
        float* next = *others_[thread - 1];
        for (const long size : sizes_) own.push_back(next), next += size;
        return own;
    }

    std::vector<float*> targets_;
    std::vector<long> sizes_;
    std::vector<std::unique_ptr<Buffer>> others_;
    std::vector<char> started_;
};

// total (N) += the sum of the rows of x (M, N), taken in block_sums first: sums of few addends lose fewer digits.
static inline void add_columns(const float* x, long M, long N, float* block_sums, float* total) {
    std::memset(block_sums, 0, sizeof(float) * N);
    for (long m = 0; m < M; ++m, x += N)
        for (long n = 0; n < N; ++n) block_sums[n] += x[n];
    for (long n = 0; n < N; ++n) total[n] += block_sums[n];
}
