//! From events to what a period's blocks came to.
//!
//! A request belongs to the block in which it was admitted, whenever it ends: its block chose its place in batch, cache and
//! queue. One that is still running while the other arm serves is counted as crossed; many of those mean that blocks are too
//! short for these requests. One that arrives within the burn-in after a switch belongs to none. A period is complete when
//! all its requests have ended, or after the settling time, when what still runs counts with the time it has had.

use std::collections::{HashMap, HashSet, VecDeque};

use pointsman_telemetry::{Event, EventKind, Micros};
use serde::{Deserialize, Serialize};

use super::assign::Arm;
use super::shadow::Answers;
use super::spec::{Metric, Mode, Spec};
use super::stats::Moments;

/// Requests that are followed at once; more make a period incomplete.
const MAX_OPEN: usize = 65_536;
/// Units of a split that are known again; at the bound all are forgotten, and count once more.
const MAX_UNITS: usize = 65_536;
/// Periods that settle at once; the oldest is closed to make room.
const MAX_WINDOWS: usize = 32;
/// Events may reach the ledger so much later than they happened.
const LAG: Micros = 200_000;
/// Events kept of requests that nobody has announced: threads record on their own, and a fast answer may overtake its
/// admission. The oldest give way.
const EARLY: usize = 256;
/// A block's beginning, until the host has switched to its arm.
const NOT_YET: Micros = Micros::MAX;

/// What the requests of one block came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Sums {
    /// Requests, refused ones included.
    pub offered: u64,
    /// Refused, before or after admission.
    pub rejected: u64,
    /// Ended by a fault of host or device.
    pub failed: u64,
    /// Ended by the client or its deadline.
    pub cancelled: u64,
    /// Ended normally.
    pub finished: u64,
    /// Of those, within both SLOs.
    pub good: u64,
    /// Got a first token.
    pub first_tokens: u64,
    /// Requests whose time to first token is known, or known to be over the SLO.
    pub ttft_n: u64,
    /// Of those, over the SLO.
    pub ttft_over: u64,
    /// Sum of the known times, in microseconds.
    pub ttft_us: u64,
    /// Requests with a mean time between tokens.
    pub itl_n: u64,
    /// Of those, over the SLO.
    pub itl_over: u64,
    /// Sum of those means, in microseconds.
    pub itl_us: u64,
    /// Requests with an end-to-end time: finished, or cut off by the settling time.
    pub e2e_n: u64,
    /// Sum of those times, in microseconds.
    pub e2e_us: u64,
    /// Generated tokens.
    pub tokens: u64,
    /// Prompt tokens.
    pub prompt_tokens: u64,
    /// Of those, expected in the prefix cache of the chosen replica.
    pub cached_tokens: u64,
    /// Ran on while the other arm served.
    pub crossed: u64,
    /// Decided by the other arm's policy, or not served by the variant to which they were assigned.
    pub misplaced: u64,
    /// Had not ended when the period was closed.
    pub late: u64,
}

/// What the blocks of one arm came to in a period.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArmPeriod {
    /// Its blocks.
    pub n_blocks: u64,
    /// Time in which its requests counted; its share of it where requests are split.
    pub exposed_ms: u64,
    /// Mean of its blocks, in millionths, in the order of [`Metric::ALL`]; nothing where no block tells.
    pub harm: [Option<i64>; Metric::ALL.len()],
    /// Sums of its blocks.
    pub sums: Sums,
}

/// One period: the unit in which evidence is taken in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Period {
    /// 0, 1, 2 ... within the rollout.
    pub number: u64,
    /// The candidate's share.
    pub percent: u8,
    /// Its length.
    pub took_ms: u64,
    /// Whether events were lost or a switch was missed: such a period proves nothing.
    pub incomplete: bool,
    /// What happened while control served, or to its share.
    pub control: ArmPeriod,
    /// The same of the candidate.
    pub candidate: ArmPeriod,
    /// Where units are split: those that were seen for the first time. The sum is the candidate's beyond its share, in
    /// thousandths, the squares are the spread that chance gives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub units: Option<Moments>,
    /// How a shadow answered meanwhile; of the other modes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Answers>,
}

