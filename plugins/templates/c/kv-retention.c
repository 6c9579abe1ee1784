// Retention: cached blocks that several requests have found are evicted last.
//
// Against the host's own order, by last use: one long prompt that nobody sends again touches every block once, and would push
// out the beginning that all the others share. The functions and records are those of wit/policy.wit;
// bindings/kv_retention_policy.h declares them. Arguments belong to the callee: free them.
#include "options.h"
#include "kv_retention_policy.h"

// How many requests must have found a block.
static uint32_t min_hits = 2;

bool exports_pointsman_policy_lifecycle_init(kv_retention_policy_string_t *config,
                                             exports_pointsman_policy_lifecycle_host_info_t *host,
                                             exports_pointsman_policy_lifecycle_manifest_t *manifest,
                                             kv_retention_policy_string_t *error) {
  char *text = strndup((const char *)config->ptr, config->len);
  bool good = read_option(text, "min_hits", &min_hits);
  free(text);
  kv_retention_policy_string_free(config);
  exports_pointsman_policy_lifecycle_host_info_free(host);
  if (!good) {
    kv_retention_policy_string_dup(error, "min_hits must be a whole number");
    return false;
  }
  memset(manifest, 0, sizeof *manifest);
  kv_retention_policy_string_dup(&manifest->name, "{{name}}");
  kv_retention_policy_string_dup(&manifest->version, "0.1.0");
  kv_retention_policy_string_dup(&manifest->summary, "{{summary}}");
  return true;
}

// False leaves the blocks in the host's own order.
bool exports_pointsman_policy_kv_retention_rank(exports_pointsman_policy_kv_retention_micros_t now, uint32_t wanted,
                                                exports_pointsman_policy_kv_retention_blocks_t *blocks,
                                                exports_pointsman_policy_kv_retention_ranking_t *ranking) {
  (void)now, (void)wanted;
  memset(ranking, 0, sizeof *ranking);
  // Rows come least recently used first, and among the kept ones the last goes last.
  for (size_t row = 0; row < blocks->hits.len; row++) {
    if (blocks->hits.ptr[row] < min_hits) continue;
    if (ranking->keep.ptr == NULL) {
      ranking->keep.ptr = malloc(blocks->hits.len * sizeof *ranking->keep.ptr);
      if (ranking->keep.ptr == NULL) abort();
    }
    ranking->keep.ptr[ranking->keep.len++] = (uint32_t)row;
  }
  exports_pointsman_policy_kv_retention_blocks_free(blocks);
  return ranking->keep.len > 0;
}
