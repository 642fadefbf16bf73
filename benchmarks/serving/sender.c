// Turns a file of whole HTTP/1.1 requests into timed answers: one thread, epoll, no allocation on the
// way of a request.
//
//   sender HOST PORT REQUESTS OUT closed CONNECTIONS SECONDS TIMEOUT
//   sender HOST PORT REQUESTS OUT open   CONNECTIONS SCHEDULE TIMEOUT
//
// REQUESTS: for each request a little-endian uint32 length and its bytes; request i sends number
// i modulo their count. SCHEDULE: float64 seconds after the start, one for each request.
// closed: each connection sends its next request when its last is answered; CONNECTIONS are open.
// open: a request is sent at its time whatever the server does, on an idle connection, else on a
// new one, up to CONNECTIONS; beyond that it waits for one, and its time runs. OUT holds one
// struct Record for each request; times are CLOCK_MONOTONIC seconds after the start.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#define FAILED (-1)     // the connection broke, twice
#define TIMED_OUT (-2)  // sent, no whole answer in time
#define NOT_SENT (-3)   // no connection came free in time
#define BUFFER (1 << 20)
#define TIMER UINT32_MAX

typedef struct {
  double intended, sent, done;
  int32_t status, body_bytes, retry_after, reserved;
} Record;

typedef struct {
  int fd;            // -1: closed
  int64_t request;   // -1: idle
  size_t written, length;
  int fresh, retried;
  char *buffer;
} Connection;

static char *requests;
static uint32_t *sizes;
static size_t *offsets, num_requests;
static Record *records;
static size_t num_records, room_records, num_done;
static Connection *connections;
static int num_connections, num_idle, num_closed, *idle, *closed_slots;
static size_t *waiting, first_waiting, end_waiting;
static int epoll, open_loop;
static double start_time, timeout_s, stop_s;
static struct sockaddr_in address;
static uint64_t reconnects;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9 - start_time;
}

static void die(const char *what) {
  fprintf(stderr, "sender: %s: %s\n", what, strerror(errno));
  exit(1);
}

static void watch(Connection *c, uint32_t events, int how) {
  struct epoll_event event = {.events = events, .data.u32 = (uint32_t)(c - connections)};
  epoll_ctl(epoll, how, c->fd, &event);
}

static void close_connection(Connection *c) {
  if (c->fd >= 0) close(c->fd);
  c->fd = -1;
}

