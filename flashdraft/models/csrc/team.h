// A team of threads that shares work in pieces and never waits for a thread that has nothing in hand.
//
// A job is a list of phases, a phase a number of pieces, in as many ranges as there are threads. A thread claims pieces of its
// own range, then of the ranges of those who are late. A phase is over when all its pieces are done, not when all threads have
// come: one that another process has pushed off its core holds the others up only while it has a piece. Which thread takes a
// piece changes no bit of the result.
//
// What a late thread may read: the team's own memory, always; the job and what it points to, only while it holds a piece, for
// until that is done the job cannot end. A counter carries its job's number, so that a claim for an old job fails.

#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <ctime>
#include <chrono>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(_WIN32)
#include <process.h>
#else
#include <csignal>
#include <unistd.h>
#endif

namespace flashdraft {

struct Phase {
    int64_t kind, at, count;  // what is done, at which layer or place, in how many pieces
    int64_t part;             // of the times that are asked for: which sum it belongs to
};

struct Job {
    // Pieces `from` to `to` of a phase. stamp: no other phase of this process has the same.
    virtual void run(const Phase& phase, uint64_t stamp, int64_t from, int64_t to) = 0;
    virtual ~Job() = default;
};

inline int64_t this_process() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

inline uint64_t new_stamps(int64_t count) {
    static std::atomic<uint64_t> next{1};
    return next.fetch_add(uint64_t(count));
}

inline double now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

// Waiting: at first it only looks again, then it lets others run, at last it sleeps, so that a core without work is seen to be
// free and a thread that waits for one can come to it.
class Wait {
    static constexpr int SPINS = 2000, YIELDS = 20;
    int looks = 0;

  public:
    bool is_long() const { return looks >= SPINS; }

    void operator()() {
        looks++;
        if (looks < SPINS) {
            pause();
        } else if (looks < SPINS + YIELDS) {
            std::this_thread::yield();
        } else {
            std::this_thread::sleep_for(std::chrono::microseconds(20));
        }
    }
};

// Whether the others are worth waiting for. Where they keep the caller waiting for much of two jobs nearby, because other
// processes have their cores, it works alone for a while; the longer, the more often a new try fails.
class Company {
    static constexpr double MUCH = 0.25;  // of a job's time, spent in waiting that is more than a moment
    static constexpr int SHORT = 8, LONG = 128;  // jobs alone
    int bad = 0, alone = 0, period = SHORT;

  public:
    bool wanted() {
        if (alone == 0) return true;
        alone--;
        return false;
    }

    void worked(double waited, double seconds) {
        const bool again = period > SHORT;
        if (waited < MUCH * seconds) {
            bad = std::max(bad - 1, 0);
            if (bad == 0) period = SHORT;
            return;
        }
        bad++;
        if (bad < 2 && !again) return;
        alone = period;
        period = std::min(2 * period, LONG);
        bad = 1;
    }
};

class Team {
    // A range's counter: the job's number, where the range ends, the next piece that nobody has claimed.
    static constexpr int BITS = 20;
    static constexpr uint64_t MOST = (uint64_t(1) << BITS) - 1;
    static constexpr double AWAKE = 5e-5, CALLED = 5e-4;  // seconds until a thread sleeps: after a job, after a call
    static constexpr int64_t PHASES = 1024;  // of a job; longer lists become several jobs
    static constexpr int64_t RANGES = 6;     // of a phase, at most: more threads than that share them

    struct Range {
        std::atomic<uint64_t> next{0};
    };
    struct alignas(64) Counter {  // one line of a cache: a job hands hundreds of them to its threads
        std::atomic<int64_t> done{0};
        std::atomic<int64_t> count{0};
        Range ranges[RANGES];
    };

    std::mutex busy;  // held by the thread whose job runs
    std::unique_ptr<Counter[]> counters{new Counter[PHASES]};
    std::unique_ptr<Phase[]> phases{new Phase[PHASES]};
    Job* job = nullptr;
    uint64_t first_stamp = 0;
    std::atomic<uint64_t> published{0};  // the job's number, its threads, its phases
    int64_t num_threads = 1;             // with the caller's
    Company company;                     // of the thread that holds `busy`

    std::mutex door;  // of the threads that sleep between jobs
    std::condition_variable bell;
    std::atomic<int> sleeping{0};
    uint64_t calls = 0;  // guarded by `door`

    static uint64_t pack(uint64_t number, uint64_t middle, uint64_t low) { return number << 2 * BITS | middle << BITS | low; }
    static uint64_t number_of(uint64_t packed) { return packed >> 2 * BITS; }
    static int64_t middle_of(uint64_t packed) { return int64_t(packed >> BITS & MOST); }
    static int64_t low_of(uint64_t packed) { return int64_t(packed & MOST); }

