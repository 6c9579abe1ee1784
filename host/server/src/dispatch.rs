//! One prompt's way to a replica: columns from the live gauges, one call of the routing policy, a reservation, the mailbox.
//!
//! Synchronous and without a lock: it runs on the worker that handles the request. The columns are scratch memory of the
//! thread, because a policy call of a microsecond should not pay for thirteen allocations.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::http::header::{HeaderMap, HeaderName, HeaderValue};
use pointsman_sched::ids::{Micros, Priority, ReplicaId, RequestId};
use pointsman_sched::mask::TokenMask;
use pointsman_sched::prefix::salted_hashes;
use pointsman_sched::request::{Request, Sampling, TokenSink};
use pointsman_sched::route::{
    Choice, DecidedBy, ReplicaColumns, RequestNumbers, Resolved, RouteRequest, Routed, UPSTREAM, resolve,
};
use pointsman_telemetry::{Event, EventKind};

use crate::admin::wire::decision::Line;
use crate::error::ApiError;
use crate::identity::{ANONYMOUS, Caller, session_hash};
use crate::openai::speculation::Speculation;
use crate::ports::{Catalog, Encoder, Replica, SubmitError, Variant};
use crate::state::ServerState;
use crate::text::TextModel;
use crate::trace::{Noted, Trace};
use crate::upstream::{Begun, Mishap, Onward, Seat, Upstream};

const REPLICA: HeaderName = HeaderName::from_static("x-pointsman-replica");
const VARIANT: HeaderName = HeaderName::from_static("x-pointsman-variant");
const ROUTER: HeaderName = HeaderName::from_static("x-pointsman-router");

/// What keeps a request from being sent to an upstream, as far as its shape goes.
const NOT_ONWARD: &str = "this request is no conversation, nor a completion of one text, in a form that they would take, or its prompt \
                          is not to be cached";

/// Bytes of the prompt that a router may read as `prompt-head`.
const PROMPT_HEAD: usize = 256;

/// The model that a client named: a variant, or all variants of an alias.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// As the client wrote it.
    pub(crate) name: String,
    /// At least one; they share a tokenizer.
    pub(crate) variants: Vec<Arc<Variant>>,
}

/// A tokenized prompt.
#[derive(Clone, Debug)]
pub(crate) struct Prompt {
    pub(crate) tokens: Arc<[u32]>,
    /// Its text, where the client sent text.
    pub(crate) text: String,
}

/// What the requests of all choices share.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) priority: Priority,
    pub(crate) session: u64,
    pub(crate) arrived: Micros,
    pub(crate) deadline: Micros,
    pub(crate) max_new_tokens: u32,
    pub(crate) min_new_tokens: u32,
    pub(crate) stop_tokens: Arc<[u32]>,
    pub(crate) cache_prompt: bool,
    /// Which drafts it wants.
    pub(crate) speculation: Speculation,
    /// Whether the prompt's own log-probabilities are asked for.
    pub(crate) scores_prompt: bool,
    /// What routers may ask for by name.
    pub(crate) numbers: RequestNumbers,
}

/// One choice of a prompt.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) id: RequestId,
    pub(crate) sampling: Arc<Sampling>,
    /// The first choice of the prompt, for the others.
    pub(crate) fork_of: Option<RequestId>,
    /// What its text may be.
    pub(crate) mask: Option<Box<dyn TokenMask>>,
    pub(crate) sink: Box<dyn TokenSink>,
}

/// Where a request went, and who decided.
#[derive(Clone, Debug)]
pub(crate) struct Placement {
    pub(crate) replica: Arc<Replica>,
    pub(crate) variant: Arc<Variant>,
    /// Its row in what the router saw.
    row: u32,
    /// When its first token is expected; 0 where nobody knows.
    pub(crate) expected: Micros,
    /// Whether another variant might have been meant: that to which it was assigned, or what the router picked, is full.
    pub(crate) strays: bool,
    decided_by: DecidedBy,
}

/// A placement by its names, for whoever outlives it.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    pub(crate) replica: Arc<str>,
    pub(crate) variant: Arc<str>,
    decided_by: DecidedBy,
}

