//! What the host offers to a policy: a log, metrics, a small store.
//!
//! Thin on wasm. Natively the same calls go to a host made of thread-local tables, which [`crate::testing`] reads: a test
//! sees exactly what an operator would.

#[cfg(target_arch = "wasm32")]
use crate::bindings::host::pointsman::policy::{host_log, host_metrics, host_state};
#[cfg(not(target_arch = "wasm32"))]
use crate::testing::{host_log, host_metrics, host_state};

/// Leveled logging under the policy's name; the host limits the rate.
pub mod log {
    use super::host_log;
    use crate::Level;

    /// For the author of the policy.
    pub fn debug(message: &str) {
        host_log::log(Level::Debug, message);
    }

    /// For the operator, in passing.
    pub fn info(message: &str) {
        host_log::log(Level::Info, message);
    }

    /// Something that the operator should look at.
    pub fn warn(message: &str) {
        host_log::log(Level::Warn, message);
    }

    /// Something that is wrong.
    pub fn error(message: &str) {
        host_log::log(Level::Error, message);
    }
}

/// Metrics, exposed by the host as `pointsman_plugin_<name>`. Register in `init`; a name with at most one label.
pub mod metrics {
    use super::host_metrics;

    /// Only goes up.
    #[derive(Clone, Copy, Debug)]
    pub struct Counter(u32);

    /// Goes up and down.
    #[derive(Clone, Copy, Debug)]
    pub struct Gauge(u32);

    /// Counts observations in buckets.
    #[derive(Clone, Copy, Debug)]
    pub struct Histogram(u32);

    impl Counter {
        /// A counter without a label.
        #[must_use]
        pub fn register(name: &str, help: &str) -> Self {
            Self(host_metrics::counter(name, help, None))
        }

        /// A counter with a label whose value [`add_for`](Self::add_for) names.
        #[must_use]
        pub fn register_labeled(name: &str, help: &str, label: &str) -> Self {
            Self(host_metrics::counter(name, help, Some(label)))
        }

        /// Adds to it.
        pub fn add(self, value: f64) {
            host_metrics::record_value(self.0, value, None);
        }

        /// Adds to the series of one label value.
        pub fn add_for(self, label_value: &str, value: f64) {
            host_metrics::record_value(self.0, value, Some(label_value));
        }
    }

    impl Gauge {
        /// A gauge without a label.
        #[must_use]
        pub fn register(name: &str, help: &str) -> Self {
            Self(host_metrics::gauge(name, help, None))
        }

        /// Sets it.
        pub fn set(self, value: f64) {
            host_metrics::record_value(self.0, value, None);
        }
    }

    impl Histogram {
        /// A histogram without a label; `buckets` are upper bounds, ascending, in the metric's own unit.
        #[must_use]
        pub fn register(name: &str, help: &str, buckets: &[f64]) -> Self {
            Self(host_metrics::histogram(name, help, None, buckets))
        }

        /// Counts one observation.
        pub fn observe(self, value: f64) {
            host_metrics::record_value(self.0, value, None);
        }
    }
}

/// A small key-value store that survives swaps: 1,024 keys of 256 bytes, 64 KiB a value.
pub mod state {
    use super::host_state;
    use crate::StateFault;

    /// What a key holds.
    #[must_use]
    pub fn get(key: &str) -> Option<Vec<u8>> {
        host_state::get(key)
    }

    /// Sets a key.
    ///
    /// # Errors
    /// The store is full, or the key or the value is too large; nothing changed.
    pub fn set(key: &str, value: &[u8]) -> Result<(), StateFault> {
        host_state::set(key, value)
    }

    /// Sets a key if it holds `expected` (none: absent) and says whether it did. Instances of a router run at once: this
    /// is how they share a count.
    ///
    /// # Errors
    /// As [`set`].
    pub fn compare_and_set(key: &str, expected: Option<&[u8]>, value: &[u8]) -> Result<bool, StateFault> {
        host_state::compare_and_set(key, expected, value)
    }

    /// Removes a key, if it is there.
    pub fn delete(key: &str) {
        host_state::delete(key);
    }
}
