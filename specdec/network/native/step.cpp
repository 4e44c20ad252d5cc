// The layers of a llama-, mistral-, qwen2- or qwen3-type model over the few tokens of a decode step, in float32.
//
// Such a step takes as long as its weights take to arrive from memory. So they are packed into panels that are read
// once, in order, whatever the number of tokens, and all threads stay in one parallel region from the first layer to
// the last, through five stages a layer. A sum runs in the same order for every number of tokens: what a token becomes
// does not depend, in any bit, on what is computed next to it.
//
// Plain C++17 with the vector types of GCC and clang, for whatever vectors the processor has.

#include <vector>

#include <sys/mman.h>

#include "attention.h"
#include "products.h"
#include "threads.h"

namespace {

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

constexpr int STAGES = 5;  // of a layer

// All layers, by each of the threads at once. A thread that comes late finds stages taken or over and catches up. What
// it prepares for a stage is sound if it still gets a piece of it: until that is done, no later stage overwrites.
void run_layers(const Step& s, const Places& places, Stage* stages) {
    const int64_t tokens = s.rows * s.width, thread = s.num_threads > 1 ? omp_get_thread_num() : 0;
    float *hidden = s.hidden_states, *qkv = s.workspace, *attended = qkv + places.attended, *act = qkv + places.act;
    float *normed = qkv + places.normed + thread * places.each_normed;
    float *scores = qkv + places.scores + thread * places.each_scores;
    // Every thread normalises all tokens for itself: that is less work than waiting for the others.
    const auto normalise_for = [&](const Stage& stage, const Linear& linear, const float* weight, float eps) {
        if (stage.is_taken(panels_of(linear))) return;
        for (int64_t t = 0; t < tokens; t++)
            normalise(hidden + t * s.hidden, weight, eps, s.hidden, normed + t * s.hidden);
    };

    for (int64_t number = 0; number < s.num_layers; number++, stages += STAGES) {
        const Layer& layer = s.layers[number];
        normalise_for(stages[0], layer.qkv, layer.attention_norm, layer.attention_eps);
        product<Into::STORE>(layer.qkv, normed, s.hidden, tokens, qkv, places.qkv_stride, stages[0]);

        const auto attend_piece = [&](int64_t i) {
            attend_head(s, layer, i / s.kv_heads, i % s.kv_heads, qkv, places.qkv_stride, scores, attended);
        };
        stages[1].run(s.rows * s.kv_heads, attend_piece, NOTHING);

        const int64_t width = s.heads * s.head_dim;
        product<Into::ADD>(layer.attention_out, attended, width, tokens, hidden, s.hidden, stages[2]);
        normalise_for(stages[3], layer.gate_up, layer.mlp_norm, layer.mlp_eps);
        product<Into::GATED>(layer.gate_up, normed, s.hidden, tokens, act, places.act_stride, stages[3]);

        const auto save = [&] {
            if (layer.saved) std::copy(hidden, hidden + tokens * s.hidden, layer.saved);
        };
        product<Into::ADD>(layer.down, act, places.act_stride, tokens, hidden, s.hidden, stages[4], save);
    }
}

}  // namespace

extern "C" {

// Floats that `specdec_layers` needs as a workspace.
int64_t specdec_workspace(const Step* step) { return Places(*step).end; }

void specdec_layers(const Step* step) {
    const Places places(*step);
    std::vector<Stage> stages(STAGES * step->num_layers);
    in_parallel(step->num_threads, [&] { run_layers(*step, places, stages.data()); });
}

// One product for any number of tokens. x: [tokens, in], rows x_stride apart; y: [tokens, out]. into: 0 writes y, 1 adds
// to it, 2 writes silu(gate) * up, [tokens, out / 2].
void specdec_linear(const Linear* linear, const float* x, int64_t x_stride, int64_t tokens, float* y, int64_t into,
                    int64_t num_threads) {
    Stage stage;
    const int64_t out = linear->out;
    in_parallel(num_threads, [&] {
        if (into == 0) product<Into::STORE>(*linear, x, x_stride, tokens, y, out, stage);
        if (into == 1) product<Into::ADD>(*linear, x, x_stride, tokens, y, out, stage);
        if (into == 2) product<Into::GATED>(*linear, x, x_stride, tokens, y, out / 2, stage);
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
