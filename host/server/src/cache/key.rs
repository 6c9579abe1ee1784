//! What makes two requests equal: everything that may change an answer, hashed.
//!
//! Each part is taken apart without `..`: a field that is added to a request does not compile until somebody has said here, or
//! in `Params::write_key`, whether it changes what is answered. SHA-256 and not a faster hash, because a client chooses the
//! bytes, and whoever found two requests of one key could read another's answer.

use std::sync::Arc;

use pointsman_sched::request::Sampling;
use pointsman_sched::route::RequestNumbers;
use sha2::{Digest, Sha256};

use crate::dispatch::{Prompt, Target, Terms};
use crate::identity::Caller;
use crate::openai::params::Params;
use crate::ports::{Author, Authors, Replica, Variant};

/// Changes with the meaning of what follows it.
const VERSION: u64 = 1;

/// What stands for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key([u8; 32]);

/// Hashes values one after the other. Texts and lists begin with their length, so that no two sequences are the same bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct KeyWriter(Sha256);

/// A request, as far as its answer depends on it.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) caller: &'a Caller,
    pub(crate) target: &'a Target,
    pub(crate) params: &'a Params,
    pub(crate) prompts: &'a [Prompt],
    /// Of each prompt.
    pub(crate) terms: &'a [Terms],
    /// Of the first choice; the others differ in their seeds alone.
    pub(crate) sampling: &'a Sampling,
    /// The variant to which the weights of an alias assign it.
    pub(crate) assigned: Option<&'a Arc<str>>,
    pub(crate) authors: Authors,
    /// Whether it is left to the router which variant answers.
    pub(crate) is_open: bool,
}

// === impl KeyWriter ===

impl KeyWriter {
    pub(crate) fn number(&mut self, number: u64) {
        self.0.update(number.to_le_bytes());
    }

    pub(crate) fn float(&mut self, number: f32) {
        // The two zeros are one number.
        self.number((number + 0.0).to_bits().into());
    }

    pub(crate) fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    pub(crate) fn maybe(&mut self, number: Option<u64>) {
        self.number(number.is_some().into());
        self.number(number.unwrap_or(0));
    }

    fn tokens(&mut self, tokens: &[u32]) {
        self.number(tokens.len() as u64);
        tokens.iter().for_each(|token| self.0.update(token.to_le_bytes()));
    }

    /// What was hashed by itself.
    pub(crate) fn nested(&mut self, key: &Key) {
        self.0.update(key.0);
    }

    pub(crate) fn key(self) -> Key {
        Key(self.0.finalize().into())
    }
}

// === impl Subject ===

impl Subject<'_> {
    pub(crate) fn key(&self) -> Key {
        let Self { caller, target, params, prompts, terms, sampling, assigned, authors, is_open } = *self;
        let mut key = KeyWriter::default();
        key.number(VERSION);
        write_target(&mut key, target);
        params.write_key(&mut key);
        write_sampling(&mut key, sampling, params.key_seed());
        key.number(prompts.len() as u64);
        for Prompt { tokens, text: _ } in prompts {
            key.tokens(tokens);
        }
        // A router may refuse any request, and chooses among variants where nothing else has.
        let Author { generation: router, mark: _, is_trial: _ } = authors.router;
        let Author { generation: sampler, mark: _, is_trial: _ } = authors.sampler;
        let is_routed = router.is_some() && is_open;
        key.maybe(router);
        key.maybe(sampler);
        key.text(assigned.map_or("", |variant| variant));
        for terms in terms {
            key.number(if router.is_some() { terms.priority as u64 } else { 0 });
            write_terms(&mut key, terms, is_routed);
        }
        write_caller(&mut key, caller, router.is_some() || sampler.is_some());
        key.key()
    }
}

/// A model is known by its loading: whatever is loaded again, even from the same file, has other answers.
fn write_target(key: &mut KeyWriter, Target { name, variants }: &Target) {
    key.text(name);
    key.number(variants.len() as u64);
    for variant in variants {
        let Variant { id, replicas, alias: _, text: _, context_tokens: _, block_tokens: _, draft_model: _, created: _ } =
            &**variant;
        key.text(id);
        key.number(replicas.len() as u64);
        for Replica { id, key: replica, started, .. } in replicas.iter().map(|replica| &**replica) {
            key.number(id.0.into());
            key.number(*replica);
            key.number(*started);
        }
    }
}

fn write_sampling(key: &mut KeyWriter, sampling: &Sampling, seed: Option<u64>) {
    let Sampling {
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        logit_bias,
        // Made up where the request names none.
        seed: _,
        logprobs,
        prompt_logprobs,
    } = sampling;
    for number in [temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty] {
        key.float(*number);
    }
    key.number((*top_k).into());
    // Each token has one: their order means nothing.
    let mut biases = logit_bias.clone();
    biases.sort_unstable_by_key(|(token, _)| *token);
    key.number(biases.len() as u64);
    for (token, bias) in biases {
        key.number(token.into());
        key.float(bias);
    }
    // A greedy answer draws nothing.
    key.maybe(seed.filter(|_| *temperature != 0.0));
    key.maybe(logprobs.map(u64::from));
    key.maybe(prompt_logprobs.map(u64::from));
}

fn write_terms(key: &mut KeyWriter, terms: &Terms, is_routed: bool) {
    let Terms {
        priority: _,
        session,
        arrived,
        deadline,
        max_new_tokens,
        min_new_tokens,
        stop_tokens,
        // Neither a prefix from the cache nor drafts change what is computed.
        cache_prompt: _,
        speculation: _,
        // Of the sampling.
        scores_prompt: _,
        numbers,
    } = terms;
    key.number((*max_new_tokens).into());
    key.number((*min_new_tokens).into());
    key.tokens(stop_tokens);
    if is_routed {
        let RequestNumbers { choices, temperature_ppm, stream, min_new_tokens, cache_prompt } = *numbers;
        let times = [*session, deadline.saturating_sub(*arrived)];
        let seen = [choices, temperature_ppm, stream, min_new_tokens, cache_prompt];
        times.into_iter().chain(seen).for_each(|number| key.number(number));
    }
}

/// Tenants are apart, always. `is_seen` where a policy that may read its headers has a say.
fn write_caller(key: &mut KeyWriter, caller: &Caller, is_seen: bool) {
    let Caller { tenant, attributes, key: _, holder: _, tenant_id: _, session: _, max_priority: _, header_priority: _ } =
        caller;
    key.text(tenant);
    let seen = if is_seen { &**attributes } else { &[] };
    key.number(seen.len() as u64);
    for (name, value) in seen {
        key.text(name);
        key.text(value);
    }
}