static void connect_it(Connection *c) {
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  if (c->fd < 0) die("socket");
  int one = 1;
  setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  connect(c->fd, (struct sockaddr *)&address, sizeof address);
  if (!c->buffer && !(c->buffer = malloc(BUFFER))) die("memory");
  c->fresh = 1;
  reconnects++;
  watch(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
}

static void write_some(Connection *c) {
  size_t which = (size_t)c->request % num_requests;
  while (c->written < sizes[which]) {
    ssize_t n = send(c->fd, requests + offsets[which] + c->written, sizes[which] - c->written,
                     MSG_NOSIGNAL);
    if (n <= 0) break;  // full, connecting, or broken: epoll will say
    c->written += (size_t)n;
  }
  int rest = c->written < sizes[which];
  if (!rest && c->fresh) watch(c, EPOLLIN, EPOLL_CTL_MOD), c->fresh = 0;
  if (rest && !c->fresh) watch(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD), c->fresh = 1;
}

static void begin(Connection *c, size_t request) {
  c->request = (int64_t)request;
  c->written = c->length = 0;
  c->retried = 0;
  records[request].sent = now();
  if (c->fd < 0) connect_it(c);
  write_some(c);
}

static size_t new_record(double intended) {
  if (num_records == room_records) {
    room_records = room_records ? room_records * 2 : 1 << 16;
    records = realloc(records, room_records * sizeof *records);
    if (!records) die("memory");
  }
  records[num_records] = (Record){.intended = intended, .sent = -1, .done = -1};
  return num_records++;
}

static void finish(size_t request, int status) {
  records[request].status = status;
  records[request].done = now();
  num_done++;
}

// The connection has no request any more: give it the next one, or put it aside.
static void next_for(Connection *c) {
  c->request = -1;
  if (!open_loop) {
    double t = now();
    if (t < stop_s) begin(c, new_record(t));
    return;
  }
  while (first_waiting < end_waiting) {
    size_t request = waiting[first_waiting++];
    if (now() - records[request].intended <= timeout_s) {
      begin(c, request);
      return;
    }
    finish(request, NOT_SENT);
  }
  int slot = (int)(c - connections);
  if (c->fd >= 0) idle[num_idle++] = slot;
  else closed_slots[num_closed++] = slot;
}

static void broken(Connection *c) {
  close_connection(c);
  if (c->request < 0) {  // an idle one was closed by the server
    int slot = (int)(c - connections);
    for (int i = 0; i < num_idle; i++)
      if (idle[i] == slot) idle[i--] = idle[--num_idle];
    if (open_loop) closed_slots[num_closed++] = slot;
    return;
  }
  if (!c->retried && !c->length) {  // the server closed it while the request was on its way
    c->retried = 1;
    c->written = 0;
    connect_it(c);
    write_some(c);
    return;
  }
  finish((size_t)c->request, FAILED);
  next_for(c);
}

static const char *header(const char *head, const char *end, const char *name) {
  size_t n = strlen(name);
  for (const char *line = head; line < end; line++) {
    if (strncasecmp(line, name, n) == 0) return line + n;
    line = memchr(line, '\n', (size_t)(end - line));
    if (!line) break;
  }
  return NULL;
}

// Bytes of the body once all of it is there, else -1.
static long chunked_body(const char *at, const char *end) {
  long total = 0;
  for (;;) {
    const char *line_end = memmem(at, (size_t)(end - at), "\r\n", 2);
    if (!line_end) return -1;
    long size = strtol(at, NULL, 16);
    at = line_end + 2 + size + 2;
    if (at > end) return -1;
    if (size == 0) return total;
    total += size;
  }
}

static void read_some(Connection *c) {
  for (;;) {
    ssize_t n = recv(c->fd, c->buffer + c->length, BUFFER - 1 - c->length, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0 || c->request < 0) {
      broken(c);
      return;
    }
    c->length += (size_t)n;
    c->buffer[c->length] = 0;
    char *head_end = memmem(c->buffer, c->length, "\r\n\r\n", 4);
    if (!head_end) continue;
    char *body = head_end + 4, *end = c->buffer + c->length;
    const char *length = header(c->buffer, head_end, "content-length:");
    long want = length ? atol(length) : -1;
    long have = length ? end - body : chunked_body(body, end);
    if (have < 0 || have < want) continue;
    Record *record = &records[c->request];
    const char *retry = header(c->buffer, head_end, "retry-after:");
    const char *connection = header(c->buffer, head_end, "connection:");
    record->body_bytes = (int32_t)have;
    record->retry_after = retry ? atoi(retry) : -1;
    finish((size_t)c->request, atoi(c->buffer + 9));
    if (connection && strcasestr(connection, "close") &&
        strcasestr(connection, "close") < strchr(connection, '\r'))
      close_connection(c);
    next_for(c);
    return;
  }
}

static void expire(void) {
  double t = now();
  for (int i = 0; i < num_connections; i++) {
    Connection *c = &connections[i];
    if (c->request < 0 || t - records[c->request].intended <= timeout_s) continue;
    close_connection(c);
    finish((size_t)c->request, TIMED_OUT);
    next_for(c);
  }
  while (first_waiting < end_waiting &&
         t - records[waiting[first_waiting]].intended > timeout_s)
    finish(waiting[first_waiting++], NOT_SENT);
}

static void arrive(size_t request) {
  if (num_idle) begin(&connections[idle[--num_idle]], request);
  else if (num_closed) begin(&connections[closed_slots[--num_closed]], request);
  else waiting[end_waiting++] = request;
}

static char *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file) die(path);
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  char *bytes = malloc(*size + 1);
  if (!bytes || fread(bytes, 1, *size, file) != *size) die(path);
  fclose(file);
  return bytes;
}

