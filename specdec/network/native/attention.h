// Norms, rotation, and each query's view of its row's keys and values.

#pragma once

#include <limits>

#include "structures.h"
#include "vectors.h"

namespace {

constexpr int MAX_HEAD_DIM = 512;

// y may be x.
void normalise(const float* x, const float* weight, float eps, int64_t size, float* y) {
    Vec squares = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(total / size + eps);
    for (int64_t j = 0; j < size; j++) y[j] = x[j] * scale * weight[j];
}

// What one query sees of a row: the slots first .. end - 1 of keys and values that lie `stride` floats apart.
struct View {
    const float *keys, *values;
    int64_t stride, first, end;
    const bool* visible;  // [slots], or null where all of them are seen
};

// The scores of a query, and the highest. scores: room for the slots and a vector. VECTORS: of the head, 0 for any size.
template <int VECTORS>
float score(const View& view, const float* query, int64_t size, float scaling, float* scores) {
    const int64_t whole = VECTORS ? VECTORS * LANES : size / LANES * LANES, count = view.end - view.first;
    const Vec lowest = all(-std::numeric_limits<float>::infinity());
    Vec highest = lowest, held[VECTORS + 1];
    for (int v = 0; v < VECTORS; v++) held[v] = load(query + v * LANES);
    for (int64_t block = 0; block < count; block += LANES) {
        Vec dots[LANES];
        for (int i = 0; i < LANES; i++) {
            const float* key = view.keys + (view.first + std::min(block + i, count - 1)) * view.stride;
            Vec dot = {};
            if constexpr (VECTORS) {
                for (int v = 0; v < VECTORS; v++) dot += held[v] * load(key + v * LANES);
            } else {
                for (int64_t d = 0; d < whole; d += LANES) dot += load(query + d) * load(key + d);
                for (int64_t d = whole; d < size; d++) dot[0] += query[d] * key[d];
            }
            dots[i] = dot;
        }
        Vec result = sums(dots) * scaling;
        if (block + LANES > count || view.visible) {
            for (int i = 0; i < LANES; i++) {
                const bool seen = block + i < count && (!view.visible || view.visible[view.first + block + i]);
                if (!seen) result[i] = lowest[i];
            }
        }
        store(scores + block, result);
        highest = result > highest ? result : highest;
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, highest[i]);
    return top;
}

// out = the values' sum by weight, times scale. Even and odd slots are summed apart, for the adders wait for each other.
template <int VECTORS>
void mix(const View& view, const float* weights, int64_t size, float scale, float* out) {
    const int64_t count = view.end - view.first;
    const float* value = view.values + view.first * view.stride;
    const auto is_seen = [&](int64_t s) { return !view.visible || view.visible[view.first + s]; };
    if constexpr (VECTORS) {
        Vec even[VECTORS] = {}, odd[VECTORS] = {};
        for (int64_t s = 0; s < count; s += 2, value += 2 * view.stride) {
            if (is_seen(s))
                for (int v = 0; v < VECTORS; v++) even[v] += load(value + v * LANES) * weights[s];
            if (s + 1 < count && is_seen(s + 1))
                for (int v = 0; v < VECTORS; v++) odd[v] += load(value + view.stride + v * LANES) * weights[s + 1];
        }
        for (int v = 0; v < VECTORS; v++) store(out + v * LANES, (even[v] + odd[v]) * scale);
    } else {
        float total[MAX_HEAD_DIM] = {};
        for (int64_t s = 0; s < count; s++, value += view.stride)
            if (is_seen(s))
                for (int64_t d = 0; d < size; d++) total[d] += value[d] * weights[s];
        for (int64_t d = 0; d < size; d++) out[d] = total[d] * scale;
    }
}

template <int VECTORS>
void attend(const View& view, const float* query, int64_t size, float scaling, float* scores, float* out) {
    const float top = score<VECTORS>(view, query, size, scaling, scores);
    Vec totals = {};
    for (int64_t s = 0; s < view.end - view.first; s += LANES) {
        const Vec weights = exponential(load(scores + s) - top);
        totals += weights;
        store(scores + s, weights);
    }
    mix<VECTORS>(view, scores, size, 1.0f / sum(totals), out);
}

// The columns of one row at one key head: their keys and values are cached, then their queries attend.
// qkv: [tokens, qkv_stride]; out: [tokens, heads * head_dim].
void attend_head(const Step& s, const Layer& layer, int64_t row, int64_t head, float* qkv, int64_t qkv_stride,
                 float* scores, float* out) {
    const int64_t dim = s.head_dim, half = dim / 2, group = s.heads / s.kv_heads, stride = s.kv_heads * dim;
    const int64_t base = (s.first_row + row) * s.num_slots * stride + head * dim;
    const auto prepare = [&](const float* from, const float* norm, int64_t position, float* to) {
        float x[MAX_HEAD_DIM];
        if (norm) normalise(from, norm, layer.head_eps, dim, x);
        else std::copy(from, from + dim, x);
        const float *cos = s.cos + position * dim, *sin = s.sin + position * dim;
        for (int64_t i = 0; i < half; i++) to[i] = x[i] * cos[i] + x[i + half] * sin[i];
        for (int64_t i = half; i < dim; i++) to[i] = x[i] * cos[i] + x[i - half] * sin[i];
    };

    for (int64_t token = row * s.width; token < (row + 1) * s.width; token++) {
        const float* key = qkv + token * qkv_stride + (s.heads + head) * dim;
        const int64_t place = base + s.slots[token] * stride;
        prepare(key, layer.key_norm, s.positions[token], layer.keys + place);
        std::copy(key + stride, key + stride + dim, layer.values + place);
    }
    for (int64_t token = row * s.width; token < (row + 1) * s.width; token++) {
        const bool* visible = layer.visible ? layer.visible + token * s.used_slots : nullptr;
        const int64_t end = visible ? s.used_slots : s.slots[token] + 1;
        const int64_t first = visible || !layer.window ? 0 : std::max<int64_t>(0, end - layer.window);
        for (int64_t h = head * group; h < (head + 1) * group; h++) {
            float* query = qkv + token * qkv_stride + h * dim;
            prepare(query, layer.query_norm, s.positions[token], query);
            const auto run = dim == 64 ? attend<4> : dim == 128 ? attend<8> : attend<0>;
            const View view{layer.keys + base, layer.values + base, stride, first, end, visible};
            run(view, query, dim, layer.scaling, scores, out + (token * s.heads + h) * dim);
        }
    }
}

}  // namespace
