// The layers of a llama-, mistral-, qwen2- or qwen3-type model over the few tokens of a decode step, in float32.
//
// Such a step takes as long as its weights take to arrive from memory. So they are packed into panels that are read
// once, in order, whatever the number of tokens, and all threads stay in one parallel region from the first layer to
// the last, with five barriers a layer. A sum runs in the same order for every number of tokens: what a token becomes
// does not depend, in any bit, on what is computed next to it.
//
// Plain C++17 with the vector types of GCC and clang, for whatever vectors the processor has.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include <omp.h>
#include <sys/mman.h>

namespace {

constexpr int LANES = 16, PANEL = 2 * LANES;  // floats of a vector; outputs of a panel
#if defined(__AVX512F__)
constexpr int TILE = 12;  // tokens whose sums fit into registers next to the weights
#else
constexpr int TILE = 3;
#endif
constexpr int PREFETCH = 32 * PANEL;  // floats ahead: 4 KiB, as far as the memory's latency
constexpr int MAX_HEAD_DIM = 512;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec all(float x) { return Vec{} + x; }

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (Int){__VA_ARGS__})
#endif

// Lane i of the result is the sum of the lanes of v[i]. Four folds, each of two vectors into one.
inline Vec sums(const Vec (&v)[LANES]) {
    // Folding puts vector i into the lane with the bits of i reversed.
    static constexpr int reversed[LANES] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};
    Vec fold[8];
    for (int i = 0; i < 8; i++) {
        const Vec a = v[reversed[i]], b = v[reversed[i + 8]];
        fold[i] = PICK(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                  PICK(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    for (int i = 0; i < 4; i++) {
        const Vec a = fold[i], b = fold[i + 4];
        fold[i] = PICK(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                  PICK(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        const Vec a = fold[i], b = fold[i + 2];
        fold[i] = PICK(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
                  PICK(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    }
    const Vec a = fold[0], b = fold[1];
    return PICK(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           PICK(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

inline float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

// e^x within 2 units in the last place (Cephes' polynomial); 0 below -87, where float32's smallest numbers begin.
inline Vec exponential(Vec x) {
    const Vec clamped = x < -87.0f ? all(-87.0f) : (x > 88.0f ? all(88.0f) : x);
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = (clamped * 1.44269504f + magic) - magic;
    const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    const Int bits = (__builtin_convertvector(n, Int) + 127) << 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? Vec{} : p * power;
}

}  // namespace

extern "C" {

// One product y = x W' + b. weight: [panels, in, 32], each panel 32 outputs; of a gated product 16 gates and their 16
// ups. bias: [panels * 32] in the same order, or null.
struct Linear {
    const float *weight, *bias;
    int64_t in, out;
};

// keys, values: [rows of the cache, slots of a row, kv_heads, head_dim]. visible: [rows, width, used_slots] bool, or
// null where each column sees the slots up to its own. window: 0 for none; `visible` respects it already.
struct Layer {
    Linear qkv, attention_out, gate_up, down;
    const float *attention_norm, *mlp_norm, *query_norm, *key_norm;
    float attention_eps, mlp_eps, head_eps, scaling;
    int64_t window;
    float *keys, *values;
    const bool* visible;
    float* saved;  // [tokens, hidden]: where the layer's output is wanted, or null
};

// slots, positions: [rows, width]. cos, sin: [positions, head_dim], sin signed for the rotation of halves.
// hidden_states: [tokens, hidden], read and overwritten. workspace: `workspace_floats` floats, aligned to 64 bytes.
struct Step {
    int64_t num_threads, num_layers, rows, width, hidden, heads, kv_heads, head_dim, intermediate;
    int64_t first_row, num_slots, used_slots;
    const int64_t *slots, *positions;
    const float *cos, *sin;
    float *hidden_states, *workspace;
    const Layer* layers;
};
}

namespace {

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Pieces of one stage, handed out to whichever thread is free.
struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
    int64_t take() { return next.fetch_add(1, std::memory_order_relaxed); }
};

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

// A thread's share of a product. x: [tokens, in] with rows x_stride apart; y: rows y_stride apart.
template <Into INTO>
void product(const Linear& linear, const float* x, int64_t x_stride, int64_t tokens, float* y, int64_t y_stride,
             Counter& counter) {
    const int64_t panels = up_to(linear.out, PANEL) / PANEL, passes = (tokens + TILE - 1) / TILE;
    for (int64_t panel = counter.take(); panel < panels; panel = counter.take()) {
        // The panel comes from memory in the first pass and from the cache in the others.
        for (int64_t pass = 0; pass < passes; pass++) {
            const int64_t first = tokens * pass / passes, size = tokens * (pass + 1) / passes - first;
            const Tile run = tile_of<INTO>(size, std::make_integer_sequence<int, TILE>{});
            run(x + first * x_stride, x_stride, linear.weight + panel * PANEL * linear.in, linear, panel * PANEL,
                y + first * y_stride, y_stride);
        }
    }
}

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

// One query over the slots first .. end - 1 of a row. scores: room for the slots and a vector.
void attend(const float* query, const float* keys, const float* values, int64_t stride, int64_t size, float scaling,
            int64_t first, int64_t end, const bool* visible, float* scores, float* out) {
    const int64_t whole = size / LANES * LANES, count = end - first;
    Vec highest = all(-std::numeric_limits<float>::infinity());
    for (int64_t block = 0; block < count; block += LANES) {
        Vec dots[LANES];
        for (int i = 0; i < LANES; i++) {
            const float* key = keys + (first + std::min(block + i, count - 1)) * stride;
            Vec dot = {};
            for (int64_t d = 0; d < whole; d += LANES) dot += load(query + d) * load(key + d);
            for (int64_t d = whole; d < size; d++) dot[0] += query[d] * key[d];
            dots[i] = dot;
        }
        Vec score = sums(dots) * scaling;
        for (int i = 0; i < LANES; i++) {
            const bool seen = block + i < count && (!visible || visible[first + block + i]);
            if (!seen) score[i] = -std::numeric_limits<float>::infinity();
        }
        store(scores + block, score);
        highest = score > highest ? score : highest;
    }

    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = std::max(top, highest[i]);
    Vec totals = {};
    for (int64_t block = 0; block < count; block += LANES) {
        const Vec weights = exponential(load(scores + block) - top);
        totals += weights;
        store(scores + block, weights);
    }

    const float scale = 1.0f / sum(totals);
    constexpr int WIDE = 4;  // vectors of the output that are summed at once
    for (int64_t d = 0; d < size; d += WIDE * LANES) {
        Vec mixed[WIDE] = {};
        float tail[LANES] = {};
        const int64_t vectors = std::min<int64_t>(WIDE, (whole - d) / LANES);
        for (int64_t s = 0; s < count; s++) {
            if (visible && !visible[first + s]) continue;
            const float* value = values + (first + s) * stride + d;
            if (vectors == WIDE) {
                for (int v = 0; v < WIDE; v++) mixed[v] += load(value + v * LANES) * scores[s];
                continue;
            }
            for (int64_t v = 0; v < vectors; v++) mixed[v] += load(value + v * LANES) * scores[s];
            for (int64_t i = d + vectors * LANES; i < size; i++) tail[i - d - vectors * LANES] += value[i - d] * scores[s];
        }
        for (int64_t v = 0; v < vectors; v++) store(out + d + v * LANES, mixed[v] * scale);
        if (vectors < WIDE)
            for (int64_t i = d + vectors * LANES; i < size; i++) out[i] = tail[i - d - vectors * LANES] * scale;
    }
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
            attend(query, layer.keys + base, layer.values + base, stride, dim, layer.scaling, first, end, visible,
                   scores, out + (token * s.heads + h) * dim);
        }
    }
}

// Where in the workspace things stand, in floats.
struct Places {
    int64_t qkv_stride, act_stride, attended, act, normed, scores, each_normed, each_scores, end;
    explicit Places(const Step& s) {
        const int64_t tokens = s.rows * s.width;
        qkv_stride = up_to((s.heads + 2 * s.kv_heads) * s.head_dim, PANEL);
        act_stride = up_to(s.intermediate, LANES);
        each_normed = up_to(tokens * s.hidden, LANES);
        each_scores = up_to(s.used_slots, LANES) + LANES;
        attended = tokens * qkv_stride;
        act = attended + up_to(tokens * s.heads * s.head_dim, LANES);
        normed = act + tokens * act_stride;
        scores = normed + s.num_threads * each_normed;
        end = scores + s.num_threads * each_scores;
    }
};

// All layers, by each of the threads at once.
void run_layers(const Step& s, const Places& places, Counter* counters) {
    const int64_t tokens = s.rows * s.width, thread = omp_get_thread_num();
    float *hidden = s.hidden_states, *qkv = s.workspace, *attended = qkv + places.attended, *act = qkv + places.act;
    float *normed = qkv + places.normed + thread * places.each_normed;
    float *scores = qkv + places.scores + thread * places.each_scores;
    // Every thread normalises all tokens for itself: that is less work than waiting for the others.
    const auto normalise_all = [&](const float* weight, float eps) {
        for (int64_t t = 0; t < tokens; t++)
            normalise(hidden + t * s.hidden, weight, eps, s.hidden, normed + t * s.hidden);
    };

    for (int64_t number = 0; number < s.num_layers; number++, counters += 5) {
        const Layer& layer = s.layers[number];
        normalise_all(layer.attention_norm, layer.attention_eps);
        product<Into::STORE>(layer.qkv, normed, s.hidden, tokens, qkv, places.qkv_stride, counters[0]);
#pragma omp barrier
        const int64_t pieces = s.rows * s.kv_heads;
        for (int64_t i = counters[1].take(); i < pieces; i = counters[1].take())
            attend_head(s, layer, i / s.kv_heads, i % s.kv_heads, qkv, places.qkv_stride, scores, attended);
#pragma omp barrier
        const int64_t width = s.heads * s.head_dim;
        product<Into::ADD>(layer.attention_out, attended, width, tokens, hidden, s.hidden, counters[2]);
#pragma omp barrier
        normalise_all(layer.mlp_norm, layer.mlp_eps);
        product<Into::GATED>(layer.gate_up, normed, s.hidden, tokens, act, places.act_stride, counters[3]);
#pragma omp barrier
        product<Into::ADD>(layer.down, act, places.act_stride, tokens, hidden, s.hidden, counters[4]);
#pragma omp barrier
        // The next write to `hidden` comes after two more barriers.
        if (layer.saved && thread == 0) std::copy(hidden, hidden + tokens * s.hidden, layer.saved);
    }
}

template <class Work>
void in_parallel(int64_t num_threads, const Work& work) {
    if (num_threads > 1) {
#pragma omp parallel num_threads(num_threads)
        work();
    } else {
        work();
    }
}

}  // namespace

extern "C" {

// Floats that `specdec_layers` needs as a workspace.
int64_t specdec_workspace(const Step* step) { return Places(*step).end; }

void specdec_layers(const Step* step) {
    const Places places(*step);
    std::vector<Counter> counters(5 * step->num_layers);
    in_parallel(step->num_threads, [&] { run_layers(*step, places, counters.data()); });
}

// y = x W' + b. x: [tokens, in], y: [tokens, out].
void specdec_linear(const Linear* linear, const float* x, int64_t tokens, float* y, int64_t num_threads) {
    Counter counter;
    in_parallel(num_threads, [&] {
        product<Into::STORE>(*linear, x, linear->in, tokens, y, linear->out, counter);
    });
}

// Large pages for memory that has not been touched yet, where the system has them: fewer of the processor's page
// tables are read while the weights are. Whether the system agreed.
int specdec_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / page * page;
    return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
    return 0;
#endif
}
}
