// How a thread waits for others, and when it stops counting on them.

#pragma once
#include <algorithm>
#include <chrono>
#include <ctime>
#include <thread>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace flashdraft {
namespace {

inline double now() {  // seconds
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#endif
}

// At first it only looks again, then it lets others run, at last it sleeps, so that a core without
// work is seen to be free and a thread that waits for one can come to it.
class Wait {
    static constexpr int SPINS = 2000, YIELDS = 20;
    static constexpr std::chrono::microseconds NAP{20};
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
            std::this_thread::sleep_for(NAP);
        }
    }
};

// Whether the others are worth waiting for. Where they keep the caller waiting for much of two jobs
// nearby, because other processes have their cores, it works alone for a while; the longer, the
// more often a new try fails.
class Company {
    static constexpr double MUCH = 0.25;         // of a job's time, waited for more than a moment
    static constexpr int SHORT = 8, LONG = 128;  // jobs alone
    int bad = 0;         // jobs that waited much, less those since that did not
    int alone = 0;       // jobs alone that are left
    int period = SHORT;  // jobs alone next time

  public:
    bool wanted() {
        if (alone == 0) return true;
        alone--;
        return false;
    }

    // After a job with others: how many of its seconds were spent in long waits.
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

}  // namespace
}  // namespace flashdraft