static void load_requests(const char *path) {
  size_t size;
  requests = read_file(path, &size);
  for (size_t at = 0; at < size; num_requests++) {
    uint32_t length;
    memcpy(&length, requests + at, 4);
    sizes = realloc(sizes, (num_requests + 1) * sizeof *sizes);
    offsets = realloc(offsets, (num_requests + 1) * sizeof *offsets);
    sizes[num_requests] = length;
    offsets[num_requests] = at + 4;
    at += 4 + length;
  }
}

static void set_timer(int timer, double at) {
  double when = at + start_time;
  struct itimerspec spec = {.it_value = {(time_t)when, (long)((when - (time_t)when) * 1e9) + 1}};
  timerfd_settime(timer, TFD_TIMER_ABSTIME, &spec, NULL);
}

int main(int argc, char **argv) {
  if (argc != 9) return fprintf(stderr, "sender: 8 arguments are needed, see sender.c\n"), 2;
  address.sin_family = AF_INET;
  address.sin_port = htons((uint16_t)atoi(argv[2]));
  if (inet_pton(AF_INET, argv[1], &address.sin_addr) != 1) die("address");
  load_requests(argv[3]);
  open_loop = strcmp(argv[5], "open") == 0;
  num_connections = atoi(argv[6]);
  timeout_s = atof(argv[8]);
  connections = calloc((size_t)num_connections, sizeof *connections);
  idle = calloc((size_t)num_connections, sizeof *idle);
  closed_slots = calloc((size_t)num_connections, sizeof *closed_slots);
  double *schedule = NULL;
  size_t scheduled = 0, size, next = 0;
  if (open_loop) {
    schedule = (double *)read_file(argv[7], &size);
    scheduled = size / sizeof *schedule;
    waiting = malloc((scheduled + 1) * sizeof *waiting);
  } else {
    stop_s = atof(argv[7]);
  }
  epoll = epoll_create1(0);
  int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
  struct epoll_event event = {.events = EPOLLIN, .data.u32 = TIMER};
  epoll_ctl(epoll, EPOLL_CTL_ADD, timer, &event);
  for (int i = num_connections - 1; i >= 0; i--) {
    connections[i].fd = -1;
    connections[i].request = -1;
    closed_slots[num_closed++] = i;
  }
  start_time = now();
  for (int i = 0; !open_loop && i < num_connections; i++) begin(&connections[i], new_record(now()));
  double expire_at = 0.05;
  struct epoll_event events[256];
  while (open_loop ? next < scheduled || num_done < num_records
                   : now() < stop_s || num_done < num_records) {
    double t = now();
    while (next < scheduled && schedule[next] <= t) arrive(new_record(schedule[next++]));
    if (t >= expire_at) expire(), expire_at = t + 0.05;
    double wake = next < scheduled && schedule[next] < expire_at ? schedule[next] : expire_at;
    set_timer(timer, wake);
    int n = epoll_wait(epoll, events, 256, 1000);
    for (int i = 0; i < n; i++) {
      if (events[i].data.u32 == TIMER) {
        uint64_t ticks;
        (void)!read(timer, &ticks, sizeof ticks);
        continue;
      }
      Connection *c = &connections[events[i].data.u32];
      if (c->fd < 0) continue;
      if (events[i].events & EPOLLOUT && c->request >= 0) write_some(c);
      if (c->fd >= 0 && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_some(c);
    }
  }
  FILE *out = fopen(argv[4], "wb");
  if (!out || fwrite(records, sizeof *records, num_records, out) != num_records) die(argv[4]);
  fclose(out);
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  printf("{\"requests\": %zu, \"seconds\": %.6f, \"cpu_s\": %.6f, \"connects\": %lu}\n", num_records, now(),
         (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
             (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6,
         (unsigned long)reconnects);
  return 0;
}
