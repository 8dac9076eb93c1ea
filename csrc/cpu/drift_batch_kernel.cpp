// Many small drifting problems: every task centres, packs and multiplies one problem stripe by
// stripe, so that nothing but the inputs, the kept distances and the final force meets memory.

#include "drift_gram.h"
#include "drift_softmax.h"
#include "streaming.h"

#include <tuple>

namespace driftar::cpu {

namespace {

// Stripes that are loaded at a time, and their features.
constexpr int64_t kStripes = 4;
template <typename acc_t>
constexpr int64_t kBatchDepth = kStripes * kPanelWidth<acc_t>;

// What the passes over one problem share.
template <typename acc_t>
struct ProblemMemory {
  int64_t generated, points, stride;
  acc_t* stripes;  // [kStripes, M padded, width]
  acc_t* values;   // [N, M padded]: distances, then D
  acc_t* rest;

  ProblemMemory(int64_t generated, int64_t points, acc_t* memory)
      : generated(generated),
        points(points),
        stride(row_length<acc_t>(points)),
        stripes(memory),
        values(stripes + kStripes * stripe_size()),
        rest(values + generated * stride) {
    for (int64_t k = 0; k < kStripes; ++k) {
      acc_t* stripe = stripes + k * stripe_size();
      std::fill(stripe + points * kPanelWidth<acc_t>, stripe + stripe_size(), acc_t(0));
    }
  }

  int64_t stripe_size() const { return stride * kPanelWidth<acc_t>; }

  // Calls visit(first, stripe) for the centred stripes of problem b.
  template <typename scalar_t, typename Visitor>
  void each_stripe(const DriftBatch<scalar_t>& call, int64_t b, Visitor&& visit) const {
    constexpr int64_t depth = kBatchDepth<acc_t>, width = kPanelWidth<acc_t>;
    for (int64_t start = 0; start < call.features; start += depth) {
      const int64_t end = std::min(start + depth, call.features);
      load_stripes(call, b, start, end, stripes, stripe_size());
      acc_t* stripe = stripes;
      for (int64_t first = start; first < end; first += width, stripe += stripe_size()) {
        centre_stripe(stripe, points);
        visit(first, stripe);
      }
    }
  }
};

// Calls visit(start, depth, by_point) for every kBatchDepth features, with the points packed panels
// kBatchDepth * width apart, and sums up the squared norms. by_point has room for M padded x
// kBatchDepth.
template <typename scalar_t, typename acc_t, typename Visitor>
void each_packed(const DriftBatch<scalar_t>& call, int64_t b, const ProblemMemory<acc_t>& memory,
                 acc_t* norms, acc_t* by_point, Visitor&& visit) {
  constexpr int64_t width = kPanelWidth<acc_t>, depth = kBatchDepth<acc_t>;
  memory.each_stripe(call, b, [&](int64_t first, const acc_t* stripe) {
    const int64_t end = std::min(first + width, call.features), start = first / depth * depth;
    transpose_stripe(stripe, call.points, end - first, by_point + (first - start) * width,
                     depth * width, first > 0, norms);
    if (end == std::min(start + depth, call.features)) visit(start, end - start, by_point);
  });
}

// The inner products of all points, upper triangle of panels, and their squared norms.
template <typename scalar_t, typename acc_t>
void gram_of(const DriftBatch<scalar_t>& call, int64_t b, const ProblemMemory<acc_t>& memory,
             acc_t* norms, acc_t* gram) {
  each_packed(call, b, memory, norms, memory.rest,
              [&](int64_t start, int64_t depth, const acc_t* packed) {
                add_gram(packed, kBatchDepth<acc_t> * kPanelWidth<acc_t>, depth, call.points,
                         start > 0, gram);
              });
}

template <typename scalar_t, typename acc_t>
void distances_of(const DriftBatch<scalar_t>& call, int64_t b, const ProblemMemory<acc_t>& memory) {
  constexpr int64_t panel_stride = kBatchDepth<acc_t> * kPanelWidth<acc_t>;
  if (call.grams != nullptr) {
    acc_t* norms = call.grams + b * gram_size<acc_t>(call.points);
    acc_t* gram = norms + panel_padded<acc_t>(call.points);
    gram_of(call, b, memory, norms, gram);
    mirror_gram(call.generated, call.points, gram);
    gram_rows(gram, call.generated, call.points, memory.values, memory.stride);
    products_to_distances(call, b, 0, call.generated, norms, memory.values);
    return;
  }
  acc_t* norms = memory.rest;
  each_packed(call, b, memory, norms, norms + memory.stride,
              [&](int64_t start, int64_t depth, const acc_t* by_point) {
                inner_products(by_point, panel_stride, depth, 0, call.generated, call.points,
                               start > 0, memory.values, memory.stride);
              });
  products_to_distances(call, b, 0, call.generated, norms, memory.values);
}

// Rows of a result, `stride` apart, from rows of `values`.
template <typename T>
void store_values(const T* values, int64_t value_stride, int64_t rows, int64_t columns,
                  bool streams, T* target, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = values + r * value_stride;
    streams ? stream_row(row, columns, target + r * stride)
            : static_cast<void>(std::copy_n(row, columns, target + r * stride));
  }
}

// Where the coefficients of `sets` sums of points come from, for T temperatures.
template <typename acc_t>
struct ForceMemory : ProblemMemory<acc_t> {
  acc_t *w_neg, *w_pos;
  acc_t* sums;          // [N, width]
  acc_t* coefficients;  // [sets, N, M padded]
  acc_t* affinity;      // [N, M padded]
  acc_t* row;           // [M padded]
  acc_t* balances;      // [T, Balance::size]
  Minima<acc_t> minima;