/// One prompt on its way.
#[derive(Debug)]
pub(crate) struct Dispatch<'a> {
    pub(crate) state: &'a ServerState,
    pub(crate) caller: &'a Caller,
    pub(crate) target: &'a Target,
    pub(crate) prompt: &'a Prompt,
    pub(crate) terms: &'a Terms,
    pub(crate) trace: &'a Trace,
    /// Where the weights of its alias want it; none where the router chooses.
    pub(crate) assigned: Option<&'a Assignment>,
    /// Whether an upstream may be offered: the request has a form in which it can be sent there.
    pub(crate) is_onward: bool,
    /// Upstreams that have failed it, or have it.
    pub(crate) without: &'a [ReplicaId],
    /// Whether an upstream has it and is slow: another upstream may have it too, and no replica of this host.
    pub(crate) is_hedge: bool,
}

/// Where the choices of a prompt went.
#[derive(Debug)]
pub(crate) enum Placed {
    /// To replicas of this host, each in turn.
    Here(Vec<Placement>),
    /// All of them to an upstream.
    There(Sent),
}

/// A request that has a place at an upstream.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) placement: Placement,
    pub(crate) seat: Seat,
    /// What the events of what becomes of it have in common.
    pub(crate) event: Event,
}

/// Where one choice went.
#[derive(Debug)]
enum Landed {
    Here(Placement),
    There(Sent),
}

/// The variant to which the weights of its alias assign a request.
#[derive(Clone, Debug)]
pub(crate) struct Assignment {
    pub(crate) variant: Arc<str>,
    /// Its number in the event stream; 0 for one that is not loaded.
    pub(crate) number: u32,
    /// Hash of what stays there.
    pub(crate) unit: u64,
}

/// What the policy said, once for all choices of a prompt.
#[derive(Clone, Copy, Debug)]
struct Decision<'a> {
    routed: &'a Routed,
    /// Breaks the ties of the native order.
    seed: u64,
    call_us: u64,
}

#[derive(Debug, Default)]
struct Scratch {
    columns: ReplicaColumns,
    /// Variant and replica behind each row.
    rows: Vec<(usize, usize)>,
    /// Rows whose mailbox refused.
    refused: Vec<bool>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Chained hashes of a prompt, by block size: variants of an alias may differ in it.
#[derive(Debug)]
struct Hashes<'a> {
    tokens: &'a [u32],
    salt: u64,
    /// Whether its blocks may be found by those of the same salt.
    shared: bool,
    by_block: Vec<(u32, Arc<[u64]>)>,
}

// === impl Target ===

impl Target {
    /// Finds what a client named as its model.
    pub(crate) fn find(catalog: &Catalog, name: &str) -> Result<Self, ApiError> {
        Self::find_as("model", catalog, name)
    }

    /// Finds what a client named in the field `param`.
    pub(crate) fn find_as(param: &'static str, catalog: &Catalog, name: &str) -> Result<Self, ApiError> {
        if catalog.is_empty() {
            return Err(ApiError::Loading);
        }
        let of_alias: Vec<Arc<Variant>> = catalog.variants.iter().filter(|v| *v.alias == *name).cloned().collect();
        let variants = match of_alias.is_empty() {
            false => of_alias,
            true => catalog.variants.iter().filter(|v| *v.id == *name).cloned().collect(),
        };
        if variants.is_empty() && catalog.encoder(name).is_some() {
            let problem = format!("`{name}` makes embeddings and generates no text: use it with /v1/embeddings");
            return Err(ApiError::invalid(param, problem));
        }
        if variants.is_empty() {
            let unloaded = catalog.unloaded().map(|name| format!("`{name}`"));
            let served = catalog.names().into_iter().map(|(name, _)| format!("`{name}`"));
            let known: Vec<String> = served.chain(unloaded).collect();
            return Err(ApiError::UnknownModel { param, name: name.to_owned(), known: known.join(", ") });
        }
        Ok(Self { name: name.to_owned(), variants })
    }

    /// Tokenizer and template; those of a variant that is served here, where there is one.
    pub(crate) fn text(&self) -> &Arc<TextModel> {
        let here = self.variants.iter().find(|variant| !variant.is_upstream());
        &here.unwrap_or(&self.variants[0]).text
    }

