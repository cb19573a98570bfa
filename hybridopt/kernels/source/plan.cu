// What surrounds the sweeps: writing the table, and adding partial sums up.

#define WORDS 440
struct Words { i64 at[WORDS]; };

// The table arrives as kernel arguments: no host buffer has to stay alive, nothing
// waits, and inside a graph capture the table becomes part of the graph.
extern "C" __global__ void fill(i64* to, i64 count, Words from) {
  for (i64 i = threadIdx.x; i < count; i += blockDim.x) to[i] = from.at[i];
}

// Which tensor owns each chunk; one block per tensor.
extern "C" __global__ void own(const i64* words, i64 lists, i64 tensors, i64 chunks,
                               int* owner) {
  const Table table = {words, lists, tensors};
  const i64 tensor = blockIdx.x;
  const i64 end = tensor + 1 < tensors ? table.first(tensor + 1) : chunks;
  for (i64 i = table.first(tensor) + threadIdx.x; i < end; i += blockDim.x)
    owner[i] = (int)tensor;
}

// result[row, r] = sum over the tensor's chunks of partials[chunk, r]; double inside,
// always in the same order. One block per tensor.
extern "C" __global__ void __launch_bounds__(256)
total(const i64* words, i64 lists, i64 tensors, i64 chunks, const float* partials,
      i64 width, float* result) {
  const Table table = {words, lists, tensors};
  const i64 tensor = blockIdx.x, row = table.row(tensor);
  const i64 end = tensor + 1 < tensors ? table.first(tensor + 1) : chunks;
  for (i64 r = 0; r < width; ++r) {
    double sum = 0.0;
    for (i64 i = table.first(tensor) + threadIdx.x; i < end; i += blockDim.x)
      sum += partials[i * width + r];
    block_sum(sum, result + row * width + r);
  }
}

// What judge found: result[row] = squared norm per tensor, result[tensors] = 1 if no
// chunk holds a bad weight, else 0. One block per tensor, then one for the flag.
extern "C" __global__ void __launch_bounds__(1024)
verdict(const i64* words, i64 lists, i64 tensors, i64 chunks, const float* partials,
        float* result) {
  const Table table = {words, lists, tensors};
  const i64 tensor = blockIdx.x;
  const bool flag = tensor == tensors;
  const i64 begin = flag ? 0 : table.first(tensor);
  const i64 end = tensor + 1 < tensors ? table.first(tensor + 1) : chunks;
  double sum = 0.0;
  for (i64 i = begin + threadIdx.x; i < end; i += blockDim.x)
    sum += partials[i * 2 + (flag ? 1 : 0)];
  float* to = result + (flag ? tensors : table.row(tensor));
  block_sum(sum, to);
  if (flag && sees_sum()) *to = *to == 0.0f ? 1.0f : 0.0f;
}
