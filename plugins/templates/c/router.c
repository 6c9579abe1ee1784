// Router: the replica with the least work ahead of a new request.
//
// Work is prompt tokens accepted and not yet computed, plus a charge per request that waits or runs. The functions and
// records are those of wit/policy.wit; bindings/router_policy.h declares them. Arguments belong to the callee: free them.
#include "options.h"
#include "router_policy.h"

// What one more request in the batch costs, in prompt tokens: the option `sequence_tokens`.
static uint32_t sequence_tokens = 16;

bool exports_pointsman_policy_lifecycle_init(router_policy_string_t *config,
                                             exports_pointsman_policy_lifecycle_host_info_t *host,
                                             exports_pointsman_policy_lifecycle_manifest_t *manifest,
                                             router_policy_string_t *error) {
  char *text = strndup((const char *)config->ptr, config->len);
  bool good = read_option(text, "sequence_tokens", &sequence_tokens);
  free(text);
  router_policy_string_free(config);
  exports_pointsman_policy_lifecycle_host_info_free(host);
  if (!good) {
    router_policy_string_dup(error, "sequence_tokens must be a whole number");
    return false;
  }
  memset(manifest, 0, sizeof *manifest);
  router_policy_string_dup(&manifest->name, "{{name}}");
  router_policy_string_dup(&manifest->version, "0.1.0");
  router_policy_string_dup(&manifest->summary, "{{summary}}");
  return true;
}

void exports_pointsman_policy_router_route(exports_pointsman_policy_router_micros_t now,
                                           exports_pointsman_policy_router_request_t *request,
                                           exports_pointsman_policy_router_replicas_t *replicas,
                                           exports_pointsman_policy_router_choice_t *choice) {
  (void)now;
  uint64_t least = UINT64_MAX;
  choice->tag = EXPORTS_POINTSMAN_POLICY_ROUTER_CHOICE_ABSTAIN;
  for (uint32_t row = 0; row < replicas->id.len; row++) {
    if (replicas->weight.ptr[row] == 0) continue;
    uint64_t sequences = (uint64_t)replicas->waiting.ptr[row] + replicas->running.ptr[row];
    uint64_t work = replicas->queued_tokens.ptr[row] + sequences * sequence_tokens;
    if (work < least) {
      least = work;
      choice->tag = EXPORTS_POINTSMAN_POLICY_ROUTER_CHOICE_PICK;
      choice->val.pick = row;
    }
  }
  exports_pointsman_policy_router_request_free(request);
  exports_pointsman_policy_router_replicas_free(replicas);
}
