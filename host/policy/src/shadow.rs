//! A candidate that is asked and never obeyed: a share of what the active policy decides is put to it too, on a thread of its
//! own, and its answers are compared.
//!
//! A serving thread pays one relaxed load while nothing is shadowed, and a copy of the inputs for a decision of the share;
//! where the candidate is behind, not even that: the decision is dropped and counted. It is not asked in place, once the
//! active policy has answered, because then every request would wait for a policy that nobody has trusted yet.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pointsman_sched::route::Choice;

use crate::generation::Generation;
use crate::instance::Hook;
use crate::runtime::Shared;

/// Places of decisions that the shadow may be behind.
const QUEUE: usize = 256;
/// Ids in a copy for which it takes one place more: the queue holds the ids of 256 such copies and of one other, however long.
const IDS_A_PLACE: usize = 1_024;
/// The last calls whose time, and the last answers whose words, are kept.
const KEPT: usize = 1_024;
/// Most kinds of difference that a hook tells apart.
const MAX_KINDS: usize = 8;
/// A share of everything.
const WHOLE_PPM: u32 = 1_000_000;

/// What a shadow's answers have come to since it was staged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    /// Answers that come to the same as the active policy's.
    pub agreed: u64,
    /// Answers that do not, by kind; every kind of the slot is there.
    pub differed: Vec<(&'static str, u64)>,
    /// Decisions without an answer: it faulted, or its circuit was open.
    pub unanswered: u64,
    /// Decisions of the share that were not put to it, because it was behind.
    pub dropped: u64,
    /// Median time of its last 1,024 answered calls, in nanoseconds; 0 of none.
    pub call_p50_ns: u64,
    /// The 99th percentile of the same.
    pub call_p99_ns: u64,
}

/// A shadow as serving threads hold it. When the last of them lets go, its thread ends.
pub(crate) struct Shadow<H: Hook> {
    pub(crate) case: Arc<Case<H>>,
    queue: SyncSender<Copied<H>>,
}

/// What is put to a shadow.
struct Copied<H: Hook> {
    sample: H::Sample,
    places: usize,
}

/// What serving threads and the shadow's thread share.
pub(crate) struct Case<H: Hook> {
    pub(crate) candidate: Arc<Generation<H>>,
    /// Of a million decisions; 0 while nothing is to be asked.
    share_ppm: Arc<AtomicU32>,
    /// Places that are taken.
    pending: AtomicUsize,
    dropped: AtomicU64,
    /// The shadow's thread writes, a report reads.
    tally: Mutex<Tally>,
}

/// How an answer compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It comes to the same.
    Agrees,
    /// It does not: a place in [`Hook::DIFFERENCES`].
    Differs(usize),
    /// There is none.
    NoAnswer,
}

#[derive(Debug, Default)]
struct Tally {
    agreed: u64,
    differed: [u64; MAX_KINDS],
    unanswered: u64,
    call_ns: VecDeque<u64>,
    /// By request; of routers only.
    answers: VecDeque<(u64, Choice)>,
}

// === impl Shadow ===

impl<H: Hook> Shadow<H> {
    const FEW_KINDS: () = assert!(H::DIFFERENCES.len() <= MAX_KINDS);

    /// Starts the thread.
    pub(crate) fn hire(
        shared: &Shared,
        candidate: &Arc<Generation<H>>,
        share_ppm: &Arc<AtomicU32>,
    ) -> std::io::Result<Self> {
        let () = Self::FEW_KINDS;
        let case = Arc::new(Case {
            candidate: Arc::clone(candidate),
            share_ppm: Arc::clone(share_ppm),
            pending: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            tally: Mutex::default(),
        });
        let (asked, mut memory) = (Arc::clone(&case), H::Memory::default());
        let queue = shared.hire("policy-shadow", QUEUE, move |copied| asked.take(&mut memory, copied))?;
        Ok(Self { case, queue })
    }

