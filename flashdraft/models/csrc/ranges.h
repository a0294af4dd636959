// The pieces of a phase that nobody has claimed yet, in a range for each thread.
//
// A thread claims pieces of its own range, then of the ranges of those who are late. One that
// another process has pushed off its core therefore holds the others up only while it has a piece.
//
// A range is one word of 64 bits, so that a claim is one atomic exchange. The job's number in it
// makes a late thread's claim for an old job fail:
//
//   | number of the job: 24 bits | end of the range: 20 bits | next piece: 20 bits |

#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace flashdraft {
namespace {

// Three numbers in a word; also a job's number, its threads and its phases.
struct Word {
    static constexpr int BITS = 20;  // of each of the lower two
    static constexpr uint64_t MOST = (uint64_t(1) << BITS) - 1;
    static constexpr uint64_t MOST_NUMBER = (uint64_t(1) << (64 - 2 * BITS)) - 1;

    static uint64_t of(uint64_t number, int64_t middle, int64_t low) {
        return number << 2 * BITS | uint64_t(middle) << BITS | uint64_t(low);
    }
    static uint64_t number(uint64_t word) { return word >> 2 * BITS; }
    static int64_t middle(uint64_t word) { return int64_t(word >> BITS & MOST); }
    static int64_t low(uint64_t word) { return int64_t(word & MOST); }
};

class Range {
    std::atomic<uint64_t> next{0};

  public:
    void prepare(uint64_t job, int64_t from, int64_t to) {
        next.store(Word::of(job, to, from), std::memory_order_release);
    }

    bool is_of(uint64_t job) const {
        return Word::number(next.load(std::memory_order_acquire)) == job;
    }

    // Takes most of what is left, or the last piece. false: nothing is, or the job is over.
    bool claim(uint64_t job, int64_t& from, int64_t& to) {
        uint64_t seen = next.load(std::memory_order_acquire);
        while (Word::number(seen) == job) {
            const int64_t end = Word::middle(seen);
            from = Word::low(seen);
            if (from >= end) return false;

            to = from + std::max<int64_t>(1, (end - from) * 7 / 8);
            const uint64_t taken = Word::of(job, end, to);
            if (next.compare_exchange_weak(seen, taken, std::memory_order_acq_rel)) return true;
        }
        return false;
    }
};

constexpr int64_t RANGES = 6;  // of a phase, at most: more threads than that share them

// A phase's pieces. One line of a processor's cache: a job hands hundreds of them to its threads.
struct alignas(64) Counter {
    std::atomic<int64_t> done{0};
    std::atomic<int64_t> count{0};
    Range ranges[RANGES];

    static int64_t num_ranges(int64_t threads) { return std::min(threads, RANGES); }

    void prepare(uint64_t job, int64_t pieces, int64_t threads) {
        done.store(0, std::memory_order_relaxed);
        count.store(pieces, std::memory_order_relaxed);
        const int64_t parts = num_ranges(threads);
        for (int64_t r = 0; r < parts; r++)
            ranges[r].prepare(job, pieces * r / parts, pieces * (r + 1) / parts);
    }

    void add_done(int64_t pieces) { done.fetch_add(pieces, std::memory_order_acq_rel); }

    bool is_finished() const {
        return done.load(std::memory_order_acquire) >= count.load(std::memory_order_relaxed);
    }

    bool is_of(uint64_t job) const { return ranges[0].is_of(job); }
};

static_assert(sizeof(Counter) == 64, "a counter is one line");

}  // namespace
}  // namespace flashdraft
