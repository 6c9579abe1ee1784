//! Router: requests with a header, and a share of the others, go to the canary replicas; the rest never does.
//!
//! Which replicas are the canary is a column with a value: `{"column": "replica.label.track", "equals": "canary"}` are those
//! that the operator has labelled so, and `{"column": "replica.variant", "equals": "2"}` is the second variant, numbered from
//! 1 in the order of loading. Columns hold numbers: a text stands for the hash that the host passes for it. A request is a
//! canary when the header has the value, or when the hash of its session (without one, its seed) falls into the share: a session
//! stays on its side, and a growing share only ever moves sessions to the canary. A header with another value keeps a
//! request off the canary, whatever the share.
//!
//! Within its side a request goes where the least work is queued. Where one side has no replica in service, as with a
//! request for a pinned variant, the other serves it: a canary must never cost an answer.
//!
//! Configuration: `header` ("x-canary"), `value` ("1"), `share_permille` (0), `column` ("replica.variant"), `equals` ("2").

use pointsman_plugin::{Choice, HostInfo, Manifest, Micros, Policy, Replica, Replicas, Request, Router, label, mix};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    header: String,
    value: String,
    share_permille: u32,
    column: String,
    equals: String,
}

/// The policy.
#[derive(Debug)]
pub struct Canary {
    config: Config,
    /// What the column holds for a canary.
    equals: u64,
    /// The attribute's name.
    header: String,
}

pointsman_plugin::router!(Canary);

/// What one more sequence costs, in prompt tokens.
const SEQUENCE_TOKENS: u16 = 16;

impl Default for Config {
    fn default() -> Self {
        Self {
            header: "x-canary".to_owned(),
            value: "1".to_owned(),
            share_permille: 0,
            column: "replica.variant".to_owned(),
            equals: "2".to_owned(),
        }
    }
}

impl Policy for Canary {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        if config.share_permille > 1_000 {
            return Err(format!("share_permille is a share of 1000, not {}", config.share_permille));
        }
        let lower = config.header.to_ascii_lowercase();
        if !lower.starts_with("x-") {
            return Err(format!("header must start with x-, as the host passes no other: {lower}"));
        }
        if !config.column.starts_with("replica.") {
            return Err(format!("column must be one of replicas, as in replica.variant: {}", config.column));
        }
        let equals = config.equals.parse().unwrap_or_else(|_| label(&config.equals));
        Ok(Self { config, equals, header: format!("header.{lower}") })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!().wants([&self.config.column, &self.header])
    }
}

impl Router for Canary {
    fn route(&mut self, _now: Micros, request: &Request, replicas: &Replicas) -> Choice {
        let wanted = self.is_canary(request);
        let side = |row: u32| {
            let value = replicas.extra.first().and_then(|column| column.get(row as usize));
            (value == Some(&self.equals)) == wanted
        };
        let in_service = replicas.rows().filter(Replica::in_service);
        // Its own side first; between equals the request's bits decide.
        let best =
            in_service.min_by_key(|r| (!side(r.row), r.health, r.work(0, SEQUENCE_TOKENS), mix(request.seed, r.key)));
        best.map_or(Choice::Abstain, |replica| Choice::Pick(replica.row))
    }
}

impl Canary {
    fn is_canary(&self, request: &Request) -> bool {
        if let Some((_, value)) = request.attributes.iter().find(|(name, _)| *name == self.header) {
            return *value == self.config.value;
        }
        let whom = if request.session == 0 { request.seed } else { request.session };
        // The salt keeps these draws apart from those of placement.
        mix(whom, 0x6361_6e61_7279) % 1_000 < u64::from(self.config.share_permille)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::NO_LABEL;
    use pointsman_plugin::testing::{self, replica};

    /// The row that a request gets; `variants` are those of the replicas.
    fn route(config: &str, request: &Request, variants: &[u64], rows: &[Replica]) -> Choice {
        let mut router: Canary = testing::start(config).expect("a valid configuration");
        let columns = Replicas { extra: vec![variants.to_vec()], ..testing::replicas(rows.iter().copied()) };
        router.route(1, request, &columns)
    }

    fn with_header(value: &str) -> Request {
        Request { attributes: vec![("header.x-canary".into(), value.into())], ..testing::request() }
    }

    #[test]
    fn the_header_decides_and_the_least_work_within_a_side() {
        let queued = |id, queued_tokens| Replica { queued_tokens, ..replica(id) };
        let rows = [queued(1, 900), queued(2, 0), queued(3, 300), queued(4, 100)];
        let variants = [1, 1, 2, 2];
        for (config, request, expect) in [
            ("", testing::request(), 1),
            ("", with_header("1"), 3),
            ("", with_header("0"), 1),
            (r#"{"share_permille": 1000}"#, testing::request(), 3),
            (r#"{"share_permille": 1000}"#, with_header("0"), 1),
            (r#"{"equals": "1"}"#, with_header("1"), 1),
        ] {
            assert_eq!(route(config, &request, &variants, &rows), Choice::Pick(expect), "{config} {request:?}");
        }
    }

    #[test]
    fn a_text_stands_for_its_hash() {
        let config = r#"{"column": "replica.label.track", "equals": "canary"}"#;
        let labels = [NO_LABEL, label("canary")];
        for (request, expect) in [(with_header("1"), 1), (testing::request(), 0)] {
            assert_eq!(route(config, &request, &labels, &[replica(1), replica(2)]), Choice::Pick(expect));
        }
    }

    #[test]
    fn a_side_without_replicas_is_served_by_the_other() {
        let drained = Replica { weight: 0, ..replica(2) };
        for (request, variants, rows, expect) in [
            (with_header("1"), [1, 1], [replica(1), drained], Choice::Pick(0)),
            (testing::request(), [2, 2], [replica(1), drained], Choice::Pick(0)),
            (with_header("1"), [1, 2], [replica(1), drained], Choice::Pick(0)),
            (with_header("1"), [1, 2], [drained, drained], Choice::Abstain),
        ] {
            assert_eq!(route("", &request, &variants, &rows), expect, "{request:?} {variants:?}");
        }
    }

    #[test]
    fn a_share_is_a_share_of_sessions_and_only_grows() {
        let rows = [replica(1), replica(2)];
        let on_canary = |permille: u32, session| {
            let config = format!(r#"{{"share_permille": {permille}}}"#);
            route(&config, &Request { session, ..testing::request() }, &[1, 2], &rows) == Choice::Pick(1)
        };
        let mut n = 0;
        for session in 1..=4_000 {
            let at_ten = on_canary(100, session);
            assert!(on_canary(125, session) || !at_ten, "{session} went back");
            n += u32::from(at_ten);
        }
        assert!((340..=460).contains(&n), "{n}");
    }

    #[test]
    fn nonsense_is_refused_and_the_manifest_asks_for_what_it_reads() {
        for (config, part) in [
            (r#"{"share_permille": 1001}"#, "share_permille"),
            (r#"{"header": "cookie"}"#, "cookie"),
            (r#"{"column": "price"}"#, "price"),
        ] {
            let error = testing::start::<Canary>(config).expect_err(config);
            assert!(error.contains(part), "{error}");
        }
        let router: Canary = testing::start(r#"{"header": "X-Plan"}"#).expect("a valid configuration");
        assert_eq!(router.manifest().wants, ["replica.variant", "header.x-plan"]);
    }
}
