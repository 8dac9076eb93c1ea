#pragma once

namespace driftar {

enum class EntropyKind { none, head, map };

}  // namespace driftar