    // Takes most of what is left of a range, or a piece.
    static bool claim(Range& range, uint64_t number, int64_t& from, int64_t& to) {
        uint64_t seen = range.next.load(std::memory_order_acquire);
        while (number_of(seen) == number) {
            const int64_t end = middle_of(seen);
            from = low_of(seen);
            if (from >= end) return false;
            to = from + std::max<int64_t>(1, (end - from) * 7 / 8);
            const uint64_t taken = pack(number, uint64_t(end), uint64_t(to));
            if (range.next.compare_exchange_weak(seen, taken, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
        }
        return false;
    }

    // Whether the phase ended; false: the whole job has, and another may have begun.
    bool finished(Counter& counter, uint64_t number, double* waited) {
        Wait wait;
        double since = 0;
        while (counter.done.load(std::memory_order_acquire) < counter.count.load(std::memory_order_relaxed)) {
            if (number_of(published.load(std::memory_order_acquire)) != number) return false;
            if (waited && wait.is_long() && since == 0) since = now();
            wait();
        }
        if (since > 0) *waited += now() - since;
        return true;
    }

    bool take_part(int64_t p, uint64_t number, int64_t me, int64_t threads, double* waited = nullptr) {
        Counter& counter = counters[p];
        const int64_t ranges = std::min(threads, RANGES);
        for (int64_t r = 0; r < ranges; r++) {
            Range& range = counter.ranges[(me + r) % ranges];  // its own first
            int64_t from, to;
            while (claim(range, number, from, to)) {
                job->run(phases[p], first_stamp + uint64_t(p), from, to);
                counter.done.fetch_add(to - from, std::memory_order_acq_rel);
            }
        }
        if (number_of(counter.ranges[0].next.load(std::memory_order_acquire)) != number) return false;
        return finished(counter, number, waited);
    }

    void serve(int64_t index) {
        uint64_t last = 0;
        while (true) {
            const uint64_t current = await(last);
            last = current;
            if (index >= middle_of(current)) continue;
            for (int64_t p = 0; p < low_of(current); p++)
                if (!take_part(p, number_of(current), index, middle_of(current))) break;
        }
    }

    // The next job. A thread that only looks slows its caller down where the two share a core's parts, so it soon sleeps; `call`
    // wakes it a little before the next job.
    uint64_t await(uint64_t last) {
        double patience = AWAKE;
        while (true) {
            const double started = now();
            for (int looks = 1;; looks++) {
                const uint64_t current = published.load(std::memory_order_acquire);
                if (current != last) return current;
                pause();
                if (looks % 16 == 0 && now() - started > patience) break;
            }
            std::unique_lock<std::mutex> lock(door);
            const uint64_t heard = calls;
            sleeping++;
            bell.wait(lock, [&] { return published.load(std::memory_order_seq_cst) != last || calls != heard; });
            sleeping--;
            patience = CALLED;
        }
    }

    void ring() {
        {
            std::lock_guard<std::mutex> lock(door);
            calls++;
        }
        bell.notify_all();
    }

    void hire(int64_t threads) {
#if !defined(_WIN32)
        sigset_t all, before;  // signals are for the threads that were there: the interpreter's
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        for (; num_threads < threads; num_threads++) {
            const int64_t index = num_threads;
            try {
                std::thread([this, index] { serve(index); }).detach();
            } catch (const std::system_error&) {  // the system allows no more: those that are there do the work
                break;
            }
        }
#if !defined(_WIN32)
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    }

    static void prepare(Counter& counter, int64_t count, uint64_t number, int64_t threads) {
        counter.done.store(0, std::memory_order_relaxed);
        counter.count.store(count, std::memory_order_relaxed);
        const int64_t ranges = std::min(threads, RANGES);
        for (int64_t r = 0; r < ranges; r++) {
            const int64_t from = count * r / ranges, to = count * (r + 1) / ranges;
            counter.ranges[r].next.store(pack(number, uint64_t(to), uint64_t(from)), std::memory_order_release);
        }
    }

    void publish(Job& work, uint64_t stamp, const Phase* list, int64_t length, int64_t threads) {
        const uint64_t number = (number_of(published.load()) + 1) & ((uint64_t(1) << (64 - 2 * BITS)) - 1);
        published.store(pack(number, 0, 0));  // whoever waits within the last job sees that it is over
        for (int64_t p = 0; p < length; p++) {
            phases[p] = list[p];
            prepare(counters[p], list[p].count, number, threads);
        }
        job = &work;
        first_stamp = stamp;
        published.store(pack(number, uint64_t(threads), uint64_t(length)));
        if (sleeping.load()) ring();
    }

  public:
    const int64_t process = this_process();

    // A job comes soon: whoever sleeps wakes up meanwhile.
    void call() {
        if (sleeping.load()) ring();
    }

    // Does all phases in order, by the caller and at most threads - 1 others. spent: sums of seconds, or null.
    void run(Job& work, const std::vector<Phase>& list, int64_t threads, double* spent = nullptr) {
        const int64_t length = int64_t(list.size());
        const uint64_t stamp = new_stamps(length);
        std::unique_lock<std::mutex> own(busy, std::try_to_lock);  // another thread's job runs: this one goes alone
        bool shared = threads > 1 && own.owns_lock() && company.wanted();
        for (const Phase& phase : list) shared = shared && uint64_t(phase.count) <= MOST;
        if (shared) hire(threads);

        const double started = now();
        double last = started, waited = 0;
        for (int64_t p = 0; p < length; p++) {
            if (shared && p % PHASES == 0)
                publish(work, stamp + uint64_t(p), &list[p], std::min(length - p, PHASES), threads);
            if (shared) take_part(p % PHASES, number_of(published.load(std::memory_order_relaxed)), 0, threads, &waited);
            else work.run(list[p], stamp + uint64_t(p), 0, list[p].count);
            if (spent) {
                const double time = now();
                spent[list[p].part] += time - last;
                last = time;
            }
        }
        if (shared) company.worked(waited, now() - started);
    }
};

Team& team();  // of this process

}  // namespace flashdraft
