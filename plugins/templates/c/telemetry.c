// Telemetry hook: counts first tokens that came late, and raises an alert when too many do.
//
// The functions and records are those of wit/policy.wit; bindings/telemetry_hook.h declares them. Arguments belong to the
// callee: free them.
#include "options.h"
#include "telemetry_hook.h"

// The number of this kind of event.
enum { FIRST_TOKEN = 2 };

// A first token later than `ttft_ms` is late; `alert_at` late ones in one batch of events raise an alert.
static uint32_t ttft_ms = 1000, alert_at = 20;
static pointsman_policy_host_metrics_handle_t late_total;

bool exports_pointsman_policy_lifecycle_init(telemetry_hook_string_t *config,
                                             exports_pointsman_policy_lifecycle_host_info_t *host,
                                             exports_pointsman_policy_lifecycle_manifest_t *manifest,
                                             telemetry_hook_string_t *error) {
  char *text = strndup((const char *)config->ptr, config->len);
  bool good = read_option(text, "ttft_ms", &ttft_ms) && read_option(text, "alert_at", &alert_at);
  free(text);
  telemetry_hook_string_free(config);
  exports_pointsman_policy_lifecycle_host_info_free(host);
  if (!good) {
    telemetry_hook_string_dup(error, "ttft_ms and alert_at must be whole numbers");
    return false;
  }
  telemetry_hook_string_t name, help;
  telemetry_hook_string_set(&name, "late_first_tokens_total");
  telemetry_hook_string_set(&help, "First tokens over the objective.");
  late_total = pointsman_policy_host_metrics_counter(&name, &help, NULL);

  memset(manifest, 0, sizeof *manifest);
  telemetry_hook_string_dup(&manifest->name, "{{name}}");
  telemetry_hook_string_dup(&manifest->version, "0.1.0");
  telemetry_hook_string_dup(&manifest->summary, "{{summary}}");
  manifest->wants.ptr = malloc(sizeof *manifest->wants.ptr);
  if (manifest->wants.ptr == NULL) abort();
  manifest->wants.len = 1;
  telemetry_hook_string_dup(&manifest->wants.ptr[0], "event.first-token");
  return true;
}

void exports_pointsman_policy_telemetry_on_events(exports_pointsman_policy_telemetry_micros_t now,
                                                  exports_pointsman_policy_telemetry_events_t *events,
                                                  uint64_t dropped,
                                                  exports_pointsman_policy_telemetry_list_alert_t *alerts) {
  (void)now, (void)dropped;
  uint32_t late = 0;
  for (size_t row = 0; row < events->kind.len; row++) {
    late += events->kind.ptr[row] == FIRST_TOKEN && events->a.ptr[row] > (uint64_t)ttft_ms * 1000;
  }
  exports_pointsman_policy_telemetry_events_free(events);
  pointsman_policy_host_metrics_record_value(late_total, late, NULL);

  memset(alerts, 0, sizeof *alerts);
  if (late < alert_at) return;
  alerts->ptr = calloc(1, sizeof *alerts->ptr);
  if (alerts->ptr == NULL) abort();
  alerts->len = 1;
  alerts->ptr[0].severity = EXPORTS_POINTSMAN_POLICY_TELEMETRY_SEVERITY_WARNING;
  telemetry_hook_string_dup(&alerts->ptr[0].title, "late first tokens");
  telemetry_hook_string_dup(&alerts->ptr[0].text, "more first tokens were late than alert_at allows");
}
