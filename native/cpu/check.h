// check.h: whether a forward call may run: everything a caller can get wrong that memory safety depends on.
#pragma once
#include "rorqual_cpu.h"

// 0; -1 - segment for a segment out of range; -1 - segment_count for the call itself (sizes, formats, null pointers).
// mtp: null for rq_forward. Reads the call, the block tables and the tokens; changes nothing.
int64_t rq_check(const RqForward *call, const RqMtp *mtp);

// Whether the model's numbers fit together: what rq_forward_scratch() may work with.
int32_t rq_check_model(const RqForward *call);
