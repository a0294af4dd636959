// Jobs whose pieces count themselves: each is done once, and no phase begins before the one before
// it is over.
// Arguments: jobs of each caller, threads of a job, callers at once.

#include "team.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>

namespace {

void fail(const char* what) {
    std::puts(what);
    std::exit(1);
}

struct Counting : flashdraft::Job {
    std::vector<flashdraft::Phase> list;
    std::vector<std::vector<int>> times;

    Counting(int length, unsigned seed) {
        for (int p = 0; p < length; p++) {
            seed = seed * 1664525u + 1013904223u;
            const int count = 1 + int(seed >> 16) % 40;
            list.push_back({p, p, count, 0});
            times.emplace_back(count, 0);
        }
    }

    void run(const flashdraft::Phase& phase, const flashdraft::Pieces& pieces) override {
        if (phase.at > 0)
            for (int before : times[phase.at - 1])
                if (before != 1) fail("a phase began early");
        for (int64_t i = pieces.from; i < pieces.to; i++) times[phase.at][i]++;
    }

    void check() const {
        for (const auto& phase : times)
            for (int done : phase)
                if (done != 1) fail("a piece was not done once");
    }
};

void work(int jobs, int threads, int caller) {
    for (int number = 0; number < jobs; number++) {
        Counting job(1 + (number * 7 + caller) % 60, unsigned(number * 31 + caller));
        flashdraft::run_by_team(job, job.list, threads);
        job.check();
        if (number % 50 == 0)  // the others go to sleep
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

}  // namespace

int main(int, char** arguments) {
    const int jobs = std::atoi(arguments[1]);
    const int threads = std::atoi(arguments[2]);
    const int callers = std::atoi(arguments[3]);
    std::vector<std::thread> all;
    for (int caller = 0; caller < callers; caller++)
        all.emplace_back(work, jobs, threads, caller);
    for (std::thread& one : all) one.join();

    Counting longer(9000, 5);  // than one list of phases may be
    flashdraft::run_by_team(longer, longer.list, threads);
    longer.check();
    std::puts("ok");
}