/// How requests are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// By the time of their admission; where a request is decided by one call of one policy, its generation tells whether
    /// that was the arm's.
    Time {
        /// Generations of control and candidate, or none to compare.
        generations: Option<[u64; 2]>,
    },
    /// By the variant to which they were assigned, whoever serves them then: numbers of control and candidate. A request that
    /// names its variant was not assigned and belongs to neither.
    Variant([u32; 2]),
}

/// What the ledger made of an event, for metrics per arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Whose request it is.
    pub arm: Arm,
    /// What happened.
    pub what: Outcome,
}

/// What happened to a request of an arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Admitted, with so many prompt tokens, of which so many in the cache.
    Admitted {
        /// Tokens of the prompt.
        prompt_tokens: u32,
        /// Of those, expected in the prefix cache.
        cached_tokens: u32,
    },
    /// Its first token came, so many microseconds after it.
    FirstToken {
        /// Time to first token.
        ttft_us: u64,
    },
    /// Ended normally.
    Finished {
        /// End-to-end time.
        e2e_us: u64,
        /// Mean time between tokens, where there are two.
        itl_us: Option<u64>,
        /// Generated tokens.
        tokens: u64,
        /// Within both SLOs.
        good: bool,
    },
    /// Refused.
    Rejected,
    /// Ended by a fault of host or device.
    Failed,
    /// Ended by the client or a deadline.
    Cancelled,
}

/// Follows the requests of the periods under way.
#[derive(Debug)]
pub(super) struct Ledger {
    split: Split,
    /// Whether periods tell how a shadow has answered.
    shadows: bool,
    ttft_slo_us: u64,
    itl_slo_us: u64,
    burn_in_us: u64,
    block_us: u64,
    settle_us: u64,
    windows: VecDeque<Window>,
    open: HashMap<u64, Open>,
    early: VecDeque<Event>,
    /// Units that have been counted.
    units: HashSet<u64>,
}

#[derive(Debug)]
struct Window {
    number: u64,
    percent: u8,
    start: Micros,
    end: Micros,
    took_us: Micros,
    blocks: Vec<Placed>,
    n_open: usize,
    incomplete: bool,
    units: Moments,
    answers: Answers,
}

#[derive(Debug)]
struct Placed {
    arm: Arm,
    /// Requests count from here on.
    from: Micros,
    until: Micros,
    sums: Sums,
}

/// A request that has not ended.
#[derive(Clone, Copy, Debug)]
struct Open {
    period: u64,
    block: usize,
    arm: Arm,
    admitted: Micros,
    ttft_us: Option<u64>,
}

// === impl Sums ===

impl Sums {
    /// The harm of a block in millionths (of a request, or of 100 s for `e2e-mean`); nothing where no request tells.
    #[must_use]
    pub fn value(&self, metric: Metric) -> Option<i64> {
        let share = |part: u64, whole: u64| {
            (whole > 0).then(|| i64::try_from((u128::from(part) * 1_000_000) / u128::from(whole)).unwrap_or(i64::MAX))
        };
        match metric {
            Metric::ErrorRate => share(self.failed, self.offered),
            Metric::RejectionRate => share(self.rejected, self.offered),
            Metric::TtftOverSlo => share(self.ttft_over, self.ttft_n),
            Metric::ItlOverSlo => share(self.itl_over, self.itl_n),
            Metric::GoodputLoss => share(self.offered - self.good.min(self.offered), self.offered),
            Metric::E2eMean => {
                (self.e2e_n > 0).then(|| i64::try_from(self.e2e_us / self.e2e_n / 100).unwrap_or(i64::MAX))
            }
        }
    }

    /// Adds another block's.
    pub fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.offered, other.offered),
            (&mut self.rejected, other.rejected),
            (&mut self.failed, other.failed),
            (&mut self.cancelled, other.cancelled),
            (&mut self.finished, other.finished),
            (&mut self.good, other.good),
            (&mut self.first_tokens, other.first_tokens),
            (&mut self.ttft_n, other.ttft_n),
            (&mut self.ttft_over, other.ttft_over),
            (&mut self.ttft_us, other.ttft_us),
            (&mut self.itl_n, other.itl_n),
            (&mut self.itl_over, other.itl_over),
            (&mut self.itl_us, other.itl_us),
            (&mut self.e2e_n, other.e2e_n),
            (&mut self.e2e_us, other.e2e_us),
            (&mut self.tokens, other.tokens),
            (&mut self.prompt_tokens, other.prompt_tokens),
            (&mut self.cached_tokens, other.cached_tokens),
            (&mut self.crossed, other.crossed),
            (&mut self.misplaced, other.misplaced),
            (&mut self.late, other.late),
        ];
        for (sum, more) in pairs {
            *sum = sum.saturating_add(more);
        }
    }
}

