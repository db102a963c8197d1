// A program: the operations of a model's step in order, made once and run for every batch.
//
// What a CUDA graph is for a GPU: the model is written once, in Python (compress.runtime.decoder);
// recording it fills a program, and a step is then one call. All threads go through all operations
// inside one parallel region, and wait for each other after each phase. A C interface for ctypes: all tensors
// are addresses, which the Python side keeps alive.
#include <omp.h>

#include <memory>

#include "../latent_attention/avx512.h"
#include "../lowbit_matmul/avx512.h"
#include "../paged_attention/avx512.h"
#include "../rms_norm/avx512.h"
#include "../rope/avx512.h"
#include "../w8a8_matmul/avx512.h"

using namespace compress;

namespace {

struct Program {
  std::vector<std::unique_ptr<Operation>> operations;
  Barrier barrier;
  const int threads;

  explicit Program(int threads) : threads(threads) {}

  template <class Op>
  void add(const void* arguments) {
    operations.push_back(
        std::make_unique<Op>(*static_cast<const typename Op::Arguments*>(arguments)));
    operations.back()->prepare(threads);
  }

  template <template <class> class Op>
  void add(bool in_float, const void* arguments) {
    in_float ? add<Op<float>>(arguments) : add<Op<bf16>>(arguments);
  }

  // Of an operation on the cache, whose arguments begin with the kind of its codes.
  template <template <class, class> class Op>
  void add_cached(bool in_float, const void* arguments) {
    in_float ? add_coded<Op, float>(arguments) : add_coded<Op, bf16>(arguments);
  }

  template <template <class, class> class Op, class T>
  void add_coded(const void* arguments) {
    switch (*static_cast<const int32_t*>(arguments)) {
      case 0: return add<Op<T, T>>(arguments);
      case 1: return add<Op<T, int8_t>>(arguments);
      case 2: return add<Op<T, e4m3>>(arguments);
    }
  }
};

}  // namespace

extern "C" {

void* program_new(int threads) { return new Program(threads); }
void program_free(void* program) { delete static_cast<Program*>(program); }

// `arguments` points to the operation's struct of that name; `in_float`: activations are float32,
// else bfloat16. The order is that of _ARGUMENTS in __init__.py.
void program_add(void* program, int operation, int in_float, const void* arguments) {
  auto& to = *static_cast<Program*>(program);
  switch (operation) {
    case 0: return to.add<Embed>(in_float, arguments);
    case 1: return to.add<Angles>(arguments);
    case 2: return to.add<RmsNorm>(in_float, arguments);
    case 3: return to.add<Linear>(arguments);
    case 4: return to.add_cached<RopeAndWrite>(in_float, arguments);
    case 5: return to.add_cached<PagedAttention>(in_float, arguments);
    case 6: return to.add<TakeRows>(arguments);
    case 7: return to.add<RoundingLinear>(arguments);
    case 8: return to.add_cached<LatentWrite>(in_float, arguments);
    case 9: return to.add_cached<LatentAttention>(in_float, arguments);
    case 10: return to.add<LatentValues>(in_float, arguments);
  }
}

void program_run(void* program, const Batch* batch) {
  auto& [operations, barrier, threads] = *static_cast<Program*>(program);
  // OpenMP's own number of threads is another one for each thread that asks.
#pragma omp parallel num_threads(threads)
  {
    Worker worker{omp_get_thread_num(), omp_get_num_threads()};
    for (auto& operation : operations)
      for (int phase = 0; phase < operation->phases(); phase++) {
        if (!operation->needed(*batch, worker, phase)) continue;
        operation->run(*batch, worker, phase);
        barrier.wait(worker.count);
      }
  }
}

}  // extern "C"
