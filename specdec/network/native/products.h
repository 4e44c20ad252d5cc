// Products of few tokens, at the speed at which their weights come from memory.

#pragma once

#include <utility>

#include "structures.h"
#include "threads.h"
#include "vectors.h"

namespace {

constexpr int PANEL = 2 * LANES;  // outputs of a panel
#if defined(__AVX512F__)
constexpr int TILE = 12;  // tokens whose sums fit into registers next to the weights
#else
constexpr int TILE = 3;
#endif
constexpr int PREFETCH = 64 * PANEL;  // floats ahead: 8 KiB, as far as the memory's latency

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Into { STORE, ADD, GATED };

template <Into INTO>
inline void put(float* y, int64_t n, const Linear& linear, Vec a, Vec b) {
    if (linear.bias) {
        a += load(linear.bias + n);
        b += load(linear.bias + n + LANES);
    }
    if constexpr (INTO == Into::GATED) {
        store(y + n / 2, a / (1.0f + exponential(-a)) * b);
    } else if (n + PANEL <= linear.out) {
        if constexpr (INTO == Into::ADD) a += load(y + n), b += load(y + n + LANES);
        store(y + n, a);
        store(y + n + LANES, b);
    } else {
        for (int64_t i = 0; n + i < linear.out; i++) {
            const float value = i < LANES ? a[i] : b[i - LANES];
            y[n + i] = INTO == Into::ADD ? y[n + i] + value : value;
        }
    }
}

template <int TOKENS, Into INTO>
void tile(const float* x, int64_t x_stride, const float* w, const Linear& linear, int64_t n, float* y, int64_t stride) {
    Vec a[TOKENS] = {}, b[TOKENS] = {};
    for (int64_t k = 0; k < linear.in; k++, w += PANEL) {
        __builtin_prefetch(w + PREFETCH);
        __builtin_prefetch(w + PREFETCH + LANES);
        const Vec wa = load(w), wb = load(w + LANES);
#pragma GCC unroll 12
        for (int t = 0; t < TOKENS; t++) {
            const float value = x[t * x_stride + k];
            a[t] += wa * value;
            b[t] += wb * value;
        }
    }
    for (int t = 0; t < TOKENS; t++) put<INTO>(y + t * stride, n, linear, a[t], b[t]);
}

using Tile = void (*)(const float*, int64_t, const float*, const Linear&, int64_t, float*, int64_t);

template <Into INTO, int... SIZES>
Tile tile_of(int64_t tokens, std::integer_sequence<int, SIZES...>) {
    static constexpr Tile tiles[] = {tile<SIZES + 1, INTO>...};
    return tiles[tokens - 1];
}

int64_t panels_of(const Linear& linear) { return up_to(linear.out, PANEL) / PANEL; }

const auto NOTHING = [] {};

// A thread's share of a product. x: [tokens, in] with rows x_stride apart; y: rows y_stride apart. last: see `Stage`.
template <Into INTO, class Last = decltype(NOTHING)>
void product(const Linear& linear, const float* x, int64_t x_stride, int64_t tokens, float* y, int64_t y_stride,
             Stage& stage, const Last& last = NOTHING) {
    const int64_t passes = (tokens + TILE - 1) / TILE;
    const auto panel_of = [&](int64_t panel) {
        // The panel comes from memory in the first pass and from the cache in the others.
        for (int64_t pass = 0; pass < passes; pass++) {
            const int64_t first = tokens * pass / passes, size = tokens * (pass + 1) / passes - first;
            const Tile run = tile_of<INTO>(size, std::make_integer_sequence<int, TILE>{});
            run(x + first * x_stride, x_stride, linear.weight + panel * PANEL * linear.in, linear, panel * PANEL,
                y + first * y_stride, y_stride);
        }
    };
    stage.run(panels_of(linear), panel_of, last);
}

}  // namespace