// === impl Period ===

impl ArmPeriod {
    /// Block means, not the mean of all requests: a busy block must not weigh more, or a share of one block in a hundred would
    /// be compared with what is busiest among the others.
    pub(super) fn of<'a>(exposed_ms: u64, blocks: impl Iterator<Item = &'a Sums> + Clone) -> Self {
        let mean = |metric| {
            let values = blocks.clone().filter_map(|sums| sums.value(metric));
            let (n, sum) = values.fold((0, 0), |(n, sum): (i64, i64), v| (n + 1, sum.saturating_add(v)));
            (n > 0).then(|| sum / n)
        };
        let mut period = Self { harm: Metric::ALL.map(mean), exposed_ms, ..Self::default() };
        for sums in blocks {
            period.n_blocks += 1;
            period.sums.add(sums);
        }
        period
    }
}

// === impl Ledger ===

impl Ledger {
    pub(super) fn new(spec: &Spec, split: Split) -> Self {
        Self {
            split,
            shadows: spec.mode == Mode::Shadow,
            ttft_slo_us: spec.ttft_slo_ms.saturating_mul(1_000),
            itl_slo_us: spec.itl_slo_ms.saturating_mul(1_000),
            burn_in_us: spec.burn_in_ms.saturating_mul(1_000),
            block_us: spec.block_ms.saturating_mul(1_000),
            settle_us: spec.settle_ms.saturating_mul(1_000),
            windows: VecDeque::new(),
            open: HashMap::new(),
            early: VecDeque::with_capacity(EARLY),
            units: HashSet::new(),
        }
    }

    /// Opens a period whose blocks begin at `start`; `serving` is who served until then. Returns its end.
    pub(super) fn begin(&mut self, (number, percent): (u64, u8), start: Micros, arms: &[Arm], serving: Arm) -> Micros {
        let mut before = serving;
        let mut at = start;
        let mut blocks = Vec::with_capacity(arms.len());
        let by_time = matches!(self.split, Split::Time { .. });
        for &arm in arms {
            let from = if by_time && arm != before { NOT_YET } else { at };
            blocks.push(Placed { arm, from, until: at + self.block_us, sums: Sums::default() });
            before = arm;
            if by_time {
                at += self.block_us;
            }
        }
        let end = if by_time { at } else { start + self.block_us };
        if self.windows.len() == MAX_WINDOWS {
            self.windows.front_mut().into_iter().for_each(|oldest| oldest.end = 0);
        }
        let took_us = end - start;
        let (n_open, incomplete, units, answers) = (0, false, Moments::default(), Answers::default());
        let window = Window { number, percent, start, end, took_us, blocks, n_open, incomplete, units, answers };
        self.windows.push_back(window);
        end
    }

    /// The host has switched at `at`: the block that this is begins now, and after the burn-in its requests count.
    pub(super) fn switched(&mut self, at: Micros) {
        let from = at.saturating_add(self.burn_in_us);
        let window = self.windows.iter_mut().find(|w| w.start <= at && at < w.end);
        let block = window.and_then(|w| w.blocks.iter_mut().find(|b| at < b.until));
        block.into_iter().filter(|b| b.from == NOT_YET).for_each(|b| b.from = from);
    }

    /// A shadow has given these answers: they are of the period that was begun last, however long those before it take to
    /// settle. Before the first one they are of none.
    pub(super) fn answered(&mut self, came: &Answers) {
        self.windows.back_mut().into_iter().for_each(|window| window.answers.add(came));
    }

    /// Events were lost, or nobody was there to switch: the periods under way prove nothing.
    pub(super) fn spoil(&mut self) {
        self.windows.iter_mut().for_each(|window| window.incomplete = true);
    }

    /// Forgets the periods under way.
    pub(super) fn clear(&mut self) {
        self.windows.clear();
        self.open.clear();
        self.early.clear();
    }