    /// The longest context among the variants; among those of this host, where there are some and the request cannot leave it.
    pub(crate) fn context_tokens(&self, is_onward: bool) -> u32 {
        let counts = |variant: &&Arc<Variant>| is_onward || self.is_elsewhere() || !variant.is_upstream();
        self.variants.iter().filter(counts).map(|v| v.context_tokens).max().unwrap_or(0)
    }

    /// What the shortest context leaves behind so many tokens, of those that leave some.
    pub(crate) fn tokens_left(&self, prompt: u32) -> u32 {
        self.variants
            .iter()
            .filter_map(|v| v.context_tokens.checked_sub(prompt).filter(|left| *left > 0))
            .min()
            .unwrap_or(0)
    }

    /// The device that computes whatever is asked of it, where there is but one.
    pub(crate) fn only_device(&self) -> Option<u64> {
        let mut devices = self.variants.iter().flat_map(|variant| &variant.replicas);
        let device = |replica: &Arc<Replica>| replica.upstream.is_none().then_some(replica.device);
        let first = devices.next().and_then(device)?;
        devices.all(|replica| device(replica) == Some(first)).then_some(first)
    }

    /// Whether somebody can say how likely the tokens of a prompt are.
    pub(crate) fn scores_prompts(&self, is_onward: bool) -> bool {
        let mut replicas = self.variants.iter().flat_map(|variant| &variant.replicas);
        replicas.any(|replica| replica.scores_prompts && (is_onward || replica.upstream.is_none()))
    }

    /// Whether the same variants answer to both names.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.variants.iter().map(|v| &v.id).eq(other.variants.iter().map(|v| &v.id))
    }

    /// Whether some of it is served elsewhere.
    pub(crate) fn has_upstreams(&self) -> bool {
        self.variants.iter().any(|variant| variant.is_upstream())
    }

    /// Whether none of it is served here.
    pub(crate) fn is_elsewhere(&self) -> bool {
        self.variants.iter().all(|variant| variant.is_upstream())
    }
}

impl Variant {
    /// Whether upstreams serve it: then all of its replicas are.
    pub(crate) fn is_upstream(&self) -> bool {
        self.replicas.iter().any(|replica| replica.upstream.is_some())
    }
}

impl Catalog {
    /// The replicas that are elsewhere, those of models for embeddings too.
    pub fn upstreams(&self) -> impl Iterator<Item = (&Arc<str>, &Arc<Upstream>)> {
        let replicas = self.variants.iter().flat_map(|variant| &variant.replicas);
        let replicas = replicas.filter_map(|replica| Some((&replica.name, replica.upstream.as_ref()?)));
        let elsewhere = self.encoders.iter().flat_map(|encoder| &encoder.upstreams);
        replicas.chain(elsewhere.map(|elsewhere| (&elsewhere.replica, &elsewhere.upstream)))
    }

    /// Whether an upstream may serve what names this model.
    pub(crate) fn is_onward(&self, name: &str) -> bool {
        self.variants.iter().any(|v| (*v.alias == *name || *v.id == *name) && v.is_upstream())
    }

    /// Whether nothing is served yet, nor would be if somebody asked.
    pub(crate) fn is_empty(&self) -> bool {
        self.variants.is_empty() && self.encoders.is_empty() && self.on_demand.is_empty()
    }

    /// The model that a name needs, if it is loaded on demand: the one of that name, or the one whose variant it is.
    pub(crate) fn demanded(&self, name: &str) -> Option<&Arc<str>> {
        let of = |name: &str| self.on_demand.iter().find(|demanded| ***demanded == *name);
        of(name).or_else(|| of(name.split(':').next()?))
    }

    /// Those that are loaded on demand and not there.
    pub(crate) fn unloaded(&self) -> impl Iterator<Item = &Arc<str>> {
        let is_there = |name: &str| self.variants.iter().any(|variant| self.belongs(variant, name));
        self.on_demand.iter().filter(move |name| !is_there(name) && self.encoder(name).is_none())
    }

    /// Whether a variant is served because this model is there, and not because it is loaded on demand by itself.
    fn belongs(&self, variant: &Variant, model: &str) -> bool {
        if *variant.id == *model { true } else { *variant.alias == *model && !self.on_demand.contains(&variant.id) }
    }

