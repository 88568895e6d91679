// Turns a SIGBUS inside a guarded call into a plain failure.
//
// Reading a mapped file raises SIGBUS where the file was truncated behind our back and where the disk reports
// EIO. A server must fail the requests that needed those bytes and nothing else, so the loops that touch
// mapped files run under `guarded`. The signal is raised by, and on, the thread that touches the page, hence
// the thread-local jump target. Faults outside a guarded call go to whatever handler was there before.
#pragma once

#include <csetjmp>

namespace scone {

extern thread_local sigjmp_buf* fault_target;

void install_fault_handler();

// Runs body(); false if a page it touched could not be read. The body must own nothing that needs a
// destructor: the jump skips them.
template <class Body>
bool guarded(Body&& body) {
    install_fault_handler();
    sigjmp_buf target;
    sigjmp_buf* outer = fault_target;
    // 0: no system call to save the signal mask; the handler runs with SA_NODEFER instead.
    if (sigsetjmp(target, 0) != 0) {
        fault_target = outer;
        return false;
    }
    fault_target = &target;
    body();
    fault_target = outer;
    return true;
}

}  // namespace scone