    /// The oldest period, once it is complete.
    pub(super) fn settled(&mut self, now: Micros) -> Option<Period> {
        let window = self.windows.front()?;
        let ended = window.end.saturating_add(LAG) <= now;
        let complete = ended && (window.n_open == 0 || window.end.saturating_add(self.settle_us) <= now);
        if !complete {
            return None;
        }
        let mut window = self.windows.pop_front()?;
        self.cut_off(&mut window, now);
        let of = |arm| {
            let blocks = window.blocks.iter().filter(move |b| b.arm == arm);
            let exposed_us = match self.split {
                Split::Time { .. } => blocks.clone().map(|b| b.until.saturating_sub(b.from)).sum::<Micros>(),
                Split::Variant(_) if arm == Arm::Candidate => window.took_us * u64::from(window.percent) / 100,
                Split::Variant(_) => window.took_us * u64::from(100 - window.percent) / 100,
            };
            ArmPeriod::of(exposed_us / 1_000, blocks.map(|b| &b.sums))
        };
        Some(Period {
            number: window.number,
            percent: window.percent,
            took_ms: window.took_us / 1_000,
            incomplete: window.incomplete,
            control: of(Arm::Control),
            candidate: of(Arm::Candidate),
            units: matches!(self.split, Split::Variant(_)).then_some(window.units),
            shadow: self.shadows.then_some(window.answers),
        })
    }

    /// Counts what still runs with the time it has had.
    fn cut_off(&mut self, window: &mut Window, now: Micros) {
        let slo = self.ttft_slo_us;
        self.open.retain(|_, open| {
            if open.period != window.number {
                return true;
            }
            let Some(block) = window.blocks.get_mut(open.block) else { return false };
            let had = now.saturating_sub(open.admitted);
            block.sums.late += 1;
            block.sums.e2e_n += 1;
            block.sums.e2e_us += had;
            if open.ttft_us.is_none() && had > slo {
                block.sums.ttft_n += 1;
                block.sums.ttft_over += 1;
            }
            false
        });
    }

    /// Takes an event; tells of each request of an arm what happened to it.
    pub(super) fn note(&mut self, event: &Event, tell: &mut dyn FnMut(Seen)) {
        let seen = match event.kind {
            EventKind::Admitted => self.admitted(event),
            EventKind::Rejected if event.request == 0 => self.refused(event),
            EventKind::Routed
            | EventKind::FirstToken
            | EventKind::Finished
            | EventKind::Failed
            | EventKind::Cancelled
            | EventKind::Rejected => {
                if !self.open.contains_key(&event.request) {
                    if self.early.len() == EARLY {
                        self.early.pop_front();
                    }
                    self.early.push_back(*event);
                    return;
                }
                self.of_request(event)
            }
            EventKind::Preempted | EventKind::Step | EventKind::PolicyFault | EventKind::Swap | EventKind::Device => {
                None
            }
        };
        seen.into_iter().for_each(&mut *tell);
        if event.kind == EventKind::Admitted && seen.is_some() {
            while let Some(i) = self.early.iter().position(|early| early.request == event.request) {
                let Some(early) = self.early.remove(i) else { break };
                self.of_request(&early).into_iter().for_each(&mut *tell);
            }
        }
    }

    /// What becomes of a request that was announced.
    fn of_request(&mut self, event: &Event) -> Option<Seen> {
        match event.kind {
            EventKind::Routed => self.routed(event),
            EventKind::FirstToken => self.first_token(event),
            _ => self.ended(event),
        }
    }

    /// Window and block in which something that happens at `at` counts.
    fn place(&self, event: &Event) -> Option<(usize, usize)> {
        let at = event.at;
        let w = self.windows.iter().position(|w| w.start <= at && at < w.end)?;
        let here = |b: &Placed| match self.split {
            Split::Time { .. } => b.from <= at && at < b.until,
            Split::Variant(variants) => variants[b.arm as usize] == event.assigned,
        };
        Some((w, self.windows[w].blocks.iter().position(here)?))
    }

