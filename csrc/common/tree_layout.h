#pragma once

// Draft trees as bit sets: bit j of row i says that node j is node i or one of its ancestors.
// Parents precede their children, so one pass from the root suffices.

#include <cstdint>

namespace driftar {

inline int64_t ancestor_words(int64_t nodes) { return (nodes + 63) / 64; }

inline bool is_ancestor(const uint64_t* row, int64_t node) {
  return (row[node >> 6] >> (node & 63)) & 1u;
}

// parents [nodes], each -1 or an earlier node -> bits [nodes, ancestor_words(nodes)],
// zero-initialised.
inline void fill_ancestors(const int64_t* parents, int64_t nodes, uint64_t* bits) {
  const int64_t words = ancestor_words(nodes);
  for (int64_t node = 0; node < nodes; ++node) {
    uint64_t* row = bits + node * words;
    if (parents[node] >= 0) {
      const uint64_t* parent = bits + parents[node] * words;
      for (int64_t word = 0; word < words; ++word) row[word] = parent[word];
    }
    row[node >> 6] |= uint64_t{1} << (node & 63);
  }
}

}  // namespace driftar
