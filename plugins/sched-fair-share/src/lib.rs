//! Scheduler: tenants share a replica by the tokens that it computes for them, whatever they send.
//!
//! The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a
//! counter of the tokens computed for it, a generated one counting `output_cost` and a prompt one that was not cached 1,
//! divided by the tenant's weight. A free place goes to the waiting tenant with the smallest counter, and there to the
//! request that arrived first. So a flood waits behind its own counter, and a tenant that sends little is served at once.
//!
//! A tenant that comes back to the queue is lifted to the smallest counter of those who wait (with an empty queue, to that
//! of the tenant that left it last): being idle earns no credit to be spent on a burst. Counters are bounds on service, not
//! clocks, so nothing has to be estimated; what a request generates is counted as it happens. Unlike shares per class or
//! rate limits this wastes nothing: a tenant that is alone gets everything, but for `spare_places` places in the batch.
//!
//! A light tenant, one that runs less than half of its share of the places, should not feel the flood at all. The spare
//! places are kept for it, so that it need not wait for somebody else's answer to end; and while it is being prefilled, the
//! prefills of the others pause, as long as it has not had more than they: steps are short then, and its first token does
//! not wait for their prompts.
//!
//! When memory is short the newest request of the tenant with the largest counter goes first. With `max_waiting`, a longer
//! queue refuses the newest requests of the tenant that has most of them: a flood's overflow then costs the flood, not
//! whoever comes next. A swap hands the counters over; after a fault or a restart they start at 0. A step costs
//! O((changes + running) * log n).
//!
//! Configuration: `weights` ({}: shares by tenant name, 1000 where not named), `output_cost` (2), `spare_places` (2; at most
//! an eighth of the places), `max_waiting` (0: the host's own limit). Keep `max_waiting` below the host's `sched.max_waiting`.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use pointsman_plugin::{Budgets, Changes, Handover, HostInfo, Manifest, Micros, Plan, Policy, RequestId, Rest};
use pointsman_plugin::{Scheduler, Sequence, View};
use serde::Deserialize;

/// What the operator may set.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    weights: BTreeMap<String, u32>,
    output_cost: u32,
    spare_places: u32,
    max_waiting: u32,
}

/// The policy.
#[derive(Debug)]
pub struct FairShare {
    config: Config,
    /// By number; the host gives at most a thousand.
    tenants: BTreeMap<u32, Tenant>,
    requests: BTreeMap<RequestId, Known>,
    /// Tenants with waiting requests, smallest counter first.
    line: BTreeSet<(u64, u64)>,
    /// Running requests without a token yet, by the tenant whose they are.
    prefilling: BTreeSet<(u64, RequestId)>,
    /// Counter of the tenant that left the line last.
    left_at: u64,
    n_running: u32,
    n_waiting: usize,
}

/// What is known of a tenant.
#[derive(Debug)]
struct Tenant {
    weight: u32,
    counter: u64,
    waiting: BTreeSet<(Micros, RequestId)>,
    running: BTreeSet<(Micros, RequestId)>,
    /// Of the counter, what was charged for prompts that have no token yet.
    under_way: u64,
}

/// What is known of a request.
#[derive(Clone, Copy, Debug)]
struct Known {
    tenant: u32,
    arrived: Micros,
    /// Prompt tokens still to be charged, at its first admission.
    prompt: u32,
    /// What was charged for them, until its first token.
    under_way: u64,
    generated: u32,
    runs: bool,
}

/// What makes a tenant a light one: places in the batch, and the weights of all who have requests.
#[derive(Clone, Copy, Debug)]
struct Light {
    places: u32,
    weights: u64,
}

pointsman_plugin::scheduler!(FairShare);
pointsman_plugin::handover!(FairShare);

/// Weight of a tenant that the configuration does not name.
const NORMAL_WEIGHT: u32 = 1_000;
/// Units of a counter per token at the normal weight, so that a division by a weight loses nothing that matters.
const PRECISION: u64 = 1_000;

