// Between two U-Net evaluations, on the device: guidance, a row of the sampler's table, the next input. The arithmetic
// is pipeline.sample's, the table walk.table's. step.ptx is this file, compiled by NVRTC (bksdm_export/step_kernel.py);
// it needs no header, so that NVRTC needs none either. Compiled for the host it is a loop that a test can run.

#define PAST 5            // earlier outputs that are remembered
#define COLUMNS (5 + PAST)

#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void
#define THREAD (blockIdx.x * blockDim.x + threadIdx.x)
__device__ float from_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ unsigned short to_half(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

// out: [rows, size], the negative prompts' first where rows is more than batch; latents: [batch, size]; history:
// [PAST, batch, size], a ring; sample: [2 * batch, size], the next input, twice; table: rows of COLUMNS floats;
// guidance: [batch]; index: of the evaluation that has just been done. A thread is an element of the latents.
#define STEP(NAME, REAL, LOAD, STORE)                                                                                  \
    KERNEL NAME(const REAL *out, float *latents, float *history, REAL *sample, const float *table,                     \
                const float *guidance, const int *index, int rows, int batch, int size) {                              \
        const int i = THREAD, count = batch * size;                                                                    \
        if (i >= count) return;                                                                                        \
        const int now = *index;                                                                                        \
        const float *row = table + now * COLUMNS;                                                                      \
        float output = LOAD(out[(rows - batch) * size + i]);                                                           \
        if (rows > batch) {                                                                                            \
            const float negative = LOAD(out[i]);                                                                       \
            output = negative + guidance[i / size] * (output - negative);                                              \
        }                                                                                                              \
        const float x = latents[i], remembered = x * row[0] + output * row[1];                                         \
        float next = x * row[2] + remembered * row[5];                                                                 \
        for (int past = 1; past < PAST && past <= now; ++past)                                                         \
            if (row[5 + past] != 0) next += history[(now - past) % PAST * count + i] * row[5 + past];                  \
        history[now % PAST * count + i] = remembered;                                                                  \
        latents[i] = next;                                                                                             \
        sample[i] = sample[count + i] = STORE(next * row[3]);                                                          \
    }

#define AS_IT_IS(value) (value)
STEP(step_float32, float, AS_IT_IS, AS_IT_IS)
STEP(step_float16, unsigned short, from_half, to_half)

// Once all of it has read the index. timestep: [rows], the next one for every row. One block.
KERNEL advance(float *timestep, const float *table, int *index, int rows) {
    const int i = THREAD, now = *index;
#ifdef __CUDACC__
    __syncthreads();
#endif
    if (i < rows) timestep[i] = table[now * COLUMNS + 4];
    if (i == rows - 1) *index = now + 1;
}
