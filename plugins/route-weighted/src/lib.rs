//! Router: replicas by weight, sticky by session.
//!
//! Weighted rendezvous hashing (`place` of the SDK): shares are exactly those of the weights; a replica that comes or goes moves only
//! its own sessions, and a weight that changes moves only the difference, which no modulo and no ring of virtual nodes does.
//! There is no state: every instance, on every host, gives the same answer, because `key` is stable.
//!
//! The answer ranks the best four, so a session whose replica is full overflows to the same second choice every time; past
//! those the host decides. Load is not looked at: for canaries, sessions and fixed shares, not for balancing. Without a
//! session the request's seed takes its place. O(replicas).
//!
//! Configuration: `sticky` (true): false spreads the requests of a session, too.

use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router, place_before};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    sticky: bool,
}

/// Replicas in an answer.
const RANKED: usize = 4;

/// The policy.
#[derive(Debug)]
pub struct Weighted {
    config: Config,
}

pointsman_plugin::router!(Weighted);

impl Default for Config {
    fn default() -> Self {
        Self { sticky: true }
    }
}

impl Policy for Weighted {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self { config })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Router for Weighted {
    fn route(&mut self, _now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        let sticky = self.config.sticky && request.session != 0;
        let label = if sticky { request.session } else { request.seed };
        let mut best = [(u8::MAX, u64::MAX, u32::MAX); RANKED];
        for replica in replicas.rows().filter(Replica::in_service) {
            let (health, last, _) = best[RANKED - 1];
            let limit = if replica.health < health { u64::MAX } else { last };
            let Some(place) = place_before(label, replica.key, replica.weight, limit) else { continue };
            let entry = (replica.health, place, replica.row);
            let mut at = RANKED - 1;
            while at > 0 && entry < best[at - 1] {
                best[at] = best[at - 1];
                at -= 1;
            }
            if entry < best[at] {
                best[at] = entry;
            }
        }
        let rank: Vec<u32> = best.iter().map(|&(.., row)| row).take_while(|row| *row != u32::MAX).collect();
        if rank.is_empty() { Choice::Abstain } else { Choice::Rank(rank) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{self, replica};

    fn rank(request: &Request, rows: &[Replica]) -> Vec<u32> {
        let mut router: Weighted = testing::start("").expect("a valid configuration");
        match router.route(1, request, &testing::replicas(rows.iter().copied())) {
            Choice::Rank(rows) => rows,
            other => panic!("{other:?}"),
        }
    }

    fn of_session(session: u64, seed: u64) -> Request {
        Request { session, seed, ..testing::request() }
    }

    #[test]
    fn shares_are_those_of_the_weights() {
        let rows = [(1, 1_000), (2, 2_000), (3, 5_000)].map(|(id, weight)| Replica { weight, ..replica(id) });
        let mut hits = [0; 3];
        for session in 1..=8_000 {
            hits[rank(&of_session(session, 0), &rows)[0] as usize] += 1;
        }
        for (n, expect) in hits.into_iter().zip([1_000, 2_000, 5_000_i32]) {
            assert!((n - expect).abs() < 150, "{hits:?}");
        }
    }

    #[test]
    fn a_session_stays_and_overflows_to_one_place() {
        let rows = [1, 2, 3, 4].map(replica);
        for session in 1..=200 {
            let order = rank(&of_session(session, 7), &rows);
            assert_eq!(order, rank(&of_session(session, 8), &rows), "the seed does not matter");
            let mut without = rows;
            without[order[0] as usize].weight = 0;
            assert_eq!(rank(&of_session(session, 7), &without), order[1..], "others keep their order");
        }
        let firsts = |session| (0..50).map(move |seed| rank(&of_session(session, seed), &rows)[0]);
        assert_eq!(firsts(0).collect::<std::collections::BTreeSet<_>>().len(), 4, "no session: spread by seed");
    }

    #[test]
    fn degraded_replicas_come_last_and_drained_ones_never() {
        let degraded = Replica { health: 1, weight: 9_000, ..replica(1) };
        let drained = Replica { weight: 0, ..replica(2) };
        assert_eq!(rank(&of_session(5, 0), &[degraded, drained, replica(3)]), [2, 0]);
    }
}
