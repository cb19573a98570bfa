// Shared by every kernel: number formats, packs of 16 bytes, chunks, block sums.
//
// A kernel file is compiled after this one, as one text, with these macros:
//   PARAM, GRAD, BASIS   storage of weights, gradients, directions: f32, bf16 or f16
//   DIRECTIONS           J, how many directions an operation takes
//   PACK                 weights per access: 16 bytes of the widest format in use
//   UNROLL, STREAMING    packs in flight per thread; 1 to mark accesses as used once
// The same text compiles for the host with HYBRIDOPT_HOST defined (tests do): there a
// block's threads run one after the other, which only block_sum has to know.

typedef long long i64;
typedef unsigned int u32;
typedef unsigned short u16;

struct f32 { u32 bits; };
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

#ifdef HYBRIDOPT_HOST
static inline u32 bits_of(float x) { u32 b; __builtin_memcpy(&b, &x, 4); return b; }
static inline float float_of(u32 b) { float x; __builtin_memcpy(&x, &b, 4); return x; }
static inline float half_to_float(u16 b) {
  _Float16 h; __builtin_memcpy(&h, &b, 2); return (float)h;
}
static inline u16 float_to_half(float x) {
  _Float16 h = (_Float16)x; u16 b; __builtin_memcpy(&b, &h, 2); return b;
}
#else
__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(u32 b) { return __uint_as_float(b); }
__device__ __forceinline__ float half_to_float(u16 b) {
  float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(b)); return x;
}
__device__ __forceinline__ u16 float_to_half(float x) {
  u16 b; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(x)); return b;
}
#endif

__device__ __forceinline__ float read(f32 v) { return float_of(v.bits); }
__device__ __forceinline__ float read(bf16 v) { return float_of((u32)v.bits << 16); }
__device__ __forceinline__ float read(f16 v) { return half_to_float(v.bits); }

