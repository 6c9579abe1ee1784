// Admission: no tenant has more than so many requests inside at once.
//
// The host says how many it carries, so nothing is remembered here and any instance can answer for any request. The functions
// and records are those of wit/policy.wit; bindings/admission_policy.h declares them. Arguments belong to the callee: free them.
#include "options.h"
#include "admission_policy.h"

// Most requests of one tenant, and when a refused client should come again.
static uint32_t max_in_flight = 32, retry_ms = 1000;

bool exports_pointsman_policy_lifecycle_init(admission_policy_string_t *config,
                                             exports_pointsman_policy_lifecycle_host_info_t *host,
                                             exports_pointsman_policy_lifecycle_manifest_t *manifest,
                                             admission_policy_string_t *error) {
  char *text = strndup((const char *)config->ptr, config->len);
  bool good = read_option(text, "max_in_flight", &max_in_flight) && read_option(text, "retry_ms", &retry_ms);
  free(text);
  admission_policy_string_free(config);
  exports_pointsman_policy_lifecycle_host_info_free(host);
  if (!good) {
    admission_policy_string_dup(error, "max_in_flight and retry_ms must be whole numbers");
    return false;
  }
  memset(manifest, 0, sizeof *manifest);
  admission_policy_string_dup(&manifest->name, "{{name}}");
  admission_policy_string_dup(&manifest->version, "0.1.0");
  admission_policy_string_dup(&manifest->summary, "{{summary}}");
  return true;
}

void exports_pointsman_policy_admission_admit(exports_pointsman_policy_admission_micros_t now,
                                              exports_pointsman_policy_admission_request_t *request,
                                              exports_pointsman_policy_admission_load_t *load,
                                              exports_pointsman_policy_admission_verdict_t *verdict) {
  (void)now;
  exports_pointsman_policy_admission_request_free(request);

  memset(verdict, 0, sizeof *verdict);
  if (load->tenant_in_flight < max_in_flight) {
    verdict->tag = EXPORTS_POINTSMAN_POLICY_ADMISSION_VERDICT_ACCEPT;
    return;
  }
  verdict->tag = EXPORTS_POINTSMAN_POLICY_ADMISSION_VERDICT_REJECT;
  verdict->val.reject.reason = POINTSMAN_POLICY_TYPES_REFUSAL_QUOTA;
  verdict->val.reject.retry_after_ms = retry_ms;
  admission_policy_string_dup(&verdict->val.reject.message, "the tenant has as many requests inside as it may have");
}

// What accepted requests came to: a quota would give back here what was not used.
void exports_pointsman_policy_admission_settle(exports_pointsman_policy_admission_micros_t now,
                                               exports_pointsman_policy_admission_endings_t *endings) {
  (void)now;
  exports_pointsman_policy_admission_endings_free(endings);
}