  ForceMemory(int64_t generated, int64_t points, int64_t sets, int64_t temperatures, acc_t* memory)
      : ProblemMemory<acc_t>(generated, points, memory) {
    const int64_t stride = this->stride, size = generated * stride;
    w_neg = this->rest;
    w_pos = w_neg + stride;
    sums = w_pos + stride;
    coefficients = sums + generated * kPanelWidth<acc_t>;
    affinity = coefficients + sets * size;
    row = affinity + size;
    balances = row + stride;
    acc_t* extremes = balances + temperatures * Balance<acc_t>::size(generated, points);
    minima = {0, 0, extremes, extremes + generated};
  }

  Balance<acc_t> balance(int64_t t) const {
    return {this->generated, this->points,
            balances + t * Balance<acc_t>::size(this->generated, this->points)};
  }
};

// Rows of distances.
template <typename acc_t>
struct DistanceRows {
  const acc_t* data;
  int64_t stride;
  bool kept;

  const acc_t* at(int64_t r) const { return data + r * stride; }
  // Kept ones of the next problem come into the cache while this one is computed.
  void prefetch_next(int64_t rows, int64_t r) const {
    if (!kept) return;
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(acc_t));
    for (int64_t j = 0; j < stride; j += line) __builtin_prefetch(at(rows + r) + j, 0, 2);
  }
};

template <typename scalar_t, typename acc_t>
DistanceRows<acc_t> distance_rows(const DriftBatch<scalar_t>& call, int64_t b,
                                  const ProblemMemory<acc_t>& problem) {
  if (call.kept != nullptr) {
    return {call.kept + b * call.generated * call.points, call.points, true};
  }
  distances_of(call, b, problem);
  return {problem.values, problem.stride, false};
}

// Where the balance of a temperature passes from one look at a problem to the next.
template <typename scalar_t>
accumulate_t<scalar_t>* saved_balance(const DriftBatch<scalar_t>& call, int64_t b, int64_t t) {
  const int64_t size = 3 * call.generated + call.points;
  return call.balances + (b * call.temperature_count + t) * size;
}

template <typename scalar_t>
accumulate_t<scalar_t> inverse_unit(const DriftBatch<scalar_t>& call) {
  using acc_t = accumulate_t<scalar_t>;
  return 1 / std::max(call.scale / std::sqrt(static_cast<acc_t>(call.features)), acc_t(kMinScale));
}

// Whether squares() makes the Gram matrix of a problem itself.
template <typename scalar_t>
bool makes_gram(const DriftBatch<scalar_t>& call) {
  return call.grams == nullptr &&
         gram_pays(call.generated, call.points, call.features, call.temperature_count);
}

// The norms and inner products of all points, at the end of the scratch memory.
template <typename scalar_t>
int64_t gram_scratch(const DriftBatch<scalar_t>& call) {
  return makes_gram(call) ? gram_size<accumulate_t<scalar_t>>(call.points) : 0;
}

}  // namespace

template <Isa isa, typename scalar_t>
int64_t DriftBatchKernel<isa, scalar_t>::scratch(const DriftBatch<scalar_t>& call) {
  constexpr int64_t width = kPanelWidth<acc_t>;
  const int64_t stride = row_length<acc_t>(call.points), rows = call.generated;
  const int64_t problem = kStripes * stride * width + rows * stride;
  const int64_t distances = stride * (2 + kBatchDepth<acc_t>);
  const int64_t sets = call.temperature_count + 1;
  const int64_t balances = call.temperature_count * Balance<acc_t>::size(rows, call.points);
  const int64_t forces = sets * rows * stride + 4 * stride + balances + rows + rows * width;
  return problem + std::max(distances, forces) + gram_scratch(call);
}

template <Isa isa, typename scalar_t>
double DriftBatchKernel<isa, scalar_t>::weighted_distance(const DriftBatch<scalar_t>& call,
                                                          int64_t b, acc_t* memory) {
  const int64_t points = call.points, rows = call.generated;
  const ProblemMemory<acc_t> problem(rows, points, memory);
  const int64_t stride = problem.stride;
  distances_of(call, b, problem);
  if (call.distances != nullptr) {
    store_values(problem.values, stride, rows, points, call.streams(points),
                 call.distances + b * rows * points, points);
    finish_streaming();
  }
  acc_t* weight = problem.rest;
  std::fill(std::copy_n(call.weight + b * points, points, weight), weight + stride, acc_t(0));
  return weighted_sum(problem.values, rows, panel_padded<acc_t>(points), stride, weight);
}

