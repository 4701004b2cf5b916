/* TIES in float32, each part in one pass over memory: the counts of `histogram` (threshold.py), the election of `Combine`
   (task.py), to the bit.

   A magnitude is ordered by its bits without the sign. The upper 16 bits are its coarse bin; within one coarse bin the lower 16
   bits are the fine one. */

#include <stdint.h>
#include <string.h>

const int ties_form = 1; /* ties.py has the same */

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_PROCESSOR
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
INLINE uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffffu; }

#define COARSE 32768
#define TABLES 4 /* neighbours often fall into one bin: counting them apart, no addition waits for the last one */

/* counts [COARSE] += how many of the values [n] lie in each coarse bin. */
void ties_coarse(int64_t n, const uint32_t *values, int64_t *counts) {
    static _Thread_local uint32_t tables[TABLES][COARSE]; /* too large for the stack of a thread on some systems */
    while (n > 0) {
        int64_t some = n < (int64_t)1 << 31 ? n : (int64_t)1 << 31, i = 0; /* no table can overflow */
        memset(tables, 0, sizeof tables);
        for (; i + TABLES <= some; i += TABLES)
            for (int table = 0; table < TABLES; table++) tables[table][magnitude(values[i + table]) >> 16]++;
        for (; i < some; i++) tables[0][magnitude(values[i]) >> 16]++;
        for (int bin = 0; bin < COARSE; bin++)
            counts[bin] += (int64_t)tables[0][bin] + tables[1][bin] + tables[2][bin] + tables[3][bin];
        values += some;
        n -= some;
    }
}

#define STRETCH 32

/* counts [65536] += how many of the values [n] lie in each fine bin of one coarse bin. Few do: a stretch where none does is
   passed over without a branch for each value. */
EVERY_PROCESSOR void ties_fine(int64_t n, const uint32_t *values, int64_t bin, int64_t *counts) {
    int64_t i = 0;
    for (; i + STRETCH <= n; i += STRETCH) {
        uint32_t any = 0;
        for (int j = 0; j < STRETCH; j++) any |= magnitude(values[i + j]) >> 16 == (uint32_t)bin;
        if (!any) continue;
        for (int j = 0; j < STRETCH; j++)
            if (magnitude(values[i + j]) >> 16 == (uint32_t)bin) counts[values[i + j] & 0xffffu]++;
    }
    for (; i < n; i++)
        if (magnitude(values[i]) >> 16 == (uint32_t)bin) counts[values[i] & 0xffffu]++;
}

#define LANES 256

/* out = the sum of the task vectors that have the elected sign, each times its weight, divided and scaled.

   after: the weights are applied before the election, which then is mergekit's; else after it.
   strict: where the sum that elects is 0, nobody is elected; else + is.
   share: what each vector counts for in the divisor, or NULL: the sum is not divided.
   least: the smallest share where all are above 0; else 0, and a divisor of 0 becomes 1. */
EVERY_PROCESSOR void ties_elect(int64_t n, int64_t count, const float *const *members, const float *weight, int after,
                                int strict, const float *share, float least, float scale, float *out) {
    for (int64_t start = 0; start < n; start += LANES) {
        int width = (int)(n - start < LANES ? n - start : LANES);
        float sum[LANES] = {0}, merged[LANES] = {0}, divisor[LANES] = {0};
        uint32_t sign[LANES], live[LANES];
        for (int64_t m = 0; m < count; m++) {
            const float *x = members[m] + start, w = after ? weight[m] : 1;
            for (int j = 0; j < width; j++) sum[j] = m ? sum[j] + x[j] * w : x[j] * w;
        }
        for (int j = 0; j < width; j++) {
            uint32_t total = bits_of(sum[j] + 0.0f); /* -0 elects + */
            sign[j] = total & 0x80000000u;
            live[j] = strict && magnitude(total) == 0 ? 0 : 0xffffffffu;
        }
        for (int64_t m = 0; m < count; m++) {
            const float *x = members[m] + start, w = weight[m], one = share ? share[m] : 0;
            for (int j = 0; j < width; j++) {
                int32_t size = (int32_t)(bits_of(after ? x[j] * w : x[j]) ^ sign[j]);
                uint32_t kept = (size > 0 ? (uint32_t)size : 0) & live[j];
                float value = after ? float_of(kept) : float_of(kept) * w;
                float counts = kept ? one : 0;
                merged[j] = m ? merged[j] + value : value;
                divisor[j] = m ? divisor[j] + counts : counts;
            }
        }
        for (int j = 0; j < width; j++) merged[j] = float_of(bits_of(merged[j]) ^ sign[j]);
        if (share)
            for (int j = 0; j < width; j++) {
                float by = least > 0 ? (divisor[j] > least ? divisor[j] : least) : divisor[j] + (divisor[j] == 0);
                merged[j] = merged[j] / by;
            }
        if (scale != 1)
            for (int j = 0; j < width; j++) merged[j] = merged[j] * scale;
        memcpy(out + start, merged, (size_t)width * sizeof(float));
    }
}
