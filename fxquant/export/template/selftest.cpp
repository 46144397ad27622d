// Does this machine compute what `reference` computed? ./build/selftest [FOLDER]
//
// golden.bin holds inputs of seeded noise and the outputs that fxquant's reference gives for them.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "model.h"

namespace {

// Compared with torch.equal where the network computes in integers alone; float operations of its
// own (softmax, layer norm) may move an integer by one step: then the outputs may differ in noise.
const double LEAST_SQNR_DB = 30.0;

struct Tensor {
    @NAME@_tensor view;
    std::vector<int64_t> storage;  // aligned for every type

    Tensor(const @NAME@_tensor& like, int64_t bytes) : view(like), storage(bytes / 8 + 1) {
        view.data = storage.data();
    }
    int64_t bytes() const {
        const int64_t sizes[] = {1, 1, 2, 4, 8, 4, 1};
        int64_t count = sizes[view.type];
        for (int axis = 0; axis < view.rank; ++axis) count *= view.shape[axis];
        return count;
    }
};

struct Golden {
    bool exact = false;
    std::vector<Tensor> inputs, outputs;
};

int64_t number(std::istream& file) {
    int64_t value = -1;
    file.read(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
}

Golden read_golden(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    Golden golden;
    golden.exact = number(file) != 0;
    const int64_t inputs = number(file), count = inputs + number(file);
    for (int64_t index = 0; index < count && file; ++index) {
        @NAME@_tensor like = {};
        like.type = static_cast<int32_t>(number(file));
        like.rank = static_cast<int32_t>(number(file));
        for (int axis = 0; axis < like.rank && axis < @NAME@_MAX_RANK; ++axis)
            like.shape[axis] = number(file);
        const int64_t bytes = number(file);
        if (!file) break;
        Tensor tensor(like, bytes);
        file.read(reinterpret_cast<char*>(tensor.storage.data()), bytes);
        // Moved storage keeps its address.
        (index < inputs ? golden.inputs : golden.outputs).push_back(std::move(tensor));
    }
    if (!file || golden.inputs.empty()) {
        std::fprintf(stderr, "%s is missing or damaged\n", path.c_str());
        std::exit(1);
    }
    return golden;
}

std::vector<@NAME@_tensor> views(const std::vector<Tensor>& tensors) {
    std::vector<@NAME@_tensor> found;
    for (const Tensor& tensor : tensors) found.push_back(tensor.view);
    return found;
}

double sqnr(const Tensor& wanted, const Tensor& found) {
    const auto* a = reinterpret_cast<const float*>(wanted.storage.data());
    const auto* b = reinterpret_cast<const float*>(found.storage.data());
    double signal = 0, noise = 0;
    for (int64_t i = 0; i < wanted.bytes() / 4; ++i) {
        signal += double(a[i]) * a[i];
        noise += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    }
    return noise > 0 ? 10 * std::log10(signal / noise) : 1000;
}

bool agrees(const Golden& golden, const std::vector<Tensor>& found, const char* what) {
    for (size_t index = 0; index < found.size(); ++index) {
        const Tensor &wanted = golden.outputs[index], &got = found[index];
        if (!std::memcmp(wanted.storage.data(), got.storage.data(), wanted.bytes())) continue;
        const bool floats = wanted.view.type == @NAME@_FLOAT32;
        if (!golden.exact && floats && sqnr(wanted, got) >= LEAST_SQNR_DB) continue;
        std::fprintf(stderr, "%s: output %zu is not that of the reference\n", what, index);
        return false;
    }
    return true;
}

bool check(@NAME@_context* context, const Golden& golden, int threads, const char* what) {
    std::vector<Tensor> found = golden.outputs;
    for (Tensor& tensor : found) {
        std::fill(tensor.storage.begin(), tensor.storage.end(), -1);
        tensor.view.data = tensor.storage.data();
    }
    const auto inputs = views(golden.inputs), outputs = views(found);
    if (!@NAME@_run(context, inputs.data(), static_cast<int>(inputs.size()), outputs.data(),
                    static_cast<int>(outputs.size()), threads)) {
        std::fprintf(stderr, "%s: %s\n", what, @NAME@_error(context));
        return false;
    }
    return agrees(golden, found, what);
}

// What does not fit must come back as a text.
bool refuses(@NAME@_context* context, const Golden& golden) {
    auto inputs = views(golden.inputs), outputs = views(golden.outputs);
    const int count = static_cast<int>(inputs.size()), results = static_cast<int>(outputs.size());
    inputs[0].shape[inputs[0].rank - 1] += 1;
    if (@NAME@_run(context, inputs.data(), count, outputs.data(), results, 1)) return false;
    inputs = views(golden.inputs);
    inputs[0].type = @NAME@_BOOL;
    if (@NAME@_run(context, inputs.data(), count, outputs.data(), results, 1)) return false;
    return std::strlen(@NAME@_error(context)) > 0;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string folder = argc > 1 ? argv[1] : FOLDER;
    const Golden golden = read_golden(folder + "/golden.bin");
    char error[1024] = "";
    @NAME@_context* context =
        @NAME@_create((folder + "/weights.bin").c_str(), error, sizeof(error));
    if (!context) {
        std::fprintf(stderr, "%s\n", error);
        return 1;
    }
    bool passed = check(context, golden, 1, "one thread") &&
                  check(context, golden, 2, "two threads") && refuses(context, golden);
    @NAME@_context* other = @NAME@_clone(context);
    bool beside = false;
    std::thread second([&] { beside = other && check(other, golden, 1, "a second context"); });
    passed = check(context, golden, 2, "beside a second context") && passed;
    second.join();
    std::printf("selftest %s (%s, %s)\n", passed && beside ? "passed" : "FAILED",
                @NAME@_isa(context), golden.exact ? "every bit" : "within rounding");
    @NAME@_destroy(other);
    @NAME@_destroy(context);
    return passed && beside ? 0 : 1;
}
