//! Admission: each tenant may use so many tokens per second, with a burst.
//!
//! A bucket per tenant holds at most `burst_tokens` and gains `tokens_per_second`. A request takes out, at the door, what it may
//! use at most: a prompt token counts 1 and a token to generate `output_cost`. What it did not use comes back when it has
//! ended: tokens not generated, prompt tokens found in the prefix cache, and everything when it was refused later on or the
//! host failed. So a client that asks for more tokens than it needs is slowed down, not robbed. A request larger than the
//! whole bucket enters when the bucket is full and leaves a debt behind; else it could never enter.
//!
//! Buckets live in the host's state, because several instances answer at once; they are changed by compare-and-set. Under
//! contention, and where the store is full (more than a thousand tenants), a request enters uncharged and is counted: a
//! limiter that is in trouble must not close the door. A restart of the host fills all buckets.
//!
//! Configuration: `tokens_per_second` (1000), `burst_tokens` (20000; 0 lets nobody in), `output_cost` (2), and `tenants` ({}),
//! the first two by tenant name, as in `{"acme": {"tokens_per_second": 50, "burst_tokens": 1000}}`.

use std::collections::BTreeMap;

use pointsman_plugin::metrics::Counter;
use pointsman_plugin::{Admission, AdmitRequest, Ending, Endings, HostInfo, Load, Manifest, Micros, Policy};
use pointsman_plugin::{Refusal, Rejection, Verdict, state};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    tokens_per_second: u32,
    burst_tokens: u32,
    output_cost: u32,
    tenants: BTreeMap<String, Limit>,
}

/// What a tenant may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    tokens_per_second: u32,
    burst_tokens: u32,
}

/// The policy.
#[derive(Debug)]
pub struct TokenBucket {
    config: Config,
    /// By number, as the host names them.
    tenants: BTreeMap<u32, String>,
    refused: Counter,
    uncharged: Counter,
}

/// What a tenant has left, in millionths of a token: a token per second is one of them per microsecond.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bucket {
    /// Negative is a debt.
    level: i64,
    at: Micros,
}

pointsman_plugin::admission!(TokenBucket);

/// Millionths in a token.
const TOKEN: i64 = 1_000_000;
/// Tries against other instances, before a request enters uncharged.
const ATTEMPTS: u32 = 16;
/// Layout of a bucket in the host's state.
const STATE_SCHEMA: u32 = 1;
/// `endings.outcome` of requests that cost nothing: the host failed, or refused them later on.
const FREE: [u8; 2] = [1, 3];

impl Default for Config {
    fn default() -> Self {
        Self { tokens_per_second: 1_000, burst_tokens: 20_000, output_cost: 2, tenants: BTreeMap::new() }
    }
}

impl Policy for TokenBucket {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self {
            config,
            tenants: BTreeMap::new(),
            refused: Counter::register_labeled("admit_refused_total", "Requests over the tenant's quota.", "tenant"),
            uncharged: Counter::register("admit_uncharged_total", "Requests that entered without being charged."),
        })
    }

    fn manifest(&self) -> Manifest {
        Manifest { state_schema: STATE_SCHEMA, ..pointsman_plugin::manifest!() }
    }
}

impl Admission for TokenBucket {
    fn admit(&mut self, now: Micros, request: &AdmitRequest, _load: &Load) -> Verdict {
        let limit = self.config.limit(&request.tenant);
        if limit.burst_tokens == 0 {
            let message = format!("tenant `{}` may not use this service", request.tenant);
            return Verdict::Reject(Rejection { reason: Refusal::NotAllowed, retry_after_ms: 0, message });
        }
        let cost = self.config.cost(request.prompt_tokens, request.max_new_tokens);
        // A full bucket is enough for any request.
        let enough = cost.min(limit.full());
        let charged = change(&request.tenant, limit, now, |bucket| {
            (bucket.level >= enough).then_some(Bucket { level: bucket.level - cost, ..bucket })
        });
        match charged {
            Some(Ok(_)) => Verdict::Accept,
            Some(Err(bucket)) => {
                self.refused.add_for(&request.tenant, 1.0);
                Verdict::Reject(refusal(&request.tenant, limit, bucket, enough))
            }
            None => {
                self.uncharged.add(1.0);
                Verdict::Accept
            }
        }
    }

