// The runner's own kernels for NVIDIA GPUs, compiled to PTX by build.rs. Each is for bf16, f16 and f32; sums are f32 always.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

template <typename T> __device__ __forceinline__ float wide(T x) { return (float)x; }
template <> __device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ __forceinline__ float wide(__half x) { return __half2float(x); }
template <typename T> __device__ __forceinline__ T narrow(float x) { return (T)x; }
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ __half narrow(float x) { return __float2half(x); }

// 16 bytes at once.
template <typename T> struct Pack {
    static constexpr int COUNT = 16 / sizeof(T);
    union {
        uint4 bits;
        T items[COUNT];
    };
    __device__ Pack() {}
};

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// The sum over all threads of a block, in all of them. At most 1024 threads.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float parts[32];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < (blockDim.x + 31) / 32 ? parts[threadIdx.x % 32] : 0.0f;
    return warp_sum(x);
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < (blockDim.x + 31) / 32 ? parts[threadIdx.x % 32] : -INFINITY;
    return warp_max(x);
}

// A block a row: sum = x + y (or x alone, when y is null), out = sum / rms(sum) * weight.
template <typename T>
__device__ void norm(const T *x, const T *y, const float *weight, T *sum, T *out, int width, float epsilon) {
    const size_t row = (size_t)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = wide(x[row + i]);
        if (y) {
            T added = narrow<T>(value + wide(y[row + i]));
            sum[row + i] = added;
            value = wide(added);
        }
        squares += value * value;
    }
    const float scale = rsqrtf(block_sum(squares) / width + epsilon);
    const T *from = y ? sum : x;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[row + i] = narrow<T>(wide(from[row + i]) * scale * weight[i]);
}

// out[n] = w[n][k] · x[k]: a warp a row, 16 bytes a lane and four of them in flight. k is a multiple of 16 bytes' elements.
template <typename T>
__device__ void gemv(const T *__restrict__ w, const T *__restrict__ x, T *__restrict__ out, int n, int k) {
    constexpr int COUNT = Pack<T>::COUNT;
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= n) return;
    const uint4 *from = (const uint4 *)(w + (size_t)row * k);
    const uint4 *with = (const uint4 *)x;
    const int packs = k / COUNT;
    float sum = 0.0f;
    int at = lane;
    for (; at + 96 < packs; at += 128) {
        Pack<T> a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; i++) a[i].bits = __ldcs(from + at + 32 * i);
#pragma unroll
        for (int i = 0; i < 4; i++) b[i].bits = __ldg(with + at + 32 * i);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int j = 0; j < COUNT; j++) sum += wide(a[i].items[j]) * wide(b[i].items[j]);
    }
    for (; at < packs; at += 32) {
        Pack<T> a, b;
        a.bits = __ldcs(from + at);
        b.bits = __ldg(with + at);
#pragma unroll
        for (int j = 0; j < COUNT; j++) sum += wide(a.items[j]) * wide(b.items[j]);
    }
    sum = warp_sum(sum);
    if (lane == 0) out[row] = narrow<T>(sum);
}

template <typename T> __device__ void gate(const T *x, T *out, int width, int gelu) {
    const size_t row = blockIdx.y;
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= width) return;
    const float g = wide(x[row * 2 * width + i]), up = wide(x[row * 2 * width + width + i]);
    const float value = gelu ? 0.5f * g * (1.0f + tanhf(0.7978845608f * g * (1.0f + 0.044715f * g * g))) : g / (1.0f + __expf(-g));
    out[row * width + i] = narrow<T>(value * up);
}

// A warp a head of a step: norms it if it has a norm, turns it by its position's angles, and puts queries to `q`, keys and values
// into the caches `[kv, room, width]`.
template <typename T>
__device__ void rotate(const T *qkv, const float *q_norm, const float *k_norm, const float *cos, const float *sin, T *q, T *k, T *v,
                       int heads, int kv, int width, int room, int position, float epsilon) {
    const int step = blockIdx.y, head = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (head >= heads + 2 * kv) return;
    const T *from = qkv + ((size_t)step * (heads + 2 * kv) + head) * width;
    if (head >= heads + kv) {
        T *to = v + ((size_t)(head - heads - kv) * room + position + step) * width;
        for (int i = lane; i < width; i += 32) to[i] = from[i];
        return;
    }
    const bool query = head < heads;
    T *to = query ? q + ((size_t)step * heads + head) * width : k + ((size_t)(head - heads) * room + position + step) * width;
    const float *weight = query ? q_norm : k_norm;
    float scale = 1.0f;
    if (weight) {
        float squares = 0.0f;
        for (int i = lane; i < width; i += 32) squares += wide(from[i]) * wide(from[i]);
        scale = rsqrtf(warp_sum(squares) / width + epsilon);
    }
    const int half = width / 2;
    cos += (size_t)(position + step) * half;
    sin += (size_t)(position + step) * half;
    for (int i = lane; i < half; i += 32) {
        float a = wide(from[i]), b = wide(from[half + i]);
        if (weight) {
            a = wide(narrow<T>(a * scale * weight[i]));
            b = wide(narrow<T>(b * scale * weight[half + i]));
        }
        to[i] = narrow<T>(a * cos[i] - b * sin[i]);
        to[half + i] = narrow<T>(b * cos[i] + a * sin[i]);
    }
}