    fn admitted(&mut self, event: &Event) -> Option<Seen> {
        let (w, block) = self.place(event)?;
        self.count_unit(w, block, event);
        let window = &mut self.windows[w];
        if self.open.len() >= MAX_OPEN {
            window.incomplete = true;
            return None;
        }
        let placed = &mut window.blocks[block];
        let (prompt_tokens, cached_tokens) = (event.prompt_tokens, event.cached_tokens);
        placed.sums.offered += 1;
        let elsewhere = matches!(self.split, Split::Variant(_)) && event.variant != event.assigned;
        placed.sums.misplaced += u64::from(elsewhere);
        placed.sums.prompt_tokens += u64::from(prompt_tokens);
        placed.sums.cached_tokens += u64::from(cached_tokens);
        let (period, arm) = (window.number, placed.arm);
        window.n_open += 1;
        self.open.insert(event.request, Open { period, block, arm, admitted: event.at, ttft_us: None });
        Some(Seen { arm, what: Outcome::Admitted { prompt_tokens, cached_tokens } })
    }

    /// Was it decided by the policy whose block it is? The native policy (generation 0) may stand in for either.
    fn routed(&mut self, event: &Event) -> Option<Seen> {
        let Split::Time { generations: Some(generations) } = self.split else { return None };
        let open = *self.open.get(&event.request)?;
        if event.generation != 0 && event.generation != generations[open.arm as usize] {
            self.sums(&open)?.misplaced += 1;
        }
        None
    }

    fn first_token(&mut self, event: &Event) -> Option<Seen> {
        let open = self.open.get_mut(&event.request)?;
        open.ttft_us = Some(event.a);
        let open = *open;
        let over = event.a > self.ttft_slo_us;
        let sums = self.sums(&open)?;
        sums.first_tokens += 1;
        sums.ttft_n += 1;
        sums.ttft_over += u64::from(over);
        sums.ttft_us = sums.ttft_us.saturating_add(event.a);
        Some(Seen { arm: open.arm, what: Outcome::FirstToken { ttft_us: event.a } })
    }

    /// Refused before a replica was chosen: it belongs to whoever serves, or to the arm to which it was assigned.
    fn refused(&mut self, event: &Event) -> Option<Seen> {
        let (w, block) = self.place(event)?;
        self.count_unit(w, block, event);
        let placed = &mut self.windows[w].blocks[block];
        placed.sums.offered += 1;
        placed.sums.rejected += 1;
        Some(Seen { arm: placed.arm, what: Outcome::Rejected })
    }

    /// Where units are split, one that was not seen yet: it is the candidate's or not, against the candidate's share.
    fn count_unit(&mut self, w: usize, block: usize, event: &Event) {
        if matches!(self.split, Split::Time { .. }) {
            return;
        }
        if self.units.len() >= MAX_UNITS {
            self.units.clear();
        }
        let window = &mut self.windows[w];
        if self.units.insert(event.unit) {
            let percent = i64::from(window.percent);
            let mine = i64::from(window.blocks[block].arm == Arm::Candidate);
            let one = Moments { n: 1, sum: mine * 1_000 - percent * 10, squares: percent * (100 - percent) * 100 };
            window.units.merge(&one);
        }
    }

    fn ended(&mut self, event: &Event) -> Option<Seen> {
        let open = self.open.remove(&event.request)?;
        let crossed = self.serving(event.at).is_some_and(|arm| arm != open.arm);
        let (ttft_slo, itl_slo) = (self.ttft_slo_us, self.itl_slo_us);
        let window = self.windows.iter_mut().find(|w| w.number == open.period)?;
        window.n_open = window.n_open.saturating_sub(1);
        let sums = &mut window.blocks.get_mut(open.block)?.sums;
        sums.crossed += u64::from(crossed);
        let never = open.ttft_us.is_none();
        let what = match event.kind {
            EventKind::Finished => {
                return Some(Seen { arm: open.arm, what: sums.finish(event, &open, [ttft_slo, itl_slo]) });
            }
            EventKind::Failed => {
                sums.failed += 1;
                Outcome::Failed
            }
            EventKind::Rejected => {
                sums.rejected += 1;
                Outcome::Rejected
            }
            _ => {
                sums.cancelled += 1;
                Outcome::Cancelled
            }
        };
        // One that the client gave up before the SLO says nothing about the first token.
        let gave_up = what == Outcome::Cancelled && event.at.saturating_sub(open.admitted) <= ttft_slo;
        if never && !gave_up {
            sums.ttft_n += 1;
            sums.ttft_over += 1;
        }
        Some(Seen { arm: open.arm, what })
    }