impl Default for Config {
    fn default() -> Self {
        Self { weights: BTreeMap::new(), output_cost: 2, spare_places: 2, max_waiting: 0 }
    }
}

impl Default for Tenant {
    fn default() -> Self {
        Self { weight: NORMAL_WEIGHT, counter: 0, waiting: BTreeSet::new(), running: BTreeSet::new(), under_way: 0 }
    }
}

impl Policy for FairShare {
    type Config = Config;

    fn init(config: Config, _host: &HostInfo) -> Result<Self, String> {
        if let Some((name, _)) = config.weights.iter().find(|(_, weight)| **weight == 0) {
            return Err(format!("the weight of {name} is 0; a tenant needs at least 1 to be served at all"));
        }
        Ok(Self {
            config,
            tenants: BTreeMap::new(),
            requests: BTreeMap::new(),
            line: BTreeSet::new(),
            prefilling: BTreeSet::new(),
            left_at: 0,
            n_running: 0,
            n_waiting: 0,
        })
    }

    fn manifest(&self) -> Manifest {
        pointsman_plugin::manifest!().wants(["progress"])
    }
}

impl Scheduler for FairShare {
    fn resync(&mut self, view: &View) {
        // Counters stay: only the requests are told again.
        self.requests.clear();
        self.line.clear();
        self.prefilling.clear();
        (self.n_running, self.n_waiting) = (0, 0);
        for tenant in self.tenants.values_mut() {
            tenant.waiting.clear();
            tenant.running.clear();
            tenant.under_way = 0;
        }
        self.meet(&view.tenants);
        // They waited before, so nobody is lifted: the smallest counter of those who wait is one of theirs.
        view.waiting.rows().for_each(|sequence| self.enter(sequence.id, known(&sequence)));
        for sequence in view.running.rows() {
            let known = Known { prompt: 0, generated: sequence.generated_tokens, ..known(&sequence) };
            self.enter(sequence.id, Known { runs: true, ..known });
        }
    }

    fn step(&mut self, _now: Micros, budgets: &Budgets, changes: &Changes) -> Option<Plan> {
        self.apply(changes);
        let drop = self.overflow();
        // Fewer free blocks than running requests: these need them to grow, and nothing can be admitted.
        let is_short = budgets.free_blocks < self.n_running;
        let places = if is_short { 0 } else { budgets.running.saturating_sub(self.n_running) };
        let live = self.tenants.values().filter(|tenant| !(tenant.waiting.is_empty() && tenant.running.is_empty()));
        let light = Light { places: budgets.running, weights: live.map(|tenant| u64::from(tenant.weight)).sum() };
        let (mut admit, reached) = self.pick(places, &light);
        let prefill_id = self.pause(&mut admit, &light);
        let prefill_tokens = vec![0; prefill_id.len()];
        Some(Plan { admit, rest: Rest::Hold, preempt: self.victims(reached), drop, prefill_id, prefill_tokens })
    }
}

/// The counters: `left_at`, then number and counter of each tenant, which has the same number as long as the host runs.
impl Handover for FairShare {
    fn snapshot(&mut self) -> Option<Vec<u8>> {
        let tenants = self.tenants.iter().map(|(number, tenant)| (u64::from(*number), tenant.counter));
        let words = [self.left_at].into_iter().chain(tenants.flat_map(|(number, counter)| [number, counter]));
        Some(words.flat_map(u64::to_le_bytes).collect())
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), String> {
        let bad = || format!("{} bytes are no counters of tenants", bytes.len());
        let (words, rest) = bytes.as_chunks::<8>();
        let (left_at, tenants) = words.split_first().ok_or_else(bad)?;
        let (tenants, odd) = tenants.as_chunks::<2>();
        if !rest.is_empty() || !odd.is_empty() {
            return Err(bad());
        }
        for [number, counter] in tenants {
            let number = u32::try_from(u64::from_le_bytes(*number)).map_err(|_| bad())?;
            self.tenants.entry(number).or_default().counter = u64::from_le_bytes(*counter);
        }
        self.left_at = u64::from_le_bytes(*left_at);
        Ok(())
    }
}

