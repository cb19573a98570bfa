// advance: s = theta - anchor, v = beta (v + s), anchor = theta, with g . s, s . s and
// v . v of the stored values. Lists: theta, gradient, anchor, s, v.
//
// With DIRECTIONS > 0 it also makes the move along s: theta += factor s, and the anchor
// is the weight behind it. A weight that would not be finite stays where it is.

struct Advance {
  PARAM* theta;
  const GRAD* gradient;
  PARAM* anchor;
  BASIS* step;
  BASIS* lag;
  float beta;
  float factor;
  float sums[3];

  template <int N> struct Registers {
    Pack<PARAM, N> theta, anchor;
    Pack<GRAD, N> g;
    Pack<BASIS, N> v;
  };

  template <int N> __device__ __forceinline__ void fetch(Registers<N>& r, i64 i) const {
    load(r.theta, theta, i);
    load(r.anchor, anchor, i);
    load(r.g, gradient, i);
    load(r.v, lag, i);
  }

  template <int N> __device__ __forceinline__ void work(Registers<N>& r, i64 i) {
    Pack<BASIS, N> s;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float moved = read(r.theta.at[k]) - read(r.anchor.at[k]);
      const float filtered = (read(r.v.at[k]) + moved) * beta;
      write(s.at[k], moved);
      write(r.v.at[k], filtered);
      // Sums describe what is stored, so they are taken after rounding.
      const float kept = read(s.at[k]), behind = read(r.v.at[k]);
      sums[0] += read(r.g.at[k]) * kept;
      sums[1] += kept * kept;
      sums[2] += behind * behind;
#if DIRECTIONS > 0
      PARAM ahead;
      write(ahead, read(r.theta.at[k]) + fmaf(factor, kept, 0.0f));
      if (is_finite(read(ahead))) r.theta.at[k] = ahead;
#endif
    }
    store(s, step, i);
    store(r.v, lag, i);
#if DIRECTIONS > 0
    store(r.theta, theta, i);
#endif
    store(r.theta, anchor, i);
  }
};

extern "C" __global__ void __launch_bounds__(256)
advance(const i64* words, i64 tensors, const int* owner, i64 base, i64 chunk_size,
        float* partials, float beta, const float* factors) {
  const Table table = {words, 5, tensors};
  const i64 index = base + blockIdx.x;
  const Chunk chunk = chunk_of(table, owner, index, chunk_size);
  const i64 t = chunk.tensor;
  Advance op;
  op.theta = table.data<PARAM>(0, t);
  op.gradient = table.data<GRAD>(1, t);
  op.anchor = table.data<PARAM>(2, t);
  op.step = table.data<BASIS>(3, t);
  op.lag = table.data<BASIS>(4, t);
  op.beta = beta;
  op.factor = DIRECTIONS > 0 ? factors[table.row(t)] : 0.0f;
  for (int r = 0; r < 3; ++r) op.sums[r] = 0.0f;
  run(op, chunk, table.aligned(t));
#pragma unroll
  for (int r = 0; r < 3; ++r) block_sum(op.sums[r], partials + index * 3 + r);
}
