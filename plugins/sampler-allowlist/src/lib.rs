//! Sampler: a request may say only the tokens of a list; the tokens that end it are always allowed.
//!
//! For classifiers and routers that ask a model to choose between a few words, and for tenants that may have nothing else.
//! The list is one of token ids, because words are not tokens: `POST /tokenize` gives the ids of a text, and a word that
//! follows a space is another token than the same word at the beginning.
//!
//! A mask is the same for every token of a request, so nothing is remembered. Ids that a variant's vocabulary does not have
//! are skipped; a list of which nothing is left does not limit, and says so in the log.
//!
//! Configuration: `allow` ([]: everything), token ids for everybody; `tenants` ({}), lists by tenant that stand in its place,
//! `[]` for no limit.

use std::collections::BTreeMap;

use pointsman_plugin::{Edit, HostInfo, Manifest, Micros, Policy, RequestId, Sampler, Started, log};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    allow: Vec<u32>,
    tenants: BTreeMap<String, Vec<u32>>,
}

/// The policy.
#[derive(Debug)]
pub struct Allowlist {
    config: Config,
}

pointsman_plugin::sampler!(Allowlist);

impl Policy for Allowlist {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        Ok(Self { config })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!()
    }
}

impl Allowlist {
    fn edit(&self, request: &Started) -> Edit {
        let list = self.config.tenants.get(&request.tenant).unwrap_or(&self.config.allow);
        let mut tokens: Vec<u32> = list.iter().copied().filter(|&token| token < request.vocabulary).collect();
        if tokens.is_empty() {
            if !list.is_empty() {
                log::warn(&format!("no allowed token exists in {}: requests are not limited", request.variant));
            }
            return Edit::Leave;
        }
        tokens.extend(request.stop_tokens.iter().filter(|&&token| token < request.vocabulary));
        Edit::Allow(tokens)
    }
}

impl Sampler for Allowlist {
    fn start(&mut self, _now: Micros, requests: &[Started]) -> Vec<Edit> {
        requests.iter().map(|request| self.edit(request)).collect()
    }

    fn next(&mut self, _now: Micros, ids: &[RequestId], _tokens: &[u32]) -> Vec<Edit> {
        vec![Edit::Keep; ids.len()]
    }

    fn ended(&mut self, _ids: &[RequestId]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing;

    #[test]
    fn a_request_gets_the_list_of_its_tenant() {
        for (config, tenant, expect) in [
            ("{}", "default", Edit::Leave),
            (r#"{"allow": [7, 5]}"#, "default", Edit::Allow(vec![7, 5, 2])),
            (r#"{"allow": [7, 1000]}"#, "default", Edit::Allow(vec![7, 2])),
            (r#"{"allow": [1000]}"#, "default", Edit::Leave),
            (r#"{"allow": [7], "tenants": {"free": []}}"#, "free", Edit::Leave),
            (r#"{"allow": [7], "tenants": {"free": []}}"#, "default", Edit::Allow(vec![7, 2])),
            (r#"{"tenants": {"strict": [9]}}"#, "strict", Edit::Allow(vec![9, 2])),
        ] {
            let mut policy: Allowlist = testing::start(config).expect(config);
            let request = Started { tenant: tenant.into(), ..testing::started(1) };
            assert_eq!(policy.start(1, &[request]), [expect], "{config} {tenant}");
        }
        let mut policy: Allowlist = testing::start("{}").expect("a configuration");
        assert_eq!(policy.next(1, &[1, 2], &[7, 7]), [Edit::Keep, Edit::Keep]);
        assert!(testing::start::<Allowlist>(r#"{"allow": [-1]}"#).is_err());
    }
}
