// AMX on processors without it, to be loaded before everything else (LD_PRELOAD): the instructions
// trap as illegal ones, and the handler carries them out as the Intel SDM describes. What an AMX
// processor would refuse ends the process with a message. Linux on x86-64.

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kRegisters = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;
  alignas(64) uint8_t data[kRows][kRowBytes] = {};
};

struct TileFile {
  bool configured = false;
  Tile tiles[kRegisters];
};

thread_local TileFile registers;
std::atomic<int64_t> configured_threads{0}, products{0};

[[noreturn]] void refuse(const char* reason) {
  std::fprintf(stderr, "AMX emulator: %s\n", reason);
  std::fflush(stderr);
  _exit(3);
}

void release() {
  if (registers.configured) configured_threads -= 1;
  registers = TileFile{};
}

void configure(const uint8_t* memory) {
  release();
  if (memory[0] == 0) return;
  if (memory[0] != 1) refuse("LDTILECFG with an unknown palette");
  for (int i = 1; i < 16; ++i) {
    if (memory[i] != 0) refuse("LDTILECFG with a start row or reserved bytes");
  }
  for (int t = 0; t < 16; ++t) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, memory + 16 + 2 * t, sizeof(row_bytes));
    const int rows = memory[48 + t];
    if (t >= kRegisters && (row_bytes != 0 || rows != 0)) refuse("LDTILECFG of a ninth tile");
    if (row_bytes > kRowBytes || rows > kRows) refuse("LDTILECFG with too large a tile");
    if ((row_bytes == 0) != (rows == 0)) refuse("LDTILECFG with half a size");
    if (t < kRegisters) registers.tiles[t].rows = rows, registers.tiles[t].row_bytes = row_bytes;
  }
  registers.configured = true;
  configured_threads += 1;
}

Tile& configured_tile(int index) {
  if (!registers.configured) refuse("tiles are not configured");
  if (registers.tiles[index].rows == 0) refuse("this tile is not configured");
  return registers.tiles[index];
}

void load(Tile& tile, const uint8_t* base, int64_t stride) {
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int r = 0; r < tile.rows; ++r) std::memcpy(tile.data[r], base + r * stride, tile.row_bytes);
}

void store(const Tile& tile, uint8_t* base, int64_t stride) {
  for (int r = 0; r < tile.rows; ++r) std::memcpy(base + r * stride, tile.data[r], tile.row_bytes);
}

// TDPBF16PS takes denormals for zeros.
float flushed(uint32_t bits) {
  return std::bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

float flushed(float value) { return flushed(std::bit_cast<uint32_t>(value)); }

// The elements of a bf16 pair.
float even_of(uint32_t pair) { return flushed(pair << 16); }
float odd_of(uint32_t pair) { return flushed(pair & 0xffff0000u); }

// TDPBF16PS: even and odd elements are summed apart and added to c together.
void multiply(Tile& c, const Tile& a, const Tile& b) {
  if (&c == &a || &c == &b || &a == &b) refuse("TDPBF16PS needs three tiles");
  if (a.row_bytes % 4 != 0 || c.row_bytes % 4 != 0) refuse("TDPBF16PS of half an element");
  if (c.rows != a.rows || b.rows != a.row_bytes / 4 || b.row_bytes != c.row_bytes) {
    refuse("TDPBF16PS: tile sizes disagree");
  }
  const int columns = c.row_bytes / 4, pairs = a.row_bytes / 4;
  for (int m = 0; m < c.rows; ++m) {
    float even[kRowBytes / 4] = {}, odd[kRowBytes / 4] = {};
    for (int k = 0; k < pairs; ++k) {
      uint32_t left;
      std::memcpy(&left, a.data[m] + 4 * k, sizeof(left));
      for (int n = 0; n < columns; ++n) {
        uint32_t right;
        std::memcpy(&right, b.data[k] + 4 * n, sizeof(right));
        even[n] = __builtin_fmaf(even_of(left), even_of(right), even[n]);
        odd[n] = __builtin_fmaf(odd_of(left), odd_of(right), odd[n]);
      }
    }
    for (int n = 0; n < columns; ++n) {
      float sum;
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof(sum));
      sum = flushed(flushed(sum) + flushed(even[n] + odd[n]));
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof(sum));
    }
  }
  products += 1;
}

