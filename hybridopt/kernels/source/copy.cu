// copy: target = source, with conversion. Lists: source (PARAM), target (BASIS). Equal
// formats move as bits, so NaN payloads survive.

template <class From, class To> struct Convert {
  static __device__ __forceinline__ To of(From v) { To w; write(w, read(v)); return w; }
};
template <class Same> struct Convert<Same, Same> {
  static __device__ __forceinline__ Same of(Same v) { return v; }
};

struct Copy {
  const PARAM* source;
  BASIS* target;

  template <int N> struct Registers { Pack<PARAM, N> value; };

  template <int N> __device__ __forceinline__ void fetch(Registers<N>& r, i64 i) const {
    load(r.value, source, i);
  }

  template <int N> __device__ __forceinline__ void work(Registers<N>& r, i64 i) {
    Pack<BASIS, N> out;
#pragma unroll
    for (int k = 0; k < N; ++k) out.at[k] = Convert<PARAM, BASIS>::of(r.value.at[k]);
    store(out, target, i);
  }
};

extern "C" __global__ void __launch_bounds__(256)
copy(const i64* words, i64 tensors, const int* owner, i64 base, i64 chunk_size) {
  const Table table = {words, 2, tensors};
  const Chunk chunk = chunk_of(table, owner, base + blockIdx.x, chunk_size);
  Copy op;
  op.source = table.data<PARAM>(0, chunk.tensor);
  op.target = table.data<BASIS>(1, chunk.tensor);
  run(op, chunk, table.aligned(chunk.tensor));
}
