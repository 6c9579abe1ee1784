//! A candidate that is asked and never obeyed: a share of what the active policy decides is put to it too, on a thread of its
//! own, and its answers are compared.
//!
//! A serving thread pays one relaxed load while nothing is shadowed, and a copy of the inputs for a decision of the share;
//! where the candidate is behind, not even that: the decision is dropped and counted. It is not asked in place, once the
//! active policy has answered, because then every request would wait for a policy that nobody has trusted yet.

use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pointsman_telemetry::Micros;

use crate::fault::Call;
use crate::generation::{Generation, Guest, Renewed};
use crate::instance::{Hook, Instance};
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

/// What a shadow's answers have come to since it was staged. Of `kv-retention` blocks are compared and of `sampler` tokens, of
/// the other slots decisions.
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
    /// It is taken back or promoted: what still waits is nobody's.
    is_over: AtomicBool,
    /// The shadow's thread writes, a report reads.
    tally: Mutex<Tally<H::Answer>>,
}

/// A shadow's instance that follows a replica, or all of them.
pub(crate) struct Post<H: Hook> {
    generation: Arc<Generation<H>>,
    replica: Arc<str>,
    instance: Kept<H>,
    /// It follows all replicas: whoever is promoted with its instance has no use for it in their places.
    is_common: bool,
}

/// The place of an instance.
type Kept<H> = Option<Box<Instance<H>>>;

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

#[derive(Debug)]
struct Tally<A> {
    agreed: u64,
    differed: [u64; MAX_KINDS],
    unanswered: u64,
    call_ns: VecDeque<u64>,
    /// By request; of slots that are asked once about each.
    answers: VecDeque<(u64, A)>,
}