// All are VEX.128, map 0F38, W0, with the opcodes 49, 4B and 5C.
constexpr int kRegisterOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                    REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                    REG_R12, REG_R13, REG_R14, REG_R15};
enum Prefix { none = 0, p66 = 1, pF3 = 2, pF2 = 3 };

struct Instruction {
  Prefix prefix;
  int opcode, reg, rm, vvvv;
  bool is_memory;
  uint8_t* base;   // address without the index
  int64_t stride;  // the index, scaled
  int length;
};

bool decode(const uint8_t* code, const greg_t* general, Instruction& result) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return false;
  const int index_high = code[1] & 0x40 ? 0 : 8, base_high = code[1] & 0x20 ? 0 : 8;
  if ((code[2] & 0x84) != 0) return false;  // W1 or 256 bits
  result.prefix = static_cast<Prefix>(code[2] & 3);
  result.vvvv = ~(code[2] >> 3) & 15;
  result.opcode = code[3];
  if (result.opcode != 0x49 && result.opcode != 0x4b && result.opcode != 0x5c) return false;
  const int mod = code[4] >> 6;
  result.reg = code[4] >> 3 & 7, result.rm = code[4] & 7;
  result.is_memory = mod != 3;
  result.length = 5;
  result.base = nullptr, result.stride = 0;
  if (!result.is_memory) return true;
  int base = result.rm;
  bool has_base = true;
  if (result.rm == 4) {
    const int sib = code[5], index = (sib >> 3 & 7) | index_high;
    result.length += 1;
    if (index != 4) result.stride = general[kRegisterOrder[index]] * (int64_t{1} << (sib >> 6));
    base = sib & 7;
    if (base == 5 && mod == 0) has_base = false;
  } else if (result.rm == 5 && mod == 0) {
    has_base = false;  // relative to the next instruction
  }
  int64_t displacement = 0;
  if (mod == 1) {
    displacement = static_cast<int8_t>(code[result.length]);
    result.length += 1;
  } else if (mod == 2 || !has_base) {
    int32_t wide;
    std::memcpy(&wide, code + result.length, sizeof(wide));
    displacement = wide;
    result.length += 4;
  }
  if (result.rm == 5 && mod == 0) displacement += reinterpret_cast<int64_t>(code) + result.length;
  if (has_base) displacement += general[kRegisterOrder[base | base_high]];
  result.base = reinterpret_cast<uint8_t*>(displacement);
  return true;
}

bool execute(const Instruction& i) {
  switch (i.opcode) {
    case 0x49:
      if (i.is_memory && i.prefix == none) return configure(i.base), true;
      if (!i.is_memory && i.prefix == none && i.rm == 0) return release(), true;
      if (!i.is_memory && i.prefix == pF2) {
        Tile& tile = configured_tile(i.reg);
        std::memset(tile.data, 0, sizeof(tile.data));
        return true;
      }
      return false;
    case 0x4b:
      if (!i.is_memory || i.rm != 4) return false;
      if (i.prefix == pF3) return store(configured_tile(i.reg), i.base, i.stride), true;
      if (i.prefix == none) return false;
      return load(configured_tile(i.reg), i.base, i.stride), true;
    default:
      if (i.is_memory || i.prefix != pF3) return false;
      multiply(configured_tile(i.reg), configured_tile(i.rm), configured_tile(i.vvvv));
      return true;
  }
}

void handle(int, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  if (!decode(reinterpret_cast<const uint8_t*>(general[REG_RIP]), general, instruction) ||
      !execute(instruction)) {
    refuse("not an AMX instruction");
  }
  general[REG_RIP] += instruction.length;
}

}  // namespace

// What the tests ask: threads that hold configured tiles, and products so far.
extern "C" int64_t amx_emulator_configured_threads() { return configured_threads; }
extern "C" int64_t amx_emulator_products() { return products; }

// Something that an AMX processor refuses.
extern "C" void amx_emulator_use_tiles_without_configuration() { asm volatile("tilezero %tmm0"); }

// In place of PyTorch's function, which would find no AMX.
namespace at::cpu {
bool init_amx() {
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, nullptr) == 0;
}
}  // namespace at::cpu
