// observe: g . g, g . b_j and b_j . b_j per chunk, reading every number once.
// Lists: gradients, then J directions. Partial sums: 1 + 2 J floats per chunk.

#define HELD (DIRECTIONS > 0 ? DIRECTIONS : 1)

struct Observe {
  const GRAD* gradient;
  const BASIS* direction[HELD];
  float sums[1 + 2 * HELD];

  template <int N> struct Registers {
    Pack<GRAD, N> g;
    Pack<BASIS, N> b[HELD];
  };

  template <int N> __device__ __forceinline__ void fetch(Registers<N>& r, i64 i) const {
    load(r.g, gradient, i);
#pragma unroll
    for (int j = 0; j < DIRECTIONS; ++j) load(r.b[j], direction[j], i);
  }

  template <int N> __device__ __forceinline__ void work(Registers<N>& r, i64) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float g = read(r.g.at[k]);
      sums[0] += g * g;
#pragma unroll
      for (int j = 0; j < DIRECTIONS; ++j) {
        const float b = read(r.b[j].at[k]);
        sums[1 + j] += g * b;
        sums[1 + DIRECTIONS + j] += b * b;
      }
    }
  }
};

extern "C" __global__ void __launch_bounds__(256)
observe(const i64* words, i64 tensors, const int* owner, i64 base, i64 chunk_size,
        float* partials) {
  const Table table = {words, 1 + DIRECTIONS, tensors};
  const i64 index = base + blockIdx.x;
  const Chunk chunk = chunk_of(table, owner, index, chunk_size);
  Observe op;
  op.gradient = table.data<GRAD>(0, chunk.tensor);
#pragma unroll
  for (int j = 0; j < DIRECTIONS; ++j)
    op.direction[j] = table.data<BASIS>(1 + j, chunk.tensor);
#pragma unroll
  for (int r = 0; r < 1 + 2 * DIRECTIONS; ++r) op.sums[r] = 0.0f;
  run(op, chunk, table.aligned(chunk.tensor));
#pragma unroll
  for (int r = 0; r < 1 + 2 * DIRECTIONS; ++r)
    block_sum(op.sums[r], partials + index * (1 + 2 * DIRECTIONS) + r);
}
