//! The gauges of devices: whether each serves, what its memory is for, and how it does.
//!
//! In a file of its own, as upstreams are. All of them are written together, at a scrape, from what the host says of its devices then:
//! a handle for each would keep the last value of a figure that nobody knows any more.

use prometheus::{GaugeVec, IntGaugeVec, Opts, Registry};

use crate::metrics::registered;

/// What the gauges of a device show. A figure that nobody knows has no gauge.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DeviceFigures {
    /// `pointsman_device_up`.
    pub is_up: bool,
    /// `pointsman_device_memory_bytes{owner="weights"}`.
    pub weights_bytes: u64,
    /// `pointsman_device_memory_bytes{owner="kv"}`.
    pub kv_bytes: u64,
    /// `pointsman_device_memory_bytes{owner="workspace"}`.
    pub workspace_bytes: u64,
    /// `pointsman_device_memory_bytes{owner="drafts"}`.
    pub drafts_bytes: Option<u64>,
    /// `pointsman_device_memory_bytes{owner="graphs"}`.
    pub graphs_bytes: Option<u64>,
    /// `pointsman_device_memory_free_bytes`.
    pub free_bytes: Option<u64>,
    /// `pointsman_device_memory_total_bytes`.
    pub total_bytes: Option<u64>,
    /// `pointsman_device_utilization_ratio`, 0 to 1.
    pub utilization: Option<f64>,
    /// `pointsman_device_temperature_celsius`.
    pub temperature_celsius: Option<u32>,
    /// `pointsman_device_power_watts`.
    pub power_watts: Option<f64>,
}

#[derive(Debug)]
pub(crate) struct DeviceFamilies {
    up: IntGaugeVec,
    memory: IntGaugeVec,
    free: IntGaugeVec,
    total: IntGaugeVec,
    utilization: GaugeVec,
    temperature: IntGaugeVec,
    power: GaugeVec,
}

impl DeviceFamilies {
    pub(crate) fn new(registry: &Registry) -> Self {
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            registered(registry, IntGaugeVec::new(Opts::new(name, help), labels))
        };
        let fraction = |name: &str, help: &str| registered(registry, GaugeVec::new(Opts::new(name, help), &["device"]));
        let device = &["device"][..];
        Self {
            up: gauge("pointsman_device_up", "1 while the driver of a device runs.", device),
            memory: gauge(
                "pointsman_device_memory_bytes",
                "Memory of a device that models hold, by what it is for.",
                &["device", "owner"],
            ),
            free: gauge("pointsman_device_memory_free_bytes", "Memory of a device that no process holds.", device),
            total: gauge("pointsman_device_memory_total_bytes", "Memory of a device.", device),
            utilization: fraction(
                "pointsman_device_utilization_ratio",
                "Share of about the last second in which a device computed, 0 to 1.",
            ),
            temperature: gauge("pointsman_device_temperature_celsius", "Temperature of a device.", device),
            power: fraction("pointsman_device_power_watts", "What a device draws."),
        }
    }

    /// Shows these devices as they are now, and nothing else: neither another device nor a figure of before.
    pub(crate) fn show<'a>(&self, devices: impl IntoIterator<Item = (&'a str, DeviceFigures)>) {
        for family in [&self.up, &self.memory, &self.free, &self.total, &self.temperature] {
            family.reset();
        }
        for family in [&self.utilization, &self.power] {
            family.reset();
        }
        for (device, figures) in devices {
            self.set(device, &figures);
        }
    }

    fn set(&self, device: &str, figures: &DeviceFigures) {
        self.up.with_label_values(&[device]).set(figures.is_up.into());
        let owners = [
            ("weights", Some(figures.weights_bytes)),
            ("kv", Some(figures.kv_bytes)),
            ("workspace", Some(figures.workspace_bytes)),
            ("drafts", figures.drafts_bytes),
            ("graphs", figures.graphs_bytes),
        ];
        for (owner, bytes) in owners {
            if let Some(bytes) = bytes {
                self.memory.with_label_values(&[device, owner]).set(signed(bytes));
            }
        }
        let whole = [
            (&self.free, figures.free_bytes),
            (&self.total, figures.total_bytes),
            (&self.temperature, figures.temperature_celsius.map(u64::from)),
        ];
        for (family, value) in whole {
            if let Some(value) = value {
                family.with_label_values(&[device]).set(signed(value));
            }
        }
        for (family, value) in [(&self.utilization, figures.utilization), (&self.power, figures.power_watts)] {
            if let Some(value) = value {
                family.with_label_values(&[device]).set(value);
            }
        }
    }
}

/// As gauges have it.
fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Metrics;

    /// The lines of devices in the exposition, without their common beginning.
    fn shown(metrics: &Metrics) -> Vec<String> {
        let text = metrics.render();
        text.lines().filter_map(|line| line.strip_prefix("pointsman_device_").map(str::to_owned)).collect()
    }

    #[test]
    fn what_is_known_of_a_device_is_shown_and_nothing_else() {
        let bare = DeviceFigures { is_up: true, weights_bytes: 3, ..DeviceFigures::default() };
        let with = |change: fn(&mut DeviceFigures)| {
            let mut figures = bare;
            change(&mut figures);
            figures
        };
        let rows = [
            (with(|f| f.drafts_bytes = Some(4)), r#"memory_bytes{device="d",owner="drafts"} 4"#),
            (with(|f| f.graphs_bytes = Some(5)), r#"memory_bytes{device="d",owner="graphs"} 5"#),
            (with(|f| f.free_bytes = Some(6)), r#"memory_free_bytes{device="d"} 6"#),
            (with(|f| f.total_bytes = Some(80 << 30)), r#"memory_total_bytes{device="d"} 85899345920"#),
            (with(|f| f.utilization = Some(0.25)), r#"utilization_ratio{device="d"} 0.25"#),
            (with(|f| f.temperature_celsius = Some(40)), r#"temperature_celsius{device="d"} 40"#),
            (with(|f| f.power_watts = Some(300.5)), r#"power_watts{device="d"} 300.5"#),
        ];
        let always = [
            r#"memory_bytes{device="d",owner="kv"} 0"#,
            r#"memory_bytes{device="d",owner="weights"} 3"#,
            r#"memory_bytes{device="d",owner="workspace"} 0"#,
            r#"up{device="d"} 1"#,
        ];
        let metrics = Metrics::new();
        // Each row after the one before it: a figure that nobody knows any more goes.
        for (figures, line) in rows {
            metrics.devices([("d", figures)]);
            let mut expect: Vec<&str> = always.into_iter().chain([line]).collect();
            expect.sort_unstable();
            let mut found = shown(&metrics);
            found.sort_unstable();
            assert_eq!(found, expect);
        }
    }

    #[test]
    fn a_device_that_went_takes_its_gauges_along() {
        let metrics = Metrics::new();
        let figures = DeviceFigures { utilization: Some(0.5), power_watts: Some(1.0), ..DeviceFigures::default() };
        metrics.devices([("cpu", figures), ("cuda:0", figures)]);
        let of = |device: &str| shown(&metrics).iter().filter(|line| line.contains(device)).count();
        assert_eq!((of("cpu"), of("cuda:0")), (6, 6));
        metrics.devices([("cpu", DeviceFigures::default())]);
        assert_eq!((of("cpu"), of("cuda:0")), (4, 0));
        assert!(shown(&metrics).contains(&r#"up{device="cpu"} 0"#.to_owned()));
    }
}