    /// The encoder of this name.
    pub(crate) fn encoder(&self, name: &str) -> Option<&Arc<Encoder>> {
        self.encoders.iter().find(|encoder| *encoder.name == *name)
    }

    /// Aliases in order of first appearance, then variants, each with the variant that stands for it.
    pub(crate) fn names(&self) -> Vec<(&str, &Variant)> {
        let mut names: Vec<(&str, &Variant)> = Vec::new();
        for variant in &self.variants {
            if !names.iter().any(|(name, _)| *name == &*variant.alias) {
                names.push((&variant.alias, variant));
            }
        }
        let ids = self.variants.iter().map(|v| (&*v.id, &**v)).filter(|(id, v)| *id != &*v.alias);
        let ids: Vec<(&str, &Variant)> = ids.collect();
        names.extend(ids);
        names
    }
}

// === impl Placement ===

impl Placement {
    pub(crate) fn origin(&self) -> Origin {
        Origin {
            replica: Arc::clone(&self.replica.name),
            variant: Arc::clone(&self.variant.id),
            decided_by: self.decided_by.clone(),
        }
    }
}

// === impl Origin ===

impl Origin {
    /// Puts the headers of a routed response.
    pub(crate) fn headers(&self, headers: &mut HeaderMap) {
        let router = format!("{};g={}", self.decided_by.revision, self.decided_by.generation);
        for (name, value) in [(REPLICA, &*self.replica), (VARIANT, &*self.variant), (ROUTER, &*router)] {
            if let Ok(value) = HeaderValue::from_str(value) {
                headers.insert(name, value);
            }
        }
    }
}

// === impl Sent ===

impl Sent {
    /// Sends it and waits for the first event of its answer; whoever drops this before closes the connection.
    pub(crate) async fn ask(mut self, onward: &Onward, tag: &str) -> (Self, Result<Begun, Mishap>) {
        let begun = self.seat.ask(onward, tag).await;
        (self, begun)
    }
}

// === impl Dispatch ===

