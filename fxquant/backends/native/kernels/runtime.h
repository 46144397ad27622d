// What runs a program: the C ABI, contexts, the choice of the instruction set and of the threads.
//
// A program is a file that is mapped: a header, steps, the parameters of their kernels, where
// addresses and batch sizes go into these, and constants. The translation unit that includes this
// header defines FXQUANT_KERNELS(F) as F(name, Params, layout) for every kernel that the program may
// call; `layout` is a hash of the Params' text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "threads.h"

namespace fxquant {

enum Isa : int { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512VNNI = 3, AMX = 4, ISA_COUNT = 5 };
static const char* const ISA_NAMES[ISA_COUNT] = {"portable", "avx2", "avxvnni", "avx512vnni",
                                                 "amx"};

struct Kernel {
    const char* name;
    const char* layout;
    int64_t params_size;
    int (*items)(const void*);
    void (*run[ISA_COUNT])(const void*, int, int);
};

template <class P, int (*F)(const P&)>
static int call_items(const void* params) {
    return F(*static_cast<const P*>(params));
}

template <class P, void (*F)(const P&, int, int)>
static void call_kernel(const void* params, int begin, int end) {
    F(*static_cast<const P*>(params), begin, end);
}

#if defined(__x86_64__)
#define FXQUANT_ENTRY(NAME, P, LAYOUT)                                                    \
    {#NAME, LAYOUT, sizeof(P), &call_items<P, &portable::NAME##_items>,                           \
     {&call_kernel<P, &portable::NAME>, &call_kernel<P, &avx2::NAME>,                     \
      &call_kernel<P, &avxvnni::NAME>, &call_kernel<P, &avx512vnni::NAME>,                \
      &call_kernel<P, &amx::NAME>}},
#else
#define FXQUANT_ENTRY(NAME, P, LAYOUT)                                                    \
    {#NAME, LAYOUT, sizeof(P), &call_items<P, &portable::NAME##_items>,                           \
     {&call_kernel<P, &portable::NAME>, nullptr, nullptr, nullptr, nullptr}},
#endif

static const Kernel KERNELS[] = {FXQUANT_KERNELS(FXQUANT_ENTRY){nullptr, nullptr, 0, nullptr, {}}};

// -- the file --------------------------------------------------------------------------------

static const uint64_t MAGIC = 0x32544e5158465eULL;

struct Header {
    uint64_t magic;
    uint64_t size;      // of the whole file
    uint64_t checksum;  // of everything behind it
    uint64_t steps;     // offsets from the start of the file, then numbers
    uint64_t step_count;
    uint64_t params;
    uint64_t params_size;
    uint64_t relocations;
    uint64_t relocation_count;
    uint64_t kernels;  // name:layout, each ended by a zero, in the order that steps number them
    uint64_t kernel_count;
    uint64_t ports;  // inputs, then outputs
    uint64_t input_count;
    uint64_t output_count;
    uint64_t constants;
    uint64_t arena_size;  // bytes a sample
    uint64_t flags;       // 1: samples depend on each other, so that a batch stays whole
    uint64_t split;       // steps before it run sample by sample where a thread has several
    uint64_t carried;
    uint64_t carried_count;
};

enum StepFlags : uint32_t { SERIAL = 1, BARRIER = 2 };

struct Step {
    uint32_t kernel;
    uint32_t flags;
    uint64_t params;  // offset into the parameters
};

enum RelocationKind : uint32_t {
    TO_ARENA = 0,
    TO_CONSTANT = 1,
    TO_INPUT = 2,
    TO_OUTPUT = 3,
    COUNT_64 = 4,
    COUNT_32 = 5,
};

// A field becomes base + batch * each: an address, or a number.
struct Relocation {
    uint32_t kind;
    uint32_t port;   // of inputs and outputs
    uint64_t field;  // offset into the parameters
    int64_t base;
    int64_t each;
};

// What a step before the split writes and one behind it reads: place and bytes of one sample.
struct Carried {
    uint64_t offset;
    uint64_t size;
};

struct Port {
    int32_t type;
    int32_t rank;
    int64_t samples_each;  // shape[0] of a batch of one; 0: not batched, shape[0] is shape
    int64_t shape[8];
};

// A bijection whose every output bit depends on every input bit: the finalizer of SplitMix64.
static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

// Of the sum of all words of 8 bytes, which any single change changes, and of their sum weighted by
// position, which an exchange changes; zeros fill the last word.
static inline uint64_t checksum(const unsigned char* bytes, uint64_t size) {
    uint64_t plain = 0, weighted = 0;
    for (uint64_t at = 0; at < size; at += 8) {
        uint64_t word = 0;
        std::memcpy(&word, bytes + at, size - at < 8 ? size - at : 8);
        plain += word;
        weighted += word * (at / 8 + 1);
    }
    return mix(mix(plain) + weighted);
}

// -- the instruction set ---------------------------------------------------------------------

#if defined(__x86_64__)
static inline bool may_use_amx() {
#if defined(__linux__)
    // The kernel gives tile registers to a process that asks for them.
    const long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(158, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}
#endif

static inline int cpu_isa() {
#if defined(__x86_64__)
    static const int found = [] {
        unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0;
        __cpuid(0, a, b, c, d);
        const unsigned highest = a;
        __cpuid(1, a, b, c, d);
        const bool has_avx = (c & (1u << 27)) && (c & (1u << 28)) && (c & (1u << 12));
        if (highest < 7 || !has_avx) return static_cast<int>(PORTABLE);
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        __cpuid_count(7, 0, a, b7, c7, d7);
        const unsigned leaves = a;
        if (leaves >= 1) {
            __cpuid_count(7, 1, a71, b, c, d);
        }
        if ((low & 6) != 6 || !(b7 & (1u << 5))) return static_cast<int>(PORTABLE);
        const unsigned avx512 = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F DQ BW VL
        const bool has_512 = (low & 0xe6) == 0xe6 && (b7 & avx512) == avx512 &&
                             (c7 & (1u << 11)) && (c7 & (1u << 1));  // VNNI, VBMI
        const bool has_amx = has_512 && (low & 0x60000) == 0x60000 && (d7 & (1u << 24)) &&
                             (d7 & (1u << 25));
        if (has_amx && may_use_amx()) return static_cast<int>(AMX);
        if (has_512) return static_cast<int>(AVX512VNNI);
        if (a71 & (1u << 4)) return static_cast<int>(AVXVNNI);
        return static_cast<int>(AVX2);
    }();
    return found;
#else
    return PORTABLE;
#endif
}

// The instruction set to use, held down by FXQUANT_ISA; -1 where that names none that is here.
static inline int chosen_isa() {
    const char* wanted = std::getenv("FXQUANT_ISA");
    if (!wanted || !*wanted) return cpu_isa();
    for (int isa = 0; isa < ISA_COUNT; ++isa)
        if (!std::strcmp(wanted, ISA_NAMES[isa])) {
            // AVX-VNNI is a branch of its own: some processors have AVX-512 VNNI without it.
            if (isa == AVXVNNI && cpu_isa() > AVXVNNI) {
                unsigned a = 0, b, c, d;
#if defined(__x86_64__)
                __cpuid_count(7, 1, a, b, c, d);
#endif
                return (a & (1u << 4)) ? isa : -1;
            }
            return isa <= cpu_isa() ? isa : -1;
        }
    return -1;
}

// -- models and contexts ---------------------------------------------------------------------

struct Model {
    const unsigned char* bytes = nullptr;
    uint64_t size = 0;
    const Header* header = nullptr;
    std::vector<const Kernel*> kernels;
    int isa = PORTABLE;
    std::string error;

    ~Model() {
        if (bytes) munmap(const_cast<unsigned char*>(bytes), size + SLACK);
    }
    static const uint64_t SLACK = 4096;

    template <class T>
    const T* at(uint64_t offset) const {
        return reinterpret_cast<const T*>(bytes + offset);
    }
    const Step* steps() const { return at<Step>(header->steps); }
    const Port* ports() const { return at<Port>(header->ports); }
    const Relocation* relocations() const { return at<Relocation>(header->relocations); }

    bool fail(const std::string& text) {
        error = text;
        return false;
    }

    bool open(const char* path) {
        const int file = ::open(path, O_RDONLY | O_CLOEXEC);
        if (file < 0) return fail(std::string("cannot open ") + path);
        struct stat status;
        if (fstat(file, &status) || static_cast<uint64_t>(status.st_size) < sizeof(Header)) {
            ::close(file);
            return fail(std::string(path) + " is no program: it is too short");
        }
        size = static_cast<uint64_t>(status.st_size);
        // Kernels may read a little behind what they need: pages of zeros follow the file.
        void* room = mmap(nullptr, size + SLACK, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        void* mapped = room == MAP_FAILED ? MAP_FAILED
                                          : mmap(room, size, PROT_READ, MAP_PRIVATE | MAP_FIXED,
                                                 file, 0);
        ::close(file);
        if (mapped == MAP_FAILED) return fail(std::string("cannot map ") + path);
        bytes = static_cast<const unsigned char*>(mapped);
        header = at<Header>(0);
        if (header->magic != MAGIC)
            return fail(std::string(path) + " is no program of this version of fxquant");
        const uint64_t behind = offsetof(Header, steps);
        if (header->size != size || header->checksum != checksum(bytes + behind, size - behind))
            return fail(std::string(path) + " is damaged: its checksum is wrong");
        isa = chosen_isa();
        if (isa < 0)
            return fail(std::string("FXQUANT_ISA=") + std::getenv("FXQUANT_ISA") +
                        " is none of what this processor has; it has up to " +
                        ISA_NAMES[cpu_isa()]);
        const char* name = at<char>(header->kernels);
        for (uint64_t i = 0; i < header->kernel_count; ++i, name += std::strlen(name) + 1) {
            const Kernel* kernel = KERNELS;
            const std::string whole = name, plain = whole.substr(0, whole.find(':'));
            while (kernel->name && plain != kernel->name) ++kernel;
            if (!kernel->name) return fail("the library has no kernel " + plain);
            if (whole != plain + ":" + kernel->layout)
                return fail(std::string(path) + " and the library are of different versions: "
                            "parameters of the kernel " + plain + " have changed; take both from "
                            "one export");
            kernels.push_back(kernel);
        }
        return true;
    }
};

// The parameters and the arena of some samples of a batch, which one thread or all run over.
struct Lane {
    int64_t batch = -1;
    std::vector<uint64_t> params;
    std::vector<int> items;
    unsigned char* arena = nullptr;
    uint64_t arena_size = 0;

    Lane() = default;
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;
    ~Lane() { std::free(arena); }

    unsigned char* field(uint64_t offset) {
        return reinterpret_cast<unsigned char*>(params.data()) + offset;
    }

    // Addresses and counts that hold for every call with this batch size.
    bool prepare(const Model& model, int64_t samples) {
        if (samples == batch) return true;
        const Header& header = *model.header;
        const uint64_t needed = header.arena_size * static_cast<uint64_t>(samples) + 4096;
        if (needed > arena_size) {
            std::free(arena);
            arena_size = 0;
            // Large pages: the values of a batch are in more small ones than a processor knows of.
            const uint64_t page = needed < LARGE_PAGE ? 4096 : LARGE_PAGE;
            const uint64_t room = (needed + page - 1) & ~(page - 1);
            arena = static_cast<unsigned char*>(std::aligned_alloc(page, room));
            if (!arena) return false;
#if defined(MADV_HUGEPAGE)
            if (page == LARGE_PAGE) madvise(arena, room, MADV_HUGEPAGE);
#endif
            arena_size = needed;
            std::memset(arena, 0, needed);
        }
        batch = samples;
        params.resize(header.params_size / 8 + 1);
        std::memcpy(params.data(), model.at<char>(header.params), header.params_size);
        const Relocation* relocations = model.relocations();
        for (uint64_t i = 0; i < header.relocation_count; ++i) {
            const Relocation& r = relocations[i];
            uint64_t value = static_cast<uint64_t>(r.base + samples * r.each);
            if (r.kind == TO_ARENA) value += reinterpret_cast<uint64_t>(arena) + ARENA_MARGIN;
            if (r.kind == TO_CONSTANT)
                value += reinterpret_cast<uint64_t>(model.bytes) + header.constants;
            if (r.kind == COUNT_32) {
                const int32_t narrow = static_cast<int32_t>(value);
                std::memcpy(field(r.field), &narrow, 4);
            } else if (r.kind != TO_INPUT && r.kind != TO_OUTPUT) {
                std::memcpy(field(r.field), &value, 8);
            }
        }
        items.clear();
        for (uint64_t i = 0; i < header.step_count; ++i) {
            const Step& step = model.steps()[i];
            items.push_back(model.kernels[step.kernel]->items(field(step.params)));
        }
        return true;
    }
    static const uint64_t LARGE_PAGE = 1 << 21;
    // Kernels may read a little before the first value and behind the last one.
    static const uint64_t ARENA_MARGIN = 1024;

    // `first`: where this lane's samples start in the caller's tensors.
    void connect(const Model& model, int64_t first, const void* const* inputs,
                 void* const* outputs) {
        const Header& header = *model.header;
        const Relocation* relocations = model.relocations();
        for (uint64_t i = 0; i < header.relocation_count; ++i) {
            const Relocation& r = relocations[i];
            if (r.kind != TO_INPUT && r.kind != TO_OUTPUT) continue;
            const void* base = r.kind == TO_INPUT ? inputs[r.port] : outputs[r.port];
            const uint64_t value =
                reinterpret_cast<uint64_t>(base) + static_cast<uint64_t>(r.base + first * r.each);
            std::memcpy(field(r.field), &value, 8);
        }
    }

    // A value of the arena, of one of this lane's samples.
    unsigned char* carried(const Carried& value, int64_t sample) {
        return arena + ARENA_MARGIN + value.offset * static_cast<uint64_t>(batch) +
               value.size * static_cast<uint64_t>(sample);
    }

    void step(const Model& model, uint64_t index, int part, int parts) {
        const Step& step = model.steps()[index];
        const int64_t count = items[index];
        const int begin = static_cast<int>(count * part / parts);
        const int end = static_cast<int>(count * (part + 1) / parts);
        if (begin < end) model.kernels[step.kernel]->run[model.isa](field(step.params), begin, end);
    }
};

struct Context {
    std::shared_ptr<Model> model;
    std::vector<std::unique_ptr<Lane>> lanes;
    std::vector<std::unique_ptr<Lane>> singles;  // of one sample each, for the steps before the split
    std::vector<int64_t> nanoseconds;  // of each step of the last profiled run
    std::string error;

    int run(int64_t batch, const void* const* inputs, void* const* outputs, int threads,
            bool profile) {
        const Header& header = *model->header;
        if (batch < 0) return fail("the batch is negative");
        if (batch == 0) return 0;
        if (threads < 1) threads = 1;
        const bool apart = batch >= threads && !(header.flags & 1) && !profile;
        const int64_t count = apart ? threads : 1;
        while (static_cast<int64_t>(lanes.size()) < count) lanes.emplace_back(new Lane);
        for (int64_t lane = 0; lane < count; ++lane) {
            const int64_t first = batch * lane / count;
            if (!lanes[lane]->prepare(*model, batch * (lane + 1) / count - first))
                return fail("out of memory");
            lanes[lane]->connect(*model, first, inputs, outputs);
        }
        if (apart) {
            while (static_cast<int64_t>(singles.size()) < count) singles.emplace_back(new Lane);
            for (int64_t lane = 0; lane < count; ++lane)
                if (takes_singly(*lanes[lane]) && !singles[lane]->prepare(*model, 1))
                    return fail("out of memory");
            // A thread for some whole samples each: nobody waits for anybody before the end.
            with_threads(threads, [&](int thread, Team&) {
                Lane& lane = *lanes[thread];
                uint64_t i = 0;
                if (takes_singly(lane)) {
                    const int64_t first = batch * thread / count;
                    for (int64_t n = 0; n < lane.batch; ++n)
                        run_first(*singles[thread], lane, first, n, inputs, outputs);
                    i = header.split;
                }
                for (; i < header.step_count; ++i) lane.step(*model, i, 0, 1);
            });
            return 0;
        }
        if (profile) {
            run_profiled(threads);
            return 0;
        }
        if (threads == 1) {
            for (uint64_t i = 0; i < header.step_count; ++i) lanes[0]->step(*model, i, 0, 1);
            return 0;
        }
        if (phases.empty()) divide();
        shares.start(units, threads);
        with_threads(threads, [&](int thread, Team& team) {
            int first = 0;
            for (uint32_t phase = 0; phase < phases.size(); ++phase) {
                const Phase& steps = phases[phase];
                shares.work(phase, first, units[phase], thread, [&](int unit, int owner) {
                    run_unit(steps, unit - first, owner, team.size());
                });
                first += units[phase];
            }
        });
        return 0;
    }

    // Steps between two barriers: those of one thread, in their order, and those of all.
    struct Phase {
        std::vector<uint64_t> serial, parallel;
    };
    std::vector<Phase> phases;
    std::vector<int> units;
    Phases shares;

    void divide() {
        const Header& header = *model->header;
        for (uint64_t i = 0; i < header.step_count; ++i) {
            const uint32_t flags = model->steps()[i].flags;
            if (phases.empty() || flags & BARRIER) phases.emplace_back();
            (flags & SERIAL ? phases.back().serial : phases.back().parallel).push_back(i);
        }
        for (const Phase& phase : phases)
            units.push_back(static_cast<int>(phase.parallel.size()) + !phase.serial.empty());
    }

    // The share of thread `owner` in a step; the last unit is that of the serial steps.
    void run_unit(const Phase& phase, int unit, int owner, int threads) {
        if (unit < static_cast<int>(phase.parallel.size()))
            lanes[0]->step(*model, phase.parallel[unit], owner, threads);
        else if (owner == 0)
            for (uint64_t i : phase.serial) lanes[0]->step(*model, i, 0, 1);
    }

    // Each step with all threads, from barrier to barrier, so that its time is its own.
    void run_profiled(int threads) {
        const Header& header = *model->header;
        nanoseconds.assign(header.step_count, 0);
        with_threads(threads, [&](int thread, Team& team) {
            Lane& lane = *lanes[0];
            auto before = std::chrono::steady_clock::now();
            for (uint64_t i = 0; i <= header.step_count; ++i) {
                const bool more = i < header.step_count;
                const uint32_t flags = more ? model->steps()[i].flags : 0;
                if (flags & BARRIER) team.wait();
                if (!thread && i) {
                    const auto now = std::chrono::steady_clock::now();
                    nanoseconds[i - 1] =
                        std::chrono::duration_cast<std::chrono::nanoseconds>(now - before).count();
                    before = now;
                }
                if (flags & SERIAL) {
                    if (!thread) lane.step(*model, i, 0, 1);
                } else if (more) {
                    lane.step(*model, i, thread, team.size());
                }
            }
        });
    }

    bool takes_singly(const Lane& lane) const { return lane.batch > 1 && model->header->split > 0; }

    // The steps before the split for sample `n` of a lane, whose samples start at `first`.
    void run_first(Lane& single, Lane& lane, int64_t first, int64_t n, const void* const* inputs,
                   void* const* outputs) {
        const Header& header = *model->header;
        single.connect(*model, first + n, inputs, outputs);
        for (uint64_t i = 0; i < header.split; ++i) single.step(*model, i, 0, 1);
        const Carried* carried = model->at<Carried>(header.carried);
        for (uint64_t i = 0; i < header.carried_count; ++i)
            std::memcpy(lane.carried(carried[i], n), single.carried(carried[i], 0),
                        carried[i].size);
    }

    int fail(const char* text) {
        error = text;
        return 1;
    }
};

}  // namespace fxquant

// -- the C ABI -------------------------------------------------------------------------------

// Whoever includes this may have an interface of its own, and keep this one to itself.
#ifndef FXQUANT_API
#define FXQUANT_API extern "C" __attribute__((visibility("default")))
#endif

// A context of the program in a file; a thread at a time may run it. Null where it cannot be made:
// then `error` holds why, cut to `room` bytes.
FXQUANT_API void* fxquant_create(const char* path, char* error, int64_t room) {
    auto report = [&](const char* text) -> void* {
        if (error && room > 0) std::snprintf(error, static_cast<size_t>(room), "%s", text);
        return nullptr;
    };
    try {
        auto model = std::make_shared<fxquant::Model>();
        if (!model->open(path)) return report(model->error.c_str());
        auto context = std::make_unique<fxquant::Context>();
        context->model = model;
        return context.release();
    } catch (const std::exception& problem) {
        return report(problem.what());
    }
}

// Another context of the same mapped program, for another thread.
FXQUANT_API void* fxquant_clone(const void* handle) {
    try {
        auto context = std::make_unique<fxquant::Context>();
        context->model = static_cast<const fxquant::Context*>(handle)->model;
        return context.release();
    } catch (const std::exception&) {
        return nullptr;
    }
}

FXQUANT_API void fxquant_destroy(void* handle) { delete static_cast<fxquant::Context*>(handle); }

FXQUANT_API const char* fxquant_error(const void* handle) {
    return static_cast<const fxquant::Context*>(handle)->error.c_str();
}

FXQUANT_API const char* fxquant_isa(const void* handle) {
    return fxquant::ISA_NAMES[static_cast<const fxquant::Context*>(handle)->model->isa];
}

FXQUANT_API int64_t fxquant_arena_size(const void* handle) {
    return static_cast<int64_t>(
        static_cast<const fxquant::Context*>(handle)->model->header->arena_size);
}

// The number of inputs (outputs), and the type and shape of one; the rank is returned. A batch of
// one is what shape[0] is counted for.
FXQUANT_API int fxquant_port_count(const void* handle, int output) {
    const auto& header = *static_cast<const fxquant::Context*>(handle)->model->header;
    return static_cast<int>(output ? header.output_count : header.input_count);
}

FXQUANT_API int fxquant_port(const void* handle, int output, int index, int* type,
                             int64_t* shape) {
    const auto& model = *static_cast<const fxquant::Context*>(handle)->model;
    const auto& port = model.ports()[(output ? model.header->input_count : 0) + index];
    *type = port.type;
    for (int axis = 0; axis < port.rank; ++axis) shape[axis] = port.shape[axis];
    return port.rank;
}

// Dense tensors in, dense tensors out. 0, or 1 and `fxquant_error` says why.
FXQUANT_API int fxquant_run(void* handle, int64_t batch, const void* const* inputs,
                            void* const* outputs, int threads) {
    auto& context = *static_cast<fxquant::Context*>(handle);
    try {
        return context.run(batch, inputs, outputs, threads, false);
    } catch (const std::exception& problem) {
        return context.fail(problem.what());
    }
}

// The same, and the nanoseconds of every step (a table of `fxquant_step_count`).
FXQUANT_API int fxquant_profile(void* handle, int64_t batch, const void* const* inputs,
                                void* const* outputs, int threads, int64_t* nanoseconds) {
    auto& context = *static_cast<fxquant::Context*>(handle);
    try {
        const int failed = context.run(batch, inputs, outputs, threads, true);
        if (!failed)
            std::memcpy(nanoseconds, context.nanoseconds.data(), 8 * context.nanoseconds.size());
        return failed;
    } catch (const std::exception& problem) {
        return context.fail(problem.what());
    }
}

FXQUANT_API int64_t fxquant_step_count(const void* handle) {
    return static_cast<int64_t>(
        static_cast<const fxquant::Context*>(handle)->model->header->step_count);
}