    /// Who serves at a time, where that is one arm.
    fn serving(&self, at: Micros) -> Option<Arm> {
        if !matches!(self.split, Split::Time { .. }) {
            return None;
        }
        let window = self.windows.iter().find(|w| w.start <= at && at < w.end)?;
        window.blocks.iter().find(|b| at < b.until).map(|b| b.arm)
    }

    fn sums(&mut self, open: &Open) -> Option<&mut Sums> {
        let window = self.windows.iter_mut().find(|w| w.number == open.period)?;
        window.blocks.get_mut(open.block).map(|b| &mut b.sums)
    }
}

impl Sums {
    fn finish(&mut self, event: &Event, open: &Open, [ttft_slo, itl_slo]: [u64; 2]) -> Outcome {
        let (e2e_us, tokens) = (event.a, event.b);
        self.finished += 1;
        self.tokens = self.tokens.saturating_add(tokens);
        self.e2e_n += 1;
        self.e2e_us = self.e2e_us.saturating_add(e2e_us);
        let itl_us = open.ttft_us.filter(|_| tokens >= 2).map(|ttft| e2e_us.saturating_sub(ttft) / (tokens - 1));
        if let Some(itl) = itl_us {
            self.itl_n += 1;
            self.itl_over += u64::from(itl > itl_slo);
            self.itl_us = self.itl_us.saturating_add(itl);
        }
        let good = open.ttft_us.is_none_or(|t| t <= ttft_slo) && itl_us.is_none_or(|i| i <= itl_slo);
        self.good += u64::from(good);
        Outcome::Finished { e2e_us, itl_us, tokens, good }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000;

    fn ledger(split: Split) -> Ledger {
        let spec = Spec {
            block_ms: 1_000,
            burn_in_ms: 100,
            settle_ms: 2_000,
            ttft_slo_ms: 50,
            itl_slo_ms: 10,
            ..Spec::of(Mode::Switchback, 1)
        };
        Ledger::new(&spec, split)
    }

    fn event(at_ms: u64, kind: EventKind, request: u64, (a, b): (u64, u64)) -> Event {
        Event { request, a, b, prompt_tokens: 10, cached_tokens: 4, ..Event::new(at_ms * MS, kind) }
    }

    #[test]
    fn a_request_belongs_to_the_block_of_its_admission() {
        use EventKind::{Admitted, Cancelled, Failed, Finished, FirstToken, Rejected, Routed};
        let mut ledger = ledger(Split::Time { generations: Some([1, 2]) });
        let end = ledger.begin((0, 50), 0, &[Arm::Control, Arm::Candidate], Arm::Control);
        assert_eq!(end, 2_000 * MS);
        ledger.switched(1_020 * MS);
        for e in [
            event(10, Admitted, 1, (10, 5)),
            Event { generation: 1, ..event(10, Routed, 1, (0, 0)) },
            event(20, FirstToken, 1, (10 * MS, 0)),
            event(60, Finished, 1, (50 * MS, 5)), // good: 10 ms to the first token, 10 between
            event(100, Rejected, 0, (0, 0)),
            event(900, Admitted, 2, (10, 5)),
            event(960, FirstToken, 2, (60 * MS, 0)),
            event(1_500, Finished, 2, (600 * MS, 5)), // crosses into the candidate's block, over both SLOs
            event(1_110, Admitted, 3, (10, 5)),       // within the burn-in of the late switch
            event(1_200, Admitted, 4, (10, 5)),
            Event { generation: 1, ..event(1_200, Routed, 4, (0, 0)) }, // by the wrong policy
            event(1_300, Failed, 4, (100 * MS, 0)),
            event(1_400, Admitted, 5, (10, 5)),
            event(1_410, Cancelled, 5, (10 * MS, 0)),
            event(1_900, Admitted, 6, (10, 5)), // never ends
        ] {
            ledger.note(&e, &mut |_| {});
        }
        assert!(ledger.settled(end + LAG).is_none(), "one is still running");
        let period = ledger.settled(end + 2_000 * MS).expect("settled");
        let (control, candidate) = (&period.control, &period.candidate);
        let expect = Sums {
            offered: 3,
            rejected: 1,
            finished: 2,
            good: 1,
            first_tokens: 2,
            ttft_n: 2,
            ttft_over: 1,
            ttft_us: 70 * MS,
            itl_n: 2,
            itl_over: 1,
            itl_us: 145 * MS,
            e2e_n: 2,
            e2e_us: 650 * MS,
            tokens: 10,
            prompt_tokens: 20,
            cached_tokens: 8,
            crossed: 1,
            ..Sums::default()
        };
        assert_eq!(control.sums, expect);
        let sums = &candidate.sums;
        assert_eq!([sums.offered, sums.failed, sums.cancelled, sums.late, sums.misplaced], [3, 1, 1, 1, 1]);
        assert_eq!([sums.ttft_n, sums.ttft_over], [2, 2], "the failed and the endless one, not the one given up early");
        assert_eq!(
            [(control.n_blocks, control.exposed_ms), (candidate.n_blocks, candidate.exposed_ms)],
            [(1, 1_000), (1, 880)]
        );
        assert_eq!(control.harm[Metric::GoodputLoss as usize], Some(666_666));
        assert_eq!(Sums::default().value(Metric::ErrorRate), None, "no request, no value");
    }

    #[test]
    fn an_answer_that_overtakes_its_admission_counts_and_a_block_begins_with_its_switch() {
        let mut ledger = ledger(Split::Time { generations: None });
        let end = ledger.begin((0, 50), 0, &[Arm::Candidate, Arm::Control], Arm::Control);
        let mut told = Vec::new();
        for e in [
            event(5, EventKind::Admitted, 1, (1, 1)), // control still serves
            event(6, EventKind::Finished, 1, (MS, 1)),
        ] {
            ledger.note(&e, &mut |seen| told.push(seen));
        }
        assert_eq!(told, []);
        ledger.switched(10 * MS);
        for e in [
            event(212, EventKind::FirstToken, 2, (2 * MS, 0)),
            event(213, EventKind::Finished, 2, (3 * MS, 2)),
            event(211, EventKind::Admitted, 2, (1, 1)),
        ] {
            ledger.note(&e, &mut |seen| told.push(seen));
        }
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told.iter().all(|seen| seen.arm == Arm::Candidate));
        let period = ledger.settled(end + LAG).expect("all ended");
        let candidate = &period.candidate;
        assert_eq!([candidate.sums.offered, candidate.sums.first_tokens, candidate.sums.finished], [1; 3]);
        assert_eq!([candidate.exposed_ms, period.control.exposed_ms], [890, 0], "the host never switched back");
    }