    fn settle(&mut self, now: Micros, endings: &Endings) {
        self.tenants.extend(endings.new_tenants.iter().cloned());
        let mut unused: BTreeMap<u32, i64> = BTreeMap::new();
        for ending in endings.rows() {
            *unused.entry(ending.tenant).or_default() += self.config.unused(&ending);
        }
        for (number, unused) in unused.into_iter().filter(|(_, unused)| *unused > 0) {
            let Some(tenant) = self.tenants.get(&number) else { continue };
            let limit = self.config.limit(tenant);
            // Where this fails the bucket fills by itself, only later.
            let _ = change(tenant, limit, now, |bucket| {
                Some(Bucket { level: bucket.level.saturating_add(unused).min(limit.full()), ..bucket })
            });
        }
    }
}

impl Config {
    fn limit(&self, tenant: &str) -> Limit {
        let all = Limit { tokens_per_second: self.tokens_per_second, burst_tokens: self.burst_tokens };
        self.tenants.get(tenant).copied().unwrap_or(all)
    }

    fn cost(&self, prompt_tokens: u32, new_tokens: u32) -> i64 {
        (i64::from(prompt_tokens) + i64::from(new_tokens).saturating_mul(self.output_cost.into())).saturating_mul(TOKEN)
    }

    /// What a request was charged for and did not use.
    fn unused(&self, ending: &Ending) -> i64 {
        let charged = self.cost(ending.prompt_tokens, ending.max_new_tokens);
        if FREE.contains(&ending.outcome) {
            return charged;
        }
        let computed = ending.prompt_tokens.saturating_sub(ending.cached_tokens);
        charged.saturating_sub(self.cost(computed, ending.generated_tokens)).max(0)
    }
}

impl Limit {
    fn full(self) -> i64 {
        i64::from(self.burst_tokens) * TOKEN
    }
}

impl Bucket {
    fn decode(bytes: &[u8]) -> Option<Self> {
        let (level, at) = bytes.split_first_chunk::<8>()?;
        Some(Self { level: i64::from_le_bytes(*level), at: Micros::from_le_bytes(at.try_into().ok()?) })
    }

    fn encode(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.level.to_le_bytes());
        bytes[8..].copy_from_slice(&self.at.to_le_bytes());
        bytes
    }

    /// As it is at `now`.
    fn filled(self, limit: Limit, now: Micros) -> Self {
        let elapsed = i64::try_from(now.saturating_sub(self.at)).unwrap_or(i64::MAX);
        let gained = elapsed.saturating_mul(limit.tokens_per_second.into());
        Self { level: self.level.saturating_add(gained).min(limit.full()), at: self.at.max(now) }
    }
}

/// Changes a tenant's bucket, against other instances: what it is then, or what it was if `step` left it alone. `None` when
/// the others were faster every time, or the store has no room.
fn change(
    tenant: &str,
    limit: Limit,
    now: Micros,
    step: impl Fn(Bucket) -> Option<Bucket>,
) -> Option<Result<Bucket, Bucket>> {
    for _ in 0..ATTEMPTS {
        let stored = state::get(tenant);
        let bucket = stored.as_deref().and_then(Bucket::decode).unwrap_or(Bucket { level: limit.full(), at: now });
        let bucket = bucket.filled(limit, now);
        let Some(next) = step(bucket) else { return Some(Err(bucket)) };
        match state::compare_and_set(tenant, stored.as_deref(), &next.encode()) {
            Ok(true) => return Some(Ok(next)),
            Ok(false) => {}
            Err(_) => return None,
        }
    }
    None
}

