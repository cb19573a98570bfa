// lead: newest = before - theta, theta -= lead newest, theta += made older. Lists: theta,
// before, older, newest; before may be newest itself.
//
// With DIRECTIONS = 0 only the displacement is kept: theta stays, older is not read. Where
// *skip is 1 the base has not stepped: theta stays, and newest times lead is what it is
// ahead by already.

struct Lead {
  PARAM* theta;
  const PARAM* before;
  const BASIS* older;
  BASIS* newest;
  float lead, made;
  bool stays;

  template <int N> struct Registers {
    Pack<PARAM, N> theta, before;
    Pack<BASIS, N> older;
  };

  template <int N> __device__ __forceinline__ void fetch(Registers<N>& r, i64 i) const {
    load(r.theta, theta, i);
    load(r.before, before, i);
#if DIRECTIONS > 0
    load(r.older, older, i);
#endif
  }

  template <int N> __device__ __forceinline__ void work(Registers<N>& r, i64 i) const {
    Pack<BASIS, N> s;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      write(s.at[k], read(r.before.at[k]) - read(r.theta.at[k]));
#if DIRECTIONS > 0
      const float kept = read(r.older.at[k]);
      if (stays) {
        write(s.at[k], lead > 0.0f ? kept * (made / lead) : 0.0f);
      } else {
        // Products are rounded by themselves: what was added is taken back as it was.
        const float ahead = fmaf(lead, read(s.at[k]), 0.0f);
        PARAM moved;
        write(moved, read(r.theta.at[k]) - ahead);
        write(r.theta.at[k], read(moved) + fmaf(made, kept, 0.0f));
      }
#endif
    }
    store(s, newest, i);
#if DIRECTIONS > 0
    if (!stays) store(r.theta, theta, i);
#endif
  }
};

extern "C" __global__ void __launch_bounds__(256)
lead(const i64* words, i64 tensors, const int* owner, i64 base, i64 chunk_size,
     float length, float made, const float* skip) {
  const Table table = {words, 4, tensors};
  const Chunk chunk = chunk_of(table, owner, base + blockIdx.x, chunk_size);
  const i64 t = chunk.tensor;
  Lead op;
  op.theta = table.data<PARAM>(0, t);
  op.before = table.data<PARAM>(1, t);
  op.older = table.data<BASIS>(2, t);
  op.newest = table.data<BASIS>(3, t);
  op.lead = length;
  op.made = made;
  op.stays = skip != nullptr && *skip != 0.0f;
  run(op, chunk, table.aligned(t));
}
