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
    explicit Team(int size) : size_(size), process_(getpid()) {
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

    template <class F>
    void run(F& work) {
        if (size_ == 1) return work(0, *this);
        call_ = [](void* f, int thread, Team& team) { (*static_cast<F*>(f))(thread, team); };
        work_ = &work;
        start_.raise();
        work(0, *this);
        wait();
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
            ++seen;
            if (stopping_) return;
            call_(work_, thread, *this);
            wait();
        }
    }

    const int size_;
    const pid_t process_;
    std::vector<std::thread> threads_;
    void (*call_)(void*, int, Team&) = nullptr;
    void* work_ = nullptr;
    std::atomic<bool> stopping_{false};
    std::atomic<int> arrived_{0};
    Signal start_;
    Signal step_;
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