impl<A> Default for Tally<A> {
    fn default() -> Self {
        let (call_ns, answers) = (VecDeque::new(), VecDeque::new());
        Self { agreed: 0, differed: [0; MAX_KINDS], unanswered: 0, call_ns, answers }
    }
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
            is_over: AtomicBool::new(false),
            tally: Mutex::default(),
        });
        let (asked, mut memory) = (Arc::clone(&case), H::Memory::default());
        let queue = shared.hire("policy-shadow", QUEUE, move |copied| asked.take(&mut memory, copied))?;
        Ok(Self { case, queue })
    }

    /// Puts a decision to the candidate, whose copy has about so many ids. Where that is behind, nothing is copied: false, and
    /// the decision is counted.
    pub(crate) fn put(&self, n_ids: usize, sample: impl FnOnce() -> H::Sample) -> bool {
        let put = self.offer(n_ids, sample);
        if !put {
            self.case.drop_some(1);
        }
        put
    }

    /// As [`put`](Self::put), where nothing is lost by what does not fit, or the caller counts it.
    pub(crate) fn offer(&self, n_ids: usize, sample: impl FnOnce() -> H::Sample) -> bool {
        let places = 1 + n_ids / IDS_A_PLACE;
        // Counted before it is sent, so that there is room for whatever is copied.
        let fits = self.case.pending.fetch_add(places, Ordering::Relaxed) < QUEUE;
        let put = fits && self.queue.try_send(Copied { sample: sample(), places }).is_ok();
        if !put {
            self.case.pending.fetch_sub(places, Ordering::Relaxed);
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
        if self.is_over.load(Ordering::Acquire) {
            *memory = H::Memory::default();
        } else if self.share_ppm() == 0 {
            H::shadow_paused(self, memory, sample);
        } else {
            H::shadow(self, memory, sample);
        }
    }

    /// Nothing is put to it any more.
    pub(crate) fn end(&self) {
        self.is_over.store(true, Ordering::Release);
    }

    /// Of a million decisions, so many are to be put to it.
    pub(crate) fn share_ppm(&self) -> u32 {
        self.share_ppm.load(Ordering::Relaxed)
    }

    /// Whether half of the queue is free: enough to begin again after a gap.
    pub(crate) fn is_at_leisure(&self) -> bool {
        self.pending.load(Ordering::Relaxed) <= QUEUE / 2
    }

    /// Counts what was not put to it.
    pub(crate) fn drop_some(&self, n: u64) {
        self.dropped.fetch_add(n, Ordering::Relaxed);
    }

    /// Counts so many decisions that were not put to it, and has it forget what came before them.
    pub(crate) fn skipped(&self, memory: &mut H::Memory, n: u64) {
        *memory = H::Memory::default();
        self.drop_some(n);
    }

    fn tally(&self) -> MutexGuard<'_, Tally<H::Answer>> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts an answer, which took so long.
    pub(crate) fn judged(&self, verdict: Verdict, took_ns: u64) {
        let is_answered = verdict != Verdict::NoAnswer;
        self.judged_each([(verdict, 1)], is_answered.then_some(took_ns));
    }

    /// Counts what answers come to, so many of each kind, and how long they took together.
    pub(crate) fn judged_each(&self, verdicts: impl IntoIterator<Item = (Verdict, u64)>, took_ns: Option<u64>) {
        let mut tally = self.tally();
        for (verdict, n) in verdicts {
            match verdict {
                Verdict::Agrees => tally.agreed += n,
                Verdict::Differs(kind) => tally.differed[kind.min(MAX_KINDS - 1)] += n,
                Verdict::NoAnswer => tally.unanswered += n,
            }
        }
        if let Some(took_ns) = took_ns {
            keep(&mut tally.call_ns, took_ns);
        }
    }

    /// Keeps an answer for whoever asks about the request.
    pub(crate) fn keep(&self, request: u64, answer: H::Answer) {
        keep(&mut self.tally().answers, (request, answer));
    }

    /// What it said of a request, if that is one of the last.
    pub(crate) fn answer_to(&self, request: u64) -> Option<H::Answer> {
        let tally = self.tally();
        let mut newest = tally.answers.iter().rev();
        newest.find(|(asked, _)| *asked == request).map(|(_, answer)| answer.clone())
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

// === impl Post ===

impl<H: Hook> Post<H> {
    /// Its instance is taken when it [is renewed](Self::renew).
    pub(crate) fn new(candidate: &Arc<Generation<H>>, replica: Arc<str>) -> Self {
        Self { generation: Arc::clone(candidate), replica, instance: None, is_common: false }
    }

    /// One that follows all replicas, with the spare instance.
    pub(crate) fn common(candidate: &Arc<Generation<H>>) -> Self {
        let (generation, replica) = (Arc::clone(candidate), "shadow".into());
        Self { generation, replica, instance: None, is_common: true }
    }

    /// Whether the candidate is the native policy, which needs no instance.
    pub(crate) fn is_native(&self) -> bool {
        self.generation.guest.is_none()
    }

    /// Has an instance where there is none, or a fresh one in the place of a worn one.
    pub(crate) fn renew(&mut self, now: Micros) -> Renewed {
        let Self { generation, replica, instance, .. } = self;
        generation.guest.as_ref().map_or(Renewed::Not, |guest| guest.renew(instance, replica, now))
    }

    /// Who is asked, unless it has faulted too often.
    pub(crate) fn parts(&mut self) -> Option<(&Guest<H>, &mut Kept<H>)> {
        let Self { generation, instance, .. } = self;
        let guest = generation.guest.as_ref().filter(|guest| guest.is_closed())?;
        Some((guest, instance))
    }

    /// Its last answer is refused: a fault.
    pub(crate) fn refuse(&mut self, call: (Call, Micros), why: &dyn Display) {
        let Self { generation, replica, instance, .. } = self;
        if let Some(guest) = &generation.guest {
            guest.refused(instance, call, format!("{replica}, as a shadow: {why}"));
        }
    }
}

impl<H: Hook> Drop for Post<H> {
    fn drop(&mut self) {
        // A promoted candidate goes on with its instances.
        if let (Some(guest), Some(instance)) = (&self.generation.guest, self.instance.take()) {
            if self.is_common { guest.give_back(instance) } else { guest.park(&self.replica, instance) }
        }
    }
}