__device__ __forceinline__ void write(f32& v, float x) { v.bits = bits_of(x); }
__device__ __forceinline__ void write(f16& v, float x) { v.bits = float_to_half(x); }
// Round to nearest, ties to even; a NaN stays one even if its payload is low.
__device__ __forceinline__ void write(bf16& v, float x) {
  u32 b = bits_of(x);
  bool nan = (b & 0x7fffffffu) > 0x7f800000u;
  v.bits = nan ? 0x7fc0 : (u16)((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ bool is_finite(float x) {
  return (bits_of(x) & 0x7f800000u) != 0x7f800000u;
}

// N stored values that move in one access. Reading the struct as words keeps the
// access whole whatever the compiler thinks of arrays of shorts.
template <int BYTES> struct Word;
template <> struct Word<16> { typedef uint4 type; };
template <> struct Word<8> { typedef uint2 type; };
template <> struct Word<4> { typedef u32 type; };
template <> struct Word<2> { typedef u16 type; };

template <class T, int N> struct Pack {
  typedef typename Word<N * sizeof(T)>::type word;
  union { word whole; T at[N]; };
};

template <class T, int N>
__device__ __forceinline__ void load(Pack<T, N>& pack, const T* from, i64 index) {
  const typename Pack<T, N>::word* whole = (const typename Pack<T, N>::word*)(from + index);
#if STREAMING && !defined(HYBRIDOPT_HOST)
  pack.whole = __ldcs(whole);
#else
  pack.whole = *whole;
#endif
}

template <class T, int N>
__device__ __forceinline__ void store(const Pack<T, N>& pack, T* to, i64 index) {
  typename Pack<T, N>::word* whole = (typename Pack<T, N>::word*)(to + index);
#if STREAMING && !defined(HYBRIDOPT_HOST)
  __stcs(whole, pack.whole);
#else
  *whole = pack.whole;
#endif
}

// The table of one call, all 64-bit: ``lists`` rows of one address per tensor, then the
// number of weights per tensor, then its first chunk, then its row in the result.
struct Table {
  const i64* words;
  i64 lists;
  i64 tensors;

  template <class T> __device__ __forceinline__ T* data(int list, i64 tensor) const {
    return (T*)words[list * tensors + tensor];
  }
  __device__ __forceinline__ i64 size(i64 t) const { return words[lists * tensors + t]; }
  __device__ __forceinline__ i64 first(i64 t) const {
    return words[(lists + 1) * tensors + t];
  }
  __device__ __forceinline__ i64 row(i64 t) const {
    return words[(lists + 2) * tensors + t];
  }
  // Whether every address of a tensor allows whole packs; sizes of formats differ, so
  // 16 bytes are asked of all.
  __device__ __forceinline__ bool aligned(i64 tensor) const {
    i64 low = 0;
    for (int list = 0; list < lists; ++list) low |= words[list * tensors + tensor];
    return (low & 15) == 0;
  }
};

// What one block works on: weights [begin, begin + length) of one tensor.
struct Chunk {
  i64 tensor, begin, length;
};

__device__ __forceinline__ Chunk chunk_of(const Table& table, const int* owner,
                                          i64 index, i64 chunk_size) {
  Chunk chunk;
  chunk.tensor = owner[index];
  chunk.begin = (index - table.first(chunk.tensor)) * chunk_size;
  i64 rest = table.size(chunk.tensor) - chunk.begin;
  chunk.length = rest < chunk_size ? rest : chunk_size;
  return chunk;
}

// Run op over a chunk: whole packs, UNROLL of them in flight per thread before the
// first is used, then the tail (or all of it, where addresses are odd) one by one.
template <int N, int U, class Op>
__device__ __forceinline__ void sweep(Op& op, i64 begin, int packs) {
  typename Op::template Registers<N> held[U];
  const int width = blockDim.x;
  int pack = threadIdx.x;
  for (; pack + (U - 1) * width < packs; pack += U * width) {
#pragma unroll
    for (int u = 0; u < U; ++u)
      op.template fetch<N>(held[u], begin + (i64)(pack + u * width) * N);
#pragma unroll
    for (int u = 0; u < U; ++u)
      op.template work<N>(held[u], begin + (i64)(pack + u * width) * N);
  }
  for (; pack < packs; pack += width) {
    op.template fetch<N>(held[0], begin + (i64)pack * N);
    op.template work<N>(held[0], begin + (i64)pack * N);
  }
}

template <class Op>
__device__ __forceinline__ void run(Op& op, const Chunk& chunk, bool aligned) {
  int packs = aligned ? (int)(chunk.length / PACK) : 0;
  if (aligned) sweep<PACK, UNROLL>(op, chunk.begin, packs);
  sweep<1, UNROLL>(op, chunk.begin + (i64)packs * PACK,
                   (int)chunk.length - packs * PACK);
}

// Whether this thread sees, and may build on, what block_sum wrote just before.
__device__ __forceinline__ bool sees_sum() {
#ifdef HYBRIDOPT_HOST
  return threadIdx.x == blockDim.x - 1;
#else
  return threadIdx.x == 0;
#endif
}

// The sum of value over the block, in a fixed order, written to *to by thread 0.
template <class T> __device__ __forceinline__ void block_sum(T value, float* to) {
#ifdef HYBRIDOPT_HOST
  *to = threadIdx.x == 0 ? (float)value : (float)(*to + value);
#else
  __shared__ T held[32];
  for (int offset = 16; offset > 0; offset >>= 1)
    value += __shfl_down_sync(0xffffffffu, value, offset);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) held[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < ((int)blockDim.x >> 5) ? held[lane] : (T)0;
    for (int offset = 16; offset > 0; offset >>= 1)
      value += __shfl_down_sync(0xffffffffu, value, offset);
    if (lane == 0) *to = (float)value;
  }
  __syncthreads();
#endif
}
