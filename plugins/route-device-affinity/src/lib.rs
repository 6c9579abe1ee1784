//! Router: requests go to the preferred kind of device while it has room, and sessions stay on a replica within a bound.
//!
//! `prefer` lists kinds, best first: `cuda`, one device as `cuda:1`, `cpu`, `null`. Replicas on devices that are not listed come
//! last, so a preference never costs an answer. The first kind with a replica that is in service and not saturated serves the
//! request; a host with one GPU and one CPU so fills the GPU first, and the CPU takes what would wait there.
//!
//! Within a kind, weighted rendezvous hashing orders the replicas for each session, and the first one takes it whose load is
//! within the bound: its share, by weight, of the kind's requests and this one, times `bound_percent` (consistent hashing with
//! bounded loads: Mirrokni, Thorup and Zadimoghaddam, 2018). So a session keeps its KV cache, and no replica gets more than a
//! quarter over its share because popular sessions meet there. Affinity without the bound is `route-sticky-until-saturated`;
//! `route-prefix-aware` compares caches and loads for each request and knows nothing of devices.
//!
//! Saturated is a replica where `max_waiting` requests wait. If all are, the host chooses by load. Requests without a session
//! are spread by their seed. O(replicas x kinds); nothing is allocated.
//!
//! Configuration: `prefer` (["cuda", "cpu"]), `bound_percent` (125), `max_waiting` (4).

use std::ops::RangeInclusive;

use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router, place};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    prefer: Vec<String>,
    bound_percent: u32,
    max_waiting: u32,
}

/// The policy.
#[derive(Debug)]
pub struct DeviceAffinity {
    bound_percent: u32,
    max_waiting: u32,
    /// Devices by number, as the column has them, best first; the last are all of them.
    kinds: Vec<RangeInclusive<u64>>,
}

pointsman_plugin::router!(DeviceAffinity);

/// What the column holds for `null`. Below are the CPU, 0, and `cuda:N`, N + 1.
const NULL: u64 = u32::MAX as u64;
/// More kinds than these are a mistake.
const MAX_KINDS: usize = 16;

impl Default for Config {
    fn default() -> Self {
        Self { prefer: vec!["cuda".to_owned(), "cpu".to_owned()], bound_percent: 125, max_waiting: 4 }
    }
}

impl Policy for DeviceAffinity {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        let Config { prefer, bound_percent, max_waiting } = config;
        if !(100..=10_000).contains(&bound_percent) || max_waiting == 0 {
            return Err("bound_percent must be 100 to 10000, and max_waiting at least 1".to_owned());
        }
        if prefer.len() > MAX_KINDS {
            return Err(format!("prefer lists {} kinds; at most {MAX_KINDS}", prefer.len()));
        }
        let listed = prefer.iter().map(|name| kind(name)).collect::<Result<Vec<_>, _>>()?;
        let kinds = listed.into_iter().chain([0..=u64::MAX]).collect();
        Ok(Self { bound_percent, max_waiting, kinds })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!().wants(["replica.device"])
    }
}

impl Router for DeviceAffinity {
    fn route(&mut self, _now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        let label = if request.session == 0 { request.seed } else { request.session };
        let best = (0..self.kinds.len()).find_map(|kind| self.best_of(kind, label, replicas));
        best.map_or(Choice::Abstain, Choice::Pick)
    }
}

impl DeviceAffinity {
    /// The row that takes the request among those of a kind, if one has room.
    fn best_of(&self, kind: usize, label: u64, replicas: &Replicas) -> Option<u32> {
        let devices = replicas.extra.first()?;
        let is_of_kind = |row: u32| devices.get(row as usize).is_some_and(|device| self.kind_of(*device) == kind);
        let open = || {
            replicas.rows().filter(|r| r.in_service() && r.waiting < self.max_waiting).filter(|r| is_of_kind(r.row))
        };
        let (n_requests, weights) =
            open().fold((1, 0), |(n, weights), r| (n + load(&r), weights + u64::from(r.weight)));
        let is_within = |r: &Replica| {
            let allowed = u128::from(n_requests) * u128::from(r.weight) * u128::from(self.bound_percent);
            // With this request it has at most its share, rounded up: one of them always fits.
            u128::from(load(r)) * u128::from(weights) * 100 < allowed
        };
        let places = open().filter(is_within).map(|r| (r.health, place(label, r.key, r.weight), r.row));
        places.min().map(|(.., row)| row)
    }

    /// The first kind to which a device belongs.
    fn kind_of(&self, device: u64) -> usize {
        self.kinds.iter().position(|devices| devices.contains(&device)).unwrap_or(self.kinds.len())
    }
}

/// Requests that wait or run there.
fn load(replica: &Replica) -> u64 {
    u64::from(replica.waiting) + u64::from(replica.running)
}