// A block a row of scores `[kv, group * steps, length]`, rows ordered by group then step; the first column is position `first`.
template <typename T> __device__ void softmax(const T *scores, T *out, int steps, int length, int first, int position, int window, float scale) {
    const size_t row = (size_t)blockIdx.x * length;
    const int own = position + blockIdx.x % steps;
    const int begin = (window > 0 ? max(own + 1 - window, 0) : 0) - first, end = own + 1 - first;
    float most = -INFINITY;
    for (int i = max(begin, 0) + threadIdx.x; i < end; i += blockDim.x) most = fmaxf(most, wide(scores[row + i]));
    most = block_max(most);
    float sum = 0.0f;
    for (int i = max(begin, 0) + threadIdx.x; i < end; i += blockDim.x) sum += __expf((wide(scores[row + i]) - most) * scale);
    const float share = 1.0f / block_sum(sum);
    for (int i = threadIdx.x; i < length; i += blockDim.x)
        out[row + i] = narrow<T>(i >= begin && i < end ? __expf((wide(scores[row + i]) - most) * scale) * share : 0.0f);
}

// One step's attention. A block takes `piece` positions of one key head for the whole group of its query heads, and leaves a maximum,
// a sum and a weighted sum of values for each; `join` puts the pieces together. A warp takes every eighth position; a lane, `width / 32`
// elements of the head. GROUP is the number of query heads a block keeps; PER is width / 32.
template <typename T, int GROUP, int PER>
__device__ void attend(const T *q, const T *k, const T *v, float *partial, int group, int room, int first, int end, int piece, float scale) {
    constexpr int WIDTH = PER * 32, WARPS = 8;
    const int head = blockIdx.x, split = blockIdx.y, part = blockIdx.z;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int from = first + split * piece, to = min(from + piece, end);
    const int base = part * GROUP, count = min(GROUP, group - base);
    float query[GROUP][PER], sums[GROUP][PER], most[GROUP], total[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        most[g] = -INFINITY;
        total[g] = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            query[g][i] = g < count ? wide(q[(size_t)(head * group + base + g) * WIDTH + lane * PER + i]) * scale : 0.0f;
            sums[g][i] = 0.0f;
        }
    }
    const T *keys = k + (size_t)head * room * WIDTH + lane * PER, *values = v + (size_t)head * room * WIDTH + lane * PER;
    for (int at = from + warp; at < to; at += WARPS) {
        float key[PER], value[PER];
#pragma unroll
        for (int i = 0; i < PER; i++) key[i] = wide(keys[(size_t)at * WIDTH + i]);
#pragma unroll
        for (int i = 0; i < PER; i++) value[i] = wide(values[(size_t)at * WIDTH + i]);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float score = 0.0f;
#pragma unroll
            for (int i = 0; i < PER; i++) score += query[g][i] * key[i];
            score = warp_sum(score);
            const float higher = fmaxf(most[g], score), shrink = __expf(most[g] - higher), weight = __expf(score - higher);
            most[g] = higher;
            total[g] = total[g] * shrink + weight;
#pragma unroll
            for (int i = 0; i < PER; i++) sums[g][i] = sums[g][i] * shrink + weight * value[i];
        }
    }
    // The eight warps of the block, joined in shared memory, one query head after the other.
    __shared__ float all[WARPS][WIDTH], mosts[WARPS], totals[WARPS];
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
        if (g >= count) break;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < PER; i++) all[warp][lane * PER + i] = sums[g][i];
        if (lane == 0) {
            mosts[warp] = most[g];
            totals[warp] = total[g];
        }
        __syncthreads();
        float highest = -INFINITY;
        for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, mosts[w]);
        float *out = partial + ((size_t)(head * group + base + g) * gridDim.y + split) * (WIDTH + 2);
        for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) {
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++)
                if (mosts[w] > -INFINITY) sum += all[w][i] * __expf(mosts[w] - highest);
            out[i] = sum;
        }
        if (threadIdx.x == 0) {
            float sum = 0.0f;
            for (int w = 0; w < WARPS; w++)
                if (mosts[w] > -INFINITY) sum += totals[w] * __expf(mosts[w] - highest);
            out[WIDTH] = highest;
            out[WIDTH + 1] = sum;
        }
    }
}

