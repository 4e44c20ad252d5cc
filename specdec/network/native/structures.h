// What Python passes; `calls.py` declares the same.

#pragma once

#include <cstdint>

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
