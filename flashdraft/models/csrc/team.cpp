// One team a process. A child of fork has none of its parent's threads: it makes a team of its own. A team is never taken down:
// its threads may outlive the last call.

#include "team.h"

namespace flashdraft {

Team& team() {
    static std::atomic<Team*> made{nullptr};
    Team* current = made.load();
    if (current && current->process == this_process()) return *current;
    Team* fresh = new Team;
    if (made.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;  // another thread was quicker; this one has hired nobody
    return *current;
}

}  // namespace flashdraft

extern "C" void flashdraft_call() { flashdraft::team().call(); }
