// Scheduler: short prompts first, with aging.
//
// A request's place is the moment it arrived plus a handicap for each prompt token still to be computed. The place never
// changes, so everybody who waits ages at the same rate. The functions and records are those of wit/policy.wit;
// bindings/scheduler_policy.h declares them. Arguments belong to the callee: free them.
//
// Two arrays: who waits, in order, and who runs. Finding a request is a scan, fast enough for thousands of them.
#include "options.h"
#include "scheduler_policy.h"

typedef struct {
  uint64_t place;
  uint64_t id;
} request_t;

typedef struct {
  request_t *rows;
  size_t n;
  size_t capacity;
} list_t;

static list_t waiting, running;

// For how long one prompt token may be overtaken, in microseconds: the option `token_us`.
static uint32_t token_us = 1000;

bool exports_pointsman_policy_lifecycle_init(scheduler_policy_string_t *config,
                                             exports_pointsman_policy_lifecycle_host_info_t *host,
                                             exports_pointsman_policy_lifecycle_manifest_t *manifest,
                                             scheduler_policy_string_t *error) {
  char *text = strndup((const char *)config->ptr, config->len);
  bool good = read_option(text, "token_us", &token_us);
  free(text);
  scheduler_policy_string_free(config);
  exports_pointsman_policy_lifecycle_host_info_free(host);
  if (!good) {
    scheduler_policy_string_dup(error, "token_us must be a whole number");
    return false;
  }
  memset(manifest, 0, sizeof *manifest);
  scheduler_policy_string_dup(&manifest->name, "{{name}}");
  scheduler_policy_string_dup(&manifest->version, "0.1.0");
  scheduler_policy_string_dup(&manifest->summary, "{{summary}}");
  return true;
}

static void insert(list_t *list, size_t at, request_t request) {
  if (list->n == list->capacity) {
    list->capacity = list->capacity ? list->capacity * 2 : 64;
    list->rows = realloc(list->rows, list->capacity * sizeof *list->rows);
    if (list->rows == NULL) abort();
  }
  memmove(&list->rows[at + 1], &list->rows[at], (list->n - at) * sizeof *list->rows);
  list->rows[at] = request;
  list->n++;
}

// Takes a request out of a list, if it is there.
static bool take(list_t *list, uint64_t id, request_t *request) {
  for (size_t i = 0; i < list->n; i++) {
    if (list->rows[i].id != id) continue;
    *request = list->rows[i];
    list->n--;
    memmove(&list->rows[i], &list->rows[i + 1], (list->n - i) * sizeof *list->rows);
    return true;
  }
  return false;
}

// Puts a request into the queue, behind all with a smaller place; equals go by id.
static void wait(request_t request) {
  size_t low = 0, high = waiting.n;
  while (low < high) {
    size_t middle = (low + high) / 2;
    request_t other = waiting.rows[middle];
    bool before = other.place < request.place || (other.place == request.place && other.id < request.id);
    if (before) low = middle + 1;
    else high = middle;
  }
  insert(&waiting, low, request);
}

static request_t read_row(const exports_pointsman_policy_scheduler_sequences_t *sequences, size_t row) {
  uint32_t prompt = sequences->prompt_tokens.ptr[row];
  uint32_t done = sequences->computed_tokens.ptr[row];
  if (done < sequences->cached_tokens.ptr[row]) done = sequences->cached_tokens.ptr[row];
  uint64_t left = prompt > done ? prompt - done : 0;
  return (request_t){sequences->arrived.ptr[row] + left * token_us, sequences->id.ptr[row]};
}

static void follow(const exports_pointsman_policy_scheduler_changes_t *changes) {
  request_t request;
  for (size_t i = 0; i < changes->gone.len; i++) {
    if (!take(&running, changes->gone.ptr[i], &request)) take(&waiting, changes->gone.ptr[i], &request);
  }
  for (size_t i = 0; i < changes->preempted.len; i++) {
    if (take(&running, changes->preempted.ptr[i], &request)) wait(request);
  }
  for (size_t row = 0; row < changes->arrived.id.len; row++) wait(read_row(&changes->arrived, row));
  for (size_t i = 0; i < changes->admitted.len; i++) {
    if (take(&waiting, changes->admitted.ptr[i], &request)) insert(&running, running.n, request);
  }
}

void exports_pointsman_policy_scheduler_resync(exports_pointsman_policy_scheduler_micros_t now, uint64_t seed,
                                               exports_pointsman_policy_scheduler_budgets_t *budgets,
                                               scheduler_policy_list_tuple2_u32_string_t *tenants,
                                               exports_pointsman_policy_scheduler_sequences_t *queued,
                                               exports_pointsman_policy_scheduler_sequences_t *started) {
  (void)now, (void)seed, (void)budgets;
  waiting.n = running.n = 0;
  for (size_t row = 0; row < queued->id.len; row++) wait(read_row(queued, row));
  for (size_t row = 0; row < started->id.len; row++) insert(&running, running.n, read_row(started, row));
  scheduler_policy_list_tuple2_u32_string_free(tenants);
  exports_pointsman_policy_scheduler_sequences_free(queued);
  exports_pointsman_policy_scheduler_sequences_free(started);
}

bool exports_pointsman_policy_scheduler_step(exports_pointsman_policy_scheduler_micros_t now,
                                             exports_pointsman_policy_scheduler_budgets_t *budgets,
                                             exports_pointsman_policy_scheduler_changes_t *changes,
                                             exports_pointsman_policy_scheduler_plan_t *plan) {
  (void)now;
  follow(changes);
  exports_pointsman_policy_scheduler_changes_free(changes);

  size_t free_places = budgets->running > running.n ? budgets->running - running.n : 0;
  size_t n = free_places < waiting.n ? free_places : waiting.n;
  memset(plan, 0, sizeof *plan);
  plan->rest = EXPORTS_POINTSMAN_POLICY_SCHEDULER_REST_HOST_ORDER;
  if (n > 0) {
    plan->admit.ptr = malloc(n * sizeof *plan->admit.ptr);
    if (plan->admit.ptr == NULL) abort();
    plan->admit.len = n;
    for (size_t i = 0; i < n; i++) plan->admit.ptr[i] = waiting.rows[i].id;
  }
  return true;
}
