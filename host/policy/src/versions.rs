//! Versions of the package `pointsman:policy`: which of them guests may name, and what makes an older guest one of the
//! latest version. The only place that knows what changed.
//!
//! 0.2.0 changed one function, `lifecycle.init`, whose manifest gained `summary`; every other function has the types that it
//! had in 0.1. wasmtime compares types by their structure but finds interfaces by their names, so before an older guest is
//! compiled its interfaces get the latest version in their names, a digit each, and its `lifecycle`, which keeps its name, is
//! bound as it was. Binding every interface twice instead would give two sets of Rust types and a conversion of every column
//! in every call. Patches of one minor version need nothing: wasmtime finds names by semantic version.

use std::borrow::Cow;

use wasmtime::Store;
use wasmtime::component::{Instance, InstancePre};

use crate::bindings::{lifecycle as v0_2, lifecycle_0_1 as v0_1};
use crate::host::Host;
use crate::instance::{InitInfo, Initialized};
use crate::manifest::Manifest;

/// The package of every interface that a guest may import or export.
pub(crate) const PACKAGE: &str = "pointsman:policy";
/// What this host binds, for error messages.
pub(crate) const BOUND: &str = "0.1.x and 0.2.x";
/// The interface that differs between versions.
pub(crate) const LIFECYCLE: &str = "lifecycle";
/// The optional interface of the package.
pub(crate) const HANDOVER: &str = "handover";

/// A minor version that this host binds, whatever the patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Minor {
    V0_1,
    V0_2,
}

/// `pointsman:policy/<name>@<version>` in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interface<'a> {
    pub(crate) name: &'a str,
    pub(crate) version: &'a str,
}

/// Where a component has its `lifecycle`, of whichever version.
#[derive(Clone)]
pub(crate) enum LifecycleIndices {
    V0_1(v0_1::LifecycleIndices),
    V0_2(v0_2::LifecycleIndices),
}

/// The `lifecycle` of an instance.
pub(crate) enum Lifecycle {
    V0_1(v0_1::Lifecycle),
    V0_2(v0_2::Lifecycle),
}

// === impl Interface ===

impl<'a> Interface<'a> {
    /// The parts of a name of the package; `None` for any other name.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let (name, version) = name.strip_prefix(PACKAGE)?.strip_prefix('/')?.split_once('@')?;
        Some(Self { name, version })
    }

    /// `None` for a version that this host does not bind, pre-releases included.
    pub(crate) fn minor(&self) -> Option<Minor> {
        let (minor, patch) = self.version.rsplit_once('.')?;
        let minor = match minor {
            "0.1" => Minor::V0_1,
            "0.2" => Minor::V0_2,
            _ => return None,
        };
        (!patch.is_empty() && patch.bytes().all(|b| b.is_ascii_digit())).then_some(minor)
    }

    /// Where the digit of the minor version stands in `component`, of which the name is a part, if it must be changed.
    pub(crate) fn outdated_digit(&self, component: &[u8]) -> Option<usize> {
        let outdated = self.minor() == Some(Minor::V0_1) && self.name != LIFECYCLE;
        let version_at = self.version.as_ptr().addr().checked_sub(component.as_ptr().addr())?;
        outdated.then_some(version_at + "0.".len())
    }
}

/// Gives the interfaces at these digits the latest version.
pub(crate) fn lift(component: &mut Cow<'_, [u8]>, outdated_digits: &[usize]) {
    if outdated_digits.is_empty() {
        return;
    }
    let bytes = component.to_mut();
    for &digit in outdated_digits {
        if let Some(byte @ b'1') = bytes.get_mut(digit) {
            *byte = b'2';
        }
    }
}

// === impl Lifecycle ===

impl LifecycleIndices {
    pub(crate) fn new(pre: &InstancePre<Host>) -> wasmtime::Result<Self> {
        match v0_2::LifecycleIndices::new(pre) {
            Ok(latest) => Ok(Self::V0_2(latest)),
            // The message names the latest version if the component has neither.
            Err(error) => v0_1::LifecycleIndices::new(pre).map(Self::V0_1).map_err(|_| error),
        }
    }

    pub(crate) fn load(&self, store: &mut Store<Host>, instance: &Instance) -> wasmtime::Result<Lifecycle> {
        Ok(match self {
            Self::V0_1(indices) => Lifecycle::V0_1(indices.load(store, instance)?),
            Self::V0_2(indices) => Lifecycle::V0_2(indices.load(store, instance)?),
        })
    }
}

impl Lifecycle {
    pub(crate) fn init(&self, store: &mut Store<Host>, info: &InitInfo<'_>) -> Initialized {
        match self {
            Self::V0_1(guest) => {
                let host = v0_1::exports::pointsman::policy::lifecycle::HostInfo {
                    slot: info.slot,
                    generation: info.generation,
                    instance: info.instance,
                    host_version: env!("CARGO_PKG_VERSION"),
                    columns: info.columns,
                };
                let answer = guest.pointsman_policy_lifecycle().call_init(store, info.config, host)?;
                Ok(answer.map(|old| Manifest {
                    name: old.name,
                    version: old.version,
                    wants: old.wants,
                    state_schema: old.state_schema,
                    // 0.1 has none.
                    summary: String::new(),
                }))
            }
            Self::V0_2(guest) => {
                let host = v0_2::exports::pointsman::policy::lifecycle::HostInfo {
                    slot: info.slot,
                    generation: info.generation,
                    instance: info.instance,
                    host_version: env!("CARGO_PKG_VERSION"),
                    columns: info.columns,
                };
                let answer = guest.pointsman_policy_lifecycle().call_init(store, info.config, host)?;
                Ok(answer.map(|latest| Manifest {
                    name: latest.name,
                    version: latest.version,
                    wants: latest.wants,
                    state_schema: latest.state_schema,
                    summary: latest.summary,
                }))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_patch_of_a_known_minor_version_is_bound() {
        for (name, expect) in [
            ("pointsman:policy/router@0.1.0", Some(Minor::V0_1)),
            ("pointsman:policy/router@0.1.17", Some(Minor::V0_1)),
            ("pointsman:policy/router@0.2.0", Some(Minor::V0_2)),
            ("pointsman:policy/router@0.2.1", Some(Minor::V0_2)),
            ("pointsman:policy/router@0.3.0", None),
            ("pointsman:policy/router@1.0.0", None),
            ("pointsman:policy/router@0.2.0-rc.1", None),
            ("pointsman:policy/router@0.2", None),
        ] {
            assert_eq!(Interface::parse(name).expect("of the package").minor(), expect, "{name}");
        }
        assert_eq!(Interface::parse("wasi:io/poll@0.2.0"), None);
    }

    #[test]
    fn old_names_become_latest_ones_and_lifecycle_stays() {
        for (name, expect) in [
            ("pointsman:policy/host-log@0.1.0", "pointsman:policy/host-log@0.2.0"),
            ("pointsman:policy/router@0.1.11", "pointsman:policy/router@0.2.11"),
            ("pointsman:policy/router@0.2.1", "pointsman:policy/router@0.2.1"),
            ("pointsman:policy/lifecycle@0.1.0", "pointsman:policy/lifecycle@0.1.0"),
        ] {
            let text = format!("..{name}..");
            let interface = Interface::parse(&text[2..2 + name.len()]).expect("of the package");
            let digits: Vec<usize> = interface.outdated_digit(text.as_bytes()).into_iter().collect();
            let mut bytes = Cow::Borrowed(text.as_bytes());
            lift(&mut bytes, &digits);
            assert_eq!(*bytes, *format!("..{expect}..").as_bytes());
        }
    }
}
