// A team of threads that does a job in pieces and never waits for a thread with nothing in hand.
//
// A job is a list of phases, a phase a number of pieces. A phase begins when all pieces of the one
// before are done. Which thread takes a piece changes no bit of the result.

#pragma once
#include <cstdint>
#include <vector>

namespace flashdraft {

struct Phase {
    int64_t kind;   // what is done: the job's own enum
    int64_t at;     // at which layer or place
    int64_t count;  // in how many pieces
    int64_t part;   // of the times that are asked for: which sum it counts for
};

// Pieces from `from` up to, not including, `to`.
struct Pieces {
    int64_t from, to;
    bool are_first;  // that this thread takes of this phase
};

struct Job {
    virtual void run(const Phase& phase, const Pieces& pieces) = 0;
    virtual ~Job() = default;
};

// Does all phases in order, by the caller and at most threads - 1 others. seconds: sums by `part`,
// which the phases' times are added to, or null.
void run_by_team(Job& job, const std::vector<Phase>& phases, int64_t threads,
                 double* seconds = nullptr);

}  // namespace flashdraft
