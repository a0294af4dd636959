// The team: who takes part in a job, and how a thread without one sleeps and wakes.
//
// A phase is over when all its pieces are done, not when all threads have come. What a late thread
// may read: the team's own memory, always; the job and what it points to, only while it holds a
// piece, for until that is done the job cannot end.

#include "team.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include "interface.h"
#include "ranges.h"
#include "waiting.h"
#if defined(_WIN32)
#include <process.h>
#else
#include <csignal>
#include <unistd.h>
#endif

namespace flashdraft {
namespace {

int64_t this_process() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

// A thread that is made meanwhile gets no signals: those are for the interpreter's own threads.
struct SignalsBlocked {
#if !defined(_WIN32)
    sigset_t before;

    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
    }

    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
#endif
};

class Team {
    static constexpr int64_t PHASES = 1024;  // of a job; longer lists become several jobs
    static constexpr double AFTER_JOB = 5e-5, AFTER_CALL = 5e-4;  // seconds until a thread sleeps

    std::mutex busy;  // held by the thread whose job runs; guards what is not atomic here
    std::unique_ptr<Counter[]> counters{new Counter[PHASES]};
    std::unique_ptr<Phase[]> phases{new Phase[PHASES]};
    Job* job = nullptr;
    std::atomic<uint64_t> published{0};  // a Word: the job's number, its threads, its phases
    int64_t num_threads = 1;             // with the caller's
    Company company;                     // of the thread that holds `busy`

    std::mutex door;  // of the threads that sleep between jobs
    std::condition_variable bell;
    std::atomic<int> sleeping{0};
    uint64_t calls = 0;  // guarded by `door`

    // ---- taking part --------------------------------------------------------------------------

    // Whether the phase ended; false: the whole job has, and another may have begun.
    bool finished(Counter& counter, uint64_t number, double* waited) {
        Wait wait;
        double since = 0;
        while (!counter.is_finished()) {
            if (Word::number(published.load(std::memory_order_acquire)) != number) return false;
            if (waited && wait.is_long() && since == 0) since = now();
            wait();
        }
        if (since > 0) *waited += now() - since;
        return true;
    }

    // Works at phase p until it is over; false: the whole job is. me: of the threads, the caller
    // is 0. waited: where seconds of long waits are added, or null.
    bool take_part(int64_t p, uint64_t number, int64_t me, int64_t threads, double* waited) {
        Counter& counter = counters[p];
        const int64_t num_ranges = Counter::num_ranges(threads);
        bool first = true;
        for (int64_t r = 0; r < num_ranges; r++) {
            Range& range = counter.ranges[(me + r) % num_ranges];  // its own first
            int64_t from, to;
            while (range.claim(number, from, to)) {
                job->run(phases[p], {from, to, first});
                first = false;
                counter.add_done(to - from);
            }
        }
        if (!counter.is_of(number)) return false;
        return finished(counter, number, waited);
    }

    // ---- the hired threads --------------------------------------------------------------------

    void hire(int64_t threads) {
        SignalsBlocked blocked;
        for (; num_threads < threads; num_threads++) {
            const int64_t index = num_threads;
            try {
                std::thread([this, index] { serve(index); }).detach();
            } catch (const std::system_error&) {  // the system allows no more: fewer do the work
                break;
            }
        }
    }

    void serve(int64_t index) {
        uint64_t last = 0;
        while (true) {
            const uint64_t current = await(last);
            last = current;
            const int64_t threads = Word::middle(current), length = Word::low(current);
            if (index >= threads) continue;
            for (int64_t p = 0; p < length; p++)
                if (!take_part(p, Word::number(current), index, threads, nullptr)) break;
        }
    }

    // The next job. A thread that only looks slows its caller down where the two share a core's
    // parts, so it soon sleeps; `call` wakes it a little before the next job.
    uint64_t await(uint64_t last) {
        double patience = AFTER_JOB;
        while (true) {
            const double started = now();
            for (int looks = 1;; looks++) {
                const uint64_t current = published.load(std::memory_order_acquire);
                if (current != last) return current;
                pause();
                const bool asks_the_clock = looks % 16 == 0;  // which takes longer than a look
                if (asks_the_clock && now() - started > patience) break;
            }
            sleep(last);
            patience = AFTER_CALL;
        }
    }

    // Until a job is published or `ring` is called.
    void sleep(uint64_t last) {
        std::unique_lock<std::mutex> lock(door);
        const uint64_t heard = calls;
        sleeping++;
        bell.wait(lock, [&] {
            return published.load(std::memory_order_seq_cst) != last || calls != heard;
        });
        sleeping--;
    }

    void ring() {
        {
            std::lock_guard<std::mutex> lock(door);
            calls++;
        }
        bell.notify_all();
    }

    // ---- the caller ---------------------------------------------------------------------------

    void publish(Job& work, const Phase* list, int64_t length, int64_t threads) {
        const uint64_t number = (Word::number(published.load()) + 1) & Word::MOST_NUMBER;
        published.store(Word::of(number, 0, 0));  // who waits within the last job sees it is over
        for (int64_t p = 0; p < length; p++) {
            phases[p] = list[p];
            counters[p].prepare(number, list[p].count, threads);
        }
        job = &work;
        published.store(Word::of(number, threads, length));
        if (sleeping.load()) ring();
    }

    // Whether others take part in a job of the thread that asks. owns: it holds `busy`.
    bool is_shared(const std::vector<Phase>& list, int64_t threads, bool owns) {
        if (threads <= 1 || !owns || !company.wanted()) return false;
        for (const Phase& phase : list)
            if (uint64_t(phase.count) > Word::MOST) return false;
        return true;
    }

  public:
    const int64_t process = this_process();

    // A job comes soon: whoever sleeps wakes up meanwhile.
    void call() {
        if (sleeping.load()) ring();
    }

    void run(Job& work, const std::vector<Phase>& list, int64_t threads, double* seconds) {
        const int64_t length = int64_t(list.size());
        std::unique_lock<std::mutex> own(busy, std::try_to_lock);  // else another's job runs
        const bool shared = is_shared(list, threads, own.owns_lock());
        if (shared) hire(threads);

        const double started = now();
        double last = started, waited = 0;
        for (int64_t p = 0; p < length; p++) {
            const int64_t slot = p % PHASES;
            if (shared && slot == 0)
                publish(work, &list[p], std::min(length - p, PHASES), threads);

            if (shared) {
                const uint64_t number = Word::number(published.load(std::memory_order_relaxed));
                take_part(slot, number, 0, threads, &waited);
            } else {
                work.run(list[p], {0, list[p].count, true});
            }

            if (seconds) {
                const double time = now();
                seconds[list[p].part] += time - last;
                last = time;
            }
        }
        if (shared) company.worked(waited, now() - started);
    }
};

// One a process. A child of fork has none of its parent's threads: it makes a team of its own. A
// team is never taken down: its threads may outlive the last call.
Team& team() {
    static std::atomic<Team*> made{nullptr};
    Team* current = made.load();
    if (current && current->process == this_process()) return *current;

    Team* fresh = new Team;
    if (made.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;  // another thread was quicker; this one has hired nobody
    return *current;
}

}  // namespace

void run_by_team(Job& job, const std::vector<Phase>& phases, int64_t threads, double* seconds) {
    team().run(job, phases, threads, seconds);
}

}  // namespace flashdraft

extern "C" void flashdraft_call() { flashdraft::team().call(); }