fn known(sequence: &Sequence) -> Known {
    Known {
        tenant: sequence.tenant,
        arrived: sequence.arrived,
        prompt: sequence.prefill_left(),
        under_way: 0,
        generated: sequence.generated_tokens,
        runs: false,
    }
}

impl Light {
    /// Whether a tenant that runs so many has less than half of its share of the places.
    fn is(&self, tenant: &Tenant, n_running: usize) -> bool {
        2 * n_running as u64 * self.weights < u64::from(self.places) * u64::from(tenant.weight)
    }
}

impl FairShare {
    /// Weights come with the names.
    fn meet(&mut self, names: &[(u32, String)]) {
        for (number, name) in names {
            let weight = self.config.weights.get(name).copied().unwrap_or(NORMAL_WEIGHT);
            self.tenants.entry(*number).or_default().weight = weight;
        }
    }

    fn apply(&mut self, changes: &Changes) {
        self.meet(&changes.new_tenants);
        for id in &changes.gone {
            self.leave(*id);
        }
        for id in &changes.preempted {
            if let Some(known) = self.leave(*id) {
                self.enter(*id, Known { runs: false, ..known });
            }
        }
        changes.arrived.rows().for_each(|sequence| self.arrive(&sequence));
        for id in &changes.admitted {
            if let Some(known) = self.leave(*id) {
                let charged = self.charge(known.tenant, u64::from(known.prompt));
                self.enter(*id, Known { prompt: 0, under_way: known.under_way + charged, runs: true, ..known });
            }
        }
        for (id, generated) in changes.progress_id.iter().zip(&changes.progress_generated) {
            let Some(known) = self.requests.get_mut(id) else { continue };
            let tokens = generated.saturating_sub(std::mem::replace(&mut known.generated, *generated));
            let number = known.tenant;
            if tokens > 0 {
                if self.prefilling.remove(&(number.into(), *id)) {
                    let under_way = std::mem::take(&mut known.under_way);
                    self.tenants.entry(number).or_default().under_way -= under_way;
                }
                self.charge(number, u64::from(tokens) * u64::from(self.config.output_cost));
            }
        }
    }

    /// A new request; its tenant gets no credit for the time without one.
    fn arrive(&mut self, sequence: &Sequence) {
        let floor = self.line.first().map_or(self.left_at, |(counter, _)| *counter);
        let tenant = self.tenants.entry(sequence.tenant).or_default();
        if tenant.waiting.is_empty() {
            tenant.counter = tenant.counter.max(floor);
        }
        self.enter(sequence.id, known(sequence));
    }

    fn enter(&mut self, id: RequestId, known: Known) {
        let tenant = self.tenants.entry(known.tenant).or_default();
        if known.runs {
            self.n_running += 1;
            tenant.running.insert((known.arrived, id));
            if known.generated == 0 {
                tenant.under_way += known.under_way;
                self.prefilling.insert((known.tenant.into(), id));
            }
        } else {
            self.n_waiting += 1;
            tenant.waiting.insert((known.arrived, id));
            self.line.insert((tenant.counter, known.tenant.into()));
        }
        self.requests.insert(id, known);
    }

    fn leave(&mut self, id: RequestId) -> Option<Known> {
        let known = self.requests.remove(&id)?;
        let tenant = self.tenants.entry(known.tenant).or_default();
        if known.runs {
            self.n_running -= 1;
            tenant.running.remove(&(known.arrived, id));
            if self.prefilling.remove(&(known.tenant.into(), id)) {
                tenant.under_way -= known.under_way;
            }
        } else {
            self.n_waiting -= 1;
            tenant.waiting.remove(&(known.arrived, id));
            if tenant.waiting.is_empty() {
                self.line.remove(&(tenant.counter, known.tenant.into()));
                self.left_at = tenant.counter;
            }
        }
        Some(known)
    }