template <Isa isa, typename scalar_t>
void DriftBatchKernel<isa, scalar_t>::squares(const DriftBatch<scalar_t>& call, int64_t b,
                                              acc_t* memory) {
  constexpr int64_t width = kPanelWidth<acc_t>;
  const int64_t points = call.points, rows = call.generated, count = call.temperature_count;
  ForceMemory<acc_t> problem(rows, points, count, count, memory);
  const int64_t stride = problem.stride;
  const bool makes = makes_gram(call);
  acc_t* norms = makes ? memory + scratch(call) - gram_scratch(call)
                       : call.grams + (call.grams == nullptr ? 0 : b * gram_size<acc_t>(points));
  acc_t* gram = norms + panel_padded<acc_t>(points);
  if (makes) gram_of<scalar_t, acc_t>(call, b, problem, norms, gram);
  const acc_t factor = inverse_unit(call);
  const DistanceRows<acc_t> distances = distance_rows(call, b, problem);
  scale_distances(distances.data, distances.stride, 0, rows, points, call.scale, problem.values,
                  problem.minima);
  split_weights(call.weight + b * points, call.negatives(), points, problem.w_neg, problem.w_pos);
  for (int64_t t = 0; t < count; ++t) {
    const Balance<acc_t> balance = problem.balance(t);
    whole_affinities(problem.values, rows, points, problem.minima, 1 / call.temperatures[t],
                     balance, problem.row, problem.affinity, [&](int64_t r, const acc_t* affinity) {
                       if (t == 0) distances.prefetch_next(rows, r);
                       std::tie(balance.repel[r], balance.attract[r]) =
                           coefficient_row(affinity, stride, problem.w_neg, problem.w_pos, factor,
                                           problem.coefficients + (t * rows + r) * stride);
                     });
    balance.save(saved_balance(call, b, t));
  }
  double* squares = call.squares + b * count;
  bool settled = makes || call.grams != nullptr;
  for (int64_t t = 0; t < count && settled; ++t) {
    squares[t] = quadratic_form(problem.coefficients + t * rows * stride, rows, points, stride,
                                gram, norms, problem.sums);
    settled = squares[t] >= 0;
  }
  if (settled) return;
  std::fill_n(squares, count, 0.0);
  problem.each_stripe(call, b, [&](int64_t, const acc_t* stripe) {
    for (int64_t t = 0; t < count; ++t) {
      weighted_sums(rows, points, problem.coefficients + t * rows * stride, stride, stripe,
                    problem.sums);
      squares[t] += sum_of_squares(problem.sums, rows * width);
    }
  });
}

template <Isa isa, typename scalar_t>
void DriftBatchKernel<isa, scalar_t>::combine(const DriftBatch<scalar_t>& call, int64_t b,
                                              acc_t* memory) {
  constexpr int64_t width = kPanelWidth<acc_t>;
  const int64_t points = call.points, rows = call.generated, features = call.features;
  const int64_t count = call.temperature_count;
  ForceMemory<acc_t> problem(rows, points, 1, count, memory);
  const int64_t stride = problem.stride;
  const acc_t factor = inverse_unit(call);
  const DistanceRows<acc_t> distances = distance_rows(call, b, problem);
  split_weights(call.weight + b * points, call.negatives(), points, problem.w_neg, problem.w_pos);
  for (int64_t t = 0; t < count; ++t) problem.balance(t).load(saved_balance(call, b, t));
  for (int64_t r = 0; r < rows; ++r) {
    distances.prefetch_next(rows, r);
    scale_row(distances.at(r), points, call.scale, r, problem.row);
    acc_t* coefficients = problem.coefficients + r * stride;
    std::fill_n(coefficients, stride, acc_t(0));
    for (int64_t t = 0; t < count; ++t) {
      add_balanced_row(problem.row, stride, 1 / call.temperatures[t], problem.balance(t), r,
                       problem.w_neg, problem.w_pos, factor * call.factors[t], coefficients);
    }
  }
  acc_t* force = call.force + b * rows * features;
  const bool streams = call.streams(features);
  double square = 0;
  problem.each_stripe(call, b, [&](int64_t first, const acc_t* stripe) {
    const int64_t columns = std::min(width, features - first);
    for (int64_t r = 0; r < rows && !streams; ++r) {  // fetched during the product
      for (int64_t s = 0; s < columns; s += 64 / static_cast<int64_t>(sizeof(acc_t)))
        __builtin_prefetch(force + r * features + first + s, 1, 2);
    }
    weighted_sums(rows, points, problem.coefficients, stride, stripe, problem.sums);
    square += sum_of_squares(problem.sums, rows * width);  // zeros in the padding
    store_values(problem.sums, width, rows, columns, streams, force + first, features);
  });
  finish_streaming();
  call.squares[b] = square;
}

template struct DriftBatchKernel<Isa::DRIFTAR_ISA, float>;
template struct DriftBatchKernel<Isa::DRIFTAR_ISA, double>;
template struct DriftBatchKernel<Isa::DRIFTAR_ISA, c10::BFloat16>;
template struct DriftBatchKernel<Isa::DRIFTAR_ISA, c10::Half>;

}  // namespace driftar::cpu
