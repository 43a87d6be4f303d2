// How a product C (M, N) is shared out: blocks of rows of ranges of columns, which threads take in turn.
//
// On a shared machine one core is slower than another for a while; whoever is free takes the next share, and nobody waits
// long at the end. A range's blocks follow each other, so that its weights come from memory once.
#pragma once

#include <algorithm>

#include "products.hpp"

constexpr long SHARES_PER_THREAD = 8;
constexpr long PANELS_TOGETHER = 4;  // at most in a share

// Into how many each of `things` is cut, so that there are enough shares.
static inline long cuts(long things, int threads) { return (SHARES_PER_THREAD * threads - 1) / std::max(things, 1L) + 1; }

// Rows first .. first + rows, columns n0 .. n1; n0 is the start of a panel.
struct Share {
    long first, rows, n0, n1;
};

class Shares {
   public:
    Shares(long M, long N, long block_rows, int threads)
        : M_(M), N_(N), block_rows_(block_rows), panels_(panels(N)),
          blocks_((M + block_rows - 1) / block_rows) {
        const long least = (panels_ + PANELS_TOGETHER - 1) / PANELS_TOGETHER;
        ranges_ = std::min(panels_, std::max(least, cuts(blocks_, threads)));
    }

    long count() const { return blocks_ * ranges_; }

    Share operator[](long i) const {
        const long range = i / blocks_, first = i % blocks_ * block_rows_;
        return {first, std::min(block_rows_, M_ - first), panels_ * range / ranges_ * TILE_COLUMNS,
                std::min(panels_ * (range + 1) / ranges_ * TILE_COLUMNS, N_)};
    }

   private:
    const long M_, N_, block_rows_, panels_, blocks_;
    long ranges_;
};