    /// Puts a decision to the candidate, whose copy has about so many ids. Where that is behind, nothing is copied: false, and
    /// the decision is counted.
    pub(crate) fn put(&self, n_ids: usize, sample: impl FnOnce() -> H::Sample) -> bool {
        let places = 1 + n_ids / IDS_A_PLACE;
        // Counted before it is sent, so that there is room for whatever is copied.
        let fits = self.case.pending.fetch_add(places, Ordering::Relaxed) < QUEUE;
        let put = fits && self.queue.try_send(Copied { sample: sample(), places }).is_ok();
        if !put {
            self.case.pending.fetch_sub(places, Ordering::Relaxed);
            self.case.drop_one();
        }
        put
    }
}

// === impl Case ===

impl<H: Hook> Case<H> {
    /// Whether a decision is one of the share. Multiples of the golden ratio are spread evenly, and in step with nothing.
    pub(crate) fn samples(&self, number: u64) -> bool {
        let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let ppm = (u128::from(place) * u128::from(WHOLE_PPM)) >> 64;
        ppm < u128::from(self.share_ppm())
    }

    fn take(&self, memory: &mut H::Memory, Copied { sample, places }: Copied<H>) {
        self.pending.fetch_sub(places, Ordering::Relaxed);
        // It has ended, or is paused, since this was sent; what came before says nothing any more of what comes after.
        if self.share_ppm() == 0 {
            *memory = H::Memory::default();
            return self.drop_one();
        }
        H::shadow(self, memory, sample);
    }

    /// Of a million decisions, so many are to be put to it.
    pub(crate) fn share_ppm(&self) -> u32 {
        self.share_ppm.load(Ordering::Relaxed)
    }

    /// Whether half of the queue is free: enough to begin again after a gap.
    pub(crate) fn is_at_leisure(&self) -> bool {
        self.pending.load(Ordering::Relaxed) <= QUEUE / 2
    }

    /// Counts a decision that was not put to it.
    pub(crate) fn drop_one(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an answer, which took so long.
    pub(crate) fn judged(&self, verdict: Verdict, took_ns: u64) {
        let mut tally = self.tally();
        match verdict {
            Verdict::Agrees => tally.agreed += 1,
            Verdict::Differs(kind) => tally.differed[kind.min(MAX_KINDS - 1)] += 1,
            Verdict::NoAnswer => {
                tally.unanswered += 1;
                return;
            }
        }
        keep(&mut tally.call_ns, took_ns);
    }

    /// Keeps an answer for whoever asks about the request.
    pub(crate) fn keep(&self, request: u64, choice: Choice) {
        keep(&mut self.tally().answers, (request, choice));
    }

    /// What it said of a request, if that is one of the last.
    pub(crate) fn answer_to(&self, request: u64) -> Option<Choice> {
        let tally = self.tally();
        let mut newest = tally.answers.iter().rev();
        newest.find(|(asked, _)| *asked == request).map(|(_, choice)| choice.clone())
    }

    pub(crate) fn compared(&self) -> Compared {
        let tally = self.tally();
        let mut times: Vec<u64> = tally.call_ns.iter().copied().collect();
        times.sort_unstable();
        let at = |percent: usize| times.get((times.len() * percent).div_ceil(100).saturating_sub(1)).copied();
        Compared {
            agreed: tally.agreed,
            differed: H::DIFFERENCES.iter().copied().zip(tally.differed).collect(),
            unanswered: tally.unanswered,
            dropped: self.dropped.load(Ordering::Relaxed),
            call_p50_ns: at(50).unwrap_or(0),
            call_p99_ns: at(99).unwrap_or(0),
        }
    }
}

/// Adds to a list of the last ones.
fn keep<T>(last: &mut VecDeque<T>, one: T) {
    if last.len() == KEPT {
        last.pop_front();
    }
    last.push_back(one);
}