    /// Adds to a counter, and says how much.
    fn charge(&mut self, number: u32, tokens: u64) -> u64 {
        let tenant = self.tenants.entry(number).or_default();
        let (before, price) = (tenant.counter, price(tokens, tenant.weight));
        tenant.counter += price;
        if self.line.remove(&(before, number.into())) {
            self.line.insert((tenant.counter, number.into()));
        }
        price
    }

    /// Waiting requests for the free places, and the largest counter that one of them was picked at.
    fn pick(&self, places: u32, light: &Light) -> (Vec<RequestId>, u64) {
        let spare = self.config.spare_places.min(light.places / 8) as usize;
        // Each place goes to one of so many tenants at most: the rest of the line need not be looked at.
        let first = self.line.iter().take(places as usize);
        let tenants = first.filter_map(|&(_, number)| self.tenants.get(&u32::try_from(number).ok()?));
        let mut queues: Vec<_> = tenants.map(|tenant| (tenant, tenant.waiting.iter(), tenant.running.len())).collect();
        let mut heap: BinaryHeap<(Reverse<u64>, Reverse<usize>)> =
            queues.iter().enumerate().map(|(at, (tenant, ..))| (Reverse(tenant.counter), Reverse(at))).collect();
        let (mut admit, mut reached) = (Vec::new(), 0);
        while admit.len() < places as usize {
            let Some((Reverse(counter), Reverse(at))) = heap.pop() else { break };
            let (tenant, waiting, n_running) = &mut queues[at];
            if places as usize - admit.len() <= spare && !light.is(tenant, *n_running) {
                continue;
            }
            let Some((_, id)) = waiting.next() else { continue };
            admit.push(*id);
            *n_running += 1;
            reached = counter;
            let prompt = self.requests.get(id).map_or(0, |known| known.prompt);
            heap.push((Reverse(counter + price(prompt.into(), tenant.weight)), Reverse(at)));
        }
        (admit, reached)
    }

    /// Takes out of `admit`, and returns of those that run, the prefills that pause for those of light tenants.
    fn pause(&self, admit: &mut Vec<RequestId>, light: &Light) -> Vec<RequestId> {
        let admitted = |id: &RequestId| self.requests.get(id).and_then(|known| self.tenants.get(&known.tenant));
        let running = |(number, _): &(u64, RequestId)| self.tenants.get(&u32::try_from(*number).ok()?);
        let all = self.prefilling.iter().filter_map(running).chain(admit.iter().filter_map(admitted));
        let level = all.filter(|tenant| light.is(tenant, tenant.running.len())).map(|t| t.counter - t.under_way).min();
        let Some(level) = level else { return Vec::new() };
        let pauses = |tenant: &Tenant| !light.is(tenant, tenant.running.len()) && tenant.counter >= level;
        admit.retain(|id| !admitted(id).is_some_and(pauses));
        self.prefilling.iter().filter(|entry| running(entry).is_some_and(pauses)).map(|(_, id)| *id).collect()
    }

    /// Running requests in the order in which they may be put back: only tenants that have had more than those admitted now.
    fn victims(&self, reached: u64) -> Vec<RequestId> {
        let mut tenants: Vec<_> =
            self.tenants.values().filter(|t| !t.running.is_empty() && t.counter > reached).collect();
        tenants.sort_unstable_by_key(|tenant| Reverse(tenant.counter));
        tenants.into_iter().flat_map(|tenant| tenant.running.iter().rev().map(|(_, id)| *id)).collect()
    }

    /// Waiting requests beyond `max_waiting`, newest first of the tenant with most of them.
    fn overflow(&self) -> Vec<RequestId> {
        let limit = self.config.max_waiting as usize;
        if limit == 0 || self.n_waiting <= limit {
            return Vec::new();
        }
        let excess = self.n_waiting - limit;
        let mut queues: Vec<_> = self.tenants.values().map(|t| (t.waiting.len(), t.waiting.iter().rev())).collect();
        let newest = |_| {
            let (len, queue) = queues.iter_mut().max_by_key(|(len, _)| *len)?;
            *len = len.saturating_sub(1);
            queue.next().map(|(_, id)| *id)
        };
        (0..excess).map_while(newest).collect()
    }
}

