/* fuzz: libFuzzer drives the frame parser and the field readers (make fuzz). Not part of the agent. */
#include <stdlib.h>
#include <string.h>

#include "wire.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct start_request request;
    uint8_t *bytes = malloc(size + 1);
    if (!bytes) return 0;
    if (size) memcpy(bytes, data, size);
    size_t at = 0, used;
    struct frame f;
    const char *why;
    while (wire_frame(bytes + at, size - at, &f, &used, &why) == 1) {
        struct reader r = {.at = f.payload, .end = f.payload + f.len};
        if (f.type == F_START) {
            if (wire_start(&r, &request))
                for (uint32_t i = 1; i <= request.argc; i++) (void)strlen(request.argv[i]);
        } else if (f.type == F_REFRESH) {
            struct refresh_request q;
            if (wire_refresh(&r, &q) && strlen(q.hostname) + strlen(q.machine_id) + q.entropy_len > 64 + 32 + 512) abort();
        } else {
            struct user_spec user;
            uint32_t len;
            (void)rd_u8(&r), (void)rd_u64(&r);
            (void)wire_user(&r, &user);
            char *s = rd_str(&r, WIRE_MAX_PATH);
            if (s) (void)strlen(s);
            (void)rd_rest(&r, &len);
        }
        at += used;
    }
    free(bytes);
    return 0;
}
