// Sampler: no token more than so many times in a row.
//
// It remembers the last token of each request and for how long it has been that one. A new instance is told of every request
// again, from its start on, so what is remembered here may go at any time. The functions and records are those of
// wit/policy.wit; bindings/sampler_policy.h declares them. Arguments belong to the callee: free them.
//
// One array of requests: a replica runs some dozens at once, so finding one is a scan.
#include "options.h"
#include "sampler_policy.h"

// The last token of a request, and how often it has come since another one.
typedef struct {
  uint64_t id;
  uint32_t token;
  uint32_t length;
} run_t;

static run_t *runs;
static size_t n_runs, capacity;

// How often a token may stand in a row.
static uint32_t max_run = 8;

bool exports_pointsman_policy_lifecycle_init(sampler_policy_string_t *config,
                                             exports_pointsman_policy_lifecycle_host_info_t *host,
                                             exports_pointsman_policy_lifecycle_manifest_t *manifest,
                                             sampler_policy_string_t *error) {
  char *text = strndup((const char *)config->ptr, config->len);
  bool good = read_option(text, "max_run", &max_run) && max_run > 0;
  free(text);
  sampler_policy_string_free(config);
  exports_pointsman_policy_lifecycle_host_info_free(host);
  if (!good) {
    sampler_policy_string_dup(error, "max_run must be a whole number of at least 1");
    return false;
  }
  memset(manifest, 0, sizeof *manifest);
  sampler_policy_string_dup(&manifest->name, "{{name}}");
  sampler_policy_string_dup(&manifest->version, "0.1.0");
  sampler_policy_string_dup(&manifest->summary, "{{summary}}");
  return true;
}

// The run of a request, a new one if it has none.
static run_t *find(uint64_t id) {
  for (size_t i = 0; i < n_runs; i++) {
    if (runs[i].id == id) return &runs[i];
  }
  if (n_runs == capacity) {
    capacity = capacity ? capacity * 2 : 64;
    runs = realloc(runs, capacity * sizeof *runs);
    if (runs == NULL) abort();
  }
  runs[n_runs] = (run_t){.id = id};
  return &runs[n_runs++];
}

// Room for so many edits, all of them `free`.
static void make_edits(exports_pointsman_policy_sampler_list_edit_t *edits, size_t n) {
  memset(edits, 0, sizeof *edits);
  if (n == 0) return;
  edits->ptr = calloc(n, sizeof *edits->ptr);
  if (edits->ptr == NULL) abort();
  edits->len = n;
  for (size_t i = 0; i < n; i++) edits->ptr[i].tag = EXPORTS_POINTSMAN_POLICY_SAMPLER_EDIT_FREE;
}

void exports_pointsman_policy_sampler_start(exports_pointsman_policy_sampler_micros_t now,
                                            exports_pointsman_policy_sampler_list_request_t *requests,
                                            exports_pointsman_policy_sampler_list_edit_t *edits) {
  (void)now;
  for (size_t i = 0; i < requests->len; i++) find(requests->ptr[i].id)->length = 0;
  make_edits(edits, requests->len);
  exports_pointsman_policy_sampler_list_request_free(requests);
}

void exports_pointsman_policy_sampler_next(exports_pointsman_policy_sampler_micros_t now,
                                           exports_pointsman_policy_sampler_list_request_id_t *ids,
                                           sampler_policy_list_u32_t *tokens,
                                           exports_pointsman_policy_sampler_list_edit_t *edits) {
  (void)now;
  make_edits(edits, ids->len);
  for (size_t i = 0; i < ids->len; i++) {
    run_t *run = find(ids->ptr[i]);
    uint32_t token = tokens->ptr[i];
    run->length = run->token == token ? run->length + 1 : 1;
    run->token = token;
    if (run->length < max_run) continue;
    sampler_policy_list_u32_t *forbidden = &edits->ptr[i].val.forbid;
    forbidden->ptr = malloc(sizeof *forbidden->ptr);
    if (forbidden->ptr == NULL) abort();
    forbidden->ptr[0] = token;
    forbidden->len = 1;
    edits->ptr[i].tag = EXPORTS_POINTSMAN_POLICY_SAMPLER_EDIT_FORBID;
  }
  exports_pointsman_policy_sampler_list_request_id_free(ids);
  sampler_policy_list_u32_free(tokens);
}

void exports_pointsman_policy_sampler_ended(exports_pointsman_policy_sampler_list_request_id_t *ids) {
  for (size_t i = 0; i < ids->len; i++) {
    run_t *run = find(ids->ptr[i]);
    *run = runs[--n_runs];
  }
  exports_pointsman_policy_sampler_list_request_id_free(ids);
}