impl Dispatch<'_> {
    /// Routes the prompt once and submits its choices, each to the chosen row or, where that is full, to the next of the
    /// native order. `submitted` hears of every engine request at once, so that a failure half-way cancels the others.
    pub(crate) fn run(
        &self,
        choices: Vec<Submission>,
        mut submitted: impl FnMut(&Placement, RequestId),
    ) -> Result<Placed, ApiError> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut hashes = self.hashes(choices.len());
            let first = choices.first().map_or(RequestId(0), |c| c.id);
            self.offer(scratch, &mut hashes);
            if scratch.rows.is_empty() {
                return Err(self.nobody());
            }
            let attributes = self.attributes();
            let request = self.route_request(&attributes, &mut hashes, first);
            let now = self.state.clock.now();
            let routed = self.state.router.route(now, &request, &scratch.columns);
            let call_us = self.state.clock.now().saturating_sub(now);
            let decision = Decision { routed: &routed, seed: request.seed, call_us };
            let mut placements: Vec<Placement> = Vec::with_capacity(choices.len());
            let mut there = None;
            let mut outcome = match &routed.choice {
                Choice::Reject(rejection) => Err(ApiError::Rejected(rejection.clone())),
                _ => Ok(()),
            };
            for choice in choices {
                if outcome.is_err() || there.is_some() {
                    break;
                }
                let id = choice.id;
                outcome = self.submit(scratch, &mut hashes, &decision, choice).map(|landed| match landed {
                    Landed::Here(placement) => {
                        submitted(&placement, id);
                        placements.push(placement);
                        // The choices of a prompt are not divided between here and elsewhere.
                        self.close_upstreams(scratch);
                    }
                    Landed::There(sent) => there = Some(sent),
                });
            }
            let chosen = placements.first().or(there.as_ref().map(|sent| &sent.placement));
            let chosen = chosen.map(|first| (first.row, first));
            let replicas = &scratch.columns;
            self.note(&Noted { now, request: &request, replicas, routed: &routed, call_us, chosen });
            outcome.map(|()| match there {
                Some(sent) => Placed::There(sent),
                None => Placed::Here(placements),
            })
        })
    }

    /// Leaves the upstreams out of what is still to be placed.
    fn close_upstreams(&self, scratch: &mut Scratch) {
        let Scratch { columns, refused, .. } = scratch;
        refused.iter_mut().zip(&columns.kind).for_each(|(refused, kind)| *refused |= *kind == UPSTREAM);
    }

    /// A tenant finds its own prefixes only, so that nobody can time what others have asked. Choices of a prompt that is not
    /// to be cached find each other's, by a salt that nobody else has, for as long as one of them runs.
    fn hashes(&self, n_choices: usize) -> Hashes<'_> {
        let cached = self.terms.cache_prompt;
        let salt = if cached || n_choices == 1 { prefix_salt(&self.caller.tenant) } else { self.state.clock.random() };
        Hashes { tokens: &self.prompt.tokens, salt, shared: cached || n_choices > 1, by_block: Vec::new() }
    }

    /// Keeps the decision for whoever asks why, and for whoever records.
    fn note(&self, noted: &Noted<'_>) {
        self.trace.decided(noted);
        let tap = &self.state.taps.router;
        if tap.recording() != 0 {
            tap.push(Line::Router(Box::new(noted.line())));
        }
    }

    /// Fills the columns with the replicas of the variant to which the request is assigned; with all of them where it is to
    /// none, or where nobody there can take it (full, drained, a prompt too long).
    fn offer(&self, scratch: &mut Scratch, hashes: &mut Hashes<'_>) {
        if let Some(assigned) = self.assigned {
            self.fill(scratch, hashes, Some(&assigned.variant));
            let weights = &scratch.columns.weight;
            // Somebody there has it already, where this is a hedge.
            if self.is_hedge || scratch.rows.iter().zip(weights).any(|(row, weight)| *weight > 0 && self.has_room(*row))
            {
                return;
            }
        }
        self.fill(scratch, hashes, None);
    }

    fn fill(&self, scratch: &mut Scratch, hashes: &mut Hashes<'_>, only: Option<&str>) {
        let load = |gauge: &std::sync::atomic::AtomicU32| gauge.load(Ordering::Relaxed);
        scratch.columns.clear();
        scratch.rows.clear();
        let c = &mut scratch.columns;
        let now = self.state.clock.now();
        let needed = self.prompt.tokens.len() as u64 + u64::from(self.terms.max_new_tokens);
        let fits = |variant: &&Arc<Variant>| needed <= u64::from(variant.context_tokens);
        let is_meant = |variant: &Variant| only.is_none_or(|only| *variant.id == *only);
        // Some pools may be too small for it, as those of CPUs beside GPUs; where all are, one of them says so.
        let holds = |variant: &Variant, replica: &Replica| {
            // The last token that is generated is never computed.
            let computed = needed - u64::from(self.terms.max_new_tokens.min(1));
            let blocks = computed.div_ceil(u64::from(variant.block_tokens.max(1)));
            replica.upstream.is_some() || blocks <= u64::from(load(&replica.gauges.total_blocks))
        };
        let offered = |replica: &&Arc<Replica>| self.health(replica).is_some();
        let any_holds = |variant: &Arc<Variant>| variant.replicas.iter().filter(offered).any(|r| holds(variant, r));
        let one_holds = self.target.variants.iter().filter(fits).any(any_holds);
        for (v, variant) in self.target.variants.iter().enumerate().filter(|(_, v)| fits(v) && is_meant(v)) {
            for (r, replica) in variant.replicas.iter().enumerate() {
                let Some(health) = self.health(replica) else { continue };
                if one_holds && !holds(variant, replica) {
                    continue;
                }
                let gauges = &replica.gauges;
                c.id.push(replica.id.0);
                c.key.push(replica.key);
                c.health.push(health);
                c.weight.push(load(&replica.weight));
                c.waiting.push(load(&gauges.waiting).saturating_add(load(&gauges.reserved_requests)));
                c.running.push(load(&gauges.running));
                c.running_limit.push(load(&gauges.running_limit));
                c.queued_tokens.push(load(&gauges.queued_tokens).saturating_add(load(&gauges.reserved_tokens)));
                c.free_blocks.push(load(&gauges.free_blocks));
                c.total_blocks.push(load(&gauges.total_blocks));
                c.cached_tokens.push(self.cached_tokens(variant, replica, hashes));
                self.extra(c, replica, now);
                scratch.rows.push((v, r));
            }
        }
        scratch.refused.clear();
        scratch.refused.resize(scratch.rows.len(), false);
    }

    /// What the column `health` says of a replica; none for one that is not offered.
    fn health(&self, replica: &Replica) -> Option<u8> {
        match &replica.upstream {
            _ if self.terms.scores_prompt && !replica.scores_prompts => None,
            None if self.is_hedge || replica.gauges.gone.load(Ordering::Acquire) => None,
            None => Some(replica.health.load(Ordering::Relaxed)),
            Some(upstream) if self.is_onward && !self.without.contains(&replica.id) => upstream.health(),
            Some(_) => None,
        }
    }

    /// Why there is no row.
    fn nobody(&self) -> ApiError {
        let model = self.target.name.clone();
        match self.target.is_elsewhere() && !self.is_onward {
            true => ApiError::NotOnward { model, what: NOT_ONWARD },
            false => ApiError::NoReplica { model },
        }
    }

    /// The named columns of a row whose others are filled already.
    fn extra(&self, c: &mut ReplicaColumns, replica: &Replica, now: Micros) {
        let gauges = &replica.gauges;
        c.device.push(replica.device);
        c.variant.push(replica.variant);
        c.load.push(gauges.busy_ppm.load(Ordering::Relaxed).into());
        c.errors.push(gauges.failed_ppm.load(Ordering::Relaxed).into());
        c.age.push(now.saturating_sub(replica.started));
        c.kind.push(if replica.upstream.is_some() { UPSTREAM } else { 0 });
        let cached = c.cached_tokens.last().copied().unwrap_or(0);
        let queued = c.queued_tokens.last().copied().unwrap_or(0);
        let own = n_tokens(self.prompt).saturating_sub(cached);
        c.predicted_ttft.push(gauges.outlook().first_token(u64::from(queued) + u64::from(own)));
        if c.labels.len() != replica.labels.len() {
            c.labels = replica.labels.iter().map(|(name, _)| (Arc::clone(name), Vec::new())).collect();
        }
        for ((_, column), (_, value)) in c.labels.iter_mut().zip(&*replica.labels) {
            column.push(*value);
        }
    }

    /// Prompt tokens that the replica probably holds; the last one is always computed.
    fn cached_tokens(&self, variant: &Variant, replica: &Replica, hashes: &mut Hashes<'_>) -> u32 {
        if !self.terms.cache_prompt || self.terms.scores_prompt {
            return 0;
        }
        let hits = replica.sketch.leading_hits(hashes.of(variant.block_tokens));
        let tokens = hits.saturating_mul(variant.block_tokens as usize).min(self.prompt.tokens.len().saturating_sub(1));
        u32::try_from(tokens).unwrap_or(u32::MAX)
    }

    /// Texts that a router may ask for.
    fn attributes(&self) -> Vec<(&str, &str)> {
        let Self { caller, prompt, .. } = self;
        let mut attributes: Vec<(&str, &str)> =
            caller.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        if !prompt.text.is_empty() {
            attributes.push(("prompt-head", head(&prompt.text)));
        }
        attributes
    }

    /// The request as routers see it.
    fn route_request<'a>(
        &'a self,
        attributes: &'a [(&'a str, &'a str)],
        hashes: &mut Hashes<'_>,
        id: RequestId,
    ) -> RouteRequest<'a> {
        let Self { state, caller, target, prompt, terms, .. } = self;
        RouteRequest {
            id,
            model: &target.name,
            tenant: &caller.tenant,
            tenant_id: caller.tenant_id,
            session: terms.session,
            prefix: hashes.of(target.variants[0].block_tokens).first().copied().unwrap_or(0),
            priority: terms.priority,
            prompt_tokens: n_tokens(prompt),
            max_new_tokens: terms.max_new_tokens,
            arrived: terms.arrived,
            deadline: terms.deadline,
            seed: state.clock.random(),
            numbers: terms.numbers,
            attributes,
        }
    }

    fn submit(
        &self,
        scratch: &mut Scratch,
        hashes: &mut Hashes<'_>,
        decision: &Decision<'_>,
        choice: Submission,
    ) -> Result<Landed, ApiError> {
        let Decision { routed, seed, call_us } = *decision;
        let Submission { id, sampling, fork_of, mut mask, mut sink } = choice;
        let mut stopped = 0;
        loop {
            let Scratch { columns, rows, refused } = &mut *scratch;
            let has_room = |row: usize| !refused[row] && self.has_room(rows[row]);
            let row = match resolve(&routed.choice, columns, seed, has_room) {
                Resolved::Row(row) => row,
                Resolved::Full if stopped == rows.len() => {
                    return Err(ApiError::NoReplica { model: self.target.name.clone() });
                }
                Resolved::Full => {
                    return Err(ApiError::Saturated {
                        what: format!("the queue of every replica of `{}` is full", self.target.name),
                    });
                }
            };
            let native = !picked(&routed.choice, row);
            let strays = self.strays(routed, native, rows[row]);
            let placement = Placement { strays, ..self.placement(routed, row, rows[row]) };
            if let Some(upstream) = &placement.replica.upstream {
                let Some(seat) = upstream.enter(n_tokens(self.prompt)) else {
                    refused[row] = true;
                    continue;
                };
                let event = self.record(id, &placement, (call_us * 1_000, native), 0);
                return Ok(Landed::There(Sent { placement, seat, event }));
            }
            let choice = Submission { id, sampling: Arc::clone(&sampling), fork_of, mask, sink };
            let request = self.request(hashes, &placement, native, choice);
            let n = n_tokens(self.prompt);
            placement.replica.gauges.reserve(n);
            match self.state.engine.submit(placement.replica.id, request) {
                Ok(()) => {
                    self.record(id, &placement, (call_us * 1_000, native), columns.cached_tokens[row]);
                    let expected = match columns.predicted_ttft[row] {
                        0 => 0,
                        wait => self.state.clock.now().saturating_add(wait),
                    };
                    return Ok(Landed::Here(Placement { expected, ..placement }));
                }
                Err((mut request, error)) => {
                    placement.replica.gauges.release(n);
                    refused[row] = true;
                    stopped += usize::from(error == SubmitError::Stopped);
                    mask = request.mask.take();
                    sink = request.sink;
                }
            }
        }
    }

    /// Whether another variant might have been meant than that of this row.
    fn strays(&self, routed: &Routed, native: bool, (v, _): (usize, usize)) -> bool {
        let is_picked = !native || !matches!(routed.choice, Choice::Pick(_) | Choice::Rank(_));
        let variant = &self.target.variants[v].id;
        let is_meant = self.assigned.map_or(is_picked, |assigned| assigned.variant == *variant);
        self.target.variants.len() > 1 && !is_meant
    }

    fn has_room(&self, (v, r): (usize, usize)) -> bool {
        let replica = &self.target.variants[v].replicas[r];
        if let Some(upstream) = &replica.upstream {
            return upstream.has_room();
        }
        let gauges = &replica.gauges;
        let waiting = gauges.waiting.load(Ordering::Relaxed);
        waiting.saturating_add(gauges.reserved_requests.load(Ordering::Relaxed)) < replica.max_waiting
    }

    fn placement(&self, routed: &Routed, row: usize, (v, r): (usize, usize)) -> Placement {
        let variant = &self.target.variants[v];
        Placement {
            row: u32::try_from(row).unwrap_or(u32::MAX),
            expected: 0,
            strays: false,
            replica: Arc::clone(&variant.replicas[r]),
            variant: Arc::clone(variant),
            decided_by: routed.decided_by.clone(),
        }
    }

    fn request(&self, hashes: &mut Hashes<'_>, placement: &Placement, native: bool, choice: Submission) -> Request {
        let terms = self.terms;
        let block_hashes = match hashes.shared {
            true => Arc::clone(hashes.of(placement.variant.block_tokens)),
            false => Arc::default(),
        };
        Request {
            id: choice.id,
            tenant: self.caller.tenant_id,
            tenant_name: Arc::clone(&self.caller.tenant),
            session: terms.session,
            priority: terms.priority,
            arrived: terms.arrived,
            deadline: terms.deadline,
            prompt: Arc::clone(&self.prompt.tokens),
            block_hashes,
            transient: !terms.cache_prompt,
            // A form says after each token what may come next.
            draft_tokens: if choice.mask.is_some() { 0 } else { terms.speculation.tokens },
            draft_method: terms.speculation.method_on(&placement.variant),
            max_new_tokens: terms.max_new_tokens,
            min_new_tokens: terms.min_new_tokens,
            stop_tokens: Arc::clone(&terms.stop_tokens),
            sampling: choice.sampling,
            attributes: Arc::clone(&self.caller.attributes),
            fork_of: choice.fork_of,
            mask: choice.mask,
            router_generation: if native { 0 } else { placement.decided_by.generation },
            sink: choice.sink,
        }
    }

    fn record(
        &self,
        id: RequestId,
        placement: &Placement,
        (call_ns, native): (u64, bool),
        cached_tokens: u32,
    ) -> Event {
        let at = self.state.clock.now();
        let base = Event {
            request: id.0,
            replica: placement.replica.id.0,
            generation: if native { 0 } else { placement.decided_by.generation },
            tenant: self.caller.tenant_id,
            variant: u32::try_from(placement.replica.variant).unwrap_or(0),
            priority: self.terms.priority as u8,
            prompt_tokens: n_tokens(self.prompt),
            cached_tokens,
            ..Event::new(at, EventKind::Routed)
        };
        let (assigned, unit) = self.assigned.map_or((0, 0), |assigned| (assigned.number, assigned.unit));
        let prompt = self.prompt.tokens.len() as u64;
        // Another try of the same request is no other request.
        if self.without.is_empty() {
            self.state.recorder.record(Event {
                kind: EventKind::Admitted,
                a: prompt,
                b: self.terms.max_new_tokens.into(),
                assigned,
                unit,
                ..base
            });
        }
        self.state.recorder.record(Event { a: call_ns, b: native.into(), ..base });
        base
    }
}

