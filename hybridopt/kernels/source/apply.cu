// apply: theta += scale sum_j c_j b_j over all tensors, or over none.
// Lists: theta, then J directions. Two sweeps, since no weight may be written before
// all were seen: judge reads (norm and finite flag), commit reads again and writes.

#define HELD (DIRECTIONS > 0 ? DIRECTIONS : 1)

struct Move {
  PARAM* theta;
  const BASIS* direction[HELD];
  float factor[HELD];
  float square, bad;
  bool commits;

  template <int N> struct Registers {
    Pack<PARAM, N> theta;
    Pack<BASIS, N> b[HELD];
  };

  // A zero factor leaves its direction unread: it costs nothing, and inf there counts
  // as zero. The branch is the same for the whole block.
  template <int N> __device__ __forceinline__ void fetch(Registers<N>& r, i64 i) const {
    load(r.theta, theta, i);
#pragma unroll
    for (int j = 0; j < DIRECTIONS; ++j)
      if (factor[j] != 0.0f) load(r.b[j], direction[j], i);
  }

  template <int N> __device__ __forceinline__ void work(Registers<N>& r, i64 i) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float delta = 0.0f;
      // fmaf by name: judge and commit must round alike, whatever gets contracted.
#pragma unroll
      for (int j = 0; j < DIRECTIONS; ++j)
        if (factor[j] != 0.0f) delta = fmaf(factor[j], read(r.b[j].at[k]), delta);
      write(r.theta.at[k], read(r.theta.at[k]) + delta);
      if (!commits) {
        square += delta * delta;
        bad += is_finite(read(r.theta.at[k])) ? 0.0f : 1.0f;
      }
    }
    if (commits) store(r.theta, theta, i);
  }
};

__device__ __forceinline__ Move move_of(const Table& table, i64 tensor,
                                        const float* coefficients, float scale) {
  Move op;
  op.theta = table.data<PARAM>(0, tensor);
  const i64 row = table.row(tensor);
#pragma unroll
  for (int j = 0; j < DIRECTIONS; ++j) {
    op.direction[j] = table.data<BASIS>(1 + j, tensor);
    op.factor[j] = coefficients[row * DIRECTIONS + j] * scale;
  }
  op.square = op.bad = 0.0f;
  return op;
}

extern "C" __global__ void __launch_bounds__(256)
judge(const i64* words, i64 tensors, const int* owner, i64 base, i64 chunk_size,
      float* partials, const float* coefficients, float scale) {
  const Table table = {words, 1 + DIRECTIONS, tensors};
  const i64 index = base + blockIdx.x;
  const Chunk chunk = chunk_of(table, owner, index, chunk_size);
  Move op = move_of(table, chunk.tensor, coefficients, scale);
  op.commits = false;
  run(op, chunk, table.aligned(chunk.tensor));
  block_sum(op.square, partials + index * 2);
  block_sum(op.bad, partials + index * 2 + 1);
}

// Chunks run from the last to the first: what judge read last is still in the cache.
extern "C" __global__ void __launch_bounds__(256)
commit(const i64* words, i64 tensors, const int* owner, i64 base, i64 chunk_size,
       const float* verdict, const float* coefficients, float scale) {
  if (*verdict == 0.0f) return;
  const Table table = {words, 1 + DIRECTIONS, tensors};
  const i64 index = base + (gridDim.x - 1 - blockIdx.x);
  const Chunk chunk = chunk_of(table, owner, index, chunk_size);
  Move op = move_of(table, chunk.tensor, coefficients, scale);
  op.commits = true;
  run(op, chunk, table.aligned(chunk.tensor));
}
