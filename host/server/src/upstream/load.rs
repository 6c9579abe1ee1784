//! How much an upstream has to do, as its own metrics say it under vLLM's names: for all of its clients, not only for this host.

use std::sync::atomic::Ordering;

use pointsman_sched::publish::ReplicaGauges;

/// Parts into which a KV pool of unknown size is divided.
const BLOCKS: u32 = 1_000;

/// What a scrape says of one model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Load {
    waiting: f64,
    /// Used share of the KV pool; none where it does not say.
    kv_usage: Option<f64>,
}

impl Load {
    /// Reads an exposition in Prometheus' text form. Series of variants of the model count together.
    pub(super) fn read(text: &str, model: &str) -> Self {
        let mut load = Self::default();
        for line in text.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let (name, labels) = series.split_once('{').unwrap_or((series, ""));
            let Some(value) = value.parse::<f64>().ok().filter(|value| value.is_finite() && is_of(labels, model))
            else {
                continue;
            };
            match name {
                "vllm:num_requests_waiting" => load.waiting += value,
                // The older name is that of vLLM before 0.10.
                "vllm:kv_cache_usage_perc" | "vllm:gpu_cache_usage_perc" => {
                    load.kv_usage = Some(load.kv_usage.map_or(value, |usage| usage.max(value)));
                }
                _ => {}
            }
        }
        load
    }

    /// Shows it to routers.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "both are clamped to what fits")]
    pub(super) fn show(self, gauges: &ReplicaGauges) {
        gauges.waiting.store(self.waiting.clamp(0.0, 1e9) as u32, Ordering::Relaxed);
        let total = if self.kv_usage.is_some() { BLOCKS } else { 0 };
        let used = (self.kv_usage.unwrap_or(0.0).clamp(0.0, 1.0) * f64::from(total)).round() as u32;
        gauges.total_blocks.store(total, Ordering::Relaxed);
        gauges.free_blocks.store(total - used, Ordering::Relaxed);
    }
}

/// Whether a series is about the model, one of its variants, or about whatever the server has.
fn is_of(labels: &str, model: &str) -> bool {
    let Some((_, named)) = labels.split_once("model_name=\"") else { return true };
    named.strip_prefix(model).is_some_and(|rest| rest.starts_with(['"', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_read_from_every_server_that_has_vllms_names() {
        let vllm = "# HELP vllm:num_requests_waiting Requests.\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 3.0\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"m2\"} 9.0\n\
            vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.25\n";
        let pointsman = "vllm:num_requests_waiting{engine=\"cpu\",model_name=\"m:f16\"} 1\n\
            vllm:num_requests_waiting{engine=\"cpu\",model_name=\"m:q8_0\"} 2\n\
            vllm:kv_cache_usage_perc{engine=\"cpu\",model_name=\"m:f16\"} 0.1\n\
            vllm:kv_cache_usage_perc{engine=\"cpu\",model_name=\"m:q8_0\"} 0.5\n";
        for (text, waiting, blocks) in [
            (vllm, 3, (750, 1_000)),
            (pointsman, 3, (500, 1_000)),
            ("vllm:num_requests_waiting 4", 4, (0, 0)),
            ("vllm:num_requests_waiting NaN\nvllm:num_requests_waiting -1\nnonsense\n", 0, (0, 0)),
            ("<html></html>", 0, (0, 0)),
        ] {
            let gauges = ReplicaGauges::default();
            Load::read(text, "m").show(&gauges);
            let load = |gauge: &std::sync::atomic::AtomicU32| gauge.load(Ordering::Relaxed);
            let found = (load(&gauges.waiting), (load(&gauges.free_blocks), load(&gauges.total_blocks)));
            assert_eq!(found, (waiting, blocks), "{text}");
        }
    }
}