    #[test]
    fn lost_events_spoil_the_periods_under_way() {
        for lost in [false, true] {
            let mut ledger = ledger(Split::Time { generations: None });
            let end = ledger.begin((0, 50), 0, &[Arm::Control, Arm::Candidate], Arm::Control);
            if lost {
                ledger.spoil();
            }
            assert_eq!(ledger.settled(end + LAG).expect("nothing runs").incomplete, lost);
        }
    }

    #[test]
    fn a_split_by_variants_follows_the_variant() {
        let mut ledger = ledger(Split::Variant([7, 8]));
        let end = ledger.begin((0, 50), 0, &[Arm::Control, Arm::Candidate], Arm::Control);
        assert_eq!(end, 1_000 * MS);
        // One unit asks twice; 4 goes to a third variant, 5 names its variant itself, 6 is served by the other arm.
        for (request, assigned, variant, unit) in
            [(1, 7, 7, 71), (2, 8, 8, 81), (3, 8, 8, 81), (4, 9, 9, 91), (5, 0, 8, 0), (6, 8, 7, 82)]
        {
            let admitted = event(5, EventKind::Admitted, request, (1, 1));
            ledger.note(&Event { assigned, variant, unit, ..admitted }, &mut |_| {});
            ledger.note(&event(20, EventKind::Failed, request, (1, 1)), &mut |_| {});
        }
        let refused = event(30, EventKind::Rejected, 0, (0, 0));
        ledger.note(&Event { assigned: 7, unit: 72, ..refused }, &mut |_| {});
        ledger.note(&refused, &mut |_| {});
        let period = ledger.settled(end + LAG).expect("all ended");
        let (control, candidate) = (&period.control.sums, &period.candidate.sums);
        assert_eq!([control.offered, control.rejected, control.misplaced], [2, 1, 0]);
        assert_eq!([candidate.offered, candidate.failed, candidate.misplaced], [3, 3, 1]);
        assert_eq!(period.units, Some(Moments { n: 4, sum: 0, squares: 1_000_000 }), "two of four, once each");
    }
}
