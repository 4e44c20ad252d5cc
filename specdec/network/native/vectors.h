// Vectors of 16 floats, in whatever registers the processor has.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

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
