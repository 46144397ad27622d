// Teams of threads that live on between calls, and a barrier that spins for a while, then sleeps.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#endif

namespace fxquant {

static inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// A counter that threads wait on. Whoever waits spins first: the others are about to arrive. With
// a busy neighbour they may not be running at all, and then spinning takes their processor.
class Signal {
  public:
    uint32_t value() const { return value_.load(std::memory_order_acquire); }

    void raise() {
        value_.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            changed_.notify_all();
        }
    }

    void wait_until_not(uint32_t old, int microseconds) {
        using clock = std::chrono::steady_clock;
        const auto until = clock::now() + std::chrono::microseconds(microseconds);
        do {
            for (int i = 0; i < 32; ++i) {
                if (value() != old) return;
                pause_briefly();
            }
        } while (clock::now() < until);
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        changed_.wait(lock, [&] { return value_.load(std::memory_order_seq_cst) != old; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

  private:
    std::atomic<uint32_t> value_{0};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable changed_;
};

// The caller and size - 1 threads of its own.
class Team {
  public:
    explicit Team(int size) : size_(size), process_(getpid()), open_(new std::atomic<bool>[size]) {
        for (int thread = 0; thread < size; ++thread) open_[thread] = false;
        try {
            for (int thread = 1; thread < size; ++thread)
                threads_.emplace_back([this, thread] { serve(thread); });
        } catch (...) {  // The system gives no more threads.
            stop();
            throw;
        }
    }
    ~Team() { stop(); }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }
    // After a fork the threads are gone.
    bool is_alive() const { return process_ == getpid(); }
    void abandon() {
        for (auto& thread : threads_) thread.detach();
        threads_.clear();
    }

    // Calls work(thread, team) for every thread. What a thread of the team has not begun when the
    // caller is done with its own, the caller does as well: beside a busy neighbour it may take
    // milliseconds to wake up.
    template <class F>
    void run(F& work) {
        if (size_ == 1) return work(0, *this);
        call_ = [](void* f, int thread, Team& team) { (*static_cast<F*>(f))(thread, team); };
        work_ = &work;
        uint32_t left = left_.value();
        for (int thread = 1; thread < size_; ++thread) open_[thread].store(true);
        start_.raise();
        work(0, *this);
        for (int thread = 1; thread < size_; ++thread) {
            if (open_[thread].exchange(false))
                work(thread, *this);
            else
                ++left;
        }
        for (uint32_t now; (now = left_.value()) != left;) left_.wait_until_not(now, 20);
    }

    // A barrier of all threads of the team.
    void wait() {
        if (size_ == 1) return;
        const uint32_t old = step_.value();
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            step_.raise();
        } else {
            step_.wait_until_not(old, 20);
        }
    }

  private:
    void stop() {
        stopping_ = true;
        start_.raise();
        for (auto& thread : threads_) thread.join();
    }

    void serve(int thread) {
        uint32_t seen = 0;
        for (;;) {
            start_.wait_until_not(seen, 50);
            seen = start_.value();
            if (stopping_) return;
            if (!open_[thread].exchange(false)) continue;  // too late: the caller has done it
            call_(work_, thread, *this);
            left_.raise();
        }
    }

    const int size_;
    const pid_t process_;
    std::vector<std::thread> threads_;
    void (*call_)(void*, int, Team&) = nullptr;
    void* work_ = nullptr;
    std::atomic<bool> stopping_{false};
    std::atomic<int> arrived_{0};
    std::unique_ptr<std::atomic<bool>[]> open_;  // whether a thread may still begin this call
    Signal start_;
    Signal step_;
    Signal left_;
};

// Units of work in phases: those of a phase are independent, and need all before it. Each unit has
// a thread that begins it if it comes in time; whoever has nothing left of its own takes others'.
class Phases {
  public:
    // `units`: how many there are for one thread in each phase.
    void start(const std::vector<int>& units, int threads) {
        int width = 0;
        for (int count : units) width += count;
        width = (width + 63) / 64 * 64;  // threads write to lines of their own
        if (width * threads > room_) {
            room_ = width * threads;
            taken_.reset(new std::atomic<uint8_t>[room_]);
        }
        for (int i = 0; i < width * threads; ++i) taken_[i].store(0, std::memory_order_relaxed);
        width_ = width;
        threads_ = threads;
        done_.store(0, std::memory_order_relaxed);
        base_ = complete_.value();
    }

    // Calls run(unit, owner) for what this thread gets of a phase of `count` units a thread; `first`
    // counts the units of the phases before it.
    template <class F>
    void work(uint32_t phase, int first, int count, int thread, const F& run) {
        for (uint32_t now; (now = complete_.value()) - base_ < phase;)
            complete_.wait_until_not(now, 20);
        int finished = 0;
        for (int i = 0; i < threads_; ++i) {
            const int owner = (thread + i) % threads_;
            for (int unit = first; unit < first + count; ++unit) {
                std::atomic<uint8_t>& taken = taken_[owner * width_ + unit];
                if (i && taken.load(std::memory_order_relaxed)) continue;
                if (taken.exchange(1, std::memory_order_relaxed)) continue;
                run(unit, owner);
                ++finished;
            }
        }
        const int all = (first + count) * threads_;
        if (finished && done_.fetch_add(finished, std::memory_order_acq_rel) + finished == all)
            complete_.raise();
    }

  private:
    std::unique_ptr<std::atomic<uint8_t>[]> taken_;  // [threads][units]
    int room_ = 0;
    int width_ = 0;
    int threads_ = 0;
    std::atomic<int> done_{0};
    Signal complete_;  // how many phases are
    uint32_t base_ = 0;
};

// Teams that nobody uses at the moment: callers of several threads have one each.
class Teams {
  public:
    std::unique_ptr<Team> take(int size) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (auto team = idle_.begin(); team != idle_.end(); ++team)
                if ((*team)->is_alive() && (*team)->size() == size) {
                    std::unique_ptr<Team> found = std::move(*team);
                    idle_.erase(team);
                    return found;
                }
        }
        return std::unique_ptr<Team>(new Team(size));
    }
    void give_back(std::unique_ptr<Team> team) {
        std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(team));
    }

    // Never destroyed: a process may end while its threads sleep.
    static Teams& all() {
        static Teams* teams = new Teams;
        return *teams;
    }

  private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Team>> idle_;
};

// Calls work(thread, team) on every thread of a team.
template <class F>
static inline void with_threads(int count, F work) {
    if (count == 1) {
        Team alone(1);
        return alone.run(work);
    }
    std::unique_ptr<Team> team = Teams::all().take(count);
    team->run(work);
    Teams::all().give_back(std::move(team));
}

}  // namespace fxquant