fn refusal(tenant: &str, limit: Limit, bucket: Bucket, enough: i64) -> Rejection {
    let missing = (enough - bucket.level).max(0);
    let per_ms = i64::from(limit.tokens_per_second) * 1_000;
    let wait = if per_ms == 0 { 0 } else { missing.saturating_add(per_ms - 1) / per_ms };
    Rejection {
        reason: Refusal::Quota,
        retry_after_ms: u32::try_from(wait).unwrap_or(u32::MAX),
        message: format!(
            "tenant `{tenant}` has {} tokens of its quota left and this request needs {}; {} come back every second",
            bucket.level.max(0) / TOKEN,
            enough / TOKEN,
            limit.tokens_per_second
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;

    const SECOND: Micros = 1_000_000;

    fn bucket(config: &str) -> TokenBucket {
        testing::start(config).expect(config)
    }

    fn request(tenant: &str, prompt_tokens: u32, max_new_tokens: u32) -> AdmitRequest {
        AdmitRequest { tenant: tenant.to_owned(), prompt_tokens, max_new_tokens, ..testing::admit_request() }
    }

    fn admit(policy: &mut TokenBucket, now: Micros, request: &AdmitRequest) -> Result<(), Rejection> {
        match policy.admit(now, request, &testing::load()) {
            Verdict::Accept => Ok(()),
            Verdict::Reject(rejection) => Err(rejection),
            other => panic!("{other:?}"),
        }
    }

    const SMALL: &str = r#"{"tokens_per_second": 100, "burst_tokens": 300, "output_cost": 2,
        "tenants": {"big": {"tokens_per_second": 0, "burst_tokens": 100000}, "shut": {"tokens_per_second": 9, "burst_tokens": 0}}}"#;

    #[test]
    fn a_burst_then_the_rate() {
        let mut policy = bucket(SMALL);
        let each = request("acme", 50, 25);
        let times = [(1, true), (1, true), (1, true), (1, false), (SECOND / 2, false), (SECOND + 1, true)];
        for (now, good) in times {
            assert_eq!(admit(&mut policy, now, &each).is_ok(), good, "{now}");
        }
        let refused = admit(&mut policy, SECOND + 1 + SECOND / 4, &each).expect_err("25 of 100");
        assert_eq!((refused.reason, refused.retry_after_ms), (Refusal::Quota, 750));
        assert!(refused.message.contains("`acme` has 25 tokens of its quota left and this request needs 100"));
        assert_eq!(testing::metric("admit_refused_total", Some("acme")), Some(3.0));
        assert!(admit(&mut policy, SECOND + 1, &request("other", 300, 0)).is_ok(), "each tenant has its own");
        assert!(admit(&mut policy, 1, &request("big", 90_000, 0)).is_ok());
        let shut = admit(&mut policy, 1, &request("shut", 1, 0)).expect_err("closed");
        assert_eq!(shut.reason, Refusal::NotAllowed);
    }

    #[test]
    fn what_was_not_used_comes_back() {
        let row = |outcome, cached_tokens, generated_tokens| Ending {
            id: 1,
            tenant: 7,
            outcome,
            prompt_tokens: 100,
            cached_tokens,
            generated_tokens,
            max_new_tokens: 100,
        };
        // Each starts with an empty bucket; a request of 300 was charged.
        for (ending, back) in [
            (row(0, 0, 100), 0),
            (row(0, 0, 10), 180),
            (row(0, 64, 10), 244),
            (row(2, 0, 0), 200),
            (row(1, 0, 50), 300),
            (row(3, 0, 0), 300),
        ] {
            let mut policy = bucket(SMALL);
            state::delete("acme");
            admit(&mut policy, 1, &request("acme", 100, 100)).expect("a full bucket");
            policy.settle(1, &testing::endings([ending], &[(7, "acme")]));
            let left = state::get("acme").and_then(|bytes| Bucket::decode(&bytes)).expect("a bucket").level / TOKEN;
            assert_eq!(left, back, "{ending:?}");
        }
    }

    #[test]
    fn a_request_larger_than_the_bucket_enters_a_full_one_and_leaves_a_debt() {
        let mut policy = bucket(SMALL);
        admit(&mut policy, 1, &request("acme", 900, 0)).expect("the bucket is full");
        assert!(admit(&mut policy, 6 * SECOND, &request("acme", 1, 0)).is_err(), "still in debt");
        assert!(admit(&mut policy, 7 * SECOND, &request("acme", 1, 0)).is_ok());
        assert!(admit(&mut policy, 8 * SECOND, &request("acme", 900, 0)).is_err(), "not full");
    }

    #[test]
    fn instances_share_the_buckets() {
        let (mut one, mut other) = (bucket(SMALL), bucket(SMALL));
        admit(&mut one, 1, &request("acme", 300, 0)).expect("a full bucket");
        assert!(admit(&mut other, 1, &request("acme", 1, 0)).is_err());
        // The other instance hears of the ending, and of a name that it has not seen.
        let ending = Ending { tenant: 7, outcome: 3, prompt_tokens: 300, ..Ending::default() };
        other.settle(1, &testing::endings([ending], &[(7, "acme")]));
        assert!(admit(&mut one, 1, &request("acme", 300, 0)).is_ok());
    }
}
