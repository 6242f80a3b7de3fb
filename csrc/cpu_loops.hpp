// What the CPU's loops have in common: how they are compiled, an exponential that vectorises, a block's maximum.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// One binary for every x86-64 machine: the loader picks the widest clone the CPU has. Elsewhere (ARM, musl,
// macOS) the plain loops are what the compiler vectorises for its baseline.
#if defined(__x86_64__) && defined(__GNUC__) && defined(__GLIBC__) && !defined(__clang__)
#define UFM_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define UFM_MULTIVERSION
#endif
#define UFM_INLINE inline __attribute__((always_inline))

namespace ufm {
namespace {

// exp(x) for x <= 0 (NaN passes through). Below log(2^-126) the result is 0: a probability of 1e-38 is no probability.
// x = k ln2 + r, |r| <= ln2 / 2; exp(r) by a degree-6 minimax-like polynomial (Cephes), 2^k by its exponent bits.
UFM_INLINE float exp_nonpositive_one(float x) {
    constexpr float kLowest = -87.3365448f;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer in the low bits
    const float clamped = x < kLowest ? kLowest : x;
    const float shifted = clamped * 1.44269504f + kRound;
    const float k = shifted - kRound;
    float r = clamped - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits, result;
    std::memcpy(&bits, &shifted, sizeof bits);
    std::memcpy(&result, &p, sizeof result);
    result += static_cast<int32_t>(static_cast<uint32_t>(bits) << 23);
    float y;
    std::memcpy(&y, &result, sizeof y);
    y = x < kLowest ? 0.0f : y;
    return x == x ? y : x;
}

// fp64 exists to check gradients, not to be fast: the library's exp will do.
UFM_INLINE double exp_nonpositive_one(double x) { return std::exp(x); }

template <typename T>
UFM_INLINE T block_maximum(const T* z, int64_t count) {
    T top = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < count; ++v) top = z[v] > top ? z[v] : top;
    return top;
}

}  // namespace
}  // namespace ufm
