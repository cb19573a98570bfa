// base: one AdamW or SGD step and the predicted move behind it, in one sweep:
// theta' = base(theta) + scale (c_0 (base(theta) - theta) + sum_j c_{j+1} b_j).
// Lists: theta, gradient, first moment (or momentum), second moment (AdamW only), then
// J directions. BASE_ADAMW says which. Nothing is judged: the gradient has been.

#define HELD (DIRECTIONS > 0 ? DIRECTIONS : 1)
#define MOMENTS (BASE_ADAMW ? 2 : 1)

// AdamW: rate = lr / (1 - beta1^t), decay = lr wd, first = beta1, second = beta2,
//        root = sqrt(1 - beta2^t), eps.
// SGD:   rate = lr, decay = wd, first = momentum, second = 1 - dampening (1 on the
//        first step), root = 1 for Nesterov else 0, eps unused.
struct Hyper { float rate, decay, first, second, root, eps; };

struct Base {
  PARAM* theta;
  const GRAD* gradient;
  PARAM* moment[MOMENTS];
  const BASIS* direction[HELD];
  float factor[1 + HELD];
  Hyper hyper;

  template <int N> struct Registers {
    Pack<PARAM, N> theta, moment[MOMENTS];
    Pack<GRAD, N> g;
    Pack<BASIS, N> b[HELD];
  };

  template <int N> __device__ __forceinline__ void fetch(Registers<N>& r, i64 i) const {
    load(r.theta, theta, i);
    load(r.g, gradient, i);
#pragma unroll
    for (int m = 0; m < MOMENTS; ++m) load(r.moment[m], moment[m], i);
#pragma unroll
    for (int j = 0; j < DIRECTIONS; ++j)
      if (factor[1 + j] != 0.0f) load(r.b[j], direction[j], i);
  }

  template <int N>
  __device__ __forceinline__ float step(Registers<N>& r, int k, float old, float g) {
    float m = read(r.moment[0].at[k]);
    if (BASE_ADAMW) {
      float v = read(r.moment[MOMENTS - 1].at[k]);
      m = hyper.first * m + (1.0f - hyper.first) * g;
      v = hyper.second * v + (1.0f - hyper.second) * g * g;
      write(r.moment[0].at[k], m);
      write(r.moment[MOMENTS - 1].at[k], v);
      const float denominator = sqrtf(v) / hyper.root + hyper.eps;
      return (old - hyper.decay * old) - hyper.rate * m / denominator;
    }
    g += hyper.decay * old;
    m = hyper.first * m + hyper.second * g;
    write(r.moment[0].at[k], m);
    return old - hyper.rate * (hyper.root != 0.0f ? g + hyper.first * m : m);
  }

  template <int N> __device__ __forceinline__ void work(Registers<N>& r, i64 i) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float old = read(r.theta.at[k]);
      const float moved = step(r, k, old, read(r.g.at[k]));
      float delta = factor[0] != 0.0f ? factor[0] * (moved - old) : 0.0f;
#pragma unroll
      for (int j = 0; j < DIRECTIONS; ++j)
        if (factor[1 + j] != 0.0f)
          delta = fmaf(factor[1 + j], read(r.b[j].at[k]), delta);
      write(r.theta.at[k], moved + delta);
    }
    store(r.theta, theta, i);
#pragma unroll
    for (int m = 0; m < MOMENTS; ++m) store(r.moment[m], moment[m], i);
  }
};

extern "C" __global__ void __launch_bounds__(256)
base(const i64* words, i64 tensors, const int* owner, i64 first_chunk, i64 chunk_size,
     const float* coefficients, float scale, float rate, float decay, float first,
     float second, float root, float eps) {
  const Table table = {words, 2 + MOMENTS + DIRECTIONS, tensors};
  const Chunk chunk = chunk_of(table, owner, first_chunk + blockIdx.x, chunk_size);
  const i64 t = chunk.tensor, row = table.row(t);
  Base op;
  op.theta = table.data<PARAM>(0, t);
  op.gradient = table.data<GRAD>(1, t);
#pragma unroll
  for (int m = 0; m < MOMENTS; ++m) op.moment[m] = table.data<PARAM>(2 + m, t);
  op.factor[0] = coefficients[row * (1 + DIRECTIONS)] * scale;
#pragma unroll
  for (int j = 0; j < DIRECTIONS; ++j) {
    op.direction[j] = table.data<BASIS>(2 + MOMENTS + j, t);
    op.factor[1 + j] = coefficients[row * (1 + DIRECTIONS) + 1 + j] * scale;
  }
  op.hyper = {rate, decay, first, second, root, eps};
  run(op, chunk, table.aligned(t));
}