/// The devices of a kind by number.
fn kind(name: &str) -> Result<RangeInclusive<u64>, String> {
    let one = |number: u64| number..=number;
    let devices = match name {
        "cpu" => Some(one(0)),
        "cuda" => Some(1..=NULL - 1),
        "null" => Some(one(NULL)),
        _ => name.strip_prefix("cuda:").and_then(|n| n.parse::<u16>().ok()).map(|n| one(u64::from(n) + 1)),
    };
    devices.ok_or_else(|| format!("prefer: no kind of device `{name}`; known are cuda, cuda:0, cuda:1 ..., cpu, null"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{self, replica};

    const CPU: u64 = 0;
    const CUDA_0: u64 = 1;
    const CUDA_1: u64 = 2;

    /// The row that a session gets among replicas on these devices.
    fn route(config: &str, session: u64, rows: &[(u64, Replica)]) -> Choice {
        let mut router: DeviceAffinity = testing::start(config).expect("a valid configuration");
        let extra = vec![rows.iter().map(|(device, _)| *device).collect()];
        let replicas = Replicas { extra, ..testing::replicas(rows.iter().map(|(_, replica)| *replica)) };
        router.route(1, &Request { session, seed: 3, ..testing::request() }, &replicas)
    }

    #[test]
    fn the_preferred_kind_serves_while_it_has_room() {
        let full = |id| Replica { waiting: 4, ..replica(id) };
        let busy = |id| Replica { waiting: 3, running: 8, ..replica(id) };
        let drained = |id| Replica { weight: 0, ..replica(id) };
        for (config, rows, expect) in [
            ("", [(CPU, replica(1)), (CUDA_0, busy(2))], Choice::Pick(1)),
            ("", [(CPU, replica(1)), (CUDA_0, full(2))], Choice::Pick(0)),
            ("", [(CPU, replica(1)), (CUDA_0, drained(2))], Choice::Pick(0)),
            ("", [(CPU, full(1)), (CUDA_0, full(2))], Choice::Abstain),
            (r#"{"max_waiting": 5}"#, [(CPU, full(1)), (CUDA_0, full(2))], Choice::Pick(1)),
            (r#"{"prefer": ["cpu"]}"#, [(CPU, busy(1)), (CUDA_0, replica(2))], Choice::Pick(0)),
            (r#"{"prefer": ["cpu"]}"#, [(CPU, full(1)), (NULL, busy(2))], Choice::Pick(1)),
            (r#"{"prefer": ["cuda:1", "cuda"]}"#, [(CUDA_0, replica(1)), (CUDA_1, busy(2))], Choice::Pick(1)),
            (r#"{"prefer": ["null"]}"#, [(CUDA_1, replica(1)), (NULL, busy(2))], Choice::Pick(1)),
        ] {
            assert_eq!(route(config, 7, &rows), expect, "{config} {rows:?}");
        }
        assert_eq!(route("", 7, &[]), Choice::Abstain);
    }

    #[test]
    fn sessions_stay_within_the_bound_and_come_back() {
        let idle = [1, 2, 3, 4].map(|id| (CUDA_0, replica(id)));
        let mut homes = [0; 4];
        for session in 1..=400 {
            let Choice::Pick(home) = route("", session, &idle) else { panic!("no pick") };
            homes[home as usize] += 1;
            let with = |running: [u32; 4]| {
                let mut rows = idle;
                rows.iter_mut().zip(running).for_each(|((_, replica), running)| replica.running = running);
                route("", session, &rows)
            };
            let mut running = [7; 4];
            assert_eq!(with(running), Choice::Pick(home), "as much as the others");
            // 7 + 7 + 7 + 8 and this one are 30, and 1.25 quarters of them are 9.4: the ninth fits, and the tenth.
            running[home as usize] = 8;
            assert_eq!(with(running), Choice::Pick(home));
            running[home as usize] = 11;
            assert_ne!(with(running), Choice::Pick(home), "over its share");
        }
        assert!(homes.iter().all(|n| (70..=130).contains(n)), "{homes:?}");
    }

    /// The bound, in the long run: one session is asked for again and again.
    #[test]
    fn one_popular_session_is_spread_by_weight() {
        let mut rows = [1, 2, 3].map(|id| (CUDA_0, Replica { running_limit: 99, ..replica(id) }));
        rows[2].1.weight = 2_000;
        for n in 1..=200_u64 {
            let Choice::Pick(row) = route("", 5, &rows) else { panic!("no pick at {n}") };
            rows[row as usize].1.running += 1;
            for (_, r) in &rows {
                let share = (n * u64::from(r.weight) * 125).div_ceil(4_000 * 100);
                assert!(u64::from(r.running) <= share, "{n}: {rows:?}");
            }
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for (config, part) in [
            (r#"{"prefer": ["gpu"]}"#, "no kind of device `gpu`; known are cuda"),
            (r#"{"prefer": ["cuda:x"]}"#, "no kind of device `cuda:x`"),
            (r#"{"bound_percent": 99}"#, "bound_percent must be 100"),
            (r#"{"max_waiting": 0}"#, "max_waiting at least 1"),
        ] {
            let error = testing::start::<DeviceAffinity>(config).expect_err(config);
            assert!(error.contains(part), "{error}");
        }
    }
}
