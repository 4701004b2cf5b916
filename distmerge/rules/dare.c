/* DARE's two passes over a block of bfloat16, each in one loop: what TaskVectors (task.py) computes operation by operation.

   The numbers are the same to the bit wherever sums do not overflow: each step is rounded to bfloat16, sums have the order of
   `folded` (protocol.py), and no multiplication is contracted with an addition. A bfloat16 is the upper half of a float. */

#include <stdint.h>
#include <string.h>

const int dare_form = 1; /* dare.py has the same */

#define LANES 256  /* protocol.py has the same */
#define TOGETHER 4 /* rows whose sums never leave the registers */
#define LEVELS 48  /* a sum of fewer than 2^48 times so many rows */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE float wide(uint16_t x) { return float_of((uint32_t)x << 16); }

/* To the nearest bfloat16, ties to even. A NaN that comes of bfloat16s has zeros in its lower half, and stays one. */
INLINE float rounded(float x) {
    uint32_t u = bits_of(x);
    return float_of((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u);
}

/* The next `width` elements; where they are fewer than `whole`, followed by zeros, which change no sum. */
#define PADDED(TYPE, NAME, FROM, width, whole)                            \
    TYPE NAME##_padded[whole];                                            \
    const TYPE *NAME = FROM;                                              \
    if (width < whole) {                                                  \
        memset(NAME##_padded, 0, sizeof NAME##_padded);                   \
        NAME = memcpy(NAME##_padded, FROM, (size_t)width * sizeof(TYPE)); \
    }
#define AT_MOST(whole, left) ((left) < (whole) ? (left) : (whole))

typedef struct { uint64_t count; float level[LEVELS][LANES]; } Sum;

/* Rows are added in pairs, their sums in pairs, and so on: a level holds the sum that waits for its other half. */
INLINE void add_row(Sum *sum, float *row) {
    int level = 0;
    for (; sum->count >> level & 1; level++)
        for (int j = 0; j < LANES; j++) row[j] += sum->level[level][j];
    memcpy(sum->level[level], row, sizeof sum->level[level]);
    sum->count++;
}

INLINE float total(Sum *sum) {
    float row[LANES] = {0};
    for (int level = 0; level < LEVELS; level++)
        if (sum->count >> level & 1)
            for (int j = 0; j < LANES; j++) row[j] += sum->level[level][j];
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) row[j] += row[j + half];
    return row[0];
}

/* norms: the sum of a task vector's magnitudes, and of those that are kept.

   keep: a byte for each element, 0 or 1. */
EVERY_PROCESSOR void dare_norms(int64_t n, const uint16_t *base, const uint16_t *member, const uint8_t *keep, float *norms) {
    Sum all, left;
    all.count = left.count = 0;
    for (int64_t start = 0; start < n; start += TOGETHER * LANES) {
        int64_t width = AT_MOST(TOGETHER * LANES, n - start);
        PADDED(uint16_t, origin, base + start, width, TOGETHER * LANES)
        PADDED(uint16_t, theta, member + start, width, TOGETHER * LANES)
        PADDED(uint8_t, kept, keep + start, width, TOGETHER * LANES)
        float sizes[LANES], kept_sizes[LANES];
        for (int j = 0; j < LANES; j++) {
            float size[TOGETHER], kept_size[TOGETHER];
            for (int row = 0; row < TOGETHER; row++) {
                int at = row * LANES + j;
                uint32_t delta = bits_of(rounded(wide(theta[at]) - wide(origin[at]))) & 0x7fffffffu;
                size[row] = float_of(delta);
                kept_size[row] = float_of(delta & -(uint32_t)kept[at]);
            }
            sizes[j] = (size[0] + size[1]) + (size[2] + size[3]);
            kept_sizes[j] = (kept_size[0] + kept_size[1]) + (kept_size[2] + kept_size[3]);
        }
        add_row(&all, sizes);
        add_row(&left, kept_sizes);
    }
    norms[0] = total(&all);
    norms[1] = total(&left);
}

/* out = base + scale * (the sum of the task vectors, thinned, each divided by its divisor, times its factor and weight).

   elect: of those elements alone that have the sign of the sum. Two vectors are added and rounded in one step; more are added
   as floats and rounded once. */
EVERY_PROCESSOR void dare_merge(int64_t n, int64_t count, const uint16_t *base, const uint16_t *const *members,
                                const uint8_t *const *keep, const float *divisor, const float *factor, const float *weight,
                                int elect, float scale, float *out) {
    float delta[count][LANES];
    for (int64_t start = 0; start < n; start += LANES) {
        int64_t width = AT_MOST(LANES, n - start);
        PADDED(uint16_t, origin, base + start, width, LANES)
        float sum[LANES] = {0}, merged[LANES];
        for (int64_t m = 0; m < count; m++) {
            PADDED(uint16_t, theta, members[m] + start, width, LANES)
            PADDED(uint8_t, kept, keep[m] + start, width, LANES)
            float *x = delta[m], d = divisor[m], f = factor[m], w = weight[m];
            for (int j = 0; j < LANES; j++)
                x[j] = float_of(bits_of(rounded(wide(theta[j]) - wide(origin[j]))) & -(uint32_t)kept[j]);
            if (d != 1)
                for (int j = 0; j < LANES; j++) x[j] = rounded(x[j] / d);
            if (f != 1)
                for (int j = 0; j < LANES; j++) x[j] = rounded(x[j] * f);
            if (w != 1)
                for (int j = 0; j < LANES; j++) x[j] = rounded(x[j] * w);
            for (int j = 0; j < LANES; j++) sum[j] = m ? sum[j] + x[j] : x[j]; /* 0 + -0 would be 0 */
        }
        for (int j = 0; j < LANES; j++) sum[j] = rounded(sum[j]);
        if (elect) {
            uint32_t sign[LANES];
            float agreed[LANES] = {0};
            for (int j = 0; j < LANES; j++) /* 0 elects +, and so does inf - inf, whose sign is the processor's */
                sign[j] = sum[j] == sum[j] ? bits_of(sum[j] + 0.0f) & 0x80000000u : 0;
            for (int64_t m = 0; m < count; m++)
                for (int j = 0; j < LANES; j++) {
                    int32_t size = (int32_t)(bits_of(delta[m][j]) ^ sign[j]);
                    agreed[j] += float_of(size > 0 ? (uint32_t)size : 0);
                }
            for (int j = 0; j < LANES; j++) sum[j] = float_of(bits_of(rounded(agreed[j])) ^ sign[j]);
        }
        if (scale != 1)
            for (int j = 0; j < LANES; j++) sum[j] = rounded(sum[j] * scale);
        for (int j = 0; j < LANES; j++) merged[j] = sum[j] + wide(origin[j]);
        memcpy(out + start, merged, (size_t)width * sizeof(float));
    }
}