// A block a query head.
template <typename T> __device__ void join(const float *partial, T *out, int splits, int width) {
    partial += (size_t)blockIdx.x * splits * (width + 2);
    float highest = -INFINITY, total = 0.0f;
    for (int s = 0; s < splits; s++) highest = fmaxf(highest, partial[(size_t)s * (width + 2) + width]);
    for (int s = 0; s < splits; s++) {
        const float *one = partial + (size_t)s * (width + 2);
        total += one[width + 1] * __expf(one[width] - highest);
    }
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float sum = 0.0f;
        for (int s = 0; s < splits; s++) {
            const float *one = partial + (size_t)s * (width + 2);
            sum += one[i] * __expf(one[width] - highest);
        }
        out[(size_t)blockIdx.x * width + i] = narrow<T>(sum / total);
    }
}

#define ATTEND(T, NAME, WIDTH)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) attend_##WIDTH##_##NAME(const T *q, const T *k, const T *v, float *partial,   \
                                                                              int group, int room, int first, int end, int piece,   \
                                                                              float scale) {                                        \
        attend<T, 4, WIDTH / 32>(q, k, v, partial, group, room, first, end, piece, scale);                                          \
    }

#define KERNELS(T, NAME)                                                                                                            \
    extern "C" __global__ void norm_##NAME(const T *x, const float *weight, T *out, int width, float epsilon) {                     \
        norm<T>(x, nullptr, weight, nullptr, out, width, epsilon);                                                                  \
    }                                                                                                                               \
    extern "C" __global__ void add_norm_##NAME(const T *x, const T *y, const float *weight, T *sum, T *out, int width,              \
                                               float epsilon) {                                                                     \
        norm<T>(x, y, weight, sum, out, width, epsilon);                                                                            \
    }                                                                                                                               \
    extern "C" __global__ void gemv_##NAME(const T *w, const T *x, T *out, int n, int k) { gemv<T>(w, x, out, n, k); }              \
    extern "C" __global__ void gate_##NAME(const T *x, T *out, int width, int gelu) { gate<T>(x, out, width, gelu); }               \
    extern "C" __global__ void rotate_##NAME(const T *qkv, const float *cos, const float *sin, T *q, T *k, T *v, int heads, int kv, \
                                             int width, int room, int position) {                                                   \
        rotate<T>(qkv, nullptr, nullptr, cos, sin, q, k, v, heads, kv, width, room, position, 0.0f);                                \
    }                                                                                                                               \
    extern "C" __global__ void norm_rotate_##NAME(const T *qkv, const float *q_norm, const float *k_norm, const float *cos,         \
                                                  const float *sin, T *q, T *k, T *v, int heads, int kv, int width, int room,       \
                                                  int position, float epsilon) {                                                    \
        rotate<T>(qkv, q_norm, k_norm, cos, sin, q, k, v, heads, kv, width, room, position, epsilon);                               \
    }                                                                                                                               \
    extern "C" __global__ void softmax_##NAME(const T *scores, T *out, int steps, int length, int first, int position, int window,  \
                                              float scale) {                                                                        \
        softmax<T>(scores, out, steps, length, first, position, window, scale);                                                     \
    }                                                                                                                               \
    extern "C" __global__ void join_##NAME(const float *partial, T *out, int splits, int width) {                                   \
        join<T>(partial, out, splits, width);                                                                                       \
    }                                                                                                                               \
    ATTEND(T, NAME, 32)                                                                                                             \
    ATTEND(T, NAME, 64)                                                                                                             \
    ATTEND(T, NAME, 96)                                                                                                             \
    ATTEND(T, NAME, 128)                                                                                                            \
    ATTEND(T, NAME, 256)

KERNELS(__nv_bfloat16, bf16)
KERNELS(__half, f16)
KERNELS(float, f32)