impl Hashes<'_> {
    fn of(&mut self, block_tokens: u32) -> &Arc<[u64]> {
        let known = self.by_block.iter().position(|(block, _)| *block == block_tokens);
        let place = known.unwrap_or_else(|| {
            self.by_block.push((block_tokens, salted_hashes(self.salt, self.tokens, block_tokens).into()));
            self.by_block.len() - 1
        });
        &self.by_block[place].1
    }
}

/// Where a tenant's prefixes begin; those of nobody in particular begin where all hosts' do.
fn prefix_salt(tenant: &str) -> u64 {
    if tenant == ANONYMOUS { 0 } else { session_hash(tenant) }
}

/// Whether the policy itself named the row.
fn picked(choice: &Choice, row: usize) -> bool {
    match choice {
        Choice::Pick(picked) => *picked as usize == row,
        Choice::Rank(rank) => rank.iter().any(|&ranked| ranked as usize == row),
        Choice::Abstain | Choice::Reject(_) => false,
    }
}

fn n_tokens(prompt: &Prompt) -> u32 {
    u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX)
}

fn head(text: &str) -> &str {
    &text[..text.floor_char_boundary(PROMPT_HEAD)]
}

/// Counts a refused request and records it for telemetry guests, and for the variant to which it was assigned by then.
pub(crate) fn record_rejection(
    state: &ServerState,
    caller: &Caller,
    error: &ApiError,
    (prompt_tokens, assigned): (u32, Option<&Assignment>),
) {
    let Some(reason) = error.reason() else { return };
    state.metrics.rejected(reason);
    let number = match reason {
        "queue" => 0,
        "kv" => 1,
        "quota" => 2,
        "deadline" => 3,
        _ => 4,
    };
    state.recorder.record(Event {
        tenant: caller.tenant_id,
        prompt_tokens,
        a: number,
        b: if error.retryable() { error.retry_after_ms().into() } else { 0 },
        assigned: assigned.map_or(0, |assigned| assigned.number),
        unit: assigned.map_or(0, |assigned| assigned.unit),
        ..Event::new(state.clock.now(), EventKind::Rejected)
    });
}
