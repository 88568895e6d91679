#include "fault_guard.hpp"

#include <csignal>
#include <mutex>

namespace scone {

thread_local sigjmp_buf* fault_target = nullptr;

static struct sigaction previous;

static void on_fault(int signal_number, siginfo_t* info, void* context) {
    if (fault_target != nullptr) siglongjmp(*fault_target, 1);
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(signal_number, info, context);
    } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
        previous.sa_handler(signal_number);
    } else {
        sigaction(SIGBUS, &previous, nullptr);  // the access is repeated and ends the process as before
    }
}

void install_fault_handler() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, &previous);
    });
}

}  // namespace scone