/// What `tokens` add to a counter.
fn price(tokens: u64, weight: u32) -> u64 {
    tokens * PRECISION * u64::from(NORMAL_WEIGHT) / u64::from(weight.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pointsman_plugin::testing::{arrivals, budgets, sequence, start, view};

    fn of(id: u64, tenant: u32) -> Sequence {
        Sequence { tenant, arrived: id, ..sequence(id) }
    }

    /// A replica of `places` places on which every admission is followed and every request generates a token a step and
    /// ends after `n_tokens`. Returns the steps and ids of the admissions.
    fn serve(config: &str, places: u32, arrivals_by_step: &[Vec<Sequence>], n_tokens: u32) -> Vec<(usize, u64)> {
        let mut policy: FairShare = start(config).expect("a valid configuration");
        let mut empty = view(1, places, &[], &[]);
        empty.tenants = vec![(1, "big".into()), (2, "small".into())];
        policy.resync(&empty);
        let (mut order, mut running) = (Vec::new(), BTreeMap::new());
        let mut next = Vec::new();
        for step in 0..400 {
            let progress: Vec<(u64, u32)> = running.iter().map(|(id, n)| (*id, *n)).collect();
            let gone: Vec<u64> = progress.iter().filter(|(_, n)| *n >= n_tokens).map(|(id, _)| *id).collect();
            running.retain(|id, _| !gone.contains(id));
            let changes = Changes {
                gone,
                admitted: std::mem::take(&mut next),
                progress_id: running.keys().copied().collect(),
                progress_generated: running.values().copied().collect(),
                ..arrivals(arrivals_by_step.get(step).cloned().unwrap_or_default())
            };
            let plan = policy.step(1, &budgets(places), &changes).expect("a plan");
            next = plan.admit;
            order.extend(next.iter().map(|id| (step, *id)));
            running.values_mut().for_each(|n| *n += 1);
            running.extend(next.iter().map(|id| (*id, 1)));
            assert!(running.len() <= places as usize);
        }
        assert!(policy.requests.is_empty() && policy.line.is_empty());
        assert_eq!((policy.n_running, policy.n_waiting), (0, 0));
        order
    }

    fn flood(ids: std::ops::Range<u64>, tenant: u32) -> Vec<Sequence> {
        ids.map(|id| of(id, tenant)).collect()
    }

    #[test]
    fn two_floods_share_by_weight() {
        for (config, shares) in [("", 18..=22), (r#"{"weights": {"big": 3000}}"#, 28..=32)] {
            let both: Vec<Sequence> = flood(1..81, 1).into_iter().chain(flood(101..181, 2)).collect();
            let order = serve(config, 4, &[both], 5);
            let first = order[..40].iter().filter(|(_, id)| *id < 100).count();
            assert!(shares.contains(&first), "{config}: {first} of the first 40");
            assert_eq!(order.len(), 160, "nobody is forgotten");
        }
    }

    #[test]
    fn a_light_tenant_goes_before_a_flood_and_has_a_place() {
        let mut by_step = vec![Vec::new(); 100];
        by_step[0] = flood(1..100, 1);
        by_step[15] = flood(900..901, 2);
        let served = |config| serve(config, 16, &by_step, 10).into_iter().find(|(_, id)| *id == 900);
        assert_eq!(served(""), Some((15, 900)), "at once");
        let without = served(r#"{"spare_places": 0}"#).expect("served");
        assert!((16..=20).contains(&without.0), "when the first of the flood's answers ends: {without:?}");
    }

    #[test]
    fn being_idle_earns_no_credit() {
        let mut by_step = vec![Vec::new(); 120];
        by_step[0] = flood(1..121, 1);
        by_step[60] = flood(901..961, 2);
        let order = serve("", 4, &by_step, 5);
        let from = order.iter().position(|(_, id)| *id > 900).expect("served");
        let of_second = order[from..from + 40].iter().filter(|(_, id)| *id > 900).count();
        assert!((18..=22).contains(&of_second), "half of the service from then on, not all of it: {of_second}");
    }

    #[test]
    fn memory_and_a_long_queue_cost_whoever_has_most() {
        let mut policy: FairShare = start(r#"{"max_waiting": 4}"#).expect("a valid configuration");
        policy.resync(&view(1, 4, &[of(20, 2)], &[of(1, 1), of(2, 1), of(3, 2)]));
        let progress = Changes { progress_id: vec![1, 2, 3], progress_generated: vec![9, 9, 4], ..arrivals([]) };
        let plan = policy.step(2, &Budgets { free_blocks: 2, ..budgets(4) }, &progress).expect("a plan");
        assert_eq!((plan.admit, plan.preempt), (vec![], vec![2, 1, 3]), "no room to grow");
        let waiting = arrivals((10..15).map(|id| of(id, 1)));
        let plan = policy.step(3, &budgets(3), &waiting).expect("a plan");
        assert_eq!((plan.admit, plan.drop, plan.preempt), (vec![], vec![14, 13], vec![2, 1, 3]));
        let gone = Changes { gone: vec![14, 13], ..arrivals([]) };
        let plan = policy.step(3, &budgets(4), &gone).expect("a plan");
        assert_eq!((plan.admit, plan.preempt), (vec![20], vec![2, 1]), "never for one that has had more");
    }

    #[test]
    fn counters_go_over_to_a_successor() {
        let mut before: FairShare = start("").expect("a valid configuration");
        before.resync(&view(1, 8, &[], &[of(1, 1), of(2, 2)]));
        let progress = Changes { progress_id: vec![1, 2], progress_generated: vec![50, 7], ..arrivals([]) };
        before.step(2, &budgets(8), &progress);
        let bytes = before.snapshot().expect("counters");
        let mut after: FairShare = start("").expect("a valid configuration");
        after.restore(&bytes).expect("its own layout");
        after.resync(&view(3, 1, &[of(3, 1), of(4, 2)], &[]));
        let plan = after.step(3, &budgets(1), &arrivals([])).expect("a plan");
        assert_eq!(plan.admit, [4], "the one that has had less");
        assert_eq!(after.snapshot(), Some(bytes), "and nothing is lost on the way");
        for bad in [&b""[..], b"1234", &[0; 16], &[0xff; 24]] {
            assert!(after.restore(bad).is_err_and(|words| words.contains("no counters of tenants")), "{bad:?}");
        }
    }

    #[test]
    fn a_first_token_does_not_wait_for_the_prompts_of_others() {
        let mut policy: FairShare = start("").expect("a valid configuration");
        policy.resync(&view(1, 8, &[], &[Sequence { generated_tokens: 5, ..of(1, 1) }, of(2, 1)]));
        let pauses = |plan: Plan| (plan.admit, plan.prefill_id, plan.prefill_tokens);
        let mut step = |changes: Changes| pauses(policy.step(2, &budgets(8), &changes).expect("a plan"));
        assert_eq!(step(arrivals([of(3, 1)])), (vec![3], vec![], vec![]), "alone");
        let admitted = Changes { admitted: vec![3], ..arrivals([of(9, 2), of(4, 1)]) };
        assert_eq!(step(admitted), (vec![9], vec![2, 3], vec![0, 0]), "one that has no token");
        let goes_on = Changes { admitted: vec![9], ..arrivals([of(5, 1)]) };
        assert_eq!(step(goes_on), (vec![], vec![2, 3], vec![0, 0]));
        let token = Changes { progress_id: vec![9], progress_generated: vec![1], ..arrivals([]) };
        assert_eq!(step(token), (vec![4, 5], vec![], vec![]), "and then all go on");
    }

    #[test]
    fn a_weight_of_nothing_is_refused() {
        let error = start::<FairShare>(r#"{"weights": {"acme": 0}}"#).expect_err("never served");
        assert!(error.contains("acme"), "{error}");
    }
}
