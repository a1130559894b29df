/* A server of stock libmodbus, for the tests.
 *
 *   modbus_peer tcp PORT [PORTS]    rtu DEVICE UNIT
 *   and then: [static] [absent N]… [mute UNIT]
 *
 * Registers are `address * 7 + unit * 1009 + counter`, modulo 65536; the counter goes up with each request that reads, so
 * that an answer shows which request it belongs to. A bit is the lowest bit of that. With `static` they are what was
 * written last. One process can serve PORTS ports from PORT on.
 */
#include <errno.h>
#include <modbus.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static int is_static, absent[64], absents, mute = -1;
static modbus_mapping_t *map;
static unsigned counter;

static void fill(const uint8_t *query, int head) {
    int unit = query[head - 1], function = query[head];
    int start = query[head + 1] << 8 | query[head + 2], count = query[head + 3] << 8 | query[head + 4];
    if (is_static || function < 1 || function > 4)
        return;
    counter++;
    for (int at = start; at < start + count && at < 65536; at++) {
        uint16_t value = at * 7 + unit * 1009 + counter;
        switch (function) {
        case 1: map->tab_bits[at] = value & 1; break;
        case 2: map->tab_input_bits[at] = value & 1; break;
        case 3: map->tab_registers[at] = value; break;
        case 4: map->tab_input_registers[at] = value; break;
        }
    }
}

/* 0: the connection is over. */
static int serve(modbus_t *ctx) {
    uint8_t query[MODBUS_TCP_MAX_ADU_LENGTH];
    int length = modbus_receive(ctx, query), head = modbus_get_header_length(ctx);
    if (length <= 0)
        return length == 0 || errno == EMBBADCRC || errno == EMBBADDATA;
    if (query[head - 1] == mute)
        return 1;
    int function = query[head], start = query[head + 1] << 8 | query[head + 2];
    int count = function == 5 || function == 6 || function == 22 ? 1 : query[head + 3] << 8 | query[head + 4];
    for (int n = 0; n < absents; n++)
        if (absent[n] >= start && absent[n] < start + count) {
            modbus_reply_exception(ctx, query, MODBUS_EXCEPTION_ILLEGAL_DATA_ADDRESS);
            return 1;
        }
    fill(query, head);
    return modbus_reply(ctx, query, length, map) > 0;
}

int main(int argc, char **argv) {
    int next = 3, ports = 1, unit = 1;
    if (argc < 3)
        return 2;
    int is_tcp = !strcmp(argv[1], "tcp");
    if (argc > 3 && argv[3][0] >= '0' && argv[3][0] <= '9') {
        *(is_tcp ? &ports : &unit) = atoi(argv[3]);
        next = 4;
    }
    for (; next < argc; next++) {
        if (!strcmp(argv[next], "static"))
            is_static = 1;
        else if (!strcmp(argv[next], "absent") && next + 1 < argc && absents < 64)
            absent[absents++] = atoi(argv[++next]);
        else if (!strcmp(argv[next], "mute") && next + 1 < argc)
            mute = atoi(argv[++next]);
    }
    signal(SIGPIPE, SIG_IGN);
    map = modbus_mapping_new(65536, 65536, 65536, 65536);
    if (!is_tcp) {
        modbus_t *ctx = modbus_new_rtu(argv[2], 9600, 'N', 8, 1);
        modbus_set_slave(ctx, unit);
        if (modbus_connect(ctx)) {
            perror(argv[2]);
            return 1;
        }
        puts("ready");
        fflush(stdout);
        for (;;)
            if (!serve(ctx) && errno == EIO)
                return 1;
    }
    int epoll = epoll_create1(0);
    for (int n = 0; n < ports; n++) {
        modbus_t *ctx = modbus_new_tcp("127.0.0.1", atoi(argv[2]) + n);
        int listener = modbus_tcp_listen(ctx, 64);
        if (listener < 0) {
            perror(argv[2]);
            return 1;
        }
        modbus_free(ctx);
        struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)listener << 1 | 1};
        epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &event);
    }
    puts("ready");
    fflush(stdout);
    modbus_t *ctx = modbus_new_tcp("127.0.0.1", 0);
    for (;;) {
        struct epoll_event events[64];
        int count = epoll_wait(epoll, events, 64, -1);
        for (int n = 0; n < count; n++) {
            int fd = events[n].data.u64 >> 1;
            if (events[n].data.u64 & 1) {
                int accepted = accept(fd, NULL, NULL);
                struct epoll_event event = {.events = EPOLLIN, .data.u64 = (uint64_t)accepted << 1};
                if (accepted >= 0)
                    epoll_ctl(epoll, EPOLL_CTL_ADD, accepted, &event);
                continue;
            }
            modbus_set_socket(ctx, fd);
            if (!serve(ctx))
                close(fd);
        }
    }
}
