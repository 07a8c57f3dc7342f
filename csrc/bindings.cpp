// The extension module residual_kernels._cpp: names, checks, and letting go of the GIL. Arrays arrive as addresses with
// sizes and strides counted in elements; the Python side keeps them alive and allocates every output.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "tables.h"
#include "threads.h"

namespace py = pybind11;
using namespace residual_kernels;

namespace {

using Strides = std::array<int64_t, 3>;

const Kernels& kernels_of(int set) {
  if (set < 0 || set >= INSTRUCTION_SETS) throw std::invalid_argument("no instruction set number " + std::to_string(set));
  if (const char* reason = why_not(static_cast<InstructionSet>(set)))
    throw std::runtime_error(std::string(name_of(static_cast<InstructionSet>(set))) + " cannot run here: " + reason);
  return *kernels(static_cast<InstructionSet>(set));
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(bool fine, const char* message) {
  if (!fine) throw std::invalid_argument(message);
}

// What the loops read lies inside the tensors they are given: counts of elements, the table of blocks, the offsets.
void check_units(const Kernels& set, bool pairs, int dtype, const Units& u, const std::array<int64_t, 8>& elements) {
  using Wide = __int128;  // products of sizes that a caller made up
  const int64_t lanes = set.vector_bytes / (dtype == FLOAT64 ? 8 : 4);
  const auto up = [](int64_t count, int64_t step) { return (Wide(count) + step - 1) / step * step; };
  check(Wide(elements[0]) == Wide(u.blocks) * BLOCK_FIELDS && Wide(elements[1]) == Wide(u.R) + 1,
        "the packed table of blocks or the unit offsets do not have the stated size");
  check(Wide(elements[2]) == u.J * up(u.C, lanes), "packed proj does not have the stated J and C");
  for (int i = 4; i < 7; ++i) check(elements[i] == u.J, "packed bias, slope or offset do not have J elements");
  check(u.offsets[0] == 0 && u.offsets[u.R] == u.J, "the packed unit offsets do not run from 0 to J");
  for (int64_t r = 0; r < u.R; ++r) check(u.offsets[r] <= u.offsets[r + 1], "the packed unit offsets fall");
  int64_t next = 0, unit = 0;
  Wide padded = 0;
  for (int64_t b = 0; b < u.blocks; ++b) {
    const int64_t* block = u.block + BLOCK_FIELDS * b;
    const bool goes_on = b > 0 && block[FIRST_UNIT] == unit - 1;  // a unit too large for one block
    check(block[FIRST] == next && block[LAST] >= next && block[LAST] <= u.J, "the packed blocks are not runs of components");
    check((block[FIRST_UNIT] == unit || goes_on) && block[LAST_UNIT] > block[FIRST_UNIT] && block[LAST_UNIT] <= u.R,
          "the packed blocks do not hold every unit");
    check(u.offsets[block[FIRST_UNIT]] <= block[FIRST] && u.offsets[block[LAST_UNIT]] >= block[LAST],
          "a packed block holds components of other units");
    check(Wide(block[PADDED_FIRST]) == padded, "the packed blocks do not lie where they say");
    check(!pairs || block[LAST] - block[FIRST] <= MOST_IN_BLOCK, "a packed block holds too many components");
    padded += pairs ? up(block[LAST] - block[FIRST], 32) : Wide(block[LAST] - block[FIRST]);
    next = block[LAST];
    unit = block[LAST_UNIT];
  }
  check(next == u.J && unit == u.R, "the packed blocks do not hold every component");
  check(!pairs || Wide(elements[7]) == (u.J + 16 * (Wide(u.blocks) + u.R)) * up(u.C, 32),
        "the packed pairs of proj do not have the stated size");
  check(Wide(elements[3]) == (pairs ? 2 * padded * up(u.D, 32) : padded * up(u.D, lanes)),
        "packed basis does not have the stated J and D");
}

Reweight common_of(const Kernels& set, bool pairs, int dtype, int threads, const std::array<int64_t, 7>& sizes,
                   const std::array<uintptr_t, 8>& units, const std::array<int64_t, 8>& elements, uintptr_t z, const Strides& z_strides, uintptr_t scale, uintptr_t mean, uintptr_t weight,
                   uintptr_t weight_index) {
  const auto [N, R, C, D, J, T, blocks] = sizes;
  check(N >= 0 && R >= 1 && C >= 0 && D >= 0 && J >= 0 && T >= 0 && blocks >= 1, "a size is negative");
  check(dtype >= FLOAT32 && dtype <= BFLOAT16, "unknown data type");
  for (uintptr_t address : {units[0], units[1]}) check(address != 0, "blocks or offsets are missing");
  for (int i = 2; i < 7; ++i) check(units[i] != 0 || J * C * D == 0, "a packed constant is missing");
  Reweight x{};
  x.units = Units{R, C, D, J, blocks, at<const int64_t>(units[0]), at<const int64_t>(units[1]), at<const void>(units[2]),
                  at<const void>(units[3]), at<const void>(units[7]), at<const void>(units[4]), at<const void>(units[5]),
                  at<const void>(units[6])};
  check_units(set, pairs, dtype, x.units, elements);
  x.dtype = static_cast<DataType>(dtype);
  x.N = N;
  x.T = T;
  x.z = Array3{at<const void>(z), {z_strides[0], z_strides[1], z_strides[2]}};
  x.scale = at<const void>(scale);
  x.mean = at<const void>(mean);
  x.weight = at<const void>(weight);
  x.weight_index = at<const int64_t>(weight_index);
  x.threads = threads;
  if (x.weight_index)
    for (int64_t n = 0; n < N; ++n)
      if (x.weight_index[n] < 0 || x.weight_index[n] >= T)
        throw py::index_error("weight_index[" + std::to_string(n) + "] is " + std::to_string(x.weight_index[n]) +
                              ", not in [0, T) with T = " + std::to_string(T));
  return x;
}

const Kernels& reweight_kernels(int set, int dtype) {
  check(!on_pairs(set) || dtype == BFLOAT16, "this instruction set multiplies bfloat16 alone");
  return kernels_of(set);
}

void check_z(uintptr_t z, const std::array<int64_t, 7>& sizes) {
  check(z != 0 || sizes[0] * sizes[2] == 0, "z is missing");
}

void forward(int set, int dtype, int threads, const std::array<int64_t, 7>& sizes, const std::array<uintptr_t, 8>& units,
             const std::array<int64_t, 8>& elements, uintptr_t z, const Strides& z_strides, uintptr_t scale,
             uintptr_t mean, uintptr_t weight, uintptr_t weight_index, uintptr_t y) {
  const Kernels& chosen = reweight_kernels(set, dtype);
  check_z(z, sizes);
  Forward call{common_of(chosen, on_pairs(set), dtype, threads, sizes, units, elements, z, z_strides, scale, mean, weight,
                         weight_index), at<void>(y)};
  py::gil_scoped_release unlocked;
  if (!chosen.forward(call)) throw std::bad_alloc();
}

void backward(int set, int dtype, int threads, const std::array<int64_t, 7>& sizes, const std::array<uintptr_t, 8>& units,
              const std::array<int64_t, 8>& elements, uintptr_t z, const Strides& z_strides, uintptr_t scale,
              uintptr_t mean, uintptr_t weight, uintptr_t weight_index, uintptr_t dy, const Strides& dy_strides, uintptr_t dweight, uintptr_t dz,
              uintptr_t dscale, uintptr_t dmean) {
  const Kernels& chosen = reweight_kernels(set, dtype);
  check_z(z, sizes);
  Backward call{common_of(chosen, on_pairs(set), dtype, threads, sizes, units, elements, z, z_strides, scale, mean, weight,
                         weight_index),
                Array3{at<const void>(dy), {dy_strides[0], dy_strides[1], dy_strides[2]}},
                at<void>(dweight), at<void>(dz), at<void>(dscale), at<void>(dmean)};
  py::gil_scoped_release unlocked;
  if (!chosen.backward(call)) throw std::bad_alloc();
}

// The same loops on coefficients c [N, J] that are known already: no z, scale or mean.
Reweight sum_of(const Kernels& set, int dtype, int threads, const std::array<int64_t, 7>& sizes,
                const std::array<uintptr_t, 8>& units, const std::array<int64_t, 8>& elements, uintptr_t c, const std::array<int64_t, 2>& c_strides, uintptr_t weight) {
  check(dtype == FLOAT32 || dtype == FLOAT64, "coefficients are float32 or float64");
  Reweight x = common_of(set, false, dtype, threads, sizes, units, elements, 0, {0, 0, 0}, 0, 0, weight, 0);
  x.c = at<const void>(c);
  x.c_stride[0] = c_strides[0];
  x.c_stride[1] = c_strides[1];
  return x;
}

void sum_forward(int set, int dtype, int threads, const std::array<int64_t, 7>& sizes,
                 const std::array<uintptr_t, 8>& units, const std::array<int64_t, 8>& elements, uintptr_t c,
                 const std::array<int64_t, 2>& c_strides, uintptr_t weight, uintptr_t y) {
  const Kernels& chosen = reweight_kernels(set, dtype);
  Forward call{sum_of(chosen, dtype, threads, sizes, units, elements, c, c_strides, weight), at<void>(y)};
  py::gil_scoped_release unlocked;
  if (!chosen.forward(call)) throw std::bad_alloc();
}

void sum_backward(int set, int dtype, int threads, const std::array<int64_t, 7>& sizes,
                  const std::array<uintptr_t, 8>& units, const std::array<int64_t, 8>& elements, uintptr_t c,
                  const std::array<int64_t, 2>& c_strides, uintptr_t weight, uintptr_t dy, const Strides& dy_strides, uintptr_t dweight) {
  const Kernels& chosen = reweight_kernels(set, dtype);
  Backward call{sum_of(chosen, dtype, threads, sizes, units, elements, c, c_strides, weight),
                Array3{at<const void>(dy), {dy_strides[0], dy_strides[1], dy_strides[2]}}, at<void>(dweight),
                nullptr, nullptr, nullptr};
  py::gil_scoped_release unlocked;
  if (!chosen.backward(call)) throw std::bad_alloc();
}

void moments(int set, int dtype, int threads, const Strides& sizes, uintptr_t z, const Strides& z_strides,
             uintptr_t scale, uintptr_t mean, uintptr_t shift, uintptr_t total, uintptr_t moment) {
  const Kernels& chosen = kernels_of(set);
  const auto [N, R, C] = sizes;
  check(N >= 0 && R >= 0 && C >= 0, "a size is negative");
  check(dtype >= FLOAT32 && dtype <= BFLOAT16, "unknown data type");
  Moments call{static_cast<DataType>(dtype), N, R, C, Array3{at<const void>(z), {z_strides[0], z_strides[1], z_strides[2]}},
               at<const void>(scale), at<const void>(mean), at<const double>(shift), at<double>(total), at<double>(moment),
               threads};
  py::gil_scoped_release unlocked;
  if (!chosen.moments(call)) throw std::bad_alloc();
}

void nearest(int set, int threads, const std::array<int64_t, 2>& sizes, uintptr_t queries, uintptr_t points,
             uintptr_t exact, uintptr_t squares, uintptr_t outside) {
  const Kernels& chosen = kernels_of(set);
  check(sizes[0] >= 0 && sizes[1] >= 0, "a size is negative");
  const Nearest call{sizes[0], sizes[1], at<const float>(queries), at<const float>(points), at<const double>(exact),
                     at<double>(squares), at<double>(outside), threads};
  py::gil_scoped_release unlocked;
  if (!chosen.nearest(call)) throw std::bad_alloc();
}

void sum_ranks(int threads, const std::array<int64_t, 2>& sizes, uintptr_t values, uintptr_t target, uintptr_t shared,
               uintptr_t square) {
  check(sizes[0] >= 0 && sizes[1] >= 0, "a size is negative");
  const RankSums call{sizes[0], sizes[1], at<const float>(values), at<const double>(target), at<double>(shared),
                      at<double>(square), threads};
  py::gil_scoped_release unlocked;
  if (!rank_sums(call)) throw std::bad_alloc();
}

void match_greedily(int threads, const Strides& sizes, uintptr_t entries, uintptr_t total) {
  check(sizes[0] >= 0 && sizes[1] >= 0 && sizes[2] >= 0, "a size is negative");
  const Matching call{sizes[0], sizes[1], sizes[2], at<const double>(entries), at<double>(total), threads};
  py::gil_scoped_release unlocked;
  if (!greedy_matching(call)) throw std::bad_alloc();
}

// FLOP done by `threads` threads together, each `steps` rounds of the register loop of a set.
double peak(int set, int threads, int64_t steps) {
  const Kernels& chosen = kernels_of(set);
  check(threads >= 1 && steps >= 1, "threads and steps are at least 1");
  struct Call {
    const Kernels* kernels;
    int64_t steps;
    std::vector<double> flop;
  } call{&chosen, steps, std::vector<double>(threads)};
  py::gil_scoped_release unlocked;
  parallel_for(threads, threads, [](const void* context, int64_t i) {
    Call& mine = *const_cast<Call*>(static_cast<const Call*>(context));
    mine.flop[i] = mine.kernels->peak(mine.steps);
  }, &call);
  return std::accumulate(call.flop.begin(), call.flop.end(), 0.0);
}

}  // namespace

PYBIND11_MODULE(_cpp, module) {
  module.doc() = "Loops of the CPU backend; call residual_kernels.ops instead.";
  module.def("forward", &forward);
  module.def("backward", &backward);
  module.def("sum_forward", &sum_forward);
  module.def("sum_backward", &sum_backward);
  module.def("moments", &moments);
  module.def("nearest", &nearest);
  module.def("rank_sums", &sum_ranks);
  module.def("greedy_matching", &match_greedily);
  module.def("peak", &peak);
  module.def("layout", [](int set) {
    const Kernels& chosen = kernels_of(set);
    return py::make_tuple(chosen.vector_bytes, chosen.vectors_in_panel, MOST_IN_BLOCK);
  });
  module.def("instruction_sets", [] {
    py::dict reasons;  // name -> why it cannot run here, or None
    for (int set = 0; set < INSTRUCTION_SETS; ++set) {
      const char* reason = why_not(static_cast<InstructionSet>(set));
      reasons[name_of(static_cast<InstructionSet>(set))] = reason ? py::cast(reason) : py::none();
    }
    return reasons;
  });
}
