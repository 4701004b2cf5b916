/* Block quantisation in one pass over memory: what wire.py computes operation by operation, with the same bits.

   A block is 64 floats with one scale, its largest magnitude divided by `levels`. An element travels as the nearest whole
   number of scales, ties to even: in a byte ("8"), or as number + 8 in half of one ("4", the even element in the lower half).
   No multiplication is contracted with an addition, so every step rounds as torch's does. */

#include <stdint.h>
#include <string.h>

const int codec_form = 1; /* codec.py has the same */

#define BLOCK 64 /* wire.py has the same */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE int32_t bits_of(float x) { int32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(int32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* A float of this size has no room for fractions: adding it rounds to the nearest whole number, ties to even, which is then
   the distance of the sum's bits from its own. Example: -1.5 + 12582912 = 12582910, whose bits are two below. */
#define WHOLE 12582912.0f

/* The scale of x [64], and its elements in whole scales. A block that holds a NaN or an infinity gets such a scale. */
INLINE float quantised(const float *x, float levels, int8_t *whole) {
    int32_t most = 0; /* magnitudes are in the order of their bits, and NaN is above them all */
    for (int j = 0; j < BLOCK; j++) {
        int32_t size = bits_of(x[j]) & 0x7fffffff;
        most = size > most ? size : most;
    }
    float scale = float_of(most) / levels, divisor = scale > 0 ? scale : 1;
    int32_t limit = (int32_t)levels, zero = bits_of(WHOLE);
    for (int j = 0; j < BLOCK; j++) { /* beyond the limit only where the scale is so small that it has few bits */
        int32_t rounded = bits_of(x[j] / divisor + WHOLE) - zero;
        rounded = rounded > limit ? limit : rounded;
        whole[j] = (int8_t)(rounded < -limit ? -limit : rounded);
    }
    return scale;
}

INLINE void pack(const int8_t *whole, int four, uint8_t *body) {
    if (!four) {
        memcpy(body, whole, BLOCK);
        return;
    }
    for (int j = 0; j < BLOCK / 2; j++)
        body[j] = (uint8_t)(((whole[2 * j] + 8) & 15) | ((whole[2 * j + 1] + 8) & 15) << 4);
}

INLINE void unpack(const uint8_t *body, int four, int8_t *whole) {
    if (!four) {
        memcpy(whole, body, BLOCK);
        return;
    }
    for (int j = 0; j < BLOCK / 2; j++) {
        whole[2 * j] = (int8_t)((body[j] & 15) - 8);
        whole[2 * j + 1] = (int8_t)((body[j] >> 4) - 8);
    }
}

INLINE void encode(int64_t blocks, const float *values, float *residual, float levels, int four, uint8_t *scales,
                   uint8_t *body) {
    int width = four ? BLOCK / 2 : BLOCK;
    for (int64_t b = 0; b < blocks; b++, values += BLOCK, scales += 4, body += width) {
        float x[BLOCK];
        int8_t whole[BLOCK];
        memcpy(x, values, sizeof x);
        if (residual)
            for (int j = 0; j < BLOCK; j++) x[j] += residual[j];
        float scale = quantised(x, levels, whole);
        memcpy(scales, &scale, 4);
        pack(whole, four, body);
        if (residual) {
            for (int j = 0; j < BLOCK; j++) residual[j] = x[j] - (float)whole[j] * scale;
            residual += BLOCK;
        }
    }
}

INLINE void decode(int64_t blocks, const uint8_t *scales, const uint8_t *body, int four, int add, float weight, float *out) {
    int width = four ? BLOCK / 2 : BLOCK;
    for (int64_t b = 0; b < blocks; b++, out += BLOCK, scales += 4, body += width) {
        int8_t whole[BLOCK];
        float scale;
        memcpy(&scale, scales, 4);
        unpack(body, four, whole);
        if (add)
            for (int j = 0; j < BLOCK; j++) out[j] += (float)whole[j] * scale * weight;
        else
            for (int j = 0; j < BLOCK; j++) out[j] = (float)whole[j] * scale;
    }
}

/* values [64 blocks] to scales and body. residual, or NULL: what earlier messages lost is added, and what this one loses kept. */
EVERY_PROCESSOR void codec_encode_8(int64_t blocks, const float *values, float *residual, uint8_t *scales, uint8_t *body) {
    encode(blocks, values, residual, 127, 0, scales, body);
}

EVERY_PROCESSOR void codec_encode_4(int64_t blocks, const float *values, float *residual, uint8_t *scales, uint8_t *body) {
    encode(blocks, values, residual, 7, 1, scales, body);
}

/* out = what was encoded; with `add`, out += weight times it. */
EVERY_PROCESSOR void codec_decode_8(int64_t blocks, const uint8_t *scales, const uint8_t *body, int add, float weight, float *out) {
    decode(blocks, scales, body, 0, add, weight, out);
}

EVERY_PROCESSOR void codec_decode_4(int64_t blocks, const uint8_t *scales, const uint8_t *body, int add, float weight, float *out) {
    decode(blocks, scales, body, 1, add, weight, out);
}
