// How close the kernels come to what the multiply units can do, and whether they compute the same.
//
//   native_kernels check [seed]   every kernel on random shapes against its plain version
//   native_kernels measure [ISA]  multiply-add rate of each layer shape, as a share of the peak
//
// Built and run by native_kernels.py. One thread; each figure is the best of many runs, taken in turns.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <random>
#include <string>
#include <vector>

#include "all.h"

using namespace fxquant;

namespace {

std::mt19937 generator;

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Vectors begin at a cache line, as everything does that the lowering lays out.
template <class T>
struct Aligned {
  using value_type = T;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(size_t count) {
    return static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
  }
  void deallocate(T* memory, size_t) { free(memory); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Vector = std::vector<T, Aligned<T>>;

template <class T>
Vector<T> values(int64_t count, int low, int high) {
  Vector<T> result(static_cast<size_t>(count));
  for (T& value : result) value = static_cast<T>(draw(low, high));
  return result;
}

Vector<float> factors(int64_t count, float around) {
  Vector<float> result(static_cast<size_t>(count));
  for (float& value : result) value = around * static_cast<float>(draw(500, 1500)) / 1000.0f;
  return result;
}

int up(int value, int step) { return (value + step - 1) / step * step; }

struct Shape {
  const char* name;
  int batch, channels, size, outputs, kernel, stride, groups;
};

// A layer with random contents; `run` computes it with one kernel.
struct Layer {
  enum { SLACK = 256 };
  Shape s;
  int out, border, pixel;
  bool depthwise;
  Vector<uint8_t> x, y, residual, table;
  Vector<int8_t> weight;
  Vector<int32_t> bias, offsets;
  Vector<float> multiplier;
  ConvParams conv{};
  DepthwiseConvParams dw{};

  Layer(const Shape& shape, bool add, bool look_up, bool by_panels) : s(shape) {
    depthwise = s.groups > 1 && s.groups == s.channels;
    border = s.kernel / 2;
    out = (s.size + 2 * border - s.kernel) / s.stride + 1;
    pixel = s.channels == 3 ? 4 : s.channels;
    const int row = (s.size + 2 * border) * pixel, image = (s.size + 2 * border) * row;
    const int64_t codes = static_cast<int64_t>(s.batch) * out * out * s.outputs;
    x = values<uint8_t>(static_cast<int64_t>(s.batch) * image + 2 * SLACK, 0, 255);
    y.assign(codes + 2 * SLACK, 17);
    if (add) residual = values<uint8_t>(codes + SLACK, 0, 255);
    if (look_up) table = values<uint8_t>(256, 0, 255);
    const uint8_t* base = x.data() + SLACK;
    if (depthwise) {
      const int quads = (s.kernel + 3) / 4, lanes = up(s.channels, 32);
      weight = values<int8_t>(static_cast<int64_t>(s.kernel) * quads * lanes * 4, -127, 127);
      for (size_t i = 0; i < weight.size(); ++i)
        if (i / 128 % quads * 4 + i % 4 >= static_cast<size_t>(s.kernel)) weight[i] = 0;
      bias = values<int32_t>(lanes, -20000, 20000);
      multiplier = factors(lanes, 0.004f);
      fill(dw, base, row, image);
      dw.x_row = row;
      dw.x_pixel = pixel;
      dw.channels = s.channels;
      dw.kernel_height = dw.kernel_width = s.kernel;
      dw.stride_height = dw.stride_width = s.stride;
      return;
    }
    const int inputs = s.channels / s.groups, outputs = s.outputs / s.groups;
    const bool rows = s.groups == 1 && pixel % 4 == 0;
    for (int ky = 0; ky < s.kernel; ++ky)
      for (int kx = 0; kx < (rows ? 1 : s.kernel); ++kx) offsets.push_back(ky * row + kx * pixel);
    conv.segments = static_cast<int>(offsets.size());
    conv.segment_quads = rows ? s.kernel * pixel / 4 : up(inputs, 4) / 4;
    const int64_t panels = static_cast<int64_t>(s.groups) * up(outputs, 64) / 64;
    weight = values<int8_t>(panels * conv.segments * conv.segment_quads * 256, -127, 127);
    bias = values<int32_t>(panels * 64, -20000, 20000);
    multiplier = factors(panels * 64, 0.004f);
    fill(conv, base, row, image);
    conv.segment_offset = offsets.data();
    conv.x_row = s.stride * row;
    conv.x_column = s.stride * pixel;
    conv.x_group = inputs;
    conv.groups = s.groups;
    conv.outputs = outputs;
    conv.by_panels = by_panels;
  }

  template <class Params>
  void fill(Params& p, const uint8_t* base, int, int image) {
    p.x = base;
    p.weight = weight.data();
    p.bias = bias.data();
    p.multiplier = multiplier.data();
    p.table = table.empty() ? nullptr : table.data();
    p.residual = residual.empty() ? nullptr : residual.data();
    p.y = y.data() + SLACK;
    p.x_batch = image;
    p.y_pixel = p.residual_pixel = s.outputs;
    p.y_row = p.residual_row = out * s.outputs;
    p.y_batch = p.residual_batch = out * out * s.outputs;
    p.batch = s.batch;
    p.height = p.width = out;
    p.zero_point = 7;
    p.lo = 3;
    p.hi = 250;
    p.residual_zero_point = 100;
    p.residual_multiplier = 0.7f;
  }

  double products() const {
    return static_cast<double>(s.batch) * out * out * s.outputs * (s.channels / s.groups) *
           s.kernel * s.kernel;
  }
};

struct Kernels {
  const char* name;
  void (*conv)(const ConvParams&, int, int);
  void (*depthwise_conv)(const DepthwiseConvParams&, int, int);
};

void run(const Kernels& kernels, Layer& layer, int parts = 1) {
  const int items = layer.depthwise ? portable::depthwise_conv_items(layer.dw)
                                    : portable::conv_items(layer.conv);
  for (int i = 0; i < parts; ++i) {
    const int begin = items * i / parts, end = items * (i + 1) / parts;
    if (layer.depthwise)
      kernels.depthwise_conv(layer.dw, begin, end);
    else
      kernels.conv(layer.conv, begin, end);
  }
}

#define FXQUANT_KERNELS(isa) \
  { #isa, isa::conv, isa::depthwise_conv }

std::vector<Kernels> available() {
  std::vector<Kernels> found;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.push_back(FXQUANT_KERNELS(avx2));
  if (has_avxvnni()) found.push_back(FXQUANT_KERNELS(avxvnni));
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
    found.push_back(FXQUANT_KERNELS(avx512vnni));
  if (has_amx() && start_amx()) found.push_back(FXQUANT_KERNELS(amx));
  return found;
}

int check(unsigned seed) {
  generator.seed(seed);
  const Kernels plain = FXQUANT_KERNELS(portable);
  int failures = 0;
  for (int round = 0; round < 200; ++round) {
    Shape s{"", draw(0, 3), draw(1, 70), draw(1, 14), draw(1, 150), draw(0, 3) * 2 + 1,
            draw(1, 2), 1};
    const int kind = draw(0, 3);
    if (kind == 0) s.channels = s.outputs = s.groups = draw(2, 150);
    if (kind == 1) s.groups = draw(2, 9), s.channels = s.outputs = 8 * s.groups;
    Layer layer(s, draw(0, 1), draw(0, 3) == 0, draw(0, 1));
    run(plain, layer);
    const Vector<uint8_t> expected = layer.y;
    for (const Kernels& kernels : available()) {
      std::fill(layer.y.begin(), layer.y.end(), uint8_t(17));
      run(kernels, layer, draw(1, 3));
      if (layer.y == expected) continue;
      ++failures;
      printf("%s differs: batch %d, %d to %d channels, %d x %d, kernel %d, stride %d, groups %d\n",
             kernels.name, s.batch, s.channels, s.outputs, s.size, s.size, s.kernel, s.stride,
             s.groups);
    }
  }
  printf("%d failures\n", failures);
  return failures != 0;
}

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

// Multiply-adds in a second of the bare instruction.

FXQUANT_TARGET_BEGIN("avx512f,avx512bw,avx512vnni")
static double vnni_loop(int64_t count) {
  __m512i sums[24], a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
  FXQUANT_UNROLL
  for (int j = 0; j < 24; ++j) sums[j] = _mm512_setzero_si512();
  const double start = seconds();
  for (int64_t i = 0; i < count; ++i) {
    FXQUANT_UNROLL
    for (int j = 0; j < 24; ++j)
      __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums[j]) : "v"(a), "v"(b));
  }
  return 24.0 * 64.0 * static_cast<double>(count) / (seconds() - start);
}
FXQUANT_TARGET_END

FXQUANT_TARGET_BEGIN("amx-tile,amx-int8")
static double amx_loop(int64_t count) {
  configure_amx();
  const double start = seconds();
  for (int64_t i = 0; i < count; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 5, 6);
    _tile_dpbusd(2, 4, 7);
    _tile_dpbusd(3, 5, 7);
  }
  const double rate = 4.0 * 16 * 16 * 64 * static_cast<double>(count) / (seconds() - start);
  release_amx();
  return rate;
}
FXQUANT_TARGET_END

namespace {

const Shape RESNET50[] = {{"stem", 1, 3, 224, 64, 7, 2, 1},
                          {"2.reduce", 1, 256, 56, 64, 1, 1, 1},
                          {"2.3x3", 1, 64, 56, 64, 3, 1, 1},
                          {"2.expand", 1, 64, 56, 256, 1, 1, 1},
                          {"3.reduce", 1, 512, 28, 128, 1, 1, 1},
                          {"3.3x3/2", 1, 128, 56, 128, 3, 2, 1},
                          {"3.3x3", 1, 128, 28, 128, 3, 1, 1},
                          {"3.expand", 1, 128, 28, 512, 1, 1, 1},
                          {"4.reduce", 1, 1024, 14, 256, 1, 1, 1},
                          {"4.3x3", 1, 256, 14, 256, 3, 1, 1},
                          {"4.expand", 1, 256, 14, 1024, 1, 1, 1},
                          {"5.reduce", 1, 2048, 7, 512, 1, 1, 1},
                          {"5.3x3", 1, 512, 7, 512, 3, 1, 1},
                          {"5.expand", 1, 512, 7, 2048, 1, 1, 1},
                          {"fc", 1, 2048, 1, 1000, 1, 1, 1}};
const Shape MOBILENETV2[] = {{"stem", 1, 3, 224, 32, 3, 2, 1},
                             {"dw 112 32", 1, 32, 112, 32, 3, 1, 32},
                             {"pw 112 32-16", 1, 32, 112, 16, 1, 1, 1},
                             {"pw 112 16-96", 1, 16, 112, 96, 1, 1, 1},
                             {"dw/2 112 96", 1, 96, 112, 96, 3, 2, 96},
                             {"pw 56 96-24", 1, 96, 56, 24, 1, 1, 1},
                             {"pw 56 24-144", 1, 24, 56, 144, 1, 1, 1},
                             {"dw 56 144", 1, 144, 56, 144, 3, 1, 144},
                             {"pw 56 144-24", 1, 144, 56, 24, 1, 1, 1},
                             {"dw/2 56 144", 1, 144, 56, 144, 3, 2, 144},
                             {"pw 28 32-192", 1, 32, 28, 192, 1, 1, 1},
                             {"dw 28 192", 1, 192, 28, 192, 3, 1, 192},
                             {"pw 28 192-32", 1, 192, 28, 32, 1, 1, 1},
                             {"pw 14 64-384", 1, 64, 14, 384, 1, 1, 1},
                             {"dw 14 384", 1, 384, 14, 384, 3, 1, 384},
                             {"pw 14 384-64", 1, 384, 14, 64, 1, 1, 1},
                             {"pw 14 576-96", 1, 576, 14, 96, 1, 1, 1},
                             {"pw 7 160-960", 1, 160, 7, 960, 1, 1, 1},
                             {"dw 7 960", 1, 960, 7, 960, 3, 1, 960},
                             {"pw 7 960-160", 1, 960, 7, 160, 1, 1, 1},
                             {"pw 7 320-1280", 1, 320, 7, 1280, 1, 1, 1},
                             {"dw5 28 120", 1, 120, 28, 120, 5, 1, 120},
                             {"dw5 14 672", 1, 672, 14, 672, 5, 1, 672},
                             {"dw7 56 96", 1, 96, 56, 96, 7, 1, 96},
                             {"group8 28 104", 1, 104, 28, 104, 3, 1, 13}};

// The best time of one run, the kernels taking turns.
std::vector<double> best_times(const std::vector<Kernels>& all, Layer& layer) {
  std::vector<double> best(all.size(), 1e9);
  for (int turn = 0; turn < 15; ++turn)
    for (size_t k = 0; k < all.size(); ++k) {
      const int repeats = std::max(1, static_cast<int>(2e-3 / std::min(best[k], 2e-3)));
      const double start = seconds();
      for (int i = 0; i < repeats; ++i) run(all[k], layer);
      best[k] = std::min(best[k], (seconds() - start) / repeats);
    }
  return best;
}

// The multiply instructions' rates on one core, as JSON; the units must warm up.
void print_peaks() {
  double peak = 0.0, tiles = 0.0;
  for (int i = 0; i < 10; ++i) {
    if (__builtin_cpu_supports("avx512vnni")) peak = std::max(peak, vnni_loop(200000));
    if (has_amx() && start_amx()) tiles = std::max(tiles, amx_loop(50000));
  }
  printf("{\"peaks\": {\"vpdpbusd\": %.4g, \"tdpbusd\": %.4g}", peak / 1e9, tiles / 1e9);
}

int measure(const std::string& only) {
  generator.seed(1);
  std::vector<Kernels> all = available();
  if (!only.empty())
    all.erase(std::remove_if(all.begin(), all.end(),
                             [&](const Kernels& k) { return only != k.name; }),
              all.end());
  print_peaks();
  printf(", \"layers\": [\n");
  bool first = true;
  for (const auto& network : {std::make_pair("ResNet-50", std::vector<Shape>(std::begin(RESNET50),
                                                                             std::end(RESNET50))),
                              std::make_pair("MobileNet", std::vector<Shape>(
                                                              std::begin(MOBILENETV2),
                                                              std::end(MOBILENETV2)))})
    for (const Shape& s : network.second) {
      Layer layer(s, false, false, s.size <= 7);
      const std::vector<double> best = best_times(all, layer);
      printf("%s{\"network\": \"%s\", \"layer\": \"%s\", \"multiply_adds\": %.0f, \"rate\": {",
             first ? "" : ",\n", network.first, s.name, layer.products());
      first = false;
      for (size_t k = 0; k < all.size(); ++k)
        printf("%s\"%s\": %.1f", k ? ", " : "", all[k].name, layer.products() / best[k] / 1e9);
      printf("}}");
      fflush(stdout);
    }
  printf("\n]}\n");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "check") return check(count > 2 ? static_cast<unsigned>(atoi(arguments[2])) : 0);
  if (what == "measure") return measure(count > 2 ? arguments[2] : "");
  if (what == "peaks") {
    print_peaks();
    printf("}\n");
    return 0;
  }
  fprintf(stderr, "usage: native_kernels check [seed] | measure [instruction set] | peaks\n");
  return 2;
}
